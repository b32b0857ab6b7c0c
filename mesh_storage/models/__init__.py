"""The mapped classes, one per table; importing this package populates the metadata that Alembic compares."""

from mesh_storage.models.base import JSON, Base, make_late
from mesh_storage.models.deliveries import DELIVERIES, LANES
from mesh_storage.models.infrastructure import Mesh, Node, Route
from mesh_storage.models.runtime import ConfigEntry, LogEntry, Message, NodeState, RoutingEntry, StateEntry

# Entities bypass the ORM's constructor and loading, so the mappers must be configured up front.
Base.registry.configure()
for model in (Mesh, Node, Route, Message, StateEntry, NodeState, LogEntry, RoutingEntry, ConfigEntry):
    make_late(model)

__all__ = [
    "DELIVERIES",
    "JSON",
    "LANES",
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
