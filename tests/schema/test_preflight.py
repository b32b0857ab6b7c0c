"""What our constraints would refuse is reported before anything is changed: all of it, by table, key and reason."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from mesh_storage import schema
from mesh_storage.errors import ConflictError, MeshStorageError
from mesh_storage.schema import adoption
from tests.schema import legacy
from tests.schema.conftest import Alembic

NODE, OTHER = legacy.ulid("node", 0), legacy.ulid("ab", 1)

# By constraint: a row that it refuses, and how the row is named. The ids are of a domain that refuses them itself.
REFUSED = {
    "mesh_mesh_name_check": ("INSERT INTO mesh (mesh_id, mesh_name) VALUES ('{mesh}', '')", "mesh_id='{mesh}'"),
    "mesh_status_check": (
        "INSERT INTO mesh (mesh_id, mesh_name, status) VALUES ('{mesh}', 'x', 'active')",
        "mesh_id='{mesh}'",
    ),
    "mesh_mesh_id_check": ("INSERT INTO mesh (mesh_id, mesh_name) VALUES ('mesh-1', 'x')", "mesh_id='mesh-1'"),
    "nodes_node_id_check": (
        "INSERT INTO nodes (node_id, node_name, ip_address) VALUES ('', 'x', 'x')",
        "node_id=''",
    ),
    "nodes_node_name_check": (
        "INSERT INTO nodes (node_id, node_name, ip_address) VALUES ('{node}', '', 'x')",
        "node_id='{node}'",
    ),
    "nodes_ip_address_check": (
        "INSERT INTO nodes (node_id, node_name, ip_address) VALUES ('{node}', 'x', '')",
        "node_id='{node}'",
    ),
    "nodes_port_check": (
        "INSERT INTO nodes (node_id, node_name, ip_address, port) VALUES ('{node}', 'x', 'x', 65536)",
        "node_id='{node}'",
    ),
    "nodes_status_check": (
        "INSERT INTO nodes (node_id, node_name, ip_address, status) VALUES ('{node}', 'x', 'x', '')",
        "node_id='{node}'",
    ),
    "routes_route_id_check": (
        "INSERT INTO routes (route_id, source_node_id, target_node_id) VALUES ('route_lower', '{a}', '{b}')",
        "route_id='route_lower'",
    ),
    "routes_target_node_id_check": (
        "INSERT INTO routes (route_id, source_node_id, target_node_id) VALUES ('{route}', '{a}', '{a}')",
        "route_id='{route}'",
    ),
    "routes_route_latency_check": (
        (
            "INSERT INTO routes (route_id, source_node_id, target_node_id, route_latency) "
            "VALUES ('{route}', '{a}', '{b}', 'NaN')"
        ),
        "route_id='{route}'",
    ),
    "routes_route_bandwidth_check": (
        (
            "INSERT INTO routes (route_id, source_node_id, target_node_id, route_bandwidth) "
            "VALUES ('{route}', '{a}', '{b}', -0.001)"
        ),
        "route_id='{route}'",
    ),
    "routes_route_cost_check": (
        (
            "INSERT INTO routes (route_id, source_node_id, target_node_id, route_cost) "
            "VALUES ('{route}', '{a}', '{b}', -1)"
        ),
        "route_id='{route}'",
    ),
    "routes_status_check": (
        "INSERT INTO routes (route_id, source_node_id, target_node_id, status) VALUES ('{route}', '{a}', '{b}', 'UP')",
        "route_id='{route}'",
    ),
    "mesh_messages_id_check": ("INSERT INTO mesh_messages VALUES ('', 'a', 'b', '', 1)", "id=''"),
    "mesh_messages_from_node_check": ("INSERT INTO mesh_messages VALUES ('bad', '', 'b', '', 1)", "id='bad'"),
    "mesh_messages_to_node_check": ("INSERT INTO mesh_messages VALUES ('it''s', 'a', '', '', 1)", "id='it''s'"),
    "mesh_state_key_check": ("INSERT INTO mesh_state VALUES ('', '')", "key=''"),
    "mesh_node_state_node_id_check": ("INSERT INTO mesh_node_state VALUES ('', '1')", "node_id=''"),
    "mesh_consensus_log_term_check": (
        "INSERT INTO mesh_consensus_log VALUES (-1, 77, '1')",
        "term='-1', index='77'",
    ),
    "mesh_consensus_log_index_check": ("INSERT INTO mesh_consensus_log VALUES (1, 0, '1')", "term='1', index='0'"),
    "mesh_routing_table_destination_check": ("INSERT INTO mesh_routing_table VALUES ('', '1')", "destination=''"),
    "mesh_runtime_config_key_check": ("INSERT INTO mesh_runtime_config VALUES ('', '1')", "key=''"),
}


def insert(connection: legacy.Connection, constraint: str) -> tuple[str, str]:
    """Store a row that the constraint refuses; give the table and how the row is named."""
    names = {"mesh": legacy.ulid("mesh", 99), "node": legacy.ulid("node", 99), "route": legacy.ulid("route", 99)}
    statement, key = REFUSED[constraint]
    if constraint in {"mesh_mesh_id_check", "nodes_node_id_check", "routes_route_id_check"}:
        # Not of a domain that was made otherwise.
        connection.execute("ALTER DOMAIN ulid DROP CONSTRAINT IF EXISTS ulid_check")
    connection.execute(statement.format(**names, a=NODE, b=OTHER).encode())
    return statement.split()[2], key.format(**names)


@pytest.fixture
def unchanged(connection: legacy.Connection) -> Iterator[None]:
    """See that a test that is refused has changed nothing, and left nothing."""
    yield
    assert not legacy.exists(connection, "mesh_alembic_version")
    names = {row[1] for row in legacy.structure(connection) if row[1] != "-"}  # a domain has constraints too
    assert names == {*legacy.TABLES, *legacy.OTHER_TABLES}


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("constraint", REFUSED)
def test_a_row_is_reported_by_table_key_and_reason(
    legacy_url: str, connection: legacy.Connection, constraint: str
) -> None:
    table, key = insert(connection, constraint)
    before = legacy.rows(connection), legacy.structure(connection), legacy.others(connection)
    with pytest.raises(ConflictError) as caught:
        schema.upgrade(legacy_url)
    lines = str(caught.value).splitlines()[1:]
    assert [line for line in lines if line.startswith(f"- table {table}, row {key}: breaks {constraint}, ")] == lines
    assert (legacy.rows(connection), legacy.structure(connection), legacy.others(connection)) == before


def test_there_is_a_row_for_every_check() -> None:
    from alembic.script import ScriptDirectory

    checks = ScriptDirectory(str(schema.script_location())).get_revision("0004").module.CHECKS
    assert {f"{table}_{name}_check" for table, names in checks.items() for name in names} == set(REFUSED)


def test_all_is_reported_at_once_and_the_command_fails(
    legacy_url: str, connection: legacy.Connection, alembic: Alembic
) -> None:
    expected = {
        constraint: insert(connection, constraint) for constraint in REFUSED if constraint.endswith("key_check")
    }
    connection.execute(
        "INSERT INTO mesh_messages SELECT 'bad-' || n, '', 'b', '', 1 FROM generate_series(1, 1000) AS n"
    )
    before = legacy.rows(connection), legacy.structure(connection)
    upgrade = alembic(legacy_url, "upgrade", "head")
    _, err = upgrade.communicate(timeout=60)
    assert upgrade.returncode != 0
    for constraint, (table, key) in expected.items():
        assert f"- table {table}, row {key}: breaks {constraint}" in err
    assert err.count("- table mesh_messages, row id='bad-") == adoption.LISTED
    assert "990 more rows, 1000 in total: breaks mesh_messages_from_node_check" in err
    assert (legacy.rows(connection), legacy.structure(connection)) == before
    # Corrected, the same command succeeds.
    connection.execute("UPDATE mesh_messages SET from_node = 'unknown' WHERE from_node = ''")
    connection.execute("DELETE FROM mesh_state WHERE key = ''")
    connection.execute("DELETE FROM mesh_runtime_config WHERE key = ''")
    before_upgrade = legacy.rows(connection)
    upgrade = alembic(legacy_url, "upgrade", "head")
    assert upgrade.wait(60) == 0
    assert legacy.rows(connection) == before_upgrade


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (
            (
                "ALTER TABLE mesh_messages ALTER from_node TYPE text; "
                "INSERT INTO mesh_messages VALUES ('long', repeat('ö', 65), 'b', '', 1), "
                "('fits', repeat('ö', 64), 'b', '', 1)"
            ),
            [
                "table mesh_messages: column from_node is of type text, not character varying(64)",
                "table mesh_messages, row id='long': from_node is longer than 64 characters",
            ],
        ),
        (
            "ALTER TABLE mesh_state ALTER key TYPE varchar(300); INSERT INTO mesh_state VALUES (repeat('k', 256), '')",
            [
                "table mesh_state: column key is of type character varying(300), not character varying(255)",
                f"table mesh_state, row key='{'k' * 256}': key is longer than 255 characters",
            ],
        ),
        (
            "ALTER TABLE mesh_node_state ALTER state DROP NOT NULL; INSERT INTO mesh_node_state VALUES ('n', NULL)",
            [
                "table mesh_node_state: column state is not NOT NULL",
                "table mesh_node_state, row node_id='n': state is null",
            ],
        ),
        (
            "ALTER TABLE nodes ALTER port DROP DEFAULT, ALTER port TYPE text",
            ["table nodes: column port is of type text, not integer"],
        ),
        ("ALTER TABLE mesh DROP COLUMN allow_join", ["table mesh: column allow_join (boolean) is missing"]),
        (
            "ALTER TABLE mesh_runtime_config DROP CONSTRAINT mesh_runtime_config_pkey",
            [
                "table mesh_runtime_config: column key is not NOT NULL",
                "table mesh_runtime_config: constraint PRIMARY KEY (key) is missing",
            ],
        ),
        (
            "ALTER TABLE nodes DROP CONSTRAINT nodes_node_name_key",
            ["table nodes: constraint UNIQUE (node_name) is missing"],
        ),
        (
            "ALTER TABLE routes DROP CONSTRAINT routes_target_node_id_fkey",
            [
                (
                    "table routes: constraint FOREIGN KEY (target_node_id) REFERENCES nodes(node_id) "
                    "ON UPDATE CASCADE ON DELETE CASCADE is missing"
                )
            ],
        ),
        (
            "CREATE VIEW recent AS SELECT node_id FROM nodes WHERE created > '2024-01-01'",
            ["table nodes: the type of column created cannot be changed because of rule _RETURN on view recent"],
        ),
        (
            "CREATE INDEX late ON nodes (created) WHERE created > '2020-01-01'",
            ["table nodes: the type of column created cannot be changed because of index late"],
        ),
        (
            "CREATE INDEX daily ON routes (date_trunc('day', updated))",
            ["table routes: the type of column updated cannot be changed because of index daily"],
        ),
        (
            "ALTER TABLE mesh ADD made date GENERATED ALWAYS AS (created::date) STORED",
            [
                (
                    "table mesh: the type of column created cannot be changed because of default value for column made "
                    "of table mesh"
                )
            ],
        ),
        (
            (
                "ALTER TABLE mesh_state ADD tenant text NOT NULL DEFAULT '', ADD owner text NOT NULL DEFAULT ''; "
                "ALTER TABLE mesh_state ALTER tenant DROP DEFAULT"
            ),
            ["table mesh_state: column tenant is NOT NULL without a default, so no row could be inserted"],
        ),
        (
            "CREATE TABLE mesh_consensus_log_stale (note text)",
            ["table mesh_consensus_log_stale: it already exists"],
        ),
        (
            (
                "CREATE INDEX mesh_consensus_log_index_key ON mesh_consensus_log (term); "
                "CREATE INDEX nodes_status_node_id_idx ON nodes (port)"
            ),
            [
                (
                    "table mesh_consensus_log: mesh_consensus_log_index_key already exists as "
                    "INDEX ON mesh_consensus_log USING btree (term), not as "
                    "UNIQUE INDEX ON mesh_consensus_log USING btree (index)"
                ),
                (
                    "table nodes: nodes_status_node_id_idx already exists as INDEX ON nodes USING btree "
                    "(port), not as INDEX ON nodes USING btree (status, node_id)"
                ),
            ],
        ),
        (
            "CREATE INDEX nodes_region_id_node_id_idx ON nodes (region_id, node_id) WHERE port = 1",
            [
                (
                    "table nodes: nodes_region_id_node_id_idx already exists as INDEX ON nodes USING btree "
                    "(region_id, node_id) WHERE (port = 1), not as INDEX ON nodes USING btree (region_id, node_id)"
                )
            ],
        ),
        (
            "CREATE SEQUENCE mesh_state_key_c_idx",
            [
                (
                    "table mesh_state: mesh_state_key_c_idx already exists as another kind of relation, not as "
                    'INDEX ON mesh_state USING btree (key COLLATE "C")'
                )
            ],
        ),
    ],
)
def test_a_table_that_is_not_the_go_services_is_reported(
    legacy_url: str, connection: legacy.Connection, change: str, reasons: list[str]
) -> None:
    connection.execute(change.encode())
    with pytest.raises(ConflictError) as caught:
        schema.upgrade(legacy_url)
    lines = [line.removeprefix("- ") for line in str(caught.value).splitlines()[1:]]
    # PostgreSQL leaves the columns of a key NOT NULL, or not, by version.
    assert [line for line in lines if "NOT NULL" not in line] == [each for each in reasons if "NOT NULL" not in each]
    connection.execute(
        "DROP VIEW IF EXISTS recent; DROP SEQUENCE IF EXISTS mesh_state_key_c_idx; "
        "DROP TABLE IF EXISTS mesh_consensus_log_stale"
    )


def test_what_depends_on_times_and_does_not_stop_the_migrations_is_no_problem(
    legacy_url: str, connection: legacy.Connection
) -> None:
    connection.execute("CREATE INDEX plain ON nodes (created)")
    connection.execute("CREATE INDEX active ON nodes (updated) WHERE status = 'STATUS_ACTIVE'")
    schema.upgrade(legacy_url)
    indexes = connection.execute(
        "SELECT relname, indisvalid, split_part(pg_get_indexdef(oid), ' USING ', 2) FROM pg_class "
        "JOIN pg_index ON indexrelid = oid WHERE relname IN ('active', 'plain') ORDER BY relname"
    ).fetchall()
    assert indexes == [
        ("active", True, "btree (updated) WHERE ((status)::text = 'STATUS_ACTIVE'::text)"),
        ("plain", True, "btree (created)"),
    ]
    types = connection.execute(
        "SELECT atttypid::regtype::text FROM pg_attribute "
        "WHERE attrelid = 'nodes'::regclass AND attname IN ('created', 'updated')"
    ).fetchall()
    assert types == [("timestamp with time zone",)] * 2


def test_the_indexes_of_ours_that_are_there_are_taken_and_a_half_built_one_is_built_anew(
    legacy_url: str, connection: legacy.Connection
) -> None:
    connection.execute("CREATE INDEX mesh_messages_timestamp_id_idx ON mesh_messages (timestamp, id)")
    connection.execute('CREATE INDEX mesh_state_key_c_idx ON mesh_state (key COLLATE "C")')
    connection.execute("INSERT INTO mesh_consensus_log VALUES (1, 7777, '1'), (2, 7777, '1')")
    with pytest.raises(psycopg.errors.UniqueViolation):
        connection.execute(
            "CREATE UNIQUE INDEX CONCURRENTLY mesh_consensus_log_index_key ON mesh_consensus_log (index)"
        )
    oids = "SELECT 'mesh_messages_timestamp_id_idx'::regclass::oid, 'mesh_state_key_c_idx'::regclass::oid"
    before = connection.execute(oids).fetchone()
    schema.upgrade(legacy_url)
    assert connection.execute(oids).fetchone() == before
    built = "SELECT indisvalid, indisunique FROM pg_index WHERE indexrelid = 'mesh_consensus_log_index_key'::regclass"
    assert connection.execute(built).fetchone() == (True, True)


def test_an_index_that_is_not_ours_is_reported_at_a_later_revision_as_well(
    legacy_url: str, connection: legacy.Connection
) -> None:
    schema.upgrade(legacy_url, "0006")
    connection.execute("CREATE INDEX nodes_status_node_id_idx ON nodes (port)")
    with pytest.raises(ConflictError, match="table nodes: nodes_status_node_id_idx already exists"):
        schema.upgrade(legacy_url)
    assert connection.execute("SELECT version_num FROM mesh_alembic_version").fetchone() == ("0006",)
    connection.execute("DROP INDEX nodes_status_node_id_idx")
    schema.upgrade(legacy_url)


def test_a_row_that_comes_while_the_migrations_run_is_reported_and_the_next_run_goes_on(
    legacy_url: str, connection: legacy.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = adoption.check
    checked = []

    def then_a_row_comes(*arguments: Any, **options: Any) -> None:
        check(*arguments, **options)
        checked.append(options)
        connection.execute("INSERT INTO mesh_state VALUES ('', 'late')")

    monkeypatch.setattr(adoption, "check", then_a_row_comes)
    with pytest.raises(ConflictError, match="table mesh_state, row key='': breaks mesh_state_key_check"):
        schema.upgrade(legacy_url)
    assert [options["shape"] for options in checked] == [True]
    with psycopg.connect(legacy_url) as other:
        assert other.execute("SELECT version_num FROM mesh_alembic_version").fetchone() == ("0004",)
    with pytest.raises(MeshStorageError, match="row key=''"):
        schema.upgrade(legacy_url)
    monkeypatch.undo()
    connection.execute("UPDATE mesh_state SET key = 'late' WHERE key = ''")
    schema.upgrade(legacy_url)
    assert connection.execute("SELECT value FROM mesh_state WHERE key = 'late'").fetchone() == (b"late",)


def test_only_an_upgrade_is_refused(legacy_url: str, connection: legacy.Connection, alembic: Alembic) -> None:
    schema.upgrade(legacy_url, "0003")
    insert(connection, "mesh_state_key_check")
    for arguments in (["current"], ["downgrade", "0001"], ["downgrade", "base"], ["stamp", "0001"]):
        command = alembic(legacy_url, *arguments)
        assert command.wait(60) == 0, (arguments, command.communicate())
    upgrade = alembic(legacy_url, "upgrade", "+1")
    assert "row key='': breaks mesh_state_key_check" in upgrade.communicate(timeout=60)[1]
    assert upgrade.returncode != 0


SURROUNDINGS = {
    "a partitioned table": (
        (
            "DROP TABLE mesh_state; CREATE TABLE mesh_state (key varchar(255) PRIMARY KEY, value bytea NOT NULL, "
            "created_at timestamptz DEFAULT now(), updated_at timestamptz DEFAULT now()) PARTITION BY HASH (key); "
            "CREATE TABLE part PARTITION OF mesh_state FOR VALUES WITH (MODULUS 1, REMAINDER 0)"
        ),
        ["table mesh_state: it is partitioned, and no index can be built on it concurrently"],
    ),
    "a partition": (
        (
            "CREATE TABLE whole (LIKE mesh_routing_table INCLUDING ALL) PARTITION BY HASH (destination); "
            "ALTER TABLE whole ATTACH PARTITION mesh_routing_table FOR VALUES WITH (MODULUS 1, REMAINDER 0)"
        ),
        ["table mesh_routing_table: it is a partition of another table"],
    ),
    "inheritance": (
        "CREATE TABLE heir () INHERITS (mesh_messages)",
        ["table mesh_messages: other tables inherit from it: heir"],
    ),
    "a view": (
        "ALTER TABLE mesh_runtime_config RENAME TO config; CREATE VIEW mesh_runtime_config AS SELECT * FROM config",
        [
            "table mesh_runtime_config: it is a view, not a table",
            "table mesh_runtime_config: constraint PRIMARY KEY (key) is missing",
        ],
    ),
    "a generated column": (
        (
            "ALTER TABLE mesh_messages DROP COLUMN timestamp, "
            "ADD COLUMN timestamp bigint NOT NULL GENERATED ALWAYS AS (length(content)) STORED"
        ),
        ["table mesh_messages: a column that gets a default is generated"],
    ),
    "a trigger that refuses deletes": (
        (
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no deletes'; END $$; "
            "CREATE TRIGGER k BEFORE DELETE OR TRUNCATE ON mesh_consensus_log EXECUTE FUNCTION refuse()"
        ),
        ["table mesh_consensus_log: trigger k fires on DELETE, which moves stale entries; disable it for the upgrade"],
    ),
    "a rule that refuses deletes": (
        "CREATE RULE keep AS ON DELETE TO mesh_consensus_log DO INSTEAD NOTHING",
        ["table mesh_consensus_log: rule keep fires on DELETE, which moves stale entries; disable it for the upgrade"],
    ),
}


@pytest.mark.parametrize("what", SURROUNDINGS)
def test_what_the_migrations_cannot_be_done_to_is_reported(
    legacy_url: str, connection: legacy.Connection, what: str
) -> None:
    change, reasons = SURROUNDINGS[what]
    connection.execute(change.encode())
    before = legacy.structure(connection)
    with pytest.raises(ConflictError) as caught:
        schema.upgrade(legacy_url)
    lines = [line.removeprefix("- ") for line in str(caught.value).splitlines()[1:]]
    # PostgreSQL leaves the columns of a view, and of a key, NOT NULL or not, by version.
    assert [line for line in lines if "NOT NULL" not in line] == reasons
    assert legacy.structure(connection) == before


def test_a_trigger_for_rows_is_no_problem_where_none_is_to_be_deleted(
    legacy_url: str, connection: legacy.Connection
) -> None:
    trigger = SURROUNDINGS["a trigger that refuses deletes"][0].replace(" OR TRUNCATE", "")
    connection.execute("DELETE FROM mesh_consensus_log WHERE (term, index) IN ((0, 1), (1, 3), (2, 3))")
    connection.execute(trigger.replace("EXECUTE", "FOR EACH ROW EXECUTE").encode())
    schema.upgrade(legacy_url)


def test_a_trigger_that_is_disabled_is_no_problem(legacy_url: str, connection: legacy.Connection) -> None:
    connection.execute(SURROUNDINGS["a trigger that refuses deletes"][0].encode())
    connection.execute("ALTER TABLE mesh_consensus_log DISABLE TRIGGER k")
    schema.upgrade(legacy_url)
    assert connection.execute("SELECT count(*) FROM mesh_consensus_log_stale").fetchone() == (len(legacy.STALE),)


EVENT_TRIGGERS = {
    "every": ("", ["CREATE TABLE"]),
    "one command": ("WHEN TAG IN ('ALTER TABLE', 'CREATE INDEX')", ["ALTER TABLE", "CREATE INDEX"]),
    "drops": ("WHEN TAG IN ('DROP INDEX')", ["DROP INDEX"]),
}


@pytest.mark.parametrize("which", EVENT_TRIGGERS)
def test_an_event_trigger_that_refuses_the_migrations_is_reported(
    legacy_url: str, connection: legacy.Connection, which: str
) -> None:
    filtered, tags = EVENT_TRIGGERS[which]
    before = legacy.structure(connection)
    connection.execute(
        "CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'frozen'; END $$"
    )
    connection.execute(f"CREATE EVENT TRIGGER halt ON ddl_command_start {filtered} EXECUTE FUNCTION refuse()".encode())
    with pytest.raises(ConflictError) as caught:
        schema.upgrade(legacy_url)
    assert str(caught.value).splitlines()[1:] == [f"- {tag} is rejected (frozen); event triggers: halt" for tag in tags]
    connection.execute("DROP EVENT TRIGGER halt")
    assert legacy.structure(connection) == before
    schema.upgrade(legacy_url)


def test_an_event_trigger_that_only_looks_on_is_no_problem(legacy_url: str, connection: legacy.Connection) -> None:
    connection.execute(
        "CREATE FUNCTION look() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN END $$; "
        "CREATE EVENT TRIGGER looks ON ddl_command_end EXECUTE FUNCTION look()"
    )
    schema.upgrade(legacy_url)
    assert connection.execute("SELECT to_regclass('mesh_storage_trial')").fetchone() == (None,)


def test_a_role_that_may_not_alter_the_tables_is_told_before_anything_is_changed(
    legacy_url: str, connection: legacy.Connection
) -> None:
    role = f"migrator_{os.getpid()}"
    connection.execute(f"CREATE ROLE {role}; GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}".encode())
    try:
        before = legacy.structure(connection)
        with pytest.raises(ConflictError) as caught:
            schema.upgrade(f"{legacy_url}&options=-crole%3D{role}")
        lines = str(caught.value).splitlines()[1:]
        assert lines[:9] == [
            f"- table {table}: it is owned by postgres, and {role} may not alter it" for table in sorted(legacy.TABLES)
        ]
        assert lines[9:] == [f"- schema public: {role} may not create tables there (GRANT CREATE ON SCHEMA)"]
        assert legacy.structure(connection) == before
    finally:
        connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())


def test_rows_that_are_hidden_are_not_taken_for_none(legacy_url: str, connection: legacy.Connection) -> None:
    role = f"migrator_{os.getpid()}"
    connection.execute(f"CREATE ROLE {role}; GRANT CREATE ON SCHEMA public TO {role}".encode())
    try:
        for table in legacy.TABLES:
            connection.execute(f"ALTER TABLE {table} OWNER TO {role}".encode())
        connection.execute("ALTER TABLE mesh_state ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
        with pytest.raises(ConflictError, match=f"table mesh_state: its row level security hides rows from {role}"):
            schema.upgrade(f"{legacy_url}&options=-crole%3D{role}")
    finally:
        connection.execute(f"REASSIGN OWNED BY {role} TO CURRENT_USER; DROP OWNED BY {role}; DROP ROLE {role}".encode())
