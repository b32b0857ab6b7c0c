"""One repository for each aggregate: the only place where SQL is."""

from mesh_storage.repositories.base import Page
from mesh_storage.repositories.consensus_log import ConsensusLogRepository
from mesh_storage.repositories.meshes import MeshRepository
from mesh_storage.repositories.messages import MessageRepository
from mesh_storage.repositories.node_states import NodeStateRepository
from mesh_storage.repositories.nodes import NodeRepository
from mesh_storage.repositories.routes import RouteRepository
from mesh_storage.repositories.routing_table import RoutingTableRepository
from mesh_storage.repositories.runtime_config import RuntimeConfigRepository
from mesh_storage.repositories.state import StateRepository

__all__ = [
    "ConsensusLogRepository",
    "MeshRepository",
    "MessageRepository",
    "NodeRepository",
    "NodeStateRepository",
    "Page",
    "RouteRepository",
    "RoutingTableRepository",
    "RuntimeConfigRepository",
    "StateRepository",
]
