"""A unique index of the consensus log, and indexes for the queries of the repositories."""

from __future__ import annotations

from mesh_storage.schema import migration

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

KEY = "mesh_consensus_log_index_key"
INDEXES = {
    KEY: ("mesh_consensus_log", "index"),
    "nodes_status_node_id_idx": ("nodes", "status, node_id"),
    "nodes_region_id_node_id_idx": ("nodes", "region_id, node_id"),
    "routes_source_node_id_route_id_idx": ("routes", "source_node_id, route_id"),
    "routes_target_node_id_route_id_idx": ("routes", "target_node_id, route_id"),
    "mesh_messages_timestamp_id_idx": ("mesh_messages", "timestamp, id"),
    "mesh_messages_to_node_timestamp_id_idx": ("mesh_messages", "to_node, timestamp, id"),
    "mesh_messages_from_node_timestamp_id_idx": ("mesh_messages", "from_node, timestamp, id"),
    "mesh_messages_from_node_to_node_timestamp_id_idx": ("mesh_messages", "from_node, to_node, timestamp, id"),
    "mesh_state_key_c_idx": ("mesh_state", 'key COLLATE "C"'),
    "mesh_runtime_config_key_c_idx": ("mesh_runtime_config", 'key COLLATE "C"'),
}

# One statement, so that at no time an entry is in neither table or in both. The entry that stays is not rewritten.
SET_ASIDE = """
    WITH stale AS (
        DELETE FROM mesh_consensus_log AS entry
        USING (SELECT index, max(term) AS term FROM mesh_consensus_log GROUP BY index HAVING count(*) > 1) AS newest
        WHERE entry.index = newest.index AND entry.term < newest.term
        RETURNING entry.term, entry.index, entry.entry, entry.created_at
    )
    INSERT INTO mesh_consensus_log_stale (term, index, entry, created_at) SELECT * FROM stale
"""


def upgrade() -> None:
    """Create the indexes concurrently."""
    with migration.beside_traffic():
        for name, (table, columns) in INDEXES.items():
            migration.create_index(name, table, columns, unique=name == KEY, repair=SET_ASIDE if name == KEY else "")


def downgrade() -> None:
    """Drop the indexes concurrently."""
    with migration.beside_traffic():
        for name in reversed(INDEXES):
            migration.drop_index(name)
