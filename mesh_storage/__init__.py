"""The data layer of a distributed mesh service: the public API."""

from mesh_storage.errors import (
    AlreadyExistsError,
    ClosedError,
    ConfigurationError,
    ConflictError,
    InvalidInputError,
    MeshStorageError,
    MissingReferenceError,
    NotFoundError,
    SchemaMismatchError,
    SerializationError,
    StorageTimeoutError,
    UnavailableError,
)
from mesh_storage.health import Health
from mesh_storage.models import (
    JSON,
    ConfigEntry,
    LogEntry,
    Mesh,
    Message,
    Node,
    NodeState,
    Route,
    RoutingEntry,
    StateEntry,
)
from mesh_storage.repositories import Page
from mesh_storage.settings import Settings
from mesh_storage.storage import MeshStorage
from mesh_storage.unit_of_work import UnitOfWork

__version__ = "0.1.0"

__all__ = [
    "JSON",
    "AlreadyExistsError",
    "ClosedError",
    "ConfigEntry",
    "ConfigurationError",
    "ConflictError",
    "Health",
    "InvalidInputError",
    "LogEntry",
    "Mesh",
    "MeshStorage",
    "MeshStorageError",
    "Message",
    "MissingReferenceError",
    "Node",
    "NodeState",
    "NotFoundError",
    "Page",
    "Route",
    "RoutingEntry",
    "SchemaMismatchError",
    "SerializationError",
    "Settings",
    "StateEntry",
    "StorageTimeoutError",
    "UnavailableError",
    "UnitOfWork",
]
