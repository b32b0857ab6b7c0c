"""Validation of the check constraints for existing rows, without blocking traffic."""

from __future__ import annotations

from alembic import op

from mesh_storage.schema import migration

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

NAMES = {
    "mesh": ("mesh_id", "mesh_name", "status"),
    "nodes": ("node_id", "node_name", "ip_address", "port", "status"),
    "routes": ("route_id", "target_node_id", "route_latency", "route_bandwidth", "route_cost", "status"),
    "mesh_messages": ("id", "from_node", "to_node"),
    "mesh_state": ("key",),
    "mesh_node_state": ("node_id",),
    "mesh_consensus_log": ("term", "index"),
    "mesh_routing_table": ("destination",),
    "mesh_runtime_config": ("key",),
}


def upgrade() -> None:
    """Validate the constraints; this locks a table against other migrations only."""
    migration.wait_longer()
    for table, names in NAMES.items():
        validations = ", ".join(f"VALIDATE CONSTRAINT {table}_{name}_check" for name in names)
        op.execute(f"ALTER TABLE {table} {validations}")


def downgrade() -> None:
    """Do nothing: a validated constraint need not be invalidated."""
