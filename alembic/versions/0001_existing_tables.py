"""The tables as the earlier Go service made them.

A database that has them is adopted as it is. An empty one gets them, with ids that the library makes: text with the
check that stands in the Go service's domain `ulid`.
"""

from __future__ import annotations

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = (
    """
    CREATE TABLE IF NOT EXISTS mesh (
        mesh_id text PRIMARY KEY CHECK (mesh_id ~ '^[a-z]{2,10}_[0-9A-HJKMNP-TV-Z]{26}$'),
        mesh_name varchar(255) UNIQUE NOT NULL,
        mesh_description text DEFAULT '',
        allow_join boolean DEFAULT false,
        status varchar(255) DEFAULT 'STATUS_PENDING',
        created timestamp DEFAULT CURRENT_TIMESTAMP,
        updated timestamp DEFAULT CURRENT_TIMESTAMP
    )
    """,
    """
    CREATE TABLE IF NOT EXISTS nodes (
        node_id text PRIMARY KEY CHECK (node_id ~ '^[a-z]{2,10}_[0-9A-HJKMNP-TV-Z]{26}$'),
        node_name varchar(255) UNIQUE NOT NULL,
        node_description text DEFAULT '',
        node_platform varchar(255) DEFAULT 'linux-amd64',
        node_version varchar(255) DEFAULT '1.0.0',
        region_id text,
        node_public_key text DEFAULT '',
        ip_address varchar(255) NOT NULL,
        port integer DEFAULT 8443,
        status varchar(255) DEFAULT 'STATUS_PENDING',
        created timestamp DEFAULT CURRENT_TIMESTAMP,
        updated timestamp DEFAULT CURRENT_TIMESTAMP
    )
    """,
    """
    CREATE TABLE IF NOT EXISTS routes (
        route_id text PRIMARY KEY CHECK (route_id ~ '^[a-z]{2,10}_[0-9A-HJKMNP-TV-Z]{26}$'),
        source_node_id text NOT NULL REFERENCES nodes (node_id) ON DELETE CASCADE ON UPDATE CASCADE,
        target_node_id text NOT NULL REFERENCES nodes (node_id) ON DELETE CASCADE ON UPDATE CASCADE,
        route_bidirectional boolean DEFAULT false,
        route_latency decimal DEFAULT 0,
        route_bandwidth decimal DEFAULT 0,
        route_cost integer DEFAULT 100,
        status varchar(255) DEFAULT 'STATUS_PENDING',
        created timestamp DEFAULT CURRENT_TIMESTAMP,
        updated timestamp DEFAULT CURRENT_TIMESTAMP
    )
    """,
    """
    CREATE TABLE IF NOT EXISTS mesh_messages (
        id varchar(64) PRIMARY KEY,
        from_node varchar(64) NOT NULL,
        to_node varchar(64) NOT NULL,
        content bytea NOT NULL,
        timestamp bigint NOT NULL,
        created_at timestamptz DEFAULT CURRENT_TIMESTAMP
    )
    """,
    """
    CREATE TABLE IF NOT EXISTS mesh_state (
        key varchar(255) PRIMARY KEY,
        value bytea NOT NULL,
        created_at timestamptz DEFAULT CURRENT_TIMESTAMP,
        updated_at timestamptz DEFAULT CURRENT_TIMESTAMP
    )
    """,
    """
    CREATE TABLE IF NOT EXISTS mesh_node_state (
        node_id varchar(64) PRIMARY KEY,
        state jsonb NOT NULL,
        created_at timestamptz DEFAULT CURRENT_TIMESTAMP,
        updated_at timestamptz DEFAULT CURRENT_TIMESTAMP
    )
    """,
    """
    CREATE TABLE IF NOT EXISTS mesh_consensus_log (
        term bigint NOT NULL,
        index bigint NOT NULL,
        entry jsonb NOT NULL,
        created_at timestamptz DEFAULT CURRENT_TIMESTAMP,
        PRIMARY KEY (term, index)
    )
    """,
    """
    CREATE TABLE IF NOT EXISTS mesh_routing_table (
        destination varchar(255) PRIMARY KEY,
        route jsonb NOT NULL,
        created_at timestamptz DEFAULT CURRENT_TIMESTAMP,
        updated_at timestamptz DEFAULT CURRENT_TIMESTAMP
    )
    """,
    """
    CREATE TABLE IF NOT EXISTS mesh_runtime_config (
        key varchar(255) PRIMARY KEY,
        value jsonb NOT NULL,
        created_at timestamptz DEFAULT CURRENT_TIMESTAMP,
        updated_at timestamptz DEFAULT CURRENT_TIMESTAMP
    )
    """,
)

NAMES = (
    "routes",
    "nodes",
    "mesh",
    "mesh_messages",
    "mesh_state",
    "mesh_node_state",
    "mesh_consensus_log",
    "mesh_routing_table",
    "mesh_runtime_config",
)

INDEXES = {
    "idx_mesh_messages_timestamp": "mesh_messages (timestamp)",
    "idx_mesh_messages_from_node": "mesh_messages (from_node)",
    "idx_mesh_messages_to_node": "mesh_messages (to_node)",
    "idx_mesh_messages_from_to": "mesh_messages (from_node, to_node)",
    "idx_mesh_state_key": "mesh_state (key)",
    "idx_mesh_node_state_node_id": "mesh_node_state (node_id)",
    "idx_mesh_consensus_log_term": "mesh_consensus_log (term)",
    "idx_mesh_consensus_log_index": "mesh_consensus_log (index)",
    "idx_mesh_consensus_log_term_index": "mesh_consensus_log (term, index)",
    "idx_mesh_routing_table_destination": "mesh_routing_table (destination)",
    "idx_mesh_runtime_config_key": "mesh_runtime_config (key)",
}


def upgrade() -> None:
    """Create what is not there."""
    for table in TABLES:
        op.execute(table)
    for name, columns in INDEXES.items():
        op.execute(f"CREATE INDEX IF NOT EXISTS {name} ON {columns}")


def downgrade() -> None:
    """Drop the tables, but leave them where they are the Go service's own: where ids have its domain."""
    names = [
        "routes",
        "nodes",
        "mesh",
        "mesh_messages",
        "mesh_state",
        "mesh_node_state",
        "mesh_consensus_log",
        "mesh_routing_table",
    ]
    drops = "".join(f"DROP TABLE IF EXISTS {name}; " for name in [*names, "mesh_runtime_config"])
    op.execute(
        "DO $$ BEGIN IF NOT EXISTS (SELECT FROM information_schema.columns WHERE table_schema = current_schema() "
        f"AND table_name = 'mesh' AND column_name = 'mesh_id' AND domain_name = 'ulid') THEN {drops}END IF; END $$"
    )
