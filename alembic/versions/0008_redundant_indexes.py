"""Removal of redundant indexes of the Go service, each of which slows down every write."""

from __future__ import annotations

from mesh_storage.schema import migration

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

INDEXES = {
    "idx_mesh_messages_timestamp": ("mesh_messages", "timestamp"),
    "idx_mesh_messages_from_node": ("mesh_messages", "from_node"),
    "idx_mesh_messages_to_node": ("mesh_messages", "to_node"),
    "idx_mesh_messages_from_to": ("mesh_messages", "from_node, to_node"),
    "idx_mesh_state_key": ("mesh_state", "key"),
    "idx_mesh_node_state_node_id": ("mesh_node_state", "node_id"),
    "idx_mesh_consensus_log_term": ("mesh_consensus_log", "term"),
    "idx_mesh_consensus_log_index": ("mesh_consensus_log", "index"),
    "idx_mesh_consensus_log_term_index": ("mesh_consensus_log", "term, index"),
    "idx_mesh_routing_table_destination": ("mesh_routing_table", "destination"),
    "idx_mesh_runtime_config_key": ("mesh_runtime_config", "key"),
}


def upgrade() -> None:
    """Drop the indexes concurrently."""
    with migration.beside_traffic():
        for name in INDEXES:
            migration.drop_index(name)


def downgrade() -> None:
    """Create the indexes again concurrently."""
    with migration.beside_traffic():
        for name, (table, columns) in INDEXES.items():
            migration.create_index(name, table, columns)
