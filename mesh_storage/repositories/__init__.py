"""One repository per aggregate; all SQL is in this package."""

from mesh_storage.repositories.changelog import Batch, Change
from mesh_storage.repositories.changes import ChangeRepository
from mesh_storage.repositories.deliveries import Backlog, Delivery
from mesh_storage.repositories.infrastructure.meshes import MeshRepository
from mesh_storage.repositories.infrastructure.nodes import NodeRepository
from mesh_storage.repositories.infrastructure.routes import RouteRepository
from mesh_storage.repositories.pages import Page
from mesh_storage.repositories.runtime.consensus_log import ConsensusLogRepository
from mesh_storage.repositories.runtime.messages import MessageRepository
from mesh_storage.repositories.runtime.node_states import NodeStateRepository
from mesh_storage.repositories.runtime.routing_table import RoutingTableRepository
from mesh_storage.repositories.runtime.runtime_config import RuntimeConfigRepository
from mesh_storage.repositories.runtime.state import StateRepository

__all__ = [
    "Backlog",
    "Batch",
    "Change",
    "ChangeRepository",
    "ConsensusLogRepository",
    "Delivery",
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
