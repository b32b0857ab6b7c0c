"""The same library for asyncio services, with the names, parameters, results and errors of the sync API."""

from importlib.util import find_spec

if find_spec("greenlet") is None:
    raise ImportError("mesh_storage.aio needs greenlet: install mesh-storage[async]")

from mesh_storage.aio.cache.cached import AsyncCached
from mesh_storage.aio.lease import AsyncLease
from mesh_storage.aio.repositories import (
    AsyncChangeRepository,
    AsyncConsensusLogRepository,
    AsyncMeshRepository,
    AsyncMessageRepository,
    AsyncNodeRepository,
    AsyncNodeStateRepository,
    AsyncRouteRepository,
    AsyncRoutingTableRepository,
    AsyncRuntimeConfigRepository,
    AsyncStateRepository,
)
from mesh_storage.aio.storage import AsyncMeshStorage
from mesh_storage.aio.unit_of_work import AsyncUnitOfWork

__all__ = [
    "AsyncCached",
    "AsyncChangeRepository",
    "AsyncConsensusLogRepository",
    "AsyncLease",
    "AsyncMeshRepository",
    "AsyncMeshStorage",
    "AsyncMessageRepository",
    "AsyncNodeRepository",
    "AsyncNodeStateRepository",
    "AsyncRouteRepository",
    "AsyncRoutingTableRepository",
    "AsyncRuntimeConfigRepository",
    "AsyncStateRepository",
    "AsyncUnitOfWork",
]
