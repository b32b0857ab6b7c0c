"""The schema of a database: revisions, deployment, and the adoption of databases of the earlier Go service."""

from mesh_storage.schema.deploy import (
    alembic_config,
    check,
    current,
    ensure,
    examine,
    head,
    revisions,
    script_location,
    upgrade,
    upgrade_server,
)
from mesh_storage.schema.distribution import Distribution, distribute
from mesh_storage.schema.roles import grants
from mesh_storage.schema.tables import include_object

__all__ = [
    "Distribution",
    "alembic_config",
    "check",
    "current",
    "distribute",
    "ensure",
    "examine",
    "grants",
    "head",
    "include_object",
    "revisions",
    "script_location",
    "upgrade",
    "upgrade_server",
]
