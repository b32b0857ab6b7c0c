"""Shows what a watch promises, by both APIs: whole batches of the last changes, whoever wrote, and cursors."""

from __future__ import annotations

import itertools
import pickle
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import text

from mesh_storage import (
    Batch,
    ClosedError,
    CompactedError,
    InvalidInputError,
    Mesh,
    MeshStorage,
    Node,
    Route,
    StateEntry,
    UnitOfWork,
)
from tests.contract.conftest import Open
from tests.processes import changes_are_over, eventually

EVERYTHING = ["meshes", "nodes", "routes", "state", "runtime_config", "routing_table"]
POLL = 0.02


@pytest.fixture
def raw(mesh_storage_url: str) -> Iterator[psycopg.Connection[Any]]:
    """Yield a connection that is none of the library's, as psql's is."""
    with psycopg.connect(mesh_storage_url, autocommit=True) as connection:
        yield connection


def keys(batch: Batch) -> list[tuple[str, str]]:
    return [(change.aggregate, change.key) for change in batch.changes]


def values(batch: Batch) -> dict[str, Any]:
    return {change.key: change.entry and change.entry.value for change in batch.changes}


def cursor(storage: MeshStorage) -> str:
    with storage.begin(read_only=True) as uow:
        return uow.changes.cursor()


def since(storage: MeshStorage, after: str | None, aggregates: list[str] = EVERYTHING, prefix: str = "") -> Batch:
    with storage.begin(read_only=True) as uow:
        return uow.changes.since(after, aggregates, prefix=prefix)


# What a batch is


def test_the_first_batch_is_all_that_is_there_in_the_order_of_versions(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.state.put("b", b"1")
        uow.runtime_config.put("c", {"n": [1]})
        uow.state.put("a", b"1")
        uow.state.put("b", b"2")
        uow.state.put("gone", b"")
        uow.state.delete("gone")
        uow.routing_table.put("to", {"via": "x"})
    with storage.begin() as uow:
        node = uow.nodes.add(Node(name="n", ip_address="10.0.0.1"))
        mesh = uow.meshes.add(Mesh(name="m"))
    batch = next(storage.watch(*EVERYTHING, poll=POLL))
    assert keys(batch) == [
        ("runtime_config", "c"),
        ("state", "a"),
        ("state", "b"),
        ("routing_table", "to"),
        ("nodes", node.id),
        ("meshes", mesh.id),
    ]
    versions = [change.version for change in batch.changes]
    assert versions == sorted(set(versions))
    with storage.begin(read_only=True) as uow:
        assert [change.version for change in batch.changes] == [
            uow.runtime_config.get("c").version,
            uow.state.get("a").version,
            uow.state.get("b").version,
            uow.routing_table.get("to").version,
            uow.nodes.get(node.id).row_version,
            uow.meshes.get(mesh.id).version,
        ]
    entries = [change.entry for change in batch.changes]
    assert entries[0].value == {"n": [1]}
    assert entries[2].value == b"2"
    assert entries[4].name == "n"
    assert not batch.more


def test_the_first_batch_comes_even_if_there_is_nothing_for_the_sake_of_its_cursor(storage: MeshStorage) -> None:
    batch = next(storage.watch("state", poll=POLL))
    assert batch.changes == []
    with storage.begin() as uow:
        uow.state.put("a", b"1")
    assert values(since(storage, batch.cursor)) == {"a": b"1"}


def test_a_batch_has_the_last_change_of_every_key_in_the_order_of_those(storage: MeshStorage) -> None:
    watch = storage.watch("state", "runtime_config", poll=POLL)
    next(watch)
    with storage.begin() as uow:
        for n in range(3):
            uow.state.put("often", b"%d" % n)
            uow.runtime_config.put(f"once {n}", n)
        uow.state.put("gone", b"")
        uow.state.delete("gone")
    batch = next(watch)
    assert [change.key for change in batch.changes] == ["once 0", "once 1", "often", "once 2", "gone"]
    assert values(batch) == {"once 0": 0, "once 1": 1, "once 2": 2, "often": b"2", "gone": None}
    assert [change.version for change in batch.changes] == sorted(change.version for change in batch.changes)
    with storage.begin() as uow:
        uow.state.put("gone", b"again")
    again = next(watch)
    assert values(again) == {"gone": b"again"}
    assert again.changes[0].version > batch.changes[-1].version


def test_a_batch_may_go_to_another_process(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.state.put("a", b"1")
        uow.state.put("b", b"1")
        uow.state.delete("b")
    batch = since(storage, None)
    there = pickle.loads(pickle.dumps(batch))  # noqa: S301 - our own
    assert isinstance(there, Batch)
    assert there.cursor == batch.cursor
    assert values(there) == {"a": b"1"}
    for what, name in ((batch, "cursor"), (batch.changes[0], "key")):
        with pytest.raises(AttributeError):
            setattr(what, name, "other")


def test_only_the_keys_with_a_prefix_by_code_point(storage: MeshStorage) -> None:
    start = cursor(storage)
    with storage.begin() as uow:
        for key in ("a", "a%", "a%b", "A%", "a_", "b", "a%\U0010ffff"):
            uow.state.put(key, b"")
            uow.runtime_config.put(key, 1)
    for after in (start, None):
        batch = since(storage, after, ["state", "runtime_config"], prefix="a%")
        assert sorted(keys(batch)) == sorted(
            (aggregate, key) for aggregate in ("state", "runtime_config") for key in ("a%", "a%b", "a%\U0010ffff")
        )
    with storage.begin() as uow:
        uow.state.put("b", b"new")
        uow.state.delete("a%")
    assert keys(next(storage.watch("state", prefix="a%", after=batch.cursor, poll=POLL))) == [("state", "a%")]


def test_only_what_is_watched(storage: MeshStorage) -> None:
    start = cursor(storage)
    with storage.begin() as uow:
        uow.state.put("a", b"")
        uow.runtime_config.put("a", 1)
        uow.routing_table.put("a", {})
    assert keys(since(storage, start, ["routing_table", "runtime_config"])) == [
        ("runtime_config", "a"),
        ("routing_table", "a"),
    ]
    assert keys(since(storage, start, ["nodes"])) == []


# Whoever wrote


def by_key(batch: Batch) -> dict[tuple[str, str], bool]:
    return {(change.aggregate, change.key): change.entry is not None for change in batch.changes}


@pytest.mark.one_server
def test_other_writers(storage: MeshStorage, raw: psycopg.Connection[Any]) -> None:
    start = cursor(storage)
    raw.execute("INSERT INTO mesh_state (key, value) VALUES ('sql', 'x'), ('old name', 'x')")
    raw.execute("UPDATE mesh_state SET key = 'new name' WHERE key = 'old name'")
    with raw.cursor().copy("COPY mesh_routing_table (destination, route) FROM STDIN") as copy:
        copy.write_row(("copied", "{}"))
    # As the earlier Go service puts a value.
    raw.execute(
        "INSERT INTO mesh_runtime_config (key, value, updated_at) VALUES ('go', '1', now())"
        " ON CONFLICT (key) DO UPDATE SET value = EXCLUDED.value, updated_at = now()"
    )
    with storage.begin() as uow:
        uow.session.add(StateEntry(key="session", value=b""))
    assert by_key(since(storage, start)) == {
        ("state", "sql"): True,
        ("state", "old name"): False,
        ("state", "new name"): True,
        ("routing_table", "copied"): True,
        ("runtime_config", "go"): True,
        ("state", "session"): True,
    }


def test_what_goes_with_a_deleted_node(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        here, there = (uow.nodes.add(Node(name=name, ip_address="10.0.0.1")) for name in "ab")
        route = uow.routes.add(Route(source_node_id=here.id, target_node_id=there.id))
    start = cursor(storage)
    with storage.begin() as uow:
        uow.nodes.delete(here.id)
    assert by_key(since(storage, start)) == {("nodes", here.id): False, ("routes", route.id): False}


def test_what_is_undone_or_changes_nothing_is_no_change(storage: MeshStorage, raw: psycopg.Connection[Any]) -> None:
    with storage.begin() as uow:
        uow.state.put("there", b"")
    start = cursor(storage)
    with storage.unit_of_work() as uow:
        uow.state.put("rolled back", b"")
    with storage.begin() as uow:
        with pytest.raises(ZeroDivisionError), uow.savepoint():
            uow.state.put("in a savepoint", b"")
            raise ZeroDivisionError
        uow.state.put("after it", b"")
    raw.execute("INSERT INTO mesh_state (key, value) VALUES ('there', 'x') ON CONFLICT DO NOTHING")
    raw.execute("UPDATE mesh_state SET value = 'x' WHERE key = 'nowhere'")
    assert keys(since(storage, start)) == [("state", "after it")]


def test_an_entry_that_expired_is_none_and_its_removal_a_change(
    storage: MeshStorage, raw: psycopg.Connection[Any]
) -> None:
    start = cursor(storage)
    with storage.begin() as uow:
        uow.state.put("short", b"", ttl=timedelta(milliseconds=1))
        uow.state.put("long", b"x", ttl=timedelta(hours=1))
    raw.execute("SELECT pg_sleep(0.01)")
    batch = since(storage, start)
    assert values(batch) == {"short": None, "long": b"x"}
    assert values(since(storage, None)) == {"long": b"x"}
    with storage.begin() as uow:
        long = uow.state.get("long")
        uow.state.touch("long", if_version=long.version, ttl=None)
    assert keys(since(storage, batch.cursor)) == []  # a renewed lease is no change
    raw.execute("DELETE FROM mesh_state WHERE expires_at <= now()")
    assert values(since(storage, batch.cursor)) == {"short": None}


# Whole transactions, and nobody waits


def test_a_transaction_that_stays_open_delays_no_other_and_comes_when_it_commits(storage: MeshStorage) -> None:
    watch = storage.watch("state", poll=POLL)
    next(watch)
    with storage.begin() as open_one:
        open_one.state.put("late", b"1")
        for n in range(3):
            with storage.begin() as uow:
                uow.state.put(f"soon {n}", b"")
            assert keys(next(watch)) == [("state", f"soon {n}")]
        open_one.state.put("late too", b"1")
    assert keys(next(watch)) == [("state", "late"), ("state", "late too")]


def test_a_cursor_within_a_unit_of_work_comes_before_its_changes(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.state.put("before", b"")
        with storage.begin() as other:  # so that the snapshot is newer than this transaction
            other.state.put("other", b"")
        start = uow.changes.cursor()
        with pytest.raises(InvalidInputError, match="before the changes of its own"), uow.savepoint():
            uow.changes.since(start, ["state"])
        uow.state.put("after", b"")
    assert keys(since(storage, start)) == [("state", "before"), ("state", "after")]


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_a_cursor_and_a_listing_of_one_snapshot(storage: MeshStorage, isolation: Any) -> None:
    with storage.begin(read_only=True, isolation=isolation) as uow:
        start = uow.changes.cursor()
        with storage.begin() as other:
            other.state.put("a", b"")
        assert uow.state.count() == 0
        assert uow.changes.since(start, ["state"]).changes == []
    assert keys(since(storage, start)) == [("state", "a")]


def test_what_is_read_is_committed_with_what_comes_of_it(storage: MeshStorage) -> None:
    start = cursor(storage)
    with storage.begin() as uow:
        uow.state.put("task", b"1")
    with storage.begin() as uow:
        batch = uow.changes.since(start, ["state"], "task")
        uow.state.put("cursor", batch.cursor.encode())
    with storage.begin() as uow:
        assert uow.changes.since(uow.state.get("cursor").value.decode(), ["state"], "task").changes == []


# Large batches


def test_a_large_batch_comes_in_parts_of_one_moment(storage: MeshStorage, raw: psycopg.Connection[Any]) -> None:
    watch = storage.watch("state", "runtime_config", poll=POLL)
    start = next(watch).cursor
    with raw.transaction():
        raw.execute("INSERT INTO mesh_state (key, value) SELECT 'key ' || n, '' FROM generate_series(1, 2500) n")
        raw.execute("DELETE FROM mesh_state WHERE key LIKE '%0'")
        raw.execute("INSERT INTO mesh_runtime_config (key, value) SELECT n, '1' FROM generate_series(1, 500) n")
    for parts, first, there in ((watch, start, 3000), (storage.watch("state", "runtime_config", poll=POLL), "0", 2750)):
        batches = [next(parts)]
        raw.execute("UPDATE mesh_state SET value = 'changed' WHERE key = 'key 2499'")  # after the moment
        while batches[-1].more:
            batches.append(next(parts))
        assert len(batches) > 2
        assert {batch.cursor for batch in batches[:-1]} == {first}
        changes = list(itertools.chain.from_iterable(batch.changes for batch in batches))
        assert max(len(batch.changes) for batch in batches) <= 1000
        assert len(changes) == len({(change.aggregate, change.key) for change in changes}) == there
        assert sum(change.entry is None for change in changes) == there - 2750
        assert [change.version for change in changes] == sorted(change.version for change in changes)
        assert keys(next(parts)) == [("state", "key 2499")]
    again = [next(storage.watch("state", "runtime_config", after=after, poll=POLL)) for after in (start, "0")]
    assert [batch.more for batch in again] == [True, True]
    assert len(since(storage, start).changes) == 3000


# Cursors


def test_a_cursor_goes_on_where_it_was_for_anybody(
    storage: MeshStorage, open_storage: Open, mesh_storage_url: str
) -> None:
    watch = storage.watch("state", poll=POLL)
    batch = next(watch)
    for n in range(3):
        with storage.begin() as uow:
            uow.state.put(f"{n}", b"")
        with open_storage(mesh_storage_url) as other:
            assert keys(next(other.watch("state", after=batch.cursor, poll=POLL))) == [("state", f"{n}")]
        batch = next(watch)
        assert keys(batch) == [("state", f"{n}")]


def test_two_watches_see_the_same(storage: MeshStorage) -> None:
    watches = [storage.watch("state", poll=POLL) for _ in range(2)]
    for watch in watches:
        next(watch)
    for n in range(3):
        with storage.begin() as uow:
            uow.state.put(f"{n}", b"")
        assert [keys(next(watch)) for watch in watches] == [[("state", f"{n}")]] * 2


def compact(raw: psycopg.Connection[Any]) -> None:
    assert eventually(lambda: changes_are_over(raw))
    with raw.transaction():
        row = raw.execute("SELECT max(xid) + 1 FROM mesh_changes").fetchone()
        raw.execute("DELETE FROM mesh_changes")
        raw.execute("UPDATE mesh_changes_epoch SET compacted = %s", row)


def lose(statement: str) -> Callable[[psycopg.Connection[Any]], object]:
    return lambda raw: raw.execute(statement.encode())


LOST: dict[str, Callable[[psycopg.Connection[Any]], object]] = {
    "compacted": compact,
    "truncated": lose("TRUNCATE mesh_runtime_config"),
    "restored": lose("UPDATE mesh_changes_epoch SET epoch = gen_random_uuid()"),
}


@pytest.mark.one_server
@pytest.mark.parametrize("how", LOST)
def test_a_cursor_whose_changes_are_lost_is_refused(
    storage: MeshStorage, raw: psycopg.Connection[Any], how: str
) -> None:
    watch = storage.watch("state", poll=POLL)
    start = next(watch).cursor
    with storage.begin() as uow:
        uow.state.put("a", b"")
    LOST[how](raw)
    with pytest.raises(CompactedError) as error:
        since(storage, start)
    assert not error.value.retryable
    with pytest.raises(CompactedError):
        next(storage.watch("state", after=start, poll=POLL))
    with pytest.raises(CompactedError):
        list(watch)
    fresh = since(storage, None)
    assert keys(fresh) == [("state", "a")]
    with storage.begin() as uow:
        uow.state.put("b", b"")
    assert keys(since(storage, fresh.cursor)) == [("state", "b")]


def test_a_cursor_that_is_young_enough_outlives_a_compaction(
    storage: MeshStorage, raw: psycopg.Connection[Any]
) -> None:
    with storage.begin() as uow:
        uow.state.put("a", b"")
    assert eventually(lambda: changes_are_over(raw))
    start = cursor(storage)
    compact(raw)
    with storage.begin() as uow:
        uow.state.put("b", b"")
    assert keys(since(storage, start)) == [("state", "b")]


def test_a_cursor_of_another_history_is_refused(storage: MeshStorage) -> None:
    epoch, timeline, snapshot = cursor(storage).split(".")
    other = f"{int(timeline, 16) + 1:08X}"
    for foreign in (
        f"{epoch}.{other}.{snapshot}",  # of a primary that failed
        f"{epoch}.{timeline}.{2**40 + 9}:{2**40 + 9}:",  # of the future
        f"{'0' * 8}-0000-0000-0000-{'0' * 12}.{timeline}.{snapshot}",
    ):
        with pytest.raises(CompactedError):
            since(storage, foreign)


MALFORMED = [
    "",
    "1",
    "00",
    "x",
    7,
    b"0",
    "{}.5:3:",
    "{}.0:5:",
    "{}.3:5:6",
    "{}.3:9:5,4",
    "{}.3:9:4,4",
    "{}.3:5:5",
    "{}.4294967296:4294967297:",
    "{}.3:9223372036854775808:",
    "{}.3:9:,",
    "{}.3:9:4,",
    "{}.03:9:",
    "{}.3:9",
    "{}.3:9:\n",
    "{}.3:99999999999999999999:",
    "{}.\u0663:9:",
]


@pytest.mark.parametrize("malformed", MALFORMED)
def test_what_is_no_cursor_is_refused_with_its_field(storage: MeshStorage, malformed: Any) -> None:
    if isinstance(malformed, str):
        malformed = malformed.format(cursor(storage).rpartition(".")[0])
    with storage.begin(read_only=True) as uow, pytest.raises(InvalidInputError) as error:
        uow.changes.since(malformed, ["state"])
    assert error.value.field == "cursor"
    with pytest.raises(InvalidInputError) as error:
        storage.watch("state", after=malformed)
    assert error.value.field == "after"


# Arguments, and the end


@pytest.mark.parametrize(
    ("aggregates", "options", "field"),
    [
        ([], {}, "aggregates"),
        (["messages"], {}, "aggregates"),
        (["state", 7], {}, "aggregates"),
        (["mesh_state"], {}, "aggregates"),
        (["state"], {"prefix": None}, "prefix"),
        (["state"], {"prefix": "\0"}, "prefix"),
        (["state"], {"poll": 0}, "poll"),
        (["state"], {"poll": 61}, "poll"),
        (["state"], {"poll": float("nan")}, "poll"),
        (["state"], {"poll": "1"}, "poll"),
        (["state"], {"poll": True}, "poll"),
    ],
)
def test_arguments_are_checked_by_the_call_itself(
    storage: MeshStorage, aggregates: list[Any], options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidInputError) as error:
        storage.watch(*aggregates, **options)
    assert error.value.field == field
    if "poll" not in options:
        with storage.begin(read_only=True) as uow, pytest.raises(InvalidInputError) as error:
            uow.changes.since(None, aggregates, **options)
        assert error.value.field == field


def test_since_takes_any_iterable_but_no_single_string(uow: UnitOfWork) -> None:
    assert uow.changes.since(None, iter(("state", "state", "nodes"))).changes == []
    with pytest.raises(InvalidInputError):
        uow.changes.since(None, "state")


def test_it_ends_when_the_storage_is_closed(open_storage: Open, mesh_storage_url: str) -> None:
    with open_storage(mesh_storage_url) as storage:
        watch = storage.watch("state", poll=60)
        next(watch)
        waiting = threading.Timer(0.1, storage.close)
        waiting.start()
        assert list(watch) == []
        waiting.join()
        with pytest.raises(ClosedError):
            storage.watch("state")


def test_it_uses_a_connection_only_while_it_looks(open_storage: Open, mesh_storage_url: str) -> None:
    with open_storage(mesh_storage_url, pool_size=1) as storage:
        watches = [storage.watch("state", poll=POLL) for _ in range(3)]
        for watch in watches:
            next(watch)
        with storage.begin() as uow:
            uow.session.execute(
                text("INSERT INTO mesh_state (key, value) SELECT n, '' FROM generate_series(1, 1500) n")
            )
        for watch in watches:
            assert next(watch).more
        with storage.begin(timeout=5) as uow:  # in the middle of a batch, the connection is free
            assert uow.state.count() == 1500
