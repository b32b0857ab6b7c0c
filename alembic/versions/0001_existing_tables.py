"""The tables as the earlier Go service made them.

A database that has them is adopted as it is. An empty one gets them, with ids that the library makes: text with the
check that stands in the Go service's domain `ulid`.
"""

from __future__ import annotations

from alembic import op

from mesh_storage.schema import migration

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_AS_IT_IS = "the tables are those of the Go service, which exist; what is better comes in later revisions"
EXCEPTIONS = {
    "prefer-text-field": _AS_IT_IS,
    "prefer-bigint-over-int": _AS_IT_IS,
    "prefer-timestamp-tz": _AS_IT_IS,
}

_ULID = "~ '^[a-z]{2,10}_[0-9A-HJKMNP-TV-Z]{26}$'"
_NODE = "text NOT NULL REFERENCES nodes (node_id) ON DELETE CASCADE ON UPDATE CASCADE"
_STATUS = "varchar(255) DEFAULT 'STATUS_PENDING'"
_TIMESTAMP = "timestamp DEFAULT CURRENT_TIMESTAMP"
_TIMESTAMPTZ = "timestamptz DEFAULT CURRENT_TIMESTAMP"

TABLES = {
    "mesh": {
        "mesh_id": f"text PRIMARY KEY CHECK (mesh_id {_ULID})",
        "mesh_name": "varchar(255) UNIQUE NOT NULL",
        "mesh_description": "text DEFAULT ''",
        "allow_join": "boolean DEFAULT false",
        "status": _STATUS,
        "created": _TIMESTAMP,
        "updated": _TIMESTAMP,
    },
    "nodes": {
        "node_id": f"text PRIMARY KEY CHECK (node_id {_ULID})",
        "node_name": "varchar(255) UNIQUE NOT NULL",
        "node_description": "text DEFAULT ''",
        "node_platform": "varchar(255) DEFAULT 'linux-amd64'",
        "node_version": "varchar(255) DEFAULT '1.0.0'",
        "region_id": "text",
        "node_public_key": "text DEFAULT ''",
        "ip_address": "varchar(255) NOT NULL",
        "port": "integer DEFAULT 8443",
        "status": _STATUS,
        "created": _TIMESTAMP,
        "updated": _TIMESTAMP,
    },
    "routes": {
        "route_id": f"text PRIMARY KEY CHECK (route_id {_ULID})",
        "source_node_id": _NODE,
        "target_node_id": _NODE,
        "route_bidirectional": "boolean DEFAULT false",
        "route_latency": "decimal DEFAULT 0",
        "route_bandwidth": "decimal DEFAULT 0",
        "route_cost": "integer DEFAULT 100",
        "status": _STATUS,
        "created": _TIMESTAMP,
        "updated": _TIMESTAMP,
    },
    "mesh_messages": {
        "id": "varchar(64) PRIMARY KEY",
        "from_node": "varchar(64) NOT NULL",
        "to_node": "varchar(64) NOT NULL",
        "content": "bytea NOT NULL",
        "timestamp": "bigint NOT NULL",
        "created_at": _TIMESTAMPTZ,
    },
    "mesh_state": {
        "key": "varchar(255) PRIMARY KEY",
        "value": "bytea NOT NULL",
        "created_at": _TIMESTAMPTZ,
        "updated_at": _TIMESTAMPTZ,
    },
    "mesh_node_state": {
        "node_id": "varchar(64) PRIMARY KEY",
        "state": "jsonb NOT NULL",
        "created_at": _TIMESTAMPTZ,
        "updated_at": _TIMESTAMPTZ,
    },
    "mesh_consensus_log": {
        "term": "bigint NOT NULL",
        "index": "bigint NOT NULL",
        "entry": "jsonb NOT NULL",
        "created_at": _TIMESTAMPTZ,
        "PRIMARY KEY": "(term, index)",
    },
    "mesh_routing_table": {
        "destination": "varchar(255) PRIMARY KEY",
        "route": "jsonb NOT NULL",
        "created_at": _TIMESTAMPTZ,
        "updated_at": _TIMESTAMPTZ,
    },
    "mesh_runtime_config": {
        "key": "varchar(255) PRIMARY KEY",
        "value": "jsonb NOT NULL",
        "created_at": _TIMESTAMPTZ,
        "updated_at": _TIMESTAMPTZ,
    },
}

INDEXES = {
    "mesh_messages": {
        "idx_mesh_messages_timestamp": "timestamp",
        "idx_mesh_messages_from_node": "from_node",
        "idx_mesh_messages_to_node": "to_node",
        "idx_mesh_messages_from_to": "from_node, to_node",
    },
    "mesh_state": {"idx_mesh_state_key": "key"},
    "mesh_node_state": {"idx_mesh_node_state_node_id": "node_id"},
    "mesh_consensus_log": {
        "idx_mesh_consensus_log_term": "term",
        "idx_mesh_consensus_log_index": "index",
        "idx_mesh_consensus_log_term_index": "term, index",
    },
    "mesh_routing_table": {"idx_mesh_routing_table_destination": "destination"},
    "mesh_runtime_config": {"idx_mesh_runtime_config_key": "key"},
}


def upgrade() -> None:
    """Create the tables that are not there, with their indexes.

    An index that is missing on a table that is there stays so: it could not be made beside the traffic here, and a
    later revision would drop it again.
    """
    migration.hold_nobody_up()
    for table, columns in TABLES.items():
        if _exists(table):
            continue
        listed = ", ".join(f"{name} {definition}" for name, definition in columns.items())
        op.execute(f"CREATE TABLE IF NOT EXISTS {table} ({listed})")
        for index, keys in INDEXES.get(table, {}).items():
            op.execute(f"CREATE INDEX IF NOT EXISTS {index} ON {table} ({keys})")


def downgrade() -> None:
    """Drop the tables, but leave them where they are the Go service's own: where there is its domain for ids."""
    migration.lock(*TABLES)
    if not _is_of_the_go_service():
        migration.announce_lost_grants(*TABLES)
    drops = "".join(f"DROP TABLE IF EXISTS {name}; " for name in reversed(TABLES))
    op.execute(f"DO $$ BEGIN IF to_regtype('ulid') IS NULL THEN {drops}END IF; END $$")


def _is_of_the_go_service() -> bool:
    if op.get_context().as_sql:
        return False
    return op.get_bind().exec_driver_sql("SELECT to_regtype('ulid')").scalar() is not None


def _exists(table: str) -> bool:
    if op.get_context().as_sql:
        return False
    return op.get_bind().exec_driver_sql(f"SELECT to_regclass('{table}')").scalar() is not None
