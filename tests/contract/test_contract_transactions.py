"""Shows the storage and its units of work, with the same results on the sync and the async side."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from mesh_storage import (
    AlreadyExistsError,
    ClosedError,
    InvalidInputError,
    Mesh,
    MeshStorage,
    MeshStorageError,
    Message,
    NotFoundError,
    SerializationError,
    StateEntry,
    StorageTimeoutError,
    UnavailableError,
    UnitOfWork,
    schema,
)
from tests.contract.conftest import Open


@pytest.fixture
def other(mesh_storage_url: str) -> Iterator[psycopg.Connection[Any]]:
    """Yield a connection that is none of the library's."""
    with psycopg.connect(mesh_storage_url, autocommit=True) as connection:
        yield connection


def keys(storage: MeshStorage) -> list[str]:
    with storage.unit_of_work(read_only=True) as uow:
        return [entry.key for entry in uow.state.stream()]


def setting(uow: UnitOfWork, name: str) -> str:
    return str(uow.session.execute(text(f"SHOW {name}")).scalar_one())


# One statement each, since Citus takes no several.
WAITING = (
    """
    CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql
        AS 'BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END'
    """,
    """
    CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON mesh_state DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION wait()
    """,
    "SELECT pg_advisory_lock(1)",
)


def terminate_within_commit(other: psycopg.Connection[Any]) -> threading.Thread:
    """Let the next commit of something in the shared state wait, and end its session in a thread."""
    for statement in WAITING:
        other.execute(statement)

    def terminate() -> None:
        while not other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted "
            "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        ).fetchall():
            pass

    thread = threading.Thread(target=terminate)
    thread.start()
    return thread


class Refused(Exception):  # noqa: N818 - no error of the library
    pass


def test_a_unit_of_work_spans_all_repositories_and_is_all_or_nothing(storage: MeshStorage) -> None:
    with storage.unit_of_work() as uow:
        uow.state.put("a", b"")
        uow.consensus_log.append(1, 1, {})
        uow.meshes.add(Mesh(name="one"))
        uow.messages.store(Message(id="m", from_node="a", to_node="b", content=b""))
    with storage.unit_of_work() as uow:
        counts = (uow.state.count(), uow.consensus_log.count(), uow.meshes.count(), uow.messages.count())
        assert counts == (0, 0, 0, 0)
        uow.state.put("a", b"")
        uow.consensus_log.append(1, 1, {})
        uow.commit()
        uow.state.put("b", b"")
        uow.rollback()
        uow.state.put("c", b"")
        uow.commit()
        uow.state.put("d", b"")
    with storage.unit_of_work() as uow:
        assert uow.consensus_log.last_index() == 1
    assert keys(storage) == ["a", "c"]


def test_begin_commits_at_the_end_and_rolls_back_on_an_exception(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.state.put("a", b"")
    with pytest.raises(Refused), storage.begin() as uow:
        uow.state.put("b", b"")
        raise Refused
    with storage.begin() as uow:
        uow.state.put("c", b"")
        uow.rollback()
    assert keys(storage) == ["a"]


def test_a_savepoint_undoes_its_own_block_alone(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.meshes.add(Mesh(name="taken"))
        with uow.savepoint():
            uow.state.put("kept", b"")
            with pytest.raises(AlreadyExistsError), uow.savepoint():
                uow.state.put("undone", b"")
                uow.meshes.add(Mesh(name="taken"))
        with pytest.raises(Refused), uow.savepoint():
            uow.state.put("undone too", b"")
            raise Refused
        uow.state.put("last", b"")
    assert keys(storage) == ["kept", "last"]


def test_nothing_is_committed_after_an_error_that_was_caught(storage: MeshStorage) -> None:
    with pytest.raises(MeshStorageError, match="rolled back") as error, storage.begin() as uow:
        uow.meshes.add(Mesh(name="taken"))
        with pytest.raises(AlreadyExistsError) as caught:
            uow.meshes.add(Mesh(name="taken"))
        with pytest.raises(MeshStorageError, match="earlier call"):
            uow.meshes.count()
    assert error.value.__cause__ is caught.value
    assert (error.value.sqlstate, error.value.constraint) == ("23505", "mesh_mesh_name_key")
    with storage.unit_of_work() as uow:
        assert uow.meshes.count() == 0


def test_a_rollback_lets_a_failed_unit_of_work_go_on(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.meshes.add(Mesh(name="taken"))
        with pytest.raises(AlreadyExistsError):
            uow.meshes.add(Mesh(name="taken"))
        uow.rollback()
        uow.state.put("a", b"")
    assert keys(storage) == ["a"]


@pytest.mark.parametrize("isolation", [None, "repeatable read", "serializable"])
def test_a_read_only_unit_of_work_reads_and_refuses_to_write(storage: MeshStorage, isolation: Any) -> None:
    with storage.begin() as uow:
        uow.state.put("a", b"")
    with storage.begin(read_only=True, isolation=isolation) as uow:
        assert uow.state.count() == 1
        writes = (
            lambda: uow.state.put("b", b""),
            lambda: uow.state.delete("a"),
            lambda: uow.meshes.add(Mesh(name="one")),
            lambda: uow.consensus_log.append(1, 1, {}),
            lambda: uow.routing_table.replace_all({}),
        )
        for write in writes:
            with pytest.raises(InvalidInputError) as error:
                write()
            assert error.value.field == "read_only"
        assert setting(uow, "transaction_read_only") == "on"
    assert keys(storage) == ["a"]


def test_isolation_is_what_was_asked_for_and_does_not_stay_with_the_connection(
    open_storage: Open, mesh_storage_url: str, other: psycopg.Connection[Any]
) -> None:
    with open_storage(mesh_storage_url, pool_size=1) as storage:
        for isolation in ("serializable", "repeatable read"):
            with storage.unit_of_work(isolation=isolation) as uow:
                before = uow.state.count()
                other.execute("INSERT INTO mesh_state (key, value) VALUES (%s, '')", [isolation])
                assert uow.state.count() == before
                assert setting(uow, "transaction_isolation") == isolation
        with storage.unit_of_work() as uow:
            assert uow.state.count() == 2
            other.execute("INSERT INTO mesh_state (key, value) VALUES ('new', '')")
            assert uow.state.count() == 3
            assert (setting(uow, "transaction_isolation"), setting(uow, "transaction_read_only")) == (
                "read committed",
                "off",
            )


def test_a_relaxed_commit_is_for_that_transaction_alone(
    open_storage: Open, mesh_storage_url: str, other: psycopg.Connection[Any]
) -> None:
    other.execute(f"ALTER DATABASE {other.info.dbname} SET synchronous_commit = on")
    with open_storage(mesh_storage_url, pool_size=1) as storage:
        with storage.begin(durability="relaxed") as uow:
            uow.state.put("a", b"")
        with storage.begin() as uow:
            assert setting(uow, "synchronous_commit") == "on"
        assert keys(storage) == ["a"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("isolation", "chaos"), ("durability", "eternal"), ("timeout", 0), ("timeout", -1.0), ("timeout", float("nan"))],
)
def test_what_no_transaction_can_be_is_refused(storage: MeshStorage, name: str, value: Any) -> None:
    given: dict[str, Any] = {name: value}
    calls = (storage.unit_of_work, storage.begin)
    for call in calls:
        with pytest.raises(InvalidInputError) as error, call(**given):
            pass
        assert error.value.field == name
    with pytest.raises(InvalidInputError):
        storage.run(lambda uow: uow.state.count(), **given)


def test_the_timeout_ends_a_statement_a_wait_for_a_lock_and_the_whole(
    storage: MeshStorage, other: psycopg.Connection[Any]
) -> None:
    with storage.begin() as uow:
        uow.state.put("a", b"")
    with other.transaction():
        other.execute("UPDATE mesh_state SET value = 'locked'")
        with pytest.raises(StorageTimeoutError) as error, storage.begin(timeout=0.2) as uow:
            uow.state.put("a", b"lost")
        assert not error.value.retryable
    with pytest.raises(StorageTimeoutError), storage.begin(timeout=0.2) as uow:
        for number in itertools.count():
            uow.state.put(str(number), b"lost")
    assert keys(storage) == ["a"]
    with storage.begin(timeout=30) as uow:
        uow.state.put("b", b"")
    with storage.begin() as uow:
        assert setting(uow, "statement_timeout") == "30s"
    assert keys(storage) == ["a", "b"]


def test_a_lock_timeout_and_a_statement_timeout_are_kept(
    open_storage: Open, mesh_storage_url: str, other: psycopg.Connection[Any]
) -> None:
    states = []
    for name in ("lock_timeout", "statement_timeout"):
        with open_storage(mesh_storage_url, **{name: 0.1}) as storage, other.transaction():
            other.execute("LOCK TABLE mesh_state")
            with pytest.raises(StorageTimeoutError) as error, storage.begin() as uow:
                uow.state.count()
            states.append(error.value.sqlstate)
    assert states == ["55P03", "57014"]


def test_a_full_pool_is_unavailable_and_free_again_afterwards(open_storage: Open, mesh_storage_url: str) -> None:
    with open_storage(mesh_storage_url, pool_size=2, pool_timeout=0.1) as storage:
        with storage.begin() as one, storage.begin() as two:
            with pytest.raises(UnavailableError, match="pool_size") as error, storage.begin():
                pass
            assert error.value.retryable
            with pytest.raises(StorageTimeoutError), storage.begin(timeout=0.05):
                pass
            health = storage.health()
            assert (health.ok, health.pool_in_use, health.pool_size) == (True, 2, 2)  # by a connection of its own
            one.state.put("a", b"")
            two.state.put("b", b"")
        assert keys(storage) == ["a", "b"]
        assert storage.health().pool_in_use == 0


def test_a_lost_connection_is_unavailable_and_replaced(storage: MeshStorage, other: psycopg.Connection[Any]) -> None:
    with pytest.raises(UnavailableError) as error, storage.begin() as uow:
        uow.state.put("a", b"")
        other.execute(
            "SELECT pg_terminate_backend(%s::int)", [uow.session.execute(text("SELECT pg_backend_pid()")).scalar()]
        )
        uow.state.put("b", b"")
    assert error.value.retryable
    assert keys(storage) == []
    with storage.begin() as uow:
        uow.state.put("c", b"")
    assert keys(storage) == ["c"]


def test_two_units_of_work_see_only_what_is_committed(storage: MeshStorage) -> None:
    with storage.begin() as one, storage.begin() as two:
        one.state.put("a", b"1")
        assert two.state.find("a") is None
        one.commit()
        assert two.state.get("a").value == b"1"


def test_run_gives_what_work_gave_and_commits(storage: MeshStorage) -> None:
    assert storage.run(lambda uow: uow.state.put("a", b"1").value) == b"1"
    assert keys(storage) == ["a"]


def test_run_begins_anew_after_a_retryable_error(storage: MeshStorage, caplog: pytest.LogCaptureFixture) -> None:
    tried: list[UnitOfWork] = []

    def work(uow: UnitOfWork) -> int:
        tried.append(uow)
        uow.state.put(f"attempt {len(tried)}", b"")
        if len(tried) < 3:
            raise SerializationError
        return len(tried)

    with caplog.at_level(logging.INFO, "mesh_storage"):
        assert storage.run(work) == 3
    assert len(set(map(id, tried))) == 3
    assert keys(storage) == ["attempt 3"]
    events = [(record.event, record.attempt) for record in caplog.records if record.msg == "retrying"]  # type: ignore[attr-defined]
    assert events == [("retry", 1), ("retry", 2)]


def test_run_gives_up_after_its_attempts_and_at_once_on_other_errors(storage: MeshStorage) -> None:
    tried: list[type[Exception]] = []

    def fail(error: type[Exception]) -> Any:
        def work(_: UnitOfWork) -> None:
            tried.append(error)
            raise error

        return work

    with pytest.raises(SerializationError):
        storage.run(fail(SerializationError), attempts=2)
    for error in (StorageTimeoutError, Refused):
        with pytest.raises(error):
            storage.run(fail(error))
    assert tried == [SerializationError, SerializationError, StorageTimeoutError, Refused]
    with pytest.raises(InvalidInputError) as refused:
        storage.run(fail(Refused), attempts=0)
    assert refused.value.field == "attempts"


def test_concurrent_serializable_work_is_run_until_all_of_it_is_done(storage: MeshStorage) -> None:
    workers, rounds = 4, 5
    together = threading.Barrier(workers)

    def increment(uow: UnitOfWork) -> int:
        value = int(uow.runtime_config.value("counter", 0)) + 1
        uow.runtime_config.put("counter", value)
        return value

    def worker(_: int) -> list[int]:
        together.wait(30)
        return [storage.run(increment, attempts=50, isolation="serializable") for _ in range(rounds)]

    with ThreadPoolExecutor(workers) as pool:
        results = [value for values in pool.map(worker, range(workers)) for value in values]
    assert sorted(results) == list(range(1, workers * rounds + 1))


def test_write_skew_is_a_serialization_error_at_commit(storage: MeshStorage) -> None:
    with pytest.raises(SerializationError) as error:  # noqa: SIM117 - the second begins within the first
        with storage.begin(isolation="serializable") as one, storage.begin(isolation="serializable") as two:
            for uow, key in ((one, "a"), (two, "b")):
                assert uow.state.count() == 0
                uow.state.put(key, b"")
    assert (error.value.sqlstate, error.value.retryable) == ("40001", True)
    assert len(keys(storage)) == 1


def test_a_deadlock_is_a_serialization_error_for_one_of_the_two(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        for key in ("a", "b"):
            uow.state.put(key, b"")
    together = threading.Barrier(2)

    def worker(order: str) -> bool:
        try:
            with storage.begin() as uow:
                uow.state.put(order[0], b"new")
                together.wait(30)
                uow.state.put(order[1], b"new")
        except SerializationError as error:
            assert (error.sqlstate, error.retryable) == ("40P01", True)  # noqa: PT017 - either of the two may lose
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(worker, ("ab", "ba"))) == [False, True]


def test_the_session_is_in_the_same_transaction(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.state.put("a", b"1")
        entry = uow.session.scalars(select(StateEntry)).one()
        assert (entry.key, entry.value) == ("a", b"1")
        uow.session.add(StateEntry(key="b", value=b"2"))
        uow.session.flush()
        assert uow.state.get("b").value == b"2"
        uow.session.add(StateEntry(key="c", value=b"3"))
    assert keys(storage) == ["a", "b", "c"]
    with storage.unit_of_work() as uow:
        uow.session.add(StateEntry(key="d", value=b"4"))
        uow.session.commit()
        assert keys(storage) == ["a", "b", "c"]
    assert keys(storage) == ["a", "b", "c"]


def test_an_error_of_the_session_is_translated_as_it_leaves_and_ends_the_transaction(storage: MeshStorage) -> None:
    with pytest.raises(AlreadyExistsError) as error, storage.begin() as uow:
        uow.state.put("a", b"")
        uow.session.execute(text("INSERT INTO mesh_state (key, value) VALUES ('a', '')"))
    assert isinstance(error.value.__cause__, IntegrityError)
    with pytest.raises(MeshStorageError), storage.begin() as uow:
        uow.state.put("b", b"")
        with pytest.raises(IntegrityError):
            uow.session.execute(text("INSERT INTO mesh_state (key, value) VALUES ('b', '')"))
    assert keys(storage) == []


def test_health_tells_each_fact_and_writes_nothing(storage: MeshStorage, other: psycopg.Connection[Any]) -> None:
    tables = [
        row[0]
        for row in other.execute("SELECT oid::regclass::text FROM pg_class WHERE relkind = 'r' AND NOT relisshared")
    ]
    with storage.unit_of_work(), other.transaction():
        # Not by the WAL, to which all databases of the server write.
        other.execute(f"LOCK TABLE {', '.join(tables)} IN SHARE MODE")
        health = storage.health()
        with pytest.raises(StorageTimeoutError), storage.begin(timeout=0.5) as uow:
            uow.state.put("a", b"")
    assert (health.ok, health.connected, health.writable, health.error) == (True, True, True, None)
    assert health.revision == health.head == schema.head()
    assert (health.pool_size, health.pool_in_use) == (10, 1)
    assert health.round_trip_ms is not None
    assert 0 < health.round_trip_ms < 2000


def test_health_tells_what_is_wrong(
    storage: MeshStorage, other: psycopg.Connection[Any], mesh_storage_url: str
) -> None:
    database = other.info.dbname
    disconnect = (
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = %s"
    )
    other.execute("UPDATE mesh_alembic_version SET version_num = '0001'")
    health = storage.health()
    assert (health.ok, health.connected, health.revision) == (False, True, "0001")
    other.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    other.execute(disconnect, [database])
    health = storage.health()
    assert (health.ok, health.connected, health.writable) == (False, True, False)
    with psycopg.connect(mesh_storage_url, dbname="postgres", autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")
        admin.execute(disconnect, [database])
    health = storage.health()
    assert (health.ok, health.connected, health.writable, health.revision) == (False, False, False, None)
    assert isinstance(health.error, MeshStorageError)
    # A pooler is still there, and has no session to give.
    with pytest.raises((type(health.error), UnavailableError)), storage.begin(timeout=2.0) as uow:
        uow.state.count()


def test_after_close_every_call_is_a_closed_error(open_storage: Open, mesh_storage_url: str) -> None:
    with open_storage(mesh_storage_url) as storage:
        with storage.unit_of_work() as ended:
            ended.state.put("a", b"")
        with storage.begin() as open_:
            open_.state.put("b", b"")
            storage.close()
            storage.close()
            open_.state.put("c", b"")
        for call in (
            lambda: ended.state.get("a"),
            ended.commit,
            storage.health,
            lambda: storage.run(lambda uow: uow.state.count()),
        ):
            with pytest.raises(ClosedError):
                call()
        for opening in (storage.begin, storage.unit_of_work):
            with pytest.raises(ClosedError), opening():
                pass
    with open_storage(mesh_storage_url) as storage:
        assert keys(storage) == ["b", "c"]


def add_and_flush(uow: UnitOfWork, entry: StateEntry) -> None:
    uow.session.add(entry)
    uow.session.flush()


def fails_in_run(storage: MeshStorage, entry: StateEntry) -> None:
    attempts: list[int] = []

    def work(uow: UnitOfWork) -> None:
        attempts.append(1)
        add_and_flush(uow, entry)
        if len(attempts) == 1:
            raise SerializationError

    storage.run(work)


def raises(storage: MeshStorage, entry: StateEntry) -> None:
    with pytest.raises(Refused), storage.begin() as uow:
        add_and_flush(uow, entry)
        raise Refused


def is_not_committed(storage: MeshStorage, entry: StateEntry) -> None:
    with storage.unit_of_work() as uow:
        add_and_flush(uow, entry)
        uow.session.commit()


def is_rolled_back(storage: MeshStorage, entry: StateEntry) -> None:
    with storage.unit_of_work() as uow:
        add_and_flush(uow, entry)
        uow.rollback()


def loses_its_connection(storage: MeshStorage, entry: StateEntry) -> None:
    with storage.unit_of_work() as uow:
        add_and_flush(uow, entry)
        pid = uow.session.execute(text("SELECT pg_backend_pid()")).scalar_one()
        with storage.begin() as other:
            other.session.execute(text(f"SELECT pg_terminate_backend({pid}, 10000)"))
        with pytest.raises(MeshStorageError):
            uow.state.count()
        uow.rollback()
        with pytest.raises(MeshStorageError):
            uow.session.execute(text("SELECT 1"))


def is_refused(storage: MeshStorage, entry: StateEntry) -> None:
    with storage.unit_of_work() as uow:
        add_and_flush(uow, entry)
        with pytest.raises(IntegrityError):
            uow.session.execute(text("INSERT INTO mesh_state (key, value) VALUES ('k', '')"))
        uow.session.add(StateEntry(key="never", value=b""))
        with pytest.raises(MeshStorageError):
            uow.commit()
        add_and_flush(uow, entry)
        uow.commit()


def is_in_a_savepoint(storage: MeshStorage, entry: StateEntry) -> None:
    with storage.begin() as uow:
        with pytest.raises(Refused), uow.savepoint():
            add_and_flush(uow, entry)
            raise Refused
        uow.session.add(entry)


@pytest.mark.parametrize(
    "fails",
    [
        fails_in_run,
        raises,
        is_not_committed,
        is_rolled_back,
        loses_its_connection,
        is_refused,
        is_in_a_savepoint,
    ],
)
def test_an_object_whose_unit_of_work_failed_is_stored_when_it_is_added_again(
    storage: MeshStorage, fails: Callable[[MeshStorage, StateEntry], None]
) -> None:
    entry = StateEntry(key="k", value=b"v")
    fails(storage, entry)
    if fails not in (fails_in_run, is_refused, is_in_a_savepoint):
        assert keys(storage) == []
        with storage.begin() as uow:
            uow.session.add(entry)
    assert keys(storage) == ["k"]


def test_a_changed_object_whose_unit_of_work_failed_is_changed_when_that_is_done_again(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.state.put("k", b"old")
    with storage.unit_of_work() as uow:
        entry = uow.session.scalars(select(StateEntry)).one()
        entry.value = b"new"
        uow.session.flush()
    with storage.begin() as uow:
        uow.session.add(entry)
        entry.value = b"new"
    with storage.begin() as uow:
        assert uow.state.get("k").value == b"new"


def test_an_object_that_was_committed_stays_stored_and_readable(storage: MeshStorage) -> None:
    entry = StateEntry(key="k", value=b"v")
    with storage.unit_of_work() as uow:
        add_and_flush(uow, entry)
        uow.commit()
        uow.session.add(StateEntry(key="undone", value=b""))
        uow.session.flush()
        uow.rollback()
        assert uow.session.scalars(select(StateEntry)).one() is entry
        entry.value = b"newer"
        uow.commit()
    with storage.unit_of_work() as uow:
        uow.session.add(StateEntry(key="undone", value=b""))
        uow.session.flush()
        read = uow.session.scalars(select(StateEntry).where(StateEntry.key == "k")).one()
    assert (entry.value, read.key, read.value) == (b"newer", "k", b"newer")


def test_a_savepoint_that_failed_leaves_the_objects_from_outside_of_it_in_the_session(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.state.put("k", b"old")
    with storage.begin() as uow:
        entry = uow.session.scalars(select(StateEntry)).one()
        with pytest.raises(Refused), uow.savepoint():
            uow.state.put("undone", b"")
            raise Refused
        entry.value = b"new"
    with storage.begin() as uow:
        assert uow.state.get("k").value == b"new"
    assert keys(storage) == ["k"]


def test_what_is_added_after_a_flush_that_failed_is_let_go(storage: MeshStorage) -> None:
    entry = StateEntry(key="k", value=b"v")
    with storage.unit_of_work() as uow:
        uow.state.put("taken", b"")
        with pytest.raises(IntegrityError):
            add_and_flush(uow, StateEntry(key="taken", value=b""))
        uow.session.add(entry)
    with storage.begin() as uow:
        uow.session.add(entry)
    assert keys(storage) == ["k"]


def test_a_savepoint_of_the_session_that_is_left_open_is_committed(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.session.begin_nested()
        uow.session.add(StateEntry(key="k", value=b""))
    assert keys(storage) == ["k"]


def test_a_commit_whose_session_is_ended_has_an_unknown_outcome(
    storage: MeshStorage, other: psycopg.Connection[Any]
) -> None:
    thread = terminate_within_commit(other)
    with pytest.raises(UnavailableError) as error, storage.begin() as uow:
        uow.state.put("k", b"v")
    thread.join()
    assert (error.value.committed, error.value.retryable) == ("unknown", True)


def test_run_does_not_forget_that_an_earlier_attempt_has_an_unknown_outcome(
    storage: MeshStorage, other: psycopg.Connection[Any]
) -> None:
    thread = terminate_within_commit(other)
    attempts = itertools.count(1)

    def work(uow: UnitOfWork) -> None:
        if next(attempts) == 2:
            uow.state.get("not there")
        uow.state.put("k", b"v")

    with pytest.raises(NotFoundError) as error:
        storage.run(work)
    thread.join()
    assert (next(attempts), error.value.committed) == (3, "unknown")
