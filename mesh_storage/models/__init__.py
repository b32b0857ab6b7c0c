"""The mapped classes, one for each table; importing this package fills the metadata that Alembic compares with."""

from mesh_storage.models.base import JSON, Base, make_late
from mesh_storage.models.infrastructure import Mesh, Node, Route
from mesh_storage.models.runtime import ConfigEntry, LogEntry, Message, NodeState, RoutingEntry, StateEntry

# Past the ORM's own constructor and loading, its mappers must be ready.
Base.registry.configure()
for model in (Mesh, Node, Route, Message, StateEntry, NodeState, LogEntry, RoutingEntry, ConfigEntry):
    make_late(model)

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
