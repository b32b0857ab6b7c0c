"""What others have put onto the tables stays when their rows are replaced, or the restore is refused by name."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from backup_help import contents, fill, run

from mesh_storage import (
    ConflictError,
    MeshStorage,
    Message,
    MissingReferenceError,
    SchemaMismatchError,
    backup,
    schema,
)
from mesh_storage.backup import client_tools
from mesh_storage.backup.manifest import Manifest
from mesh_storage.postgres import engine
from mesh_storage.postgres.server import Server

OTHER = f"the 'other' {os.getpid()}"
"""A role; those of other test processes may be on the same server."""


@pytest.fixture
def other(server: Server) -> Iterator[Server]:
    """Yield a server with another role that may be granted something."""
    quoted = f'"{OTHER}"'
    run(server, f"DO $$ BEGIN CREATE ROLE {quoted}; EXCEPTION WHEN duplicate_object THEN NULL; END $$")
    yield server
    run(server, f"DROP OWNED BY {quoted} CASCADE", f"DROP ROLE {quoted}")


@pytest.fixture
def made(storage: MeshStorage, tmp_path: Path) -> Path:
    """Return a backup of a database that has more rows since."""
    fill(storage)
    storage.backup(tmp_path / "backup")
    with storage.begin() as uow:
        uow.messages.store(Message(id="later", from_node="a", to_node="b", content=b"later"))
        uow.state.put("later", b"")
    return tmp_path / "backup"


def definition(server: Server) -> list[str]:
    """Return the whole database without its rows, in the words of pg_dump."""
    with engine.connect(server.connect) as connection:
        tools = client_tools.find(client_tools.server_major(connection))
        environment, public = client_tools.same_server(connection)
        said = subprocess.run(
            [tools.directory / "pg_dump", f"--dbname={public}", "--schema-only"],
            env=environment, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    return [line for line in said.splitlines() if not line.startswith(("\\restrict", "\\unrestrict"))]


def unordered(server: Server) -> list[str]:
    """Return it by line: a column that a revision drops and makes again comes behind those that others added."""
    return sorted(line.rstrip(",") for line in definition(server))


def texts(server: Server, query: str) -> list[str]:
    with engine.connect(server.connect) as connection:
        return [value for (value,) in connection.execute(query.encode()).fetchall()]


STAYS = {
    "row level security without policies": "ALTER TABLE mesh_state ENABLE ROW LEVEL SECURITY",
    "a policy": f"""
        ALTER TABLE mesh_state ENABLE ROW LEVEL SECURITY;
        CREATE POLICY theirs ON mesh_state TO "{OTHER}" USING (key LIKE 'theirs%')
    """,
    "grants and default privileges": f"""
        ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO "{OTHER}";
        GRANT SELECT ON nodes TO PUBLIC;
        GRANT INSERT ON mesh_messages TO "{OTHER}" WITH GRANT OPTION
    """,
    "grants on columns": f'GRANT SELECT (mesh_id), UPDATE (mesh_name) ON mesh TO "{OTHER}"',
    "no right of the owner": "REVOKE UPDATE ON mesh_messages FROM CURRENT_USER",
    "an owner": f'ALTER TABLE mesh_state OWNER TO "{OTHER}"',
    "a column": "ALTER TABLE nodes ADD COLUMN theirs text NOT NULL DEFAULT 'none'",
    "a generated column": "ALTER TABLE nodes ADD COLUMN theirs text GENERATED ALWAYS AS (lower(node_name)) STORED",
    "an identity column": "ALTER TABLE nodes ADD COLUMN theirs bigint GENERATED ALWAYS AS IDENTITY",
    "indexes": """
        CREATE INDEX theirs ON mesh_messages (lower(from_node)) INCLUDE (to_node) WITH (fillfactor = 70)
            WHERE to_node <> '';
        COMMENT ON INDEX theirs IS 'it''s theirs';
        CREATE UNIQUE INDEX "Theirs 2" ON mesh_state USING btree (key DESC NULLS LAST);
        CREATE INDEX theirs_3 ON mesh_node_state USING gin (state jsonb_path_ops);
        CREATE INDEX theirs_4 ON mesh_state ((length(value)));
        ALTER INDEX theirs_4 ALTER COLUMN 1 SET STATISTICS 500
    """,
    "texts with backslashes in a database with settings of old": """
        CREATE INDEX theirs ON mesh_state ((key ~ E'\\\\d')) WHERE key <> E'\\\\';
        ALTER TABLE mesh_state ADD CONSTRAINT theirs CHECK (key <> E'\\\\x') NOT VALID;
        DO $$ BEGIN
            EXECUTE format('ALTER DATABASE %I SET standard_conforming_strings = off', current_database());
            EXECUTE format('ALTER DATABASE %I SET quote_all_identifiers = on', current_database());
            EXECUTE format('ALTER DATABASE %I SET default_transaction_isolation = serializable', current_database());
        END $$
    """,
    "a table in the order of an index": "CLUSTER mesh_state USING mesh_state_key_c_idx",
    "a replica identity": "ALTER TABLE mesh_consensus_log REPLICA IDENTITY USING INDEX mesh_consensus_log_index_key",
    "constraints": """
        ALTER TABLE nodes ADD CONSTRAINT theirs CHECK (port < 65536);
        ALTER TABLE nodes ADD CONSTRAINT theirs_later CHECK (port < 5) NOT VALID;
        ALTER TABLE mesh_state ADD CONSTRAINT theirs_only UNIQUE (key, created_at) DEFERRABLE INITIALLY DEFERRED;
        COMMENT ON CONSTRAINT theirs ON nodes IS 'a check'
    """,
    "storage settings": """
        ALTER TABLE mesh_state SET (fillfactor = 50, autovacuum_enabled = false, toast.autovacuum_enabled = false);
        ALTER TABLE mesh_state ALTER value SET STORAGE EXTERNAL, ALTER key SET STATISTICS 1000;
        ALTER TABLE mesh_state ALTER key SET (n_distinct = -0.5)
    """,
    "publications": """
        CREATE PUBLICATION theirs FOR TABLE mesh_state, mesh_messages (id, to_node);
        ALTER TABLE mesh_state REPLICA IDENTITY FULL
    """,
    "a statistics object": "CREATE STATISTICS theirs (dependencies) ON from_node, to_node FROM mesh_messages",
    "comments": "COMMENT ON TABLE mesh_state IS 'theirs'; COMMENT ON COLUMN mesh_state.key IS 'theirs'",
    "defaults and rules for null": """
        ALTER TABLE nodes ALTER port SET DEFAULT 1, ALTER node_platform SET NOT NULL
    """,
    "a rule": "CREATE RULE theirs AS ON DELETE TO mesh_state DO ALSO NOTHING",
    "a rule instead": "CREATE RULE theirs AS ON INSERT TO mesh_state DO INSTEAD NOTHING",
    "views": """
        CREATE VIEW theirs AS SELECT mesh_id, mesh_name, count(*) FROM mesh GROUP BY mesh_id;
        CREATE MATERIALIZED VIEW theirs_2 AS SELECT * FROM mesh_messages
    """,
    "a function of a row": "CREATE FUNCTION theirs(mesh_state) RETURNS int LANGUAGE sql RETURN 1",
    "a foreign key": """
        CREATE TABLE theirs (node text CONSTRAINT theirs_fk REFERENCES nodes (node_id) MATCH FULL ON UPDATE CASCADE
            ON DELETE SET NULL DEFERRABLE INITIALLY DEFERRED);
        INSERT INTO theirs SELECT node_id FROM nodes;
        COMMENT ON CONSTRAINT theirs_fk ON theirs IS 'of theirs'
    """,
    "a foreign key to an index": """
        CREATE TABLE theirs (entry bigint CONSTRAINT theirs_fk REFERENCES mesh_consensus_log (index));
        INSERT INTO theirs SELECT index FROM mesh_consensus_log
    """,
    "a foreign key of a partitioned table": """
        CREATE SCHEMA theirs;
        CREATE TABLE theirs."Nodes" (node text REFERENCES nodes, part int) PARTITION BY LIST (part);
        CREATE TABLE theirs.one PARTITION OF theirs."Nodes" FOR VALUES IN (1);
        INSERT INTO theirs."Nodes" SELECT node_id, 1 FROM nodes
    """,
    "a foreign key that was never validated": """
        CREATE TABLE theirs (node text);
        INSERT INTO theirs VALUES ('of old');
        ALTER TABLE theirs ADD CONSTRAINT theirs_fk FOREIGN KEY (node) REFERENCES nodes NOT VALID
    """,
    "foreign keys among ours": """
        ALTER TABLE mesh_state ADD COLUMN theirs varchar(64) REFERENCES mesh_node_state DEFERRABLE;
        ALTER TABLE mesh ADD COLUMN theirs text REFERENCES routes ON DELETE CASCADE
    """,
    "a foreign key to theirs": """
        CREATE TABLE theirs (name text PRIMARY KEY);
        INSERT INTO theirs SELECT DISTINCT status FROM nodes;
        ALTER TABLE nodes ADD CONSTRAINT theirs_fk FOREIGN KEY (status) REFERENCES theirs
    """,
    "an inheriting table": "CREATE TABLE theirs () INHERITS (mesh_state); INSERT INTO theirs VALUES ('t', '')",
}  # fmt: skip


@pytest.mark.parametrize("what", STAYS)
def test_what_others_have_put_onto_the_tables_stays(other: Server, bare: Server, made: Path, what: str) -> None:
    backup.restore(bare, made)
    run(other, STAYS[what])
    before = definition(other)
    theirs = texts(other, "SELECT t::text FROM theirs AS t") if "CREATE TABLE theirs (" in STAYS[what] else []
    backup.restore(other, made, overwrite=True)
    assert definition(other) == before
    if theirs:
        assert texts(other, "SELECT t::text FROM theirs AS t") == theirs
    rows, expected = contents(other), contents(bare)
    assert {table: len(found) for table, found in rows.items()} == Manifest.read(made).rows
    assert rows["mesh_messages"] == expected["mesh_messages"]
    if "column" not in what and "among" not in what:
        assert rows == expected


def test_without_overwrite_it_stays_too(other: Server, made: Path) -> None:
    run(
        other,
        "TRUNCATE mesh, nodes, routes, mesh_messages, mesh_state, mesh_node_state, mesh_consensus_log,"
        " mesh_consensus_log_stale, mesh_routing_table, mesh_runtime_config, mesh_deliveries, mesh_delivery_lanes",
        STAYS["grants on columns"],
        STAYS["row level security without policies"],
    )
    before = definition(other)
    backup.restore(other, made)
    assert definition(other) == before
    assert {table: len(rows) for table, rows in contents(other).items()} == Manifest.read(made).rows


def test_triggers_are_not_fired_and_stay_as_they_are(server: Server, made: Path) -> None:
    run(
        server,
        "CREATE TABLE fired (what text)",
        "CREATE FUNCTION theirs() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN INSERT INTO fired VALUES (TG_NAME || TG_OP); RETURN NULL; END $$",
        *(
            f"CREATE TRIGGER {name} {when} ON mesh_state {each} EXECUTE FUNCTION theirs()"
            for name, when, each in [
                ("plain", "BEFORE INSERT OR DELETE", "FOR EACH ROW"),
                ('"Always"', "AFTER INSERT", "FOR EACH ROW"),
                ("replica", "AFTER INSERT", "FOR EACH STATEMENT"),
                ("disabled", "AFTER INSERT", "FOR EACH STATEMENT"),
                ("emptied", "BEFORE TRUNCATE", "FOR EACH STATEMENT"),
            ]
        ),
        "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON mesh_state DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION theirs()",
        'ALTER TABLE mesh_state ENABLE ALWAYS TRIGGER "Always", ENABLE REPLICA TRIGGER replica,'
        " DISABLE TRIGGER disabled",
    )
    before = definition(server)
    backup.restore(server, made, overwrite=True)
    assert definition(server) == before
    assert texts(server, "SELECT what FROM fired") == []
    assert len(contents(server)["mesh_state"]) == Manifest.read(made).rows["mesh_state"]
    run(server, "INSERT INTO mesh_state VALUES ('k', '')")
    assert texts(server, "SELECT what FROM fired") == ["plainINSERT"]


def test_rows_of_others_that_no_longer_hold_refuse_the_restore_by_name(server: Server, made: Path) -> None:
    run(
        server,
        "CREATE TABLE theirs (id text CONSTRAINT theirs_fk REFERENCES mesh_messages (id))",
        'CREATE SCHEMA more; CREATE TABLE more."Theirs" (k text CONSTRAINT "of more" REFERENCES mesh_state)',
        "INSERT INTO theirs VALUES ('later')",
        "INSERT INTO more.\"Theirs\" VALUES ('later')",
    )
    before, rows = definition(server), contents(server)
    with pytest.raises(MissingReferenceError) as error:
        backup.restore(server, made, overwrite=True)
    message = str(error.value)
    assert "theirs_fk of public.theirs" in message
    assert '"of more" of more."Theirs"' in message
    assert "nothing was changed" in message
    assert "later" not in message.removesuffix(" later")
    assert error.value.constraint in {"theirs_fk", "of more"}
    assert error.value.sqlstate == "23503"
    assert (definition(server), contents(server)) == (before, rows)


DOES_NOT_FIT = {
    "a check": ("DELETE FROM mesh_state; ALTER TABLE mesh_state ADD CONSTRAINT theirs CHECK (key = 'later')", "theirs"),
    "a column that must be given": (("ALTER TABLE mesh_state ADD COLUMN theirs int; UPDATE mesh_state SET theirs = 1;"
                                    "ALTER TABLE mesh_state ALTER theirs SET NOT NULL"), "theirs"),
    "a unique index": (
        "DELETE FROM mesh_messages WHERE id <> 'later'; CREATE UNIQUE INDEX theirs ON mesh_messages ((1))", "theirs"
    ),
    "an exclusion": (
        ("DELETE FROM mesh_messages WHERE id <> 'later';"
        "ALTER TABLE mesh_messages ADD CONSTRAINT theirs EXCLUDE ((1) WITH =)"), "theirs",
    ),
    "another type": (
        "DELETE FROM mesh_messages; ALTER TABLE mesh_messages ALTER from_node TYPE int USING 1",
        r"public\.mesh_messages",
    ),
    "a shorter column": (
        "DELETE FROM mesh; ALTER TABLE mesh ALTER mesh_name TYPE varchar(1)",
        r"public\.mesh ",
    ),
    "a column that is gone": ("ALTER TABLE mesh_messages DROP COLUMN created_at", "mesh_messages.created_at"),
}  # fmt: skip


@pytest.mark.parametrize("what", DOES_NOT_FIT)
def test_rows_that_do_not_fit_refuse_the_restore_by_name(server: Server, made: Path, what: str) -> None:
    statement, name = DOES_NOT_FIT[what]
    run(server, statement)
    before, rows = definition(server), contents(server)
    with pytest.raises(ConflictError, match=name) as error:
        backup.restore(server, made, overwrite=True)
    assert "nothing was changed" in str(error.value)
    assert (definition(server), contents(server)) == (before, rows)


def test_columns_that_a_backup_lacks_get_a_word(server: Server, made: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(server, 'ALTER TABLE mesh_state ADD COLUMN "Their column" int DEFAULT 7')
    with caplog.at_level(logging.WARNING, "mesh_storage"):
        backup.restore(server, made, overwrite=True)
    assert "mesh_state.Their column" in caplog.text
    assert set(texts(server, 'SELECT "Their column" FROM mesh_state')) == {7}


def test_their_columns_come_back_with_what_they_held(storage: MeshStorage, server: Server, tmp_path: Path) -> None:
    fill(storage)
    run(
        server,
        "ALTER TABLE mesh_state ADD COLUMN \"in (), order\" bigserial UNIQUE, ADD COLUMN theirs int[] DEFAULT '{1,2}'",
    )
    before = contents(server)
    storage.backup(tmp_path / "backup")
    run(server, "UPDATE mesh_state SET theirs = NULL", 'ALTER SEQUENCE "mesh_state_in (), order_seq" RESTART 1')
    backup.restore(server, tmp_path / "backup", overwrite=True)
    assert contents(server) == before
    # Numbers go on behind those that came back.
    run(server, "INSERT INTO mesh_state (key, value) VALUES ('new', '')")


def test_what_a_new_database_does_not_get_is_told(
    storage: MeshStorage, other: Server, bare: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(
        other,
        STAYS["a policy"],
        STAYS["a rule"].replace("theirs", "their_rule"),
        "CREATE TRIGGER their_trigger BEFORE UPDATE ON mesh_state"
        " FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()",
    )
    storage.backup(tmp_path / "backup")
    with caplog.at_level(logging.WARNING, "mesh_storage"):
        backup.restore(bare, tmp_path / "backup")
    for name in ("POLICY public mesh_state theirs", "RULE public mesh_state their_rule", "mesh_state their_trigger",
                 "ROW SECURITY public mesh_state"):  # fmt: skip
        assert name in caplog.text


@pytest.mark.parametrize("lost", ["mesh_state", "nodes CASCADE", "mesh_messages, routes, mesh_consensus_log_stale"])
def test_a_table_that_is_gone_comes_back_and_the_others_stay(
    other: Server, bare: Server, made: Path, lost: str
) -> None:
    run(other, STAYS["grants on columns"], STAYS["storage settings"].replace("mesh_state", "mesh_node_state")
        .replace("ALTER value", "ALTER state").replace("ALTER key", "ALTER node_id"))  # fmt: skip
    before = definition(other)
    run(other, f"DROP TABLE {lost}")
    with pytest.raises(ConflictError, match="overwrite"):
        backup.restore(other, made)
    backup.restore(other, made, overwrite=True)
    backup.restore(bare, made)
    assert contents(other) == contents(bare)
    assert definition(other) == before


@pytest.mark.parametrize("revision", ["0001", "0005", "0008"])
def test_it_stays_with_a_backup_of_another_revision(
    storage: MeshStorage, other: Server, tmp_path: Path, revision: str
) -> None:
    fill(storage)
    head = backup.backup(other, tmp_path / "new")
    command.downgrade(schema.alembic_config(other.connect), revision)
    backup.backup(other, tmp_path / "old")
    schema.upgrade_server(other)
    run(
        other,
        STAYS["a policy"],
        STAYS["grants on columns"],
        STAYS["no right of the owner"],
        STAYS["indexes"],
        STAYS["a foreign key"]
        .replace("TABLE theirs", "TABLE their_table")
        .replace("INTO theirs", "INTO their_table")
        .replace("ON theirs", "ON their_table"),
        STAYS["a column"],
    )
    before = unordered(other)
    backup.restore(other, tmp_path / "old", overwrite=True)
    assert unordered(other) == before
    command.downgrade(schema.alembic_config(other.connect), revision)
    backup.restore(other, tmp_path / "new", overwrite=True)
    assert unordered(other) == before
    assert {table: len(rows) for table, rows in contents(other).items()} == head.rows


def test_what_the_older_revision_has_no_table_or_column_for_refuses_the_restore_by_name(
    storage: MeshStorage, other: Server, tmp_path: Path
) -> None:
    fill(storage)
    command.downgrade(schema.alembic_config(other.connect), "0001")
    backup.backup(other, tmp_path / "old")
    schema.upgrade_server(other)
    for statement, undo, name in [
        (f'GRANT SELECT ON mesh_consensus_log_stale TO "{OTHER}"', "REVOKE ALL ON mesh_consensus_log_stale FROM ",
         "mesh_consensus_log_stale"),
        (f'GRANT SELECT (mesh_public_key) ON mesh TO "{OTHER}"', "REVOKE ALL (mesh_public_key) ON mesh FROM ",
         "mesh.mesh_public_key"),
        (f'ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO "{OTHER}"',
         "ALTER DEFAULT PRIVILEGES REVOKE ALL ON TABLES FROM ", "mesh_consensus_log_stale, which default privileges"),
    ]:  # fmt: skip
        run(other, statement)
        before, rows = definition(other), contents(other)
        with pytest.raises(ConflictError, match=name):
            backup.restore(other, tmp_path / "old", overwrite=True)
        assert (definition(other), contents(other)) == (before, rows)
        run(other, f'{undo} "{OTHER}"')
    run(other, "CREATE VIEW theirs AS SELECT mesh_public_key FROM mesh")
    before, rows = definition(other), contents(other)
    with pytest.raises(ConflictError, match="theirs"):
        backup.restore(other, tmp_path / "old", overwrite=True)
    assert (definition(other), contents(other)) == (before, rows)


def test_tables_that_are_no_ordinary_ones_are_refused(
    storage: MeshStorage, server: Server, made: Path, tmp_path: Path
) -> None:
    del storage
    run(
        server,
        "DROP TABLE mesh_state",
        "CREATE TABLE mesh_state (key varchar(255) NOT NULL, value bytea NOT NULL, created_at timestamptz,"
        " updated_at timestamptz) PARTITION BY LIST (key)",
        "CREATE TABLE mesh_state_1 PARTITION OF mesh_state DEFAULT",
        "INSERT INTO mesh_state VALUES ('k', 'v')",
    )
    with pytest.raises(SchemaMismatchError, match=r"mesh_state.*partitioned"):
        backup.backup(server, tmp_path / "other")
    with pytest.raises(SchemaMismatchError, match=r"mesh_state.*partitioned"):
        backup.restore(server, made, overwrite=True)
    assert texts(server, "SELECT key FROM mesh_state") == ["k"]


def test_rows_in_tables_that_inherit_are_not_left_out_of_a_backup_without_a_word(
    server: Server, tmp_path: Path
) -> None:
    run(server, "CREATE TABLE theirs () INHERITS (mesh_state)")
    backup.backup(server, tmp_path / "empty")
    run(server, "INSERT INTO theirs VALUES ('k', 'v')")
    with pytest.raises(ConflictError, match=r"public\.theirs"):
        backup.backup(server, tmp_path / "backup")


@pytest.mark.parametrize("former", ["backup", "database", "both"])
def test_the_version_table_may_have_its_former_name(
    storage: MeshStorage, server: Server, bare: Server, tmp_path: Path, former: str
) -> None:
    fill(storage)
    rename, back = (
        f"ALTER TABLE {old} RENAME TO {new}; ALTER TABLE {new} RENAME CONSTRAINT {old}_pkc TO {new}_pkc"
        for old, new in [("mesh_alembic_version", "alembic_version"), ("alembic_version", "mesh_alembic_version")]
    )
    configuration = schema.alembic_config(server.connect)
    command.downgrade(configuration, "0009")  # the last revision with the former name
    run(server, "GRANT SELECT ON mesh_alembic_version TO PUBLIC")
    schema.upgrade_server(server)
    before, rows = definition(server), contents(server)
    command.downgrade(configuration, "0009")
    if former != "database":
        run(server, rename)
    backup.backup(server, tmp_path / "backup", verify=True)
    if former == "backup":
        run(server, back)
    elif former == "database":
        run(server, rename)
    backup.restore(server, tmp_path / "backup", overwrite=True)
    assert (definition(server), contents(server)) == (before, rows)
    backup.restore(bare, tmp_path / "backup")
    assert contents(bare) == rows


def test_a_backup_goes_into_what_a_downgrade_has_left(
    storage: MeshStorage, server: Server, bare: Server, made: Path
) -> None:
    del storage
    backup.restore(bare, made)
    before = definition(server)
    command.downgrade(schema.alembic_config(server.connect), "base")
    assert set(contents(server)) == {"mesh_alembic_version"}
    backup.restore(server, made)
    assert (definition(server), contents(server)) == (before, contents(bare))


def test_a_backup_goes_into_tables_that_were_never_adopted(server: Server, bare: Server, made: Path) -> None:
    backup.restore(bare, made)
    run(server, "CREATE DOMAIN ulid AS text")  # so that a downgrade leaves the tables to the Go service
    before = definition(server)
    command.downgrade(schema.alembic_config(server.connect), "base")
    run(server, "DROP TABLE mesh_alembic_version")
    with pytest.raises(ConflictError, match="overwrite"):
        backup.restore(server, made)
    backup.restore(server, made, overwrite=True)
    assert (definition(server), contents(server)) == (before, contents(bare))


def test_some_tables_without_a_revision_are_not_taken_for_ours(server: Server, bare: Server, made: Path) -> None:
    run(bare, "CREATE TABLE nodes (id int)")
    with pytest.raises(ConflictError, match="nodes exist at revision none"):
        backup.restore(bare, made, overwrite=True)
    assert texts(bare, "SELECT count(*)::text FROM nodes") == ["0"]
    run(server, "DROP TABLE mesh_state", "UPDATE mesh_alembic_version SET version_num = '0008'")
    with pytest.raises(ConflictError, match=r"at revision 0008, but not mesh_state"):
        backup.restore(server, made, overwrite=True)
