"""One repository per aggregate, for asyncio; those of `mesh_storage.repositories` are generated from these."""

from mesh_storage.aio.repositories.changes import AsyncChangeRepository
from mesh_storage.aio.repositories.infrastructure.meshes import AsyncMeshRepository
from mesh_storage.aio.repositories.infrastructure.nodes import AsyncNodeRepository
from mesh_storage.aio.repositories.infrastructure.routes import AsyncRouteRepository
from mesh_storage.aio.repositories.runtime.consensus_log import AsyncConsensusLogRepository
from mesh_storage.aio.repositories.runtime.messages import AsyncMessageRepository
from mesh_storage.aio.repositories.runtime.node_states import AsyncNodeStateRepository
from mesh_storage.aio.repositories.runtime.routing_table import AsyncRoutingTableRepository
from mesh_storage.aio.repositories.runtime.runtime_config import AsyncRuntimeConfigRepository
from mesh_storage.aio.repositories.runtime.state import AsyncStateRepository

__all__ = [
    "AsyncChangeRepository",
    "AsyncConsensusLogRepository",
    "AsyncMeshRepository",
    "AsyncMessageRepository",
    "AsyncNodeRepository",
    "AsyncNodeStateRepository",
    "AsyncRouteRepository",
    "AsyncRoutingTableRepository",
    "AsyncRuntimeConfigRepository",
    "AsyncStateRepository",
]
