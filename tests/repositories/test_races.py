"""Shows that of two units of work in a race one wins, the other gets the right error, and nothing is half done."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeAlias

import psycopg
import pytest
from sqlalchemy import Engine, event

from mesh_storage import (
    AlreadyExistsError,
    ConflictError,
    InvalidInputError,
    LogEntry,
    MeshStorage,
    MeshStorageError,
    Message,
    NotFoundError,
    SerializationError,
    UnitOfWork,
)
from mesh_storage.testing import MeshFactory, NodeFactory

Work: TypeAlias = Callable[[UnitOfWork], Any]
LAST = 2**63 - 1
ROUNDS = 15
DEADLINE_S = 20


def message(content: bytes, id_: str = "m") -> Message:
    return Message(id=id_, from_node="a", to_node="b", content=content, timestamp=1)


def log(term: int, *indexes: int) -> list[LogEntry]:
    return [LogEntry(term=term, index=index, entry={"term": term}) for index in indexes]


def stored(uow: UnitOfWork) -> list[tuple[int, int]]:
    return [(entry.term, entry.index) for entry in uow.consensus_log.range(1, LAST)]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as threads:
        yield threads


@pytest.fixture
def watcher(mesh_storage_url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(mesh_storage_url, autocommit=True) as connection:
        yield connection


def wait_for_lock(watcher: psycopg.Connection[Any], *futures: Future[Any]) -> None:
    """Return when as many others wait for a lock as there are futures, of which none may be done."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        assert not any(future.done() for future in futures), "it did not wait for the first"
        row = watcher.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        ).fetchone()
        if row == (len(futures),):
            return
    raise AssertionError("nobody waits for a lock")


class Second:
    """The second of two units of work, which meets what the first did but did not end yet."""

    def __init__(self, storage: MeshStorage, pool: ThreadPoolExecutor, watcher: psycopg.Connection[Any]) -> None:
        self.storage, self.pool, self.watcher = storage, pool, watcher

    def against(self, first: Work, second: Work, *, commit: bool = True, **characteristics: Any) -> Any:
        """Let the second wait for the first, end the first, and give what the second gives."""

        def late() -> Any:
            with self.storage.begin(**characteristics) as uow:
                uow.state.count()  # Takes the snapshot, where there is one for the whole transaction.
                ready.wait(DEADLINE_S)
                go.wait(DEADLINE_S)
                return second(uow)

        ready, go = Barrier(2), Barrier(2)
        with self.storage.unit_of_work() as uow:
            future = self.pool.submit(late)
            ready.wait(DEADLINE_S)
            first(uow)
            go.wait(DEADLINE_S)
            wait_for_lock(self.watcher, future)
            if commit:
                uow.commit()
            else:
                uow.rollback()
        return future.result(DEADLINE_S)


@pytest.fixture
def second(storage: MeshStorage, pool: ThreadPoolExecutor, watcher: psycopg.Connection[Any]) -> Second:
    return Second(storage, pool, watcher)


def race(storage: MeshStorage, pool: ThreadPoolExecutor, *works: Work) -> list[Any]:
    """Let units of work begin at one moment; give what each gave, or its error."""
    barrier = Barrier(len(works))

    def run(work: Work) -> Any:
        try:
            with storage.begin() as uow:
                uow.state.find("x")  # The transaction is open.
                barrier.wait(DEADLINE_S)
                return work(uow)
        except MeshStorageError as error:
            return error

    return [future.result(DEADLINE_S) for future in [pool.submit(run, work) for work in works]]


SAME_KEY: dict[str, tuple[Work, Work, type[MeshStorageError]]] = {
    "mesh name": (
        lambda uow: uow.meshes.add(MeshFactory.build(name="x")),
        lambda uow: uow.meshes.add(MeshFactory.build(name="x")),
        AlreadyExistsError,
    ),
    "node name": (
        lambda uow: uow.nodes.add(NodeFactory.build(name="x")),
        lambda uow: uow.nodes.add_many([NodeFactory.build(), NodeFactory.build(name="x")]),
        AlreadyExistsError,
    ),
    "message id": (
        lambda uow: uow.messages.store(message(b"1")),
        lambda uow: uow.messages.store(message(b"2")),
        AlreadyExistsError,
    ),
    "message id among many": (
        lambda uow: uow.messages.store_many([message(b"1"), message(b"1", "a")]),
        lambda uow: uow.messages.store_many([message(b"2", "b"), message(b"2"), message(b"2", "z")]),
        AlreadyExistsError,
    ),
    "first log index": (
        lambda uow: uow.consensus_log.append(1, 1, "first"),
        lambda uow: uow.consensus_log.append(1, 1, "second"),
        ConflictError,
    ),
    "beginning of the log": (
        lambda uow: uow.consensus_log.append(1, 1, "first"),
        lambda uow: uow.consensus_log.append(1, 5, "second"),
        ConflictError,
    ),
    "beginning of the log, many": (
        lambda uow: uow.consensus_log.append_many(log(1, 5, 6)),
        lambda uow: uow.consensus_log.append_many(log(1, 1, 2, 3)),
        ConflictError,
    ),
}
same_key = pytest.mark.parametrize(("first", "other", "error"), SAME_KEY.values(), ids=list(SAME_KEY))


def everything(storage: MeshStorage) -> list[Any]:
    """Return what all the repositories of these races hold, in a form that can be compared."""
    with storage.unit_of_work() as uow:
        return [
            [mesh.name for mesh in uow.meshes.stream()],
            [node.name for node in uow.nodes.stream()],
            [(found.id, found.content) for found in uow.messages.stream()],
            [(entry.term, entry.index, entry.entry) for entry in uow.consensus_log.range(1, LAST)],
        ]


@same_key
def test_the_second_waits_and_is_refused_when_the_first_commits(
    storage: MeshStorage, second: Second, first: Work, other: Work, error: type[MeshStorageError]
) -> None:
    with pytest.raises(error) as caught:
        second.against(first, other)
    assert not caught.value.retryable
    after = everything(storage)
    with storage.begin() as uow:
        for repository in (uow.meshes, uow.nodes, uow.messages):
            for found in list(repository.stream()):
                repository.delete(found.id)
        uow.consensus_log.delete_range(1, LAST)
        first(uow)
    assert everything(storage) == after


@same_key
def test_the_second_waits_and_wins_when_the_first_rolls_back(
    storage: MeshStorage, second: Second, first: Work, other: Work, error: type[MeshStorageError]
) -> None:
    del error
    second.against(first, other, commit=False)
    with storage.unit_of_work() as uow, pytest.raises(MeshStorageError):
        first(uow)


@same_key
def test_of_two_at_once_one_wins(
    storage: MeshStorage, pool: ThreadPoolExecutor, first: Work, other: Work, error: type[MeshStorageError]
) -> None:
    for number in range(ROUNDS):
        works = (first, other) if number % 2 else (other, first)
        outcomes = race(storage, pool, *works)
        lost = [outcome for outcome in outcomes if isinstance(outcome, MeshStorageError)]
        assert [type(outcome) for outcome in lost] == [error]
        with storage.begin() as uow:
            for node in list(uow.nodes.stream()):
                uow.nodes.delete(node.id)
            for mesh in list(uow.meshes.stream()):
                uow.meshes.delete(mesh.id)
            for found in list(uow.messages.stream()):
                uow.messages.delete(found.id)
            uow.consensus_log.delete_range(1, LAST)


@pytest.mark.parametrize(
    "work",
    [
        lambda uow: uow.messages.store(message(b"1")).content,
        lambda uow: uow.messages.store_many([message(b"1")]),
        lambda uow: uow.consensus_log.append(1, 1, "x").entry,
        lambda uow: uow.consensus_log.append_many(log(1, 1, 2)),
    ],
    ids=["store", "store_many", "append", "append_many"],
)
def test_the_same_thing_twice_at_once_is_done_once_and_no_error(
    storage: MeshStorage, second: Second, work: Work
) -> None:
    second.against(work, work)
    with storage.unit_of_work() as uow:
        before = (uow.messages.count(), stored(uow))
        work(uow)
        assert (uow.messages.count(), stored(uow)) == before


@pytest.mark.parametrize("commit", [True, False])
def test_the_last_of_two_puts_of_one_key_stays(storage: MeshStorage, second: Second, commit: bool) -> None:
    second.against(lambda uow: uow.state.put("k", b"1"), lambda uow: uow.state.put("k", b"2"), commit=commit)
    with storage.unit_of_work() as uow:
        assert uow.state.get("k").value == b"2"


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_under_a_snapshot_the_second_put_of_one_key_is_a_serialization_error(
    storage: MeshStorage, second: Second, isolation: str
) -> None:
    with storage.begin() as uow:
        uow.state.put("k", b"0")
    with pytest.raises(SerializationError) as error:
        second.against(lambda uow: uow.state.put("k", b"1"), lambda uow: uow.state.put("k", b"2"), isolation=isolation)
    assert error.value.retryable
    assert error.value.sqlstate == "40001"
    with storage.unit_of_work() as uow:
        assert uow.state.get("k").value == b"1"


def test_puts_of_the_same_keys_in_opposite_orders_do_not_deadlock(
    storage: MeshStorage, pool: ThreadPoolExecutor
) -> None:
    names = [f"n{number}" for number in range(200)]

    def put(mark: str, names: Iterable[str]) -> Work:
        return lambda uow: len(uow.node_states.put_many(dict.fromkeys(names, mark)))

    def store(prefix: str, names: Iterable[str]) -> Work:
        return lambda uow: uow.messages.store_many(message(b"x", prefix + name) for name in names)

    for round_ in map(str, range(ROUNDS)):
        backwards = names[::-1]
        works = (put("a", names), put("b", backwards), store(round_, names), store(round_, backwards))
        outcomes = race(storage, pool, *works)
        assert outcomes[:2] == [200, 200]
        assert sorted(outcomes[2:]) == [0, 200]
        with storage.unit_of_work() as uow:
            assert len({state.state for state in uow.node_states.stream()}) == 1


def test_two_patches_of_one_state_are_both_kept(storage: MeshStorage, second: Second) -> None:
    second.against(
        lambda uow: uow.node_states.merge("n", {"a": 1, "c": 1}),
        lambda uow: uow.node_states.merge("n", {"b": 2, "c": 2}),
    )
    with storage.unit_of_work() as uow:
        assert uow.node_states.get("n").state == {"a": 1, "b": 2, "c": 2}


def test_a_key_that_another_deletes_at_the_same_moment_is_not_found(storage: MeshStorage, second: Second) -> None:
    with storage.begin() as uow:
        uow.state.put("k", b"")
    with pytest.raises(NotFoundError):
        second.against(lambda uow: uow.state.delete("k"), lambda uow: uow.state.delete("k"))


def test_a_message_that_another_deletes_at_the_same_moment_is_stored_again(
    storage: MeshStorage, second: Second
) -> None:
    with storage.begin() as uow:
        uow.messages.store(message(b"1"))
    second.against(lambda uow: uow.messages.delete("m"), lambda uow: uow.messages.store(message(b"2")))
    with storage.unit_of_work() as uow:
        assert uow.messages.get("m").content == b"2"


@pytest.mark.parametrize("commit", [True, False])
def test_one_whole_swap_of_the_routing_table_stays_of_two(
    storage: MeshStorage,
    second: Second,
    commit: bool,
) -> None:
    with storage.begin() as uow:
        uow.routing_table.put_many({"a": 0, "b": 0})
    second.against(
        lambda uow: uow.routing_table.replace_all({"a": 1, "b": 1, "c": 1}),
        lambda uow: uow.routing_table.replace_all({"b": 2, "d": 2}),
        commit=commit,
    )
    with storage.unit_of_work() as uow:
        assert uow.routing_table.all() == {"b": 2, "d": 2}


def test_swaps_of_the_routing_table_at_once_never_mix(storage: MeshStorage, pool: ThreadPoolExecutor) -> None:
    tables = [{f"{name}{number}": name for number in range(50)} | {"both": name} for name in "abc"]
    works: list[Work] = [lambda uow, table=table: uow.routing_table.replace_all(table) for table in tables]
    for _ in range(ROUNDS):
        outcomes = race(storage, pool, *works, lambda uow: uow.routing_table.all())
        assert outcomes[:3] == [None] * 3
        assert outcomes[3] in ({}, *tables)
        with storage.unit_of_work() as uow:
            assert uow.routing_table.all() in tables


def test_a_put_waits_for_a_swap_and_stays(storage: MeshStorage, second: Second) -> None:
    second.against(
        lambda uow: uow.routing_table.replace_all({"a": 1}), lambda uow: uow.routing_table.put_many({"b": 2})
    )
    with storage.unit_of_work() as uow:
        assert uow.routing_table.all() == {"a": 1, "b": 2}


APPENDS_AGAINST_DELETES: dict[str, tuple[Work, Work, type[MeshStorageError] | None, list[int]]] = {
    "append behind the end that is deleted": (
        lambda uow: uow.consensus_log.delete_range(3, LAST),
        lambda uow: uow.consensus_log.append_many(log(1, 4)),
        ConflictError,
        [1, 2],
    ),
    "append one behind the end that is deleted": (
        lambda uow: uow.consensus_log.delete_range(2, 3),
        lambda uow: uow.consensus_log.append(1, 4, {}),
        ConflictError,
        [1],
    ),
    "append behind a log that is deleted": (
        lambda uow: uow.consensus_log.delete_range(1, 3),
        lambda uow: uow.consensus_log.append(1, 4, {}),
        None,
        [4],
    ),
    "append behind a log whose prefix is deleted": (
        lambda uow: uow.consensus_log.delete_range(1, 2),
        lambda uow: uow.consensus_log.append(1, 4, {}),
        None,
        [3, 4],
    ),
    "append in place of the end that is deleted": (
        lambda uow: uow.consensus_log.delete_range(2, 3),
        lambda uow: uow.consensus_log.append_many(log(2, 2, 3)),
        None,
        [1, 2, 3],
    ),
    "delete an end behind which is appended": (
        lambda uow: uow.consensus_log.append(1, 4, {}),
        lambda uow: uow.consensus_log.delete_range(3, 3),
        InvalidInputError,
        [1, 2, 3, 4],
    ),
    "delete a prefix while the end grows": (
        lambda uow: uow.consensus_log.append(1, 4, {}),
        lambda uow: uow.consensus_log.delete_range(1, 3),
        None,
        [4],
    ),
    "delete all while the end grows": (
        lambda uow: uow.consensus_log.append(1, 4, {}),
        lambda uow: uow.consensus_log.delete_range(1, LAST),
        None,
        [],
    ),
    "delete a prefix while the end is deleted": (
        lambda uow: uow.consensus_log.delete_range(2, 3),
        lambda uow: uow.consensus_log.delete_range(1, 2),
        None,
        [],
    ),
}


@pytest.mark.parametrize("case", APPENDS_AGAINST_DELETES)
def test_the_log_has_no_gap_whoever_deletes_and_appends(storage: MeshStorage, second: Second, case: str) -> None:
    first, other, error, left = APPENDS_AGAINST_DELETES[case]
    with storage.begin() as uow:
        uow.consensus_log.append_many(log(1, 1, 2, 3))
    if error is None:
        second.against(first, other)
    else:
        with pytest.raises(error):
            second.against(first, other)
    with storage.unit_of_work() as uow:
        assert [index for _, index in stored(uow)] == left


def test_an_append_that_is_rolled_back_leaves_its_index_to_the_other(storage: MeshStorage, second: Second) -> None:
    with storage.begin() as uow:
        uow.consensus_log.append(1, 1, {})
    second.against(
        lambda uow: uow.consensus_log.append(1, 2, "first"),
        lambda uow: uow.consensus_log.append(2, 2, "second"),
        commit=False,
    )
    with storage.unit_of_work() as uow:
        assert uow.consensus_log.get(2).entry == "second"


def test_an_append_of_which_another_took_a_part_can_only_roll_back(storage: MeshStorage, second: Second) -> None:
    with storage.begin() as uow:
        uow.consensus_log.append_many(log(1, 1))

    def append_and_go_on(uow: UnitOfWork) -> None:
        with pytest.raises(ConflictError, match="another transaction appended to the log concurrently") as lost:
            uow.consensus_log.append_many(log(1, 2, 3))
        assert lost.value.retryable
        uow.state.put("k", b"v")

    with pytest.raises(MeshStorageError, match="an earlier call"):
        second.against(lambda uow: uow.consensus_log.append_many(log(1, 2)), append_and_go_on)
    with storage.unit_of_work() as uow:
        assert stored(uow) == [(1, 1), (1, 2)]


def test_an_append_that_others_are_always_ahead_of_gives_up_and_may_be_done_again(
    storage: MeshStorage, watcher: psycopg.Connection[Any]
) -> None:
    """Each time the last index was read, another appends the next of the same entries."""
    taken = itertools.count(3)

    def append(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("SELECT") and "DESC" in statement:
            watcher.execute(
                "INSERT INTO mesh_consensus_log (term, index, entry) VALUES (1, %s, '{\"term\": 1}')", [next(taken)]
            )

    with storage.begin() as uow:
        uow.consensus_log.append_many(log(1, 1, 2))
    event.listen(Engine, "after_cursor_execute", append)
    try:
        with pytest.raises(ConflictError, match="other transactions keep appending to the log") as lost:
            storage.run(lambda uow: uow.consensus_log.append_many(log(1, *range(2, 10))), attempts=1)
    finally:
        event.remove(Engine, "after_cursor_execute", append)
    assert lost.value.retryable
    assert next(taken) == 6, "it was tried three times"
    with storage.begin() as uow:
        uow.consensus_log.append_many(log(1, *range(2, 10)))
        assert uow.consensus_log.last_index() == 9


def test_leaders_that_append_at_once_leave_one_log_of_whole_batches(
    storage: MeshStorage, pool: ThreadPoolExecutor
) -> None:
    with storage.begin() as uow:
        uow.consensus_log.append(1, 1, {"term": 1})
    for round_ in range(ROUNDS):
        with storage.unit_of_work() as uow:
            last = uow.consensus_log.last_index()
        batches = [log(round_ + 2, *range(last + 1, last + 2 + size)) for size in (1, 2, 3)]
        for size, batch in enumerate(batches):
            for entry in batch:
                entry.entry = {"by": size}
        works: list[Work] = [lambda uow, batch=batch: uow.consensus_log.append_many(batch) for batch in batches]
        outcomes = race(storage, pool, *works)
        winners = [size for size, outcome in enumerate(outcomes) if outcome is None]
        assert len(winners) == 1
        assert all(isinstance(outcome, ConflictError) for outcome in outcomes if outcome is not None)
        with storage.unit_of_work() as uow:
            added = uow.consensus_log.range(last + 1, LAST)
            assert [(entry.index, entry.entry) for entry in added] == [
                (entry.index, entry.entry) for entry in batches[winners[0]]
            ]


def test_the_log_keeps_its_rules_under_deletes_and_appends_at_once(
    storage: MeshStorage, pool: ThreadPoolExecutor
) -> None:
    def extend(uow: UnitOfWork) -> None:
        last = uow.consensus_log.last_index()
        uow.consensus_log.append_many(log(max(1, uow.consensus_log.last_term()), *range(last + 1, last + 4)))

    def compact(uow: UnitOfWork) -> None:
        first = uow.consensus_log.first_index()
        uow.consensus_log.delete_range(1, first + 1)

    def truncate(uow: UnitOfWork) -> None:
        last = uow.consensus_log.last_index()
        uow.consensus_log.delete_range(last, LAST)

    for _ in range(ROUNDS):
        outcomes = race(storage, pool, extend, compact, extend, truncate)
        for outcome in outcomes:
            assert outcome is None or isinstance(outcome, (ConflictError, InvalidInputError, SerializationError))
        with storage.unit_of_work() as uow:
            entries = stored(uow)
            assert all(
                later == earlier + 1 and higher >= lower
                for (lower, earlier), (higher, later) in itertools.pairwise(entries)
            )
