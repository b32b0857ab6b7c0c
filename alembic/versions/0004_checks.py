"""The checks, for new rows at first; the next revision validates the rows that are there."""

from __future__ import annotations

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_ULID = "~ '^[a-z]{2,10}_[0-9A-HJKMNP-TV-Z]{26}$'"
_STATUS = "status ~ '^STATUS_[A-Z_]+$'"

CHECKS = {
    "mesh": {"mesh_id": f"mesh_id {_ULID}", "mesh_name": "mesh_name <> ''", "status": _STATUS},
    "nodes": {
        "node_id": f"node_id {_ULID}",
        "node_name": "node_name <> ''",
        "ip_address": "ip_address <> ''",
        "port": "port BETWEEN 1 AND 65535",
        "status": _STATUS,
    },
    "routes": {
        "route_id": f"route_id {_ULID}",
        "target_node_id": "source_node_id <> target_node_id",
        "route_latency": "route_latency >= 0 AND route_latency < 'Infinity'",
        "route_bandwidth": "route_bandwidth >= 0 AND route_bandwidth < 'Infinity'",
        "route_cost": "route_cost >= 0",
        "status": _STATUS,
    },
    "mesh_messages": {"id": "id <> ''", "from_node": "from_node <> ''", "to_node": "to_node <> ''"},
    "mesh_state": {"key": "key <> ''"},
    "mesh_node_state": {"node_id": "node_id <> ''"},
    "mesh_consensus_log": {"term": "term >= 0", "index": "index >= 1"},
    "mesh_routing_table": {"destination": "destination <> ''"},
    "mesh_runtime_config": {"key": "key <> ''"},
}


def upgrade() -> None:
    """Add them; the check of an id may be there from the first revision."""
    for table, checks in CHECKS.items():
        changes = [f"DROP CONSTRAINT IF EXISTS {table}_{name}_check" for name in checks if checks[name].endswith(_ULID)]
        changes += [f"ADD CONSTRAINT {table}_{name}_check CHECK ({rule}) NOT VALID" for name, rule in checks.items()]
        op.execute(f"ALTER TABLE {table} {', '.join(changes)}")


def downgrade() -> None:
    """Drop them, but for those of the ids, which the first revision has."""
    for table, checks in CHECKS.items():
        drops = [f"DROP CONSTRAINT {table}_{name}_check" for name in checks if not checks[name].endswith(_ULID)]
        op.execute(f"ALTER TABLE {table} {', '.join(drops)}")
