"""Distributes databases of plain PostgreSQL, with a stand-in for Citus: what is said before, done, and refused."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Self, cast

import psycopg
import pytest

from mesh_storage import MeshStorage, schema
from mesh_storage.cli import Exit, main
from mesh_storage.errors import (
    AlreadyExistsError,
    ConfigurationError,
    ConflictError,
    InvalidInputError,
    MeshStorageError,
    SchemaMismatchError,
    StorageTimeoutError,
)
from mesh_storage.schema import distribution, migration
from mesh_storage.schema.distribution import COLUMNS, LOCAL
from mesh_storage.schema.tables import by_psycopg
from tests.repositories.test_round_trips import message

pytestmark = pytest.mark.one_server  # They distribute it themselves.
LACKING_HERE = "the extension citus is not there"
MESSAGES = """'"public"."mesh_messages"'"""
DELIVERIES = """'"public"."mesh_deliveries"'"""
STEP = re.compile(r"(?:CREATE|ALTER|DROP|SELECT (?:create_|citus_|truncate_))")
MADE = re.compile(r"SELECT (create_distributed_table|citus_add_local|truncate_local)\w*\('\"public\".\"(\w+)\"'")
LIMITS = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")


class Citus:
    """What a server with Citus says and does, as far as it is not plain PostgreSQL."""

    def __init__(self) -> None:
        self.methods: dict[str, str] = {}
        self.nodes = [(0, False), (1, True)]
        self.parameters = {"wal_level": "logical"}
        self.before: dict[str, Callable[[], object]] = {}
        """What others do once before a statement that contains this."""
        self.limits: dict[str, dict[str, str]] = {}
        """The statements that were carried out, each with the limits of its session."""
        self.asked: list[str] = []
        """All statements."""

    @property
    def done(self) -> list[str]:
        return list(self.limits)

    def answer(self, query: str) -> str | None:
        """Return a query with the same answer for plain PostgreSQL; None for one that may be asked there."""
        if "extname = 'citus'" in query:
            return "SELECT"
        if "pg_catalog.pg_dist_partition" in query and not query.startswith("SELECT citus_"):
            known = (f"('{table}'::regclass::oid::bigint, '{method}'::text)" for table, method in self.methods.items())
            return f"SELECT * FROM (VALUES (0::bigint, ''), {', '.join(known)}) AS v WHERE column1 > 0".replace(
                ", )", ")"
            )
        if "FROM pg_catalog.pg_dist_node" in query:
            return f"VALUES {', '.join(map(str, self.nodes))}"
        if "'output_plugin_libraries'" in query:
            return f"VALUES {', '.join(map(str, self.parameters.items()))}"
        if "pg_relation_size" in query:
            return "VALUES (0)"
        if (made := MADE.match(query)) is None:
            return None
        if made[1] != "truncate_local":
            self.methods[made[2]] = "h" if made[1] == "create_distributed_table" else "n"
        return "SELECT"


class Session:
    """A connection to the stand-in."""

    def __init__(self, citus: Citus, connection: psycopg.Connection[Any]) -> None:
        self._citus, self._connection = citus, connection

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def transaction(self) -> AbstractContextManager[object]:
        return self._connection.transaction()

    def execute(self, given: bytes | str, *parameters: Any) -> Any:
        query = given if isinstance(given, str) else given.decode()
        self._citus.asked.append(query)
        if STEP.match(query):
            for part in [part for part in self._citus.before if part in query]:
                self._citus.before.pop(part)()
            shown = {name: self._connection.execute(f"SHOW {name}".encode()).fetchone() for name in LIMITS}
            self._citus.limits[query] = {name: row[0] for name, row in shown.items() if row}
        return self._connection.execute((self._citus.answer(query) or query).encode(), *parameters)


@pytest.fixture
def citus(monkeypatch: pytest.MonkeyPatch) -> Citus:
    made, connect = Citus(), migration.connect
    monkeypatch.setattr(migration, "connect", lambda arguments: Session(made, connect(arguments)))
    return made


@pytest.fixture
def admin(mesh_storage_url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(mesh_storage_url, autocommit=True) as connection:
        yield connection


@contextmanager
def role(admin: psycopg.Connection[Any], *rights: str) -> Iterator[str]:
    """Make a role with these rights; yield the options of a URL by which sessions become it."""
    name = f"spreader_{os.getpid()}"
    admin.execute(f"CREATE ROLE {name}".encode())
    try:
        for right in rights:
            admin.execute(f"{right} {name}".encode())
        yield f"&options=-crole%3D{name}"
    finally:
        admin.execute(f"REASSIGN OWNED BY {name} TO CURRENT_USER; DROP OWNED BY {name}; DROP ROLE {name}".encode())


def lacking(url: str) -> list[str]:
    return [each for each in schema.distribute(url, apply=False).lacking if not each.startswith(LACKING_HERE)]


def test_a_plain_server_is_told_what_it_lacks_and_is_not_changed(mesh_storage_url: str) -> None:
    planned = schema.distribute(mesh_storage_url, apply=False)
    assert any(each.startswith(LACKING_HERE) for each in planned.lacking)
    assert planned.statements[0].startswith("CREATE UNIQUE INDEX CONCURRENTLY mesh_messages_to_node_id_key")
    assert [each for each in planned.statements if "create_distributed_table_concurrently" in each] == [
        f"SELECT create_distributed_table_concurrently({MESSAGES}, 'to_node', colocate_with => {DELIVERIES})"
    ]
    local = [each for each in planned.statements if "citus_add_local_table_to_metadata" in each]
    assert len(local) == len(LOCAL)
    with pytest.raises(ConfigurationError, match=LACKING_HERE):
        schema.distribute(mesh_storage_url)
    assert schema.distribute(mesh_storage_url, apply=False) == planned


def test_all_is_done_and_then_nothing_is_left(
    mesh_storage_url: str, citus: Citus, capsys: pytest.CaptureFixture[str]
) -> None:
    planned = schema.distribute(mesh_storage_url)
    assert citus.done == [*planned.statements]
    assert {table for table, method in citus.methods.items() if method == "h"} == {*COLUMNS}
    citus.nodes = []  # which stands against nothing any more
    assert schema.distribute(mesh_storage_url) == schema.Distribution((), (), ())
    assert main(["distribute", "--dry-run", "--url", mesh_storage_url]) == Exit.OK
    assert capsys.readouterr().out == "nothing is left to do\n"
    assert main(["distribute", "--url", mesh_storage_url]) == Exit.OK


def test_no_limit_of_a_service_ends_it_and_whoever_it_holds_up_waits_for_3_s(
    mesh_storage_url: str, citus: Citus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESH_STORAGE_STATEMENT_TIMEOUT", "1")
    monkeypatch.setenv("MESH_STORAGE_LOCK_TIMEOUT", "1")
    schema.distribute(mesh_storage_url)
    for statement, limits in citus.limits.items():
        assert limits == {
            "statement_timeout": "0",
            "lock_timeout": "0" if " INDEX CONCURRENTLY " in statement else "3s",
            "idle_in_transaction_session_timeout": "0",
        }, statement


def test_it_goes_on_where_it_was(mesh_storage_url: str, citus: Citus) -> None:
    citus.methods = {"mesh_messages": "h", "mesh_state": "n"}
    made = schema.distribute(mesh_storage_url, apply=False)
    assert not made.lacking
    assert not [each for each in made.statements if "_concurrently('" in each]
    assert len([each for each in made.statements if "create_distributed_table(" in each]) == 3
    local = [each for each in made.statements if "citus_add_local_table_to_metadata" in each]
    assert len(local) == len(LOCAL) - 1
    assert not any('"mesh_state"' in each for each in local)


def test_it_is_locked_before_it_is_examined(mesh_storage_url: str, citus: Citus) -> None:
    def distribute_too() -> None:
        with pytest.raises(ConflictError, match="another process") as caught:
            schema.distribute(mesh_storage_url)
        assert caught.value.retryable
        assert schema.distribute(mesh_storage_url, apply=False).steps

    citus.before["DROP CONSTRAINT"] = distribute_too
    schema.distribute(mesh_storage_url)
    assert not citus.before
    assert "pg_try_advisory_lock" in citus.asked[0]


def test_a_table_that_is_gone_is_named(mesh_storage_url: str, admin: psycopg.Connection[Any]) -> None:
    admin.execute("DROP TABLE mesh_delivery_lanes")
    with pytest.raises(SchemaMismatchError, match="missing: mesh_delivery_lanes"):
        schema.distribute(mesh_storage_url, apply=False)


def test_an_index_that_was_left_invalid_is_made_anew(mesh_storage_url: str, admin: psycopg.Connection[Any]) -> None:
    admin.execute("CREATE INDEX mesh_messages_id_idx ON mesh_messages (id)")
    admin.execute("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'mesh_messages_id_idx'::regclass")
    planned = schema.distribute(mesh_storage_url, apply=False).statements
    assert planned[0] == 'DROP INDEX CONCURRENTLY "public"."mesh_messages_id_idx"'
    assert 'CREATE INDEX CONCURRENTLY mesh_messages_id_idx ON "public"."mesh_messages" (id)' in planned


@pytest.mark.usefixtures("citus")
def test_a_primary_key_of_another_name_is_swapped_as_well(
    mesh_storage_url: str, admin: psycopg.Connection[Any]
) -> None:
    admin.execute('ALTER TABLE mesh_messages RENAME CONSTRAINT mesh_messages_pkey TO "Theirs"')
    schema.distribute(mesh_storage_url)
    named = "SELECT conname FROM pg_constraint WHERE conrelid = 'mesh_messages'::regclass AND contype = 'p'"
    assert admin.execute(named).fetchall() == [("mesh_messages_pkey",)]


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ("CREATE TABLE t (id varchar(64) REFERENCES mesh_node_state)", "t has the foreign key or trigger t_id_fkey"),
        ("CREATE VIEW v AS SELECT receiver FROM mesh_deliveries", "view v depends on mesh_deliveries.receiver, whose"),
        (
            "CREATE RULE r AS ON UPDATE TO mesh_delivery_lanes WHERE old.receiver = 'x' DO ALSO NOTHING",
            "rule r on table mesh_delivery_lanes depends on mesh_delivery_lanes.receiver, whose type changes: drop it",
        ),
        (
            "CREATE POLICY p ON mesh_deliveries USING (receiver = 'x')",
            "policy p on table mesh_deliveries depends on mesh_deliveries.receiver, whose type changes: drop it",
        ),
        (
            "ALTER TABLE mesh_deliveries ADD upper text GENERATED ALWAYS AS (upper(receiver)) STORED",
            "column upper of table mesh_deliveries depends on mesh_deliveries.receiver, whose type changes: drop it",
        ),
        (
            "CREATE VIEW v AS SELECT id, timestamp FROM mesh_messages GROUP BY id",
            "view v depends on the primary key of mesh_messages, which changes: drop it",
        ),
        ("CREATE UNIQUE INDEX i ON mesh_messages (id, timestamp)", "mesh_messages has .* constraint i without to_node"),
        ("CREATE UNIQUE INDEX i ON mesh_messages (id) INCLUDE (to_node)", "constraint i without to_node: drop it, or"),
        ("CREATE UNIQUE INDEX i ON mesh_deliveries (seq)", "mesh_deliveries has .* constraint i without receiver"),
        (
            "CREATE UNIQUE INDEX i ON mesh_node_state (updated_at)",
            "mesh_node_state has .* constraint i without node_id",
        ),
        (
            "ALTER TABLE mesh_messages ADD CONSTRAINT e EXCLUDE USING btree (id WITH =)",
            "mesh_messages has the unique index or exclusion constraint e without to_node: drop it, or add to_node",
        ),
        (
            "CREATE POLICY p ON mesh_messages USING (from_node IN (SELECT id FROM nodes))",
            "mesh_messages has the policy p with a subquery, which Citus does not take: drop it",
        ),
        ("CREATE TABLE child () INHERITS (mesh_messages)", "child inherits from mesh_messages, .* NO INHERIT"),
        ("ALTER TABLE mesh_messages REPLICA IDENTITY NOTHING", "mesh_messages.* REPLICA IDENTITY DEFAULT"),
        (
            (
                'CREATE COLLATION c FROM "C"; ALTER TABLE mesh_node_state ALTER node_id TYPE varchar(64) COLLATE c; '
                "UPDATE pg_collation SET collisdeterministic = false WHERE collname = 'c'"
            ),
            "mesh_node_state.node_id has a nondeterministic collation, .*: change it",
        ),
    ],
)
def test_what_others_have_added_is_named_before_anything_is_changed(
    mesh_storage_url: str, citus: Citus, admin: psycopg.Connection[Any], theirs: str, said: str
) -> None:
    assert not schema.distribute(mesh_storage_url, apply=False).lacking
    admin.execute(theirs.encode())
    with pytest.raises(ConfigurationError, match=said):
        schema.distribute(mesh_storage_url)
    (line,) = lacking(mesh_storage_url)
    assert re.search(said, line)
    assert not citus.done


def test_what_goes_with_the_tables_is_in_the_way_of_nothing(
    mesh_storage_url: str, citus: Citus, admin: psycopg.Connection[Any]
) -> None:
    admin.execute("CREATE VIEW v AS SELECT id FROM mesh_messages")
    admin.execute("CREATE UNIQUE INDEX i ON mesh_messages (timestamp, to_node, id)")
    admin.execute("CREATE POLICY p ON mesh_messages USING (from_node = 'x')")
    schema.distribute(mesh_storage_url)
    assert len(citus.methods) == len(schema.tables.TABLES)


@pytest.mark.usefixtures("citus")
@pytest.mark.parametrize("kind", ['character varying COLLATE "C"', 'text COLLATE "C"', "text", "character varying"])
def test_the_receivers_get_the_type_and_collation_of_the_to_node(
    mesh_storage_url: str, admin: psycopg.Connection[Any], kind: str
) -> None:
    admin.execute(f"ALTER TABLE mesh_messages ALTER to_node TYPE {kind}".encode())
    schema.distribute(mesh_storage_url)
    types = admin.execute(
        "SELECT DISTINCT atttypid, attcollation FROM pg_attribute WHERE (attrelid::regclass::text, attname) "
        "IN (('mesh_messages', 'to_node'), ('mesh_deliveries', 'receiver'), ('mesh_delivery_lanes', 'receiver'))"
    ).fetchall()
    assert len(types) == 1
    assert not schema.distribute(mesh_storage_url, apply=False).steps


@pytest.mark.usefixtures("citus")
def test_who_may_not_do_it_is_told_who_may(mesh_storage_url: str, admin: psycopg.Connection[Any]) -> None:
    with role(admin, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO") as options:
        said = "; ".join(lacking(mesh_storage_url + options))
        assert re.search(r"\w+ owns .*mesh_messages.*: run it as \w+", said)
        assert "may not create an index: GRANT CREATE ON SCHEMA" in said
        assert re.search("who owns the database, must run: ALTER DATABASE .* SET citus.multi_shard_modify_mode", said)


@pytest.mark.usefixtures("citus")
def test_rows_that_are_hidden_are_not_taken_for_none(mesh_storage_url: str, admin: psycopg.Connection[Any]) -> None:
    owned = [f"ALTER TABLE {table} OWNER TO" for table in schema.tables.TABLES]
    with role(admin, "GRANT CREATE ON SCHEMA public TO", *owned) as options:
        admin.execute("ALTER TABLE mesh_deliveries ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
        assert [each for each in lacking(mesh_storage_url + options) if "owns the database" not in each] == [
            "row level security hides rows of mesh_deliveries: ALTER TABLE mesh_deliveries NO FORCE ROW LEVEL SECURITY"
        ]


def test_the_parameters_of_the_coordinator_are_said_where_they_may_be_seen(mesh_storage_url: str, citus: Citus) -> None:
    citus.parameters = {"wal_level": "replica", "output_plugin_libraries": "pgoutput"}
    assert lacking(mesh_storage_url) == [
        "wal_level must be logical on the coordinator, not replica",
        "output_plugin_libraries must contain citus on the coordinator, not 'pgoutput' alone",
    ]
    citus.parameters = {"wal_level": "logical", "output_plugin_libraries": "pgoutput, citus"}
    assert not lacking(mesh_storage_url)


def test_a_cluster_without_workers_lacks_them(mesh_storage_url: str, citus: Citus) -> None:
    citus.nodes = [(5, False)]
    said = lacking(mesh_storage_url)
    assert ["coordinator" in said[0], "no worker" in said[1], len(said)] == [True, True, 2]


def test_a_message_to_others_is_looked_for_again_while_nobody_can_send_one(
    mesh_storage_url: str, citus: Citus, storage: MeshStorage
) -> None:
    def send() -> None:
        with storage.begin() as uow:
            uow.messages.send(message(1, "b"), receivers=["audit"])

    citus.before["DROP CONSTRAINT"] = send
    with pytest.raises(ConfigurationError, match="to others than the to_node of their message: let"):
        schema.distribute(mesh_storage_url)
    with storage.begin() as uow:
        assert uow.messages.purge(2**40) == 0
        uow.messages.send(message(2, "b"), receivers=["audit"])  # as before
    with storage.begin() as uow:
        claimed = uow.messages.claim("audit", limit=2)
        assert [each.message.content for each in claimed] == [message(number).content for number in (1, 2)]
        uow.messages.ack(claimed)
    schema.distribute(mesh_storage_url)
    assert {*COLUMNS} <= {*citus.methods}
    with storage.unit_of_work() as uow, pytest.raises(InvalidInputError, match="to_node only"):
        uow.messages.send(message(3, "b"), receivers=["audit"])


def test_an_id_for_two_receivers_is_no_message_to_others(
    mesh_storage_url: str, citus: Citus, storage: MeshStorage
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    citus.before["CREATE INDEX"] = stop
    with pytest.raises(KeyboardInterrupt):
        schema.distribute(mesh_storage_url)
    with storage.begin() as uow:
        uow.messages.send(message(1, "b"))
        uow.messages.send(message(1, "c"))
    assert not lacking(mesh_storage_url)
    schema.distribute(mesh_storage_url)


def test_a_lock_that_is_not_free_is_tried_again(
    mesh_storage_url: str,
    citus: Citus,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(distribution, "LOCK_TIMEOUT_S", 0.01)
    with psycopg.connect(mesh_storage_url) as holder:
        holder.execute("LOCK TABLE mesh_deliveries IN ACCESS SHARE MODE")
        monkeypatch.setattr(migration, "LOCK_PATIENCE_S", 0.0)
        with pytest.raises(StorageTimeoutError, match=r"ALTER TABLE .*mesh_deliveries.*which does what is left"):
            schema.distribute(mesh_storage_url)
        monkeypatch.setattr(migration, "LOCK_PATIENCE_S", 300.0)
        with monkeypatch.context() as meanwhile, caplog.at_level(logging.INFO, "mesh_storage"):
            meanwhile.setattr(migration.time, "sleep", lambda _: holder.rollback())
            schema.distribute(mesh_storage_url)
    assert [each for each in caplog.records if getattr(each, "event", None) == "retry"]
    assert {*COLUMNS} <= {*citus.methods}


def test_a_step_that_fails_all_the_same_says_which_and_why(
    mesh_storage_url: str, citus: Citus, admin: psycopg.Connection[Any]
) -> None:
    citus.before["ALTER COLUMN"] = lambda: admin.execute("CREATE VIEW v AS SELECT receiver FROM mesh_deliveries")
    with pytest.raises(MeshStorageError) as caught:
        schema.distribute(mesh_storage_url)
    said = str(caught.value)
    assert said.startswith('ALTER TABLE "public"."mesh_deliveries" ALTER COLUMN receiver TYPE character varying: ')
    assert "(rule _RETURN on view v depends on column " in said  # its DETAIL
    assert said.endswith("Remove the cause, and distribute it again, which does what is left")
    assert caught.value.sqlstate == "0A000"
    admin.execute("DROP VIEW v")
    schema.distribute(mesh_storage_url)


def test_the_kind_of_a_failure_is_that_of_its_cause(
    mesh_storage_url: str, citus: Citus, admin: psycopg.Connection[Any]
) -> None:
    citus.before["CREATE INDEX CONCURRENTLY mesh_messages_id_idx"] = lambda: admin.execute(
        "CREATE TABLE mesh_messages_id_idx ()"
    )
    with pytest.raises(MeshStorageError, match=r"^CREATE INDEX CONCURRENTLY .*already exists") as caught:
        schema.distribute(mesh_storage_url)
    assert not isinstance(caught.value, AlreadyExistsError)
    assert isinstance(caught.value.__cause__, psycopg.Error)


def test_backups_and_restores_refuse_what_is_distributed_or_about_to_be(
    mesh_storage_url: str, storage: MeshStorage, admin: psycopg.Connection[Any], citus: Citus, tmp_path: Path
) -> None:
    session = by_psycopg(cast("Any", Session(citus, admin)))
    citus.methods = {"mesh_state": "n"}
    distribution.check_on_one_server(session)
    storage.backup(tmp_path / "before")
    citus.methods = {"mesh_messages": "h", "mesh_node_state": "h", "mesh_state": "n"}
    with pytest.raises(ConfigurationError, match="mesh_messages, mesh_node_state: distributed by Citus"):
        distribution.check_on_one_server(session)
    citus.methods = {}
    schema.distribute(mesh_storage_url)
    citus.methods = {}
    with pytest.raises(ConfigurationError, match=r"mesh_messages: .* run: mesh-storage distribute, which does what is"):
        storage.backup(tmp_path / "swapped")
    with pytest.raises(ConfigurationError, match=r"mesh_messages: .* run: mesh-storage distribute"):
        storage.restore(tmp_path / "before", overwrite=True)


def test_the_command_shows_what_it_changes_and_what_is_lacking(
    mesh_storage_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["distribute", "--dry-run", "--url", mesh_storage_url]) == Exit.CONFIGURATION
    said = capsys.readouterr().out
    assert all(f"  {each}\n" in said for each in distribution.CHANGES)
    assert LACKING_HERE in said
    assert "CREATE UNIQUE INDEX CONCURRENTLY mesh_messages_to_node_id_key" in said
    assert main(["distribute", "--url", mesh_storage_url]) == Exit.CONFIGURATION


def test_a_session_of_its_own_is_needed(mesh_storage_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_STORAGE_TRANSACTION_POOLING", "true")
    with pytest.raises(ConfigurationError, match=r"transaction_pooling.*distribution"):
        schema.distribute(mesh_storage_url, apply=False)
