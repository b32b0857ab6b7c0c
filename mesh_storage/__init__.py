"""The data layer of a distributed mesh service: the public API."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mesh_storage.cache.cached import Cached
    from mesh_storage.errors import (
        AlreadyExistsError,
        ClosedError,
        CompactedError,
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
    from mesh_storage.health import Health, ReplicaHealth
    from mesh_storage.lease import Lease
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
    from mesh_storage.repositories import Backlog, Batch, Change, Delivery, Page
    from mesh_storage.settings import Settings
    from mesh_storage.storage import MeshStorage
    from mesh_storage.telemetry import Telemetry
    from mesh_storage.unit_of_work import UnitOfWork

__version__ = "0.1.0"

__all__ = [
    "JSON",
    "AlreadyExistsError",
    "Backlog",
    "Batch",
    "Cached",
    "Change",
    "ClosedError",
    "CompactedError",
    "ConfigEntry",
    "ConfigurationError",
    "ConflictError",
    "Delivery",
    "Health",
    "InvalidInputError",
    "Lease",
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
    "ReplicaHealth",
    "Route",
    "RoutingEntry",
    "SchemaMismatchError",
    "SerializationError",
    "Settings",
    "StateEntry",
    "StorageTimeoutError",
    "Telemetry",
    "UnavailableError",
    "UnitOfWork",
]

if not TYPE_CHECKING:  # A checker would take it for a promise of any name.
    _MODULES = (
        "errors",
        "models",
        "repositories",
        "settings",
        "health",
        "telemetry",
        "unit_of_work",
        "lease",
        "storage",
        "schema",
    )

    def __getattr__(name: str) -> object:
        """Import a public name when it is first asked for: `mesh-storage --help` need not wait for all of them."""
        from importlib import import_module

        if name in _MODULES:
            return import_module(f"{__name__}.{name}")
        if name in __all__:
            for module in _MODULES:
                found = vars(import_module(f"{__name__}.{module}"))
                if name in found:
                    globals()[name] = found[name]
                    return found[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """List the public names, those not yet imported as well."""
        return sorted({*globals(), *__all__})
