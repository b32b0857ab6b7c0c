"""Holds every statement against the rules of Citus, and the steps of a distribution against plain PostgreSQL."""

from __future__ import annotations

import asyncio
import gc
import itertools
import re
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import text

from mesh_storage import MeshStorage, Message, schema
from mesh_storage.aio import AsyncMeshStorage
from mesh_storage.errors import InvalidInputError
from mesh_storage.health import Health
from mesh_storage.models.base import Base
from mesh_storage.postgres.connection import UnitOfWorkConnection
from mesh_storage.postgres.statement import Statement
from mesh_storage.repositories import queueing, removal
from mesh_storage.schema import distribution
from mesh_storage.schema.distribution import COLUMNS, LOCAL
from tests.repositories.test_round_trips import METHODS, REPOSITORIES, fill, message

SCALING = Path(__file__).parents[2] / "docs" / "scaling.md"
TABLES = "|".join(COLUMNS)
COLUMN = "|".join(sorted({*COLUMNS.values()}))
READ = re.compile(rf"\b(?:FROM|JOIN|UPDATE|USING) (?:{TABLES})\b")
WRITTEN = re.compile(rf"\bINSERT INTO (?:{TABLES})\b")
PINNED = re.compile(rf"\b(?:{COLUMN}) = (?:CAST)?\(?(?:%\(\w+\)|d\.receiver\b)")
SET = re.compile(r"\bSET (.*?)(?= FROM | WHERE | RETURNING |$)")
MOMENT = "(SELECT clock_timestamp())"
CHANGING = re.compile(
    r"\b(?:now|clock_timestamp|nextval|random|extract|date_part|format)\(|\bCURRENT_TIMESTAMP\b", re.IGNORECASE
)
ORDER = ("none", "one", "those of its rows", "all", "refused")
REFUSED = ("messages.send to others", "messages.delete of a key of many receivers")
"""The second sends what it deletes."""
ONE_SERVER = (queueing.ENQUEUE[False], queueing.PURGE[False], removal.MESSAGES[False])
DELIVERIES = """'"public"."mesh_deliveries"'"""


def plain(statement: Statement) -> str:
    return " ".join(statement.sql.decode().split())


def statements() -> list[str]:
    """Return the text of every statement of the library that names a distributed table."""
    found = {plain(each) for each in gc.get_objects() if isinstance(each, Statement)}
    return sorted(each for each in found if re.search(rf"\b(?:{TABLES})\b", each))


def shards(sql: str) -> str:
    """Return the shards that a statement touches: a table is pinned to one by its distribution column."""
    read, pinned = len(READ.findall(sql)), len(PINNED.findall(sql))
    if not read and not WRITTEN.search(sql):
        return "none"
    if "ON CONFLICT (id)" in sql or (read > pinned and "FOR UPDATE" in sql):
        return "refused"
    if read > pinned:
        return "all"
    by_row = WRITTEN.search(sql) and "unnest(" in sql and "%(to_node)s" not in sql
    return "those of its rows" if by_row else "one"


def documented() -> dict[str, str]:
    """Return what docs/scaling.md says of each call."""
    rows = re.findall(r"^\| (none|one|those of its rows|all|refused) \| (.*) \|$", SCALING.read_text(), re.MULTILINE)
    return {name: label for label, names in rows for name in re.findall(r"`([^`]+)`", names)}


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return what is sent to the server from now on."""
    made: list[str] = []
    run = UnitOfWorkConnection._run

    def recorded(self: UnitOfWorkConnection, statement: Statement, parameters: Any) -> Any:
        made.append(plain(statement))
        return run(self, statement, parameters)

    monkeypatch.setattr(UnitOfWorkConnection, "_run", recorded)
    return made


@pytest.fixture
def keyed_url(mesh_storage_url: str) -> str:
    """Return the URL of a database after those steps of a distribution that plain PostgreSQL can do."""
    with psycopg.connect(mesh_storage_url, autocommit=True) as connection:
        for step in distribution.examine(connection).steps:
            if not any("citus" in each or "distribut" in each for each in step):
                with connection.transaction() if len(step) > 1 else nullcontext():
                    for statement in step:
                        connection.execute(statement.encode())
    return mesh_storage_url


def test_the_rules_see_every_statement_on_a_distributed_table() -> None:
    found = statements()
    assert all(any(re.search(rf"\b{table}\b", each) for each in found) for table in COLUMNS)
    assert len(found) > 40
    assert {plain(each) for each in ONE_SERVER} <= {*found}


def test_what_an_update_sets_is_immutable_or_one_moment() -> None:
    for sql in statements():
        for values in SET.findall(sql):
            assert not CHANGING.search(values.replace(MOMENT, "")), sql
            for inner in re.findall(r"CASE .*? END|\b(?:greatest|coalesce)\([^()]*(?:\([^()]*\))?[^()]*\)", values):
                assert MOMENT not in inner, sql


def test_rows_are_locked_in_one_shard_only() -> None:
    locking = [each for each in statements() if re.search(r"FOR (?:UPDATE|NO KEY UPDATE|SHARE)", each)]
    assert len(locking) > len(ONE_SERVER)
    for sql in locking:
        assert (shards(sql) == "one") != (sql in map(plain, ONE_SERVER)), sql
        assert not re.search(rf"\b(?:{COLUMN}) IN \(", sql), sql


def test_new_rows_are_counted_by_what_is_returned() -> None:
    inserting = [each for each in statements() if WRITTEN.match(each)]
    assert inserting
    for sql in inserting:
        assert "RETURNING" in sql, sql


def test_it_is_documented_how_many_shards_a_call_touches(keyed_url: str, sent: list[str]) -> None:
    found: dict[str, str] = {}
    with MeshStorage.open(keyed_url) as storage, storage.begin() as uow:
        fill(uow)
    for name, (work, _) in METHODS.items():
        refused = pytest.raises(InvalidInputError) if name in REFUSED else nullcontext()
        with MeshStorage.open(keyed_url) as storage, refused, storage.unit_of_work() as uow:
            sent.clear()
            work(uow)
        touched = max(map(shards, sent), key=ORDER.index)
        if touched != "none" and name != REFUSED[1]:
            found[name] = touched
    assert found == documented()
    assert {name.partition(".")[0] for name in METHODS} == {*REPOSITORIES}


def test_nobody_gets_a_message_of_the_same_id_to_another(keyed_url: str) -> None:
    with MeshStorage.open(keyed_url) as storage:
        with storage.begin() as uow:
            for receiver in ("b", "c"):
                for number in (1, 2):
                    uow.messages.send(Message(id=f"m-{number}", from_node="a", to_node=receiver, content=b""))
        with storage.begin() as uow:
            (buried,) = uow.messages.claim("b")
            uow.messages.bury([buried], reason="it cannot be handled")
        with psycopg.connect(keyed_url) as connection:  # beside this library
            connection.execute("DELETE FROM mesh_messages WHERE to_node = 'b'")
        with storage.begin() as uow:
            assert uow.messages.dead("b").items == uow.messages.dead().items == []
            assert uow.messages.claim("b", limit=10) == []
            assert {(found.message.to_node, found.receiver) for found in uow.messages.claim("c", limit=10)} == {
                ("c", "c")
            }


def test_every_table_is_distributed_or_stays() -> None:
    assert {*COLUMNS, *LOCAL} == {*schema.tables.TABLES}
    for name, table in Base.metadata.tables.items():
        across = {key.column.table.name in COLUMNS for key in table.foreign_keys}
        assert across <= {False}, name
        assert not (name in COLUMNS and table.foreign_keys), name


def test_afterwards_every_key_has_the_distribution_column_and_nothing_leads_across(keyed_url: str) -> None:
    with psycopg.connect(keyed_url) as connection:
        for table, column in COLUMNS.items():
            keys = connection.execute(
                "SELECT pg_get_indexdef(indexrelid) FROM pg_index WHERE indrelid = %s::regclass AND indisunique",
                [table],
            ).fetchall()
            assert keys
            assert all(re.search(rf"[(,] ?{column}\b", definition) for (definition,) in keys), keys
        made = distribution.examine(connection)
        types = connection.execute(
            "SELECT DISTINCT format_type(atttypid, NULL) FROM pg_attribute WHERE (attrelid::regclass::text, attname) "
            "IN (('mesh_messages', 'to_node'), ('mesh_deliveries', 'receiver'), ('mesh_delivery_lanes', 'receiver'))"
        ).fetchall()
    assert types == [("character varying",)]
    assert not [each for each in made.lacking if "foreign key or trigger" in each]
    first = next(each for each in made.statements if "create_distributed_table" in each)
    assert first.startswith(f"SELECT create_distributed_table({DELIVERIES}, 'receiver'")


def test_with_the_new_keys_all_calls_work_and_an_id_is_one_for_each_receiver(keyed_url: str) -> None:
    with MeshStorage.open(keyed_url) as storage:
        with storage.begin() as uow:
            fill(uow)
        for name, (work, _) in METHODS.items():
            with storage.unit_of_work() as uow:
                if name not in REFUSED:
                    work(uow)
        with storage.begin() as uow:
            assert uow.messages.store_many([message(1, "b"), message(2, "other")]) == 1
            uow.messages.store(message(1, "other"))
            assert uow.messages.count() == 3 + 3 + 2
            assert uow.messages.send_many([message(1, "other"), message(9, "other")]) == 2
            assert [each.message.to_node for each in uow.messages.claim("other", limit=10)] == ["other", "other"]
            assert not uow.messages.claim("b")
        with storage.unit_of_work() as uow, pytest.raises(InvalidInputError, match="to_node only"):
            uow.messages.send(message(20, "b"), receivers=["b", "c"])


@pytest.mark.parametrize("how", ["store", "send", "store_many", "send_many"])
def test_with_the_new_keys_a_message_to_another_receiver_is_no_conflict_whatever_becomes_of_ours(
    keyed_url: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    run, calls = UnitOfWorkConnection._run, itertools.count(1)

    def run_between(connection: Any, *args: Any) -> Any:
        if next(calls) == 2:  # behind the conflict, before it is read
            with psycopg.connect(keyed_url) as other:
                other.execute("DELETE FROM mesh_messages WHERE to_node = 'b'")
        return run(connection, *args)

    with MeshStorage.open(keyed_url) as storage:
        with storage.begin() as uow:
            uow.messages.store(message(1, "other"))
            uow.messages.store(message(1, "b"))
        monkeypatch.setattr(UnitOfWorkConnection, "_run", run_between)
        with storage.begin() as uow:
            given = message(1, "b")
            getattr(uow.messages, how)([given] if "many" in how else given)
        monkeypatch.undo()
        with storage.begin(read_only=True) as uow:
            left = 1 if how == "store_many" else 2  # which takes what is there for stored
            assert uow.messages.count() == left


def test_with_the_new_keys_old_messages_without_a_delivery_are_removed(keyed_url: str) -> None:
    with MeshStorage.open(keyed_url) as storage:
        with storage.begin() as uow:
            for to in ("b", "c"):
                uow.messages.store_many([message(number, to) for number in range(1, 4)])
            uow.messages.send(message(1, "b"))
            uow.messages.store(message(9, "b"))
        with storage.begin() as uow:
            assert uow.messages.purge(9, limit=1) == 1
            assert uow.messages.purge(9) == 4
            assert [(each.id, each.to_node) for each in uow.messages.stream()] == [("msg-1", "b"), ("msg-9", "b")]
            uow.messages.ack(uow.messages.claim("b"))
        assert storage.maintain(messages_older_than=timedelta(0)).messages == 2


def test_a_delivery_to_another_than_the_to_node_is_claimed_and_listed_with_its_message(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        for number in range(3):
            uow.messages.send(message(number), receivers=["b", "c"])
        uow.messages.delete("msg-1")
        claimed = uow.messages.claim("c", limit=10)
        assert [(each.message.id, each.message.content) for each in claimed] == [("msg-0", b"1"), ("msg-2", b"1")]
        uow.messages.bury(claimed, "reason")
        assert [each.message.content for each in uow.messages.dead().items] == [b"1", b"1"]


def test_a_message_that_somebody_deleted_is_not_among_the_dead(storage: MeshStorage, mesh_storage_url: str) -> None:
    with storage.begin() as uow:
        uow.messages.send_many([message(number) for number in range(4)])
        uow.messages.bury(uow.messages.claim("b", limit=4), "reason")
    with psycopg.connect(mesh_storage_url) as connection:
        connection.execute("DELETE FROM mesh_messages WHERE id IN ('msg-0', 'msg-1')")
    with storage.unit_of_work() as uow:
        page = uow.messages.dead("b", limit=1)
        assert [each.message.id for each in page.items] == ["msg-2"]
        assert [each.message.id for each in uow.messages.dead("b", after=page.next, limit=1).items] == ["msg-3"]


@pytest.mark.parametrize(
    ("table", "check", "named"),
    [
        ("mesh_state_102041", "mesh_state_key_check_102041", ("mesh_state_key_check", "StateEntry.key")),
        # Another service's, which is named by the month.
        ("orders_202611", "orders_key_check_202611", ("orders_key_check_202611", "orders_key_check_202611")),
    ],
)
def test_an_error_names_the_constraint_without_the_shard(
    storage: MeshStorage, mesh_storage_url: str, table: str, check: str, named: tuple[str, str]
) -> None:
    with psycopg.connect(mesh_storage_url) as connection:
        connection.execute(f"CREATE TABLE {table} (CONSTRAINT {check} CHECK (key <> ''), key text)".encode())
    with pytest.raises(InvalidInputError) as error, storage.begin() as uow:
        uow.session.execute(text(f"INSERT INTO {table} VALUES ('')"))
    assert (error.value.constraint, error.value.field) == named


def test_health_has_no_workers_to_ask(storage: MeshStorage) -> None:
    assert storage.health().silent_workers == ()


async def check(url: str) -> Health:
    async with AsyncMeshStorage.open(url) as storage:
        return await storage.health()


def test_health_names_the_workers_that_do_not_answer_and_waits_for_none_of_them(mesh_storage_url: str) -> None:
    with psycopg.connect(mesh_storage_url) as connection:  # what stands in for Citus
        connection.execute("SET allow_system_table_mods = on")
        connection.execute(
            "INSERT INTO pg_extension SELECT 1, 'citus', extowner, extnamespace, true, '1' FROM pg_extension LIMIT 1"
        )
        connection.execute(
            """
            CREATE FUNCTION run_command_on_workers(text) RETURNS TABLE (nodename text, nodeport int, success bool)
            AS $$ VALUES ('w-2', 5432, false), ('w-1', 5432, false),
                ('w-3', 5432, current_setting('citus.node_connection_timeout') = '1s') $$ LANGUAGE sql
            """
        )
    with MeshStorage.open(mesh_storage_url) as storage:
        for health in (storage.health(), asyncio.run(check(mesh_storage_url))):
            assert health.silent_workers == ("w-1:5432", "w-2:5432")
            assert (health.ok, health.connected, health.revision) == (False, True, schema.head())
