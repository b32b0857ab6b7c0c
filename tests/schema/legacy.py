"""A database as the earlier Go service made it: awkward rows, other systems' tables, and the service's statements."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from mesh_storage.schema import changes

Connection = psycopg.Connection[tuple[Any, ...]]

_WITH_PGCRYPTO = "gen_random_bytes(25)"
# The bundled server has no extensions.
_WITHOUT = "uuid_send(gen_random_uuid()) || uuid_send(gen_random_uuid())"

_FOUNDATION = """
CREATE FUNCTION generate_ulid(prefix text) RETURNS text LANGUAGE sql VOLATILE AS $$
    SELECT prefix || '_0' || string_agg(
        substr('0123456789ABCDEFGHJKMNPQRSTVWXYZ', get_byte(bytes, place) % 32 + 1, 1), '' ORDER BY place
    ) FROM (SELECT {random} AS bytes) AS random, generate_series(0, 24) AS place
$$;
CREATE DOMAIN ulid AS text CHECK (VALUE ~ '^[a-z]{{2,10}}_[0-9A-HJKMNP-TV-Z]{{26}}$');
"""

_TABLES = """
CREATE TABLE regions (region_id ulid PRIMARY KEY DEFAULT generate_ulid('region'), region_name text NOT NULL);
CREATE TABLE mesh (
    mesh_id ulid PRIMARY KEY DEFAULT generate_ulid('mesh'),
    mesh_name varchar(255) UNIQUE NOT NULL,
    mesh_description text DEFAULT '',
    allow_join bool DEFAULT false,
    status varchar(255) DEFAULT 'STATUS_PENDING',
    created timestamp DEFAULT CURRENT_TIMESTAMP,
    updated timestamp DEFAULT CURRENT_TIMESTAMP
);
CREATE TABLE nodes (
    node_id ulid PRIMARY KEY DEFAULT generate_ulid('node'),
    node_name varchar(255) UNIQUE NOT NULL,
    node_description text DEFAULT '',
    node_platform varchar(255) DEFAULT 'linux-amd64',
    node_version varchar(255) DEFAULT '1.0.0',
    region_id ulid NULL REFERENCES regions (region_id),
    node_public_key text DEFAULT '',
    ip_address varchar(255) NOT NULL,
    port int DEFAULT 8443,
    status varchar(255) DEFAULT 'STATUS_PENDING',
    created timestamp DEFAULT CURRENT_TIMESTAMP,
    updated timestamp DEFAULT CURRENT_TIMESTAMP
);
CREATE TABLE routes (
    route_id ulid PRIMARY KEY DEFAULT generate_ulid('route'),
    source_node_id ulid NOT NULL REFERENCES nodes (node_id) ON DELETE CASCADE ON UPDATE CASCADE,
    target_node_id ulid NOT NULL REFERENCES nodes (node_id) ON DELETE CASCADE ON UPDATE CASCADE,
    route_bidirectional bool DEFAULT false,
    route_latency decimal DEFAULT 0,
    route_bandwidth decimal DEFAULT 0,
    route_cost int DEFAULT 100,
    status varchar(255) DEFAULT 'STATUS_PENDING',
    created timestamp DEFAULT CURRENT_TIMESTAMP,
    updated timestamp DEFAULT CURRENT_TIMESTAMP
);
CREATE TABLE mesh_messages (
    id varchar(64) PRIMARY KEY,
    from_node varchar(64) NOT NULL,
    to_node varchar(64) NOT NULL,
    content bytea NOT NULL,
    timestamp bigint NOT NULL,
    created_at timestamptz DEFAULT CURRENT_TIMESTAMP
);
CREATE INDEX idx_mesh_messages_timestamp ON mesh_messages (timestamp);
CREATE INDEX idx_mesh_messages_from_node ON mesh_messages (from_node);
CREATE INDEX idx_mesh_messages_to_node ON mesh_messages (to_node);
CREATE INDEX idx_mesh_messages_from_to ON mesh_messages (from_node, to_node);
CREATE TABLE mesh_state (
    key varchar(255) PRIMARY KEY,
    value bytea NOT NULL,
    created_at timestamptz DEFAULT CURRENT_TIMESTAMP,
    updated_at timestamptz DEFAULT CURRENT_TIMESTAMP
);
CREATE INDEX idx_mesh_state_key ON mesh_state (key);
CREATE TABLE mesh_node_state (
    node_id varchar(64) PRIMARY KEY,
    state jsonb NOT NULL,
    created_at timestamptz DEFAULT CURRENT_TIMESTAMP,
    updated_at timestamptz DEFAULT CURRENT_TIMESTAMP
);
CREATE INDEX idx_mesh_node_state_node_id ON mesh_node_state (node_id);
CREATE TABLE mesh_consensus_log (
    term bigint,
    index bigint,
    entry jsonb NOT NULL,
    created_at timestamptz DEFAULT CURRENT_TIMESTAMP,
    PRIMARY KEY (term, index)
);
CREATE INDEX idx_mesh_consensus_log_term ON mesh_consensus_log (term);
CREATE INDEX idx_mesh_consensus_log_index ON mesh_consensus_log (index);
CREATE INDEX idx_mesh_consensus_log_term_index ON mesh_consensus_log (term, index);
CREATE TABLE mesh_routing_table (
    destination varchar(255) PRIMARY KEY,
    route jsonb NOT NULL,
    created_at timestamptz DEFAULT CURRENT_TIMESTAMP,
    updated_at timestamptz DEFAULT CURRENT_TIMESTAMP
);
CREATE INDEX idx_mesh_routing_table_destination ON mesh_routing_table (destination);
CREATE TABLE mesh_runtime_config (
    key varchar(255) PRIMARY KEY,
    value jsonb NOT NULL,
    created_at timestamptz DEFAULT CURRENT_TIMESTAMP,
    updated_at timestamptz DEFAULT CURRENT_TIMESTAMP
);
CREATE INDEX idx_mesh_runtime_config_key ON mesh_runtime_config (key);
"""

_OTHER_SYSTEMS = """
CREATE TABLE billing (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    node_id ulid NOT NULL REFERENCES nodes (node_id) ON DELETE RESTRICT,
    mesh_id ulid REFERENCES mesh (mesh_id) ON UPDATE CASCADE,
    amount decimal CHECK (amount >= 0),
    billed timestamp DEFAULT CURRENT_TIMESTAMP
);
CREATE INDEX billing_by_node ON billing (node_id, billed);
CREATE TABLE inventory (node_id ulid PRIMARY KEY CONSTRAINT theirs REFERENCES nodes DEFERRABLE, note text);
CREATE VIEW node_names AS SELECT node_id, node_name FROM nodes WHERE status IS NOT NULL;
CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.updated = now(); RETURN NEW; END $$;
CREATE TRIGGER touch_mesh BEFORE UPDATE ON mesh FOR EACH ROW EXECUTE FUNCTION touch();
"""

TABLES = (
    "mesh",
    "nodes",
    "routes",
    "mesh_messages",
    "mesh_state",
    "mesh_node_state",
    "mesh_consensus_log",
    "mesh_routing_table",
    "mesh_runtime_config",
)
OTHER_TABLES = ("regions", "billing", "inventory")


def ulid(prefix: str, number: int) -> str:
    return f"{prefix}_01J{number:023}"


def create(connection: Connection) -> None:
    """Make the tables, with pgcrypto where the server has it."""
    available = connection.execute("SELECT FROM pg_available_extensions WHERE name = 'pgcrypto'").fetchone()
    if available is not None:
        connection.execute("CREATE EXTENSION pgcrypto")
    connection.execute(_FOUNDATION.format(random=_WITHOUT if available is None else _WITH_PGCRYPTO).encode())
    connection.execute(_TABLES.encode())
    connection.execute(_OTHER_SYSTEMS.encode())


def fill(connection: Connection) -> None:
    """Store rows that are allowed, and as awkward as that goes."""
    times = [
        "2024-03-31 02:30:00",  # no such time in Berlin
        "2024-10-27 02:30:00.123456",  # twice in Berlin
        "0044-03-15 12:00:00 BC",
        "294276-12-31 23:59:59.999999",
        "infinity",
        "-infinity",
        None,
    ]
    for number, time in enumerate(times):
        connection.execute(
            "INSERT INTO mesh VALUES (%s, %s, %s, %s, %s, %s, %s)",
            [
                ulid("mesh", number),
                ["mesh", " ", "m" * 255, "größer 🕸", "a'b\"c\\d%e:f", "\t\n", "NULL"][number],
                [None, "", "text\n" * 1000][number % 3],
                [None, True, False][number % 3],
                [None, "STATUS_ACTIVE", "STATUS_A_B"][number % 3],
                time,
                time,
            ],
        )
        connection.execute("INSERT INTO regions VALUES (%s, %s)", [ulid("region", number), f"region {number}"])
        connection.execute(
            "INSERT INTO nodes VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
            [
                ulid(["node", "ab", "abcdefghij"][number % 3], number),
                f"node {number} ö",
                [None, "", "d" * 100_000][number % 3],
                [None, "", "p" * 255][number % 3],
                [None, "", "v" * 255][number % 3],
                [None, ulid("region", number)][number % 2],
                [None, "", "k" * 5000][number % 3],
                ["10.0.0.1", "::1", "not an address", "i" * 255][number % 4],
                [None, 1, 65535][number % 3],
                [None, "STATUS_CONNECTED", "STATUS_" + "A" * 248][number % 3],
                time,
                time,
            ],
        )
    connection.execute("INSERT INTO nodes (node_name, ip_address) VALUES ('by the defaults', '10.0.0.2')")
    connection.execute("INSERT INTO mesh (mesh_name) VALUES ('by the defaults')")
    ends = [ulid("node", 0), ulid("ab", 1), ulid("node", 3)]
    latencies = [None, "0", "0.000000000000000000000000000001", "1" + "0" * 200, "1.50"]
    for number, latency in enumerate(latencies):
        connection.execute(
            "INSERT INTO routes VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)",
            [
                ulid("route", number),
                ends[number % 3],
                ends[(number + 1) % 3],
                [None, True, False][number % 3],
                latency,
                latency,
                [None, 0, 2**31 - 1][number % 3],
                [None, "STATUS_PENDING"][number % 2],
                times[number],
                times[number],
            ],
        )
    connection.execute("INSERT INTO routes (source_node_id, target_node_id) VALUES (%s, %s)", ends[:2])
    messages = [
        ("a" * 64, "n" * 64, "n" * 64, b"", 0),
        ("%s 'x' \\ :y", "ö" * 64, " ", bytes(range(256)), -(2**63)),
        ("\t", "same", "same", b"\0" * 100_000, 2**63 - 1),
    ]
    for message in messages:
        connection.execute("INSERT INTO mesh_messages VALUES (%s, %s, %s, %s, %s, NULL)", message)
    connection.execute(
        "INSERT INTO mesh_messages SELECT 'msg-' || n, 'node-' || n % 7, 'node-' || n % 5, sha256(n::text::bytea), n "
        "FROM generate_series(1, 200) AS n"
    )
    values: list[Any] = [
        None,
        True,
        "",
        "null",
        "1e400",
        [[], {}, [{}]],
        {"": {"a": None}, "ö 🕸": "\u0001"},
        0.1,
        "x" * 99_999,
    ]
    for number, value in enumerate(values):
        key = ["k" * 255, " ", "ö" * 255, "%", "a.b", "A.B", "_", "é", "e\u0301"][number]
        connection.execute("INSERT INTO mesh_state VALUES (%s, %s)", [key, str(value).encode()])
        connection.execute("INSERT INTO mesh_node_state VALUES (%s, %s, NULL, NULL)", [key[:64], Jsonb(value)])
        connection.execute("INSERT INTO mesh_routing_table VALUES (%s, %s)", [key, Jsonb(value)])
        connection.execute("INSERT INTO mesh_runtime_config VALUES (%s, %s)", [key, Jsonb(value)])
    connection.execute("INSERT INTO mesh_runtime_config VALUES ('exact', '[1e400, 123456789012345678901234567890.10]')")
    log = [(0, 1), (1, 1), (1, 2), (1, 3), (2, 3), (7, 3), (2, 4), (3, 5), (7, 9), (2**63 - 1, 2**63 - 1)]
    for term, index in log:
        connection.execute(
            "INSERT INTO mesh_consensus_log VALUES (%s, %s, %s)", [term, index, Jsonb({"term": term, "index": index})]
        )
    connection.execute(
        "INSERT INTO billing (node_id, mesh_id, amount) VALUES (%s, %s, 1.5)", [ends[0], ulid("mesh", 1)]
    )
    connection.execute("INSERT INTO inventory VALUES (%s, 'theirs')", [ends[1]])


STALE = [(0, 1), (1, 3), (2, 3)]
"""The entries of the log, by term and index, that another of a higher term makes stale."""


def rows(connection: Connection, *, also: tuple[str, ...] = OTHER_TABLES) -> dict[str, list[tuple[Any, ...]]]:
    """Return every value of every row as text; times with a zone as in UTC, stale entries of the log among them."""
    found = {}
    for table in (*TABLES, *also):
        columns = connection.execute(
            "SELECT attname, format_type(atttypid, NULL) FROM pg_attribute "
            "WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
            [table],
        ).fetchall()
        listed = [
            f"({name} AT TIME ZONE 'UTC')::text" if kind == "timestamp with time zone" else f"{name}::text"
            for name, kind in columns
            if not name.startswith(("mesh_public_key", "mesh_join_key"))
            and name not in ("version", "expires_at", "queued")
        ]
        query = f"SELECT {', '.join(listed)} FROM {table}"
        if table == "mesh_consensus_log" and exists(connection, "mesh_consensus_log_stale"):
            query += f" UNION ALL SELECT {', '.join(listed)} FROM mesh_consensus_log_stale"
        found[table] = sorted(connection.execute(query.encode()).fetchall(), key=str)
    return found


def exists(connection: Connection, table: str) -> bool:
    row = connection.execute("SELECT to_regclass(%s) IS NOT NULL", [table]).fetchone()
    return row is not None and row[0]


def others(connection: Connection) -> list[tuple[Any, ...]]:
    """Return all that is not ours: tables, keys from and to them, views, triggers, functions, types, extensions."""
    return connection.execute(
        """
        SELECT 'column', attrelid::regclass::text, attname::text, format_type(atttypid, atttypmod),
               pg_get_expr(adbin, adrelid)
        FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        WHERE attrelid IN ('regions'::regclass, 'billing'::regclass, 'inventory'::regclass, 'node_names'::regclass)
        AND attnum > 0
        UNION ALL SELECT 'id', attrelid::regclass::text, attname::text, format_type(atttypid, atttypmod),
               pg_get_expr(adbin, adrelid)
        FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        WHERE atttypid = 'ulid'::regtype AND attrelid IN (SELECT oid FROM pg_class WHERE relkind = 'r')
        UNION ALL SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid), convalidated::text
        FROM pg_constraint
        WHERE conrelid::regclass::text IN ('regions', 'billing', 'inventory')
           OR confrelid = 'regions'::regclass OR contypid = 'ulid'::regtype
        UNION ALL SELECT 'index', tablename, indexname, indexdef, NULL FROM pg_indexes
        WHERE tablename IN ('regions', 'billing', 'inventory')
        UNION ALL SELECT 'view', viewname, definition, NULL, NULL FROM pg_views WHERE schemaname = 'public'
        UNION ALL SELECT 'trigger', tgname, pg_get_triggerdef(oid), tgenabled::text, NULL FROM pg_trigger
        WHERE NOT tgisinternal AND tgname <> ALL(%(triggers)s)
        UNION ALL SELECT 'function', proname, prosrc, NULL, NULL FROM pg_proc
        WHERE pronamespace = 'public'::regnamespace
        AND oid <> ALL(SELECT tgfoid FROM pg_trigger WHERE tgname = ANY(%(triggers)s))
        UNION ALL SELECT 'extension', extname, extversion, NULL, NULL FROM pg_extension
        ORDER BY 1, 2, 3, 4
        """,
        {"triggers": [*changes.TRIGGERS]},
    ).fetchall()


def structure(connection: Connection) -> list[tuple[Any, ...]]:
    """Return all columns, constraints and indexes of all tables."""
    return connection.execute(
        """
        SELECT 'column', attrelid::regclass::text, attname::text, format_type(atttypid, atttypmod),
               pg_get_expr(adbin, adrelid), attnotnull
        FROM pg_attribute JOIN pg_class ON pg_class.oid = attrelid
        LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
        WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND attnum > 0 AND NOT attisdropped
        UNION ALL SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid), NULL, convalidated
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace AND contype <> 'n'
        UNION ALL SELECT 'index', indrelid::regclass::text, indexrelid::regclass::text, pg_get_indexdef(indexrelid),
               NULL, indisvalid
        FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid WHERE relnamespace = 'public'::regnamespace
        ORDER BY 1, 2, 3
        """
    ).fetchall()


STATEMENTS: tuple[tuple[str, tuple[Any, ...]], ...] = (
    (
        (
            "INSERT INTO mesh_messages (id, from_node, to_node, content, timestamp) VALUES (%s, %s, %s, %s, %s) "
            "ON CONFLICT (id) DO UPDATE SET from_node = EXCLUDED.from_node, to_node = EXCLUDED.to_node, "
            "content = EXCLUDED.content, timestamp = EXCLUDED.timestamp"
        ),
        ("go-{n}", "node-a", "node-b", b"content", 1_700_000_000),
    ),
    ("SELECT id, from_node, to_node, content, timestamp FROM mesh_messages WHERE id = %s", ("go-{n}",)),
    (
        (
            "INSERT INTO mesh_state (key, value) VALUES (%s, %s) "
            "ON CONFLICT (key) DO UPDATE SET value = EXCLUDED.value, updated_at = CURRENT_TIMESTAMP"
        ),
        ("go-{n}", b"value"),
    ),
    ("SELECT value FROM mesh_state WHERE key = %s", ("go-{n}",)),
    (
        (
            "INSERT INTO mesh_node_state (node_id, state) VALUES (%s, %s) "
            "ON CONFLICT (node_id) DO UPDATE SET state = EXCLUDED.state, updated_at = CURRENT_TIMESTAMP"
        ),
        ("go-{n}", Jsonb({"status": "active"})),
    ),
    ("SELECT state FROM mesh_node_state WHERE node_id = %s", ("go-{n}",)),
    (
        "INSERT INTO mesh_consensus_log (term, index, entry) VALUES (%s, %s, %s)",
        (9_000_000, "{log}", Jsonb({"command": "set"})),
    ),
    ("SELECT term, index, entry FROM mesh_consensus_log WHERE index >= %s ORDER BY index LIMIT 10", ("{log}",)),
    (
        (
            "INSERT INTO mesh_routing_table (destination, route) VALUES (%s, %s) "
            "ON CONFLICT (destination) DO UPDATE SET route = EXCLUDED.route, updated_at = CURRENT_TIMESTAMP"
        ),
        ("go-{n}", Jsonb({"next_hop": "node-a"})),
    ),
    ("SELECT route FROM mesh_routing_table WHERE destination = %s", ("go-{n}",)),
    (
        (
            "INSERT INTO mesh_runtime_config (key, value) VALUES (%s, %s) "
            "ON CONFLICT (key) DO UPDATE SET value = EXCLUDED.value, updated_at = CURRENT_TIMESTAMP"
        ),
        ("go-{n}", Jsonb(1)),
    ),
    ("SELECT value FROM mesh_runtime_config WHERE key = %s", ("go-{n}",)),
    (
        (
            "SELECT route_id, source_node_id, target_node_id, route_cost FROM routes "
            "WHERE source_node_id = %s OR (target_node_id = %s AND route_bidirectional)"
        ),
        (ulid("node", 0), ulid("node", 0)),
    ),
    ("SELECT node_id, node_name, ip_address, port, status FROM nodes WHERE node_id = %s", (ulid("node", 0),)),
    ("SELECT mesh_id, mesh_name, allow_join, status FROM mesh WHERE mesh_name = %s", ("mesh",)),
    ("INSERT INTO nodes (node_name, ip_address, port) VALUES (%s, %s, %s)", ("go-{n}", "10.0.0.9", 8443)),
    ("UPDATE nodes SET status = %s, updated = CURRENT_TIMESTAMP WHERE node_name = %s", ("STATUS_CONNECTED", "go-{n}")),
    (
        (
            "INSERT INTO routes (source_node_id, target_node_id, route_latency) "
            "SELECT %s, node_id, %s FROM nodes WHERE node_name = %s"
        ),
        (ulid("node", 0), 1.5, "go-{n}"),
    ),
    ("INSERT INTO mesh (mesh_name, allow_join) VALUES (%s, %s)", ("go-{n}", True)),
    ("DELETE FROM routes WHERE target_node_id IN (SELECT node_id FROM nodes WHERE node_name = %s)", ("go-{n}",)),
    ("DELETE FROM nodes WHERE node_name = %s", ("go-{n}",)),
    ("DELETE FROM mesh_state WHERE key = %s", ("go-{n}",)),
    ("DELETE FROM mesh_messages WHERE id = %s", ("go-{n}-not-there",)),
)
"""What the Go service says, with places for a number that grows."""

FIRST_LOG_INDEX = 1_000_000


def statement(position: int, number: int) -> tuple[str, list[Any]]:
    """Return one of the statements with its parameters, for a number that no other round has."""
    sql, parameters = STATEMENTS[position]
    places = {"{log}": FIRST_LOG_INDEX + number}
    return sql, [
        places.get(each, each.replace("{n}", str(number))) if isinstance(each, str) else each for each in parameters
    ]
