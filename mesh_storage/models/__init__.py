"""The mapped classes, one for each table; importing this package fills the metadata that Alembic compares with."""

from sqlalchemy.orm import configure_mappers

from mesh_storage.models.base import JSON, Base
from mesh_storage.models.infrastructure import Mesh, Node, Route
from mesh_storage.models.runtime import ConfigEntry, LogEntry, Message, NodeState, RoutingEntry, StateEntry

# What is loaded past the ORM's own loading needs its mapper ready.
configure_mappers()
for mapper in Base.registry.mappers:
    mapper.class_.be_late()

__all__ = [
    "JSON",
    "Base",
    "ConfigEntry",
    "LogEntry",
    "Mesh",
    "Message",
    "Node",
    "NodeState",
    "Route",
    "RoutingEntry",
    "StateEntry",
]
