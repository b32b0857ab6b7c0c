"""Units of work that are used wrongly, or whose session, savepoint or server fails half-way: still all or nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from mesh_storage import (
    ClosedError,
    InvalidInputError,
    MeshStorage,
    MeshStorageError,
    Settings,
    StateEntry,
    StorageTimeoutError,
    UnavailableError,
    UnitOfWork,
)
from tests.conftest import FROZEN_S, frozen
from tests.processes import eventually, has_ended

TOO_LONG = "x" * 256


def keys(storage: MeshStorage) -> list[str]:
    with storage.unit_of_work(read_only=True) as uow:
        return [entry.key for entry in uow.state.stream()]


def opened(url: str, **settings: Any) -> MeshStorage:
    return MeshStorage.open(settings=Settings(url=SecretStr(url), **settings))


def backend(uow: UnitOfWork) -> int:
    return int(uow.session.execute(text("SELECT pg_backend_pid()")).scalar_one())


def terminate(storage: MeshStorage, pid: int) -> None:
    with storage.begin() as uow:
        assert uow.session.execute(text(f"SELECT pg_terminate_backend({pid}, 10000)")).scalar_one()


def wait_for_lock(uow: UnitOfWork) -> None:
    """Return when another connection to this database waits for a lock."""
    deadline = time.monotonic() + 20
    # pg_stat_activity would stay the same for the whole transaction.
    query = """
        SELECT count(*) FROM pg_locks JOIN pg_database ON pg_database.oid = database
        WHERE NOT granted AND datname = current_database()
    """
    while not uow.session.execute(text(query)).scalar_one():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_flush_that_failed_and_was_caught_lets_nothing_be_committed(storage: MeshStorage) -> None:
    with pytest.raises(MeshStorageError), storage.begin() as uow:
        uow.state.put("before", b"")
        uow.session.add(StateEntry(key=TOO_LONG, value=b""))
        with pytest.raises(DBAPIError):
            uow.session.flush()
        uow.state.put("after", b"")
    assert keys(storage) == []


def test_a_rollback_after_a_failed_flush_begins_anew(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.state.put("before", b"")
        uow.session.add(StateEntry(key=TOO_LONG, value=b""))
        with pytest.raises(DBAPIError):
            uow.session.flush()
        uow.rollback()
        uow.session.add(StateEntry(key="session", value=b""))
        uow.state.put("repository", b"")
    assert keys(storage) == ["repository", "session"]


def add_and_flush(uow: UnitOfWork) -> None:
    uow.session.add(StateEntry(key=TOO_LONG, value=b""))
    uow.session.flush()


def add_alone(uow: UnitOfWork) -> None:
    uow.session.add(StateEntry(key=TOO_LONG, value=b""))


def execute(uow: UnitOfWork) -> None:
    uow.session.execute(text("SELECT 1 / 0"))


@pytest.mark.parametrize("fail", [add_and_flush, add_alone, execute])
def test_a_savepoint_undoes_what_the_session_did_and_no_more(
    storage: MeshStorage, fail: Callable[[UnitOfWork], None]
) -> None:
    with storage.begin() as uow:
        uow.state.put("before", b"")
        uow.session.add(StateEntry(key="session before", value=b""))
        with pytest.raises((DBAPIError, InvalidInputError)), uow.savepoint():
            uow.state.put("undone", b"")
            fail(uow)
        uow.state.put("after", b"")
        uow.session.add(StateEntry(key="session after", value=b""))
    assert keys(storage) == ["after", "before", "session after", "session before"]


@pytest.mark.parametrize("end", [UnitOfWork.commit, UnitOfWork.rollback, lambda uow: uow.session.rollback()])
def test_inside_of_a_savepoint_the_whole_cannot_end(storage: MeshStorage, end: Callable[[UnitOfWork], None]) -> None:
    with pytest.raises(MeshStorageError, match="savepoint"), storage.begin() as uow:
        uow.state.put("before", b"")
        with uow.savepoint():
            uow.state.put("inside", b"")
            end(uow)
    assert keys(storage) == []


def test_who_is_refused_in_a_savepoint_may_go_on(storage: MeshStorage) -> None:
    with storage.begin() as uow, uow.savepoint():
        uow.state.put("inside", b"")
        for end in (uow.commit, uow.rollback):
            with pytest.raises(MeshStorageError, match="savepoint"):
                end()
        with uow.savepoint():
            uow.state.put("inside of that", b"")
    assert keys(storage) == ["inside", "inside of that"]


def test_one_unit_of_work_cannot_be_entered_twice_at_once(mesh_storage_url: str) -> None:
    with opened(mesh_storage_url, pool_size=2, pool_timeout=0.2) as storage:
        scope = storage.begin()
        with pytest.raises(MeshStorageError, match="already open"), scope as one:
            one.state.put("a", b"")
            with scope as two:
                two.state.put("b", b"")
        assert storage.health().pool_in_use == 0
        with storage.begin(), storage.begin(), pytest.raises(UnavailableError), scope:
            pass
        with scope as again:  # It is open no more.
            again.state.put("c", b"")
        assert keys(storage) == ["c"]


def test_two_threads_in_one_unit_of_work_are_refused(storage: MeshStorage) -> None:
    with storage.begin() as holder, ThreadPoolExecutor(1) as threads:
        holder.session.execute(text("LOCK TABLE mesh_routing_table"))
        with storage.unit_of_work() as uow:
            reading = threads.submit(uow.routing_table.all)
            wait_for_lock(holder)
            calls: list[Callable[[], object]] = [lambda: uow.state.put("k", b""), uow.commit, uow.rollback]
            for call in calls:
                with pytest.raises(MeshStorageError, match="two threads"):
                    call()
            holder.commit()
            assert reading.result() == {}
            uow.state.put("k", b"")
            uow.commit()
    assert keys(storage) == ["k"]


@pytest.mark.parametrize("leave", ["use", "rollback", "commit", "end"])
def test_a_connection_lost_under_a_session_is_unavailable_or_nothing_at_all(storage: MeshStorage, leave: str) -> None:
    seen: UnavailableError | None = None
    try:
        with storage.unit_of_work() as uow:
            uow.session.add(StateEntry(key="lost", value=b""))
            uow.session.flush()
            terminate(storage, backend(uow))
            if leave == "use":
                uow.session.scalars(text("SELECT 1"))
            elif leave == "commit":
                uow.commit()
            elif leave == "rollback":
                uow.rollback()
    except UnavailableError as error:
        seen = error
    assert (seen is not None) == (leave in {"use", "commit"})
    assert keys(storage) == []
    assert storage.health().pool_in_use == 0


@pytest.mark.parametrize("leave", ["flush", "commit", "execute"])
def test_a_lost_connection_leaves_one_record(
    storage: MeshStorage, leave: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UnavailableError), storage.begin() as uow:
        terminate(storage, backend(uow))
        if leave == "execute":
            uow.session.execute(text("SELECT 1"))
        uow.session.add(StateEntry(key="lost", value=b""))
        if leave == "flush":
            uow.session.flush()
    events = [getattr(record, "event", "") for record in caplog.records if record.levelno >= logging.WARNING]
    assert events == ["connection_lost"]


@pytest.mark.parametrize("timeout", ["5", b"5", True, 0, -1, float("nan"), float("inf"), 1e300, 10**400])
def test_a_timeout_that_is_none_is_refused_by_name(storage: MeshStorage, timeout: Any) -> None:
    with pytest.raises(InvalidInputError) as error, storage.begin(timeout=timeout):
        pass
    assert error.value.field == "timeout"


def test_a_timeout_of_months_is_one(storage: MeshStorage) -> None:
    with storage.begin(timeout=100 * 86_400) as uow:
        uow.state.put("k", b"")
    assert keys(storage) == ["k"]


def test_who_waits_for_a_connection_learns_that_the_storage_was_closed(mesh_storage_url: str) -> None:
    storage = opened(mesh_storage_url, pool_size=1, pool_timeout=1.5)
    waiting = threading.Event()

    def wait() -> None:
        waiting.set()
        with storage.begin():
            pass

    with storage.begin(), ThreadPoolExecutor(1) as threads:
        waiter = threads.submit(wait)
        waiting.wait()
        storage.close()
        with pytest.raises(ClosedError):
            waiter.result()


def test_after_the_end_all_is_closed_but_what_was_read(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        entry = uow.state.put("k", b"v")
        uow.node_states.put("n", {"a": [1]})
        stream = uow.state.stream()
        session = uow.session
        added = StateEntry(key="s", value=b"s")
        session.add(added)
    with storage.unit_of_work() as other:
        state = other.node_states.get("n")
    calls: list[Callable[[], object]] = [
        lambda: uow.state.get("k"),
        lambda: next(stream),
        lambda: session.execute(text("SELECT 1")),
        lambda: uow.session.scalars(text("SELECT 1")),
        uow.commit,
        uow.savepoint().__enter__,
    ]
    for call in calls:
        with pytest.raises(ClosedError):
            call()
    uow.rollback()
    assert (entry.value, state.state, added.value) == (b"v", {"a": [1]}, b"s")
    assert entry.created_at is not None


def test_run_refuses_a_coroutine_function_before_anything(storage: MeshStorage) -> None:
    async def work(uow: UnitOfWork) -> None:
        await asyncio.sleep(0)
        uow.state.put("never", b"")

    storage.close()  # So to begin anything would be another error.
    with pytest.raises(InvalidInputError, match="AsyncMeshStorage") as error:
        storage.run(work)
    assert error.value.field == "work"


def test_run_does_again_what_the_session_lost_to_a_conflict(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.state.put("counter", b"0")
    attempts = 0

    def increment(uow: UnitOfWork) -> None:
        nonlocal attempts
        attempts += 1
        counter = uow.session.get_one(StateEntry, "counter")
        if attempts == 1:
            with storage.begin() as other:
                other.state.put("counter", b"41")
        counter.value = str(int(counter.value) + 1).encode()

    storage.run(increment, isolation="repeatable read")
    with storage.begin(read_only=True) as uow:
        assert (attempts, uow.state.get("counter").value) == (2, b"42")


@pytest.fixture(scope="module")
def own() -> Iterator[MeshStorage]:
    """Yield a storage whose server runs on this machine, whatever the other tests run on."""
    with MeshStorage.open("memory:") as storage:
        yield storage


def by_a_repository(storage: MeshStorage, freeze: Callable[[UnitOfWork], None]) -> None:
    with pytest.raises(StorageTimeoutError), storage.begin(timeout=0.3) as uow:
        freeze(uow)
        uow.state.put("k", b"")


def by_the_session(storage: MeshStorage, freeze: Callable[[UnitOfWork], None]) -> None:
    with pytest.raises(StorageTimeoutError), storage.begin(timeout=0.3) as uow:
        freeze(uow)
        uow.session.execute(text("SELECT 1"))


def in_a_savepoint(storage: MeshStorage, freeze: Callable[[UnitOfWork], None]) -> None:
    with pytest.raises(StorageTimeoutError), storage.begin(timeout=0.3) as uow, uow.savepoint():
        freeze(uow)
        uow.state.put("k", b"")


def in_the_commit(storage: MeshStorage, freeze: Callable[[UnitOfWork], None]) -> None:
    with pytest.raises(StorageTimeoutError), storage.begin(timeout=0.3) as uow:
        uow.state.put("k", b"")
        freeze(uow)


def in_the_rollback(storage: MeshStorage, freeze: Callable[[UnitOfWork], None]) -> None:
    with storage.unit_of_work(timeout=0.3) as uow:
        uow.state.put("k", b"")
        freeze(uow)


@pytest.mark.parametrize("act", [by_a_repository, by_the_session, in_a_savepoint, in_the_commit, in_the_rollback])
def test_a_server_that_stands_still_keeps_nobody_longer_than_the_timeout(
    own: MeshStorage, act: Callable[[MeshStorage, Callable[[UnitOfWork], None]], None]
) -> None:
    with ExitStack() as thaw:
        begun = time.monotonic()
        act(own, lambda uow: thaw.enter_context(frozen(backend(uow))))
        assert time.monotonic() - begun < FROZEN_S / 2
    assert own.health().ok
    assert own.health().pool_in_use == 0


def test_nor_does_the_reset_of_a_session(own: MeshStorage) -> None:
    with ExitStack() as thaw:
        begun = time.monotonic()
        with own.begin(timeout=0.3) as uow:
            pid = backend(uow)
            uow.commit()
            thaw.enter_context(frozen(pid))
        assert time.monotonic() - begun < FROZEN_S / 2


def test_who_is_interrupted_between_two_calls_does_not_wait_for_a_server_that_stands_still(own: MeshStorage) -> None:
    with ExitStack() as thaw:
        begun = time.monotonic()
        with pytest.raises(KeyboardInterrupt), own.begin() as uow:
            uow.state.put("interrupted", b"")
            thaw.enter_context(frozen(backend(uow)))
            raise KeyboardInterrupt
        assert time.monotonic() - begun < FROZEN_S / 2
    with own.begin(read_only=True) as uow:
        assert uow.state.find("interrupted") is None


def test_of_a_server_that_stands_still_health_tells_soon(own: MeshStorage) -> None:
    with own.begin() as uow:
        pid = backend(uow)
    with frozen(pid):
        begun = time.monotonic()
        health = own.health()
        assert time.monotonic() - begun < FROZEN_S / 2
    assert (health.ok, health.connected, type(health.error)) == (False, False, StorageTimeoutError)
    assert own.health().ok


def test_a_time_that_was_not_over_ends_nothing_later(own: MeshStorage) -> None:
    for _ in range(20):
        with own.begin(timeout=0.5) as uow:
            uow.state.put("k", b"")
    with own.begin() as uow:
        uow.session.execute(text("SELECT pg_sleep(0.7)"))
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("mesh_storage")] == []


def test_an_interrupt_in_the_middle_of_a_statement_leaves_the_pool_clean(mesh_storage_url: str) -> None:
    with opened(mesh_storage_url, pool_size=1, pool_timeout=5) as storage, opened(mesh_storage_url) as other:
        with other.begin() as holder, ThreadPoolExecutor(1) as threads:
            holder.session.execute(text("LOCK TABLE mesh_state"))

            def interrupt() -> None:
                wait_for_lock(holder)
                os.kill(os.getpid(), signal.SIGINT)

            interrupting = threads.submit(interrupt)
            scope: AbstractContextManager[UnitOfWork] = storage.begin()
            with pytest.raises(KeyboardInterrupt), scope as uow:
                uow.state.put("k", b"")
            interrupting.result()
        assert keys(storage) == []
        with storage.begin() as uow:
            uow.state.put("k", b"")
        assert storage.health().pool_in_use == 0


def test_a_commit_of_the_session_flushes_and_no_more(storage: MeshStorage) -> None:
    with storage.unit_of_work() as uow:
        uow.session.add(StateEntry(key="k", value=b"v"))
        assert uow.state.find("k") is None
        uow.session.commit()
        assert uow.state.get("k").value == b"v"
    assert keys(storage) == []


def test_what_follows_a_retryable_failure_is_retryable(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.session.execute(
            text(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = TG_ARGV[0]; END $$"
            )
        )
        for table, code in (("mesh_state", "40001"), ("mesh_runtime_config", "23514")):
            uow.session.execute(
                text(f"CREATE TRIGGER refuse BEFORE INSERT ON {table} EXECUTE FUNCTION refuse('{code}')")
            )

    def put_state(uow: UnitOfWork) -> None:
        uow.state.put("k", b"v")

    def put_config(uow: UnitOfWork) -> None:
        uow.runtime_config.put("k", 1)

    for put, retryable in ((put_state, True), (put_config, False)):
        with storage.unit_of_work() as uow:
            with pytest.raises(MeshStorageError) as first:
                put(uow)
            with pytest.raises(MeshStorageError, match="earlier call") as second:
                uow.nodes.count()
            with pytest.raises(MeshStorageError, match="not committed") as third:
                uow.commit()
        assert [error.value.retryable for error in (first, second, third)] == [retryable] * 3


def test_the_pauses_of_run_grow_from_20_ms_with_jitter(storage: MeshStorage, caplog: pytest.LogCaptureFixture) -> None:
    def fails(_: UnitOfWork) -> None:
        raise UnavailableError

    caplog.set_level(logging.INFO, "mesh_storage")
    begun = time.monotonic()
    for _ in range(3):
        with pytest.raises(UnavailableError):
            storage.run(fails)
    took = time.monotonic() - begun
    pauses = [getattr(record, "pause_s", 0.0) for record in caplog.records if getattr(record, "event", "") == "retry"]
    assert len(pauses) == 3 * 4
    for number, pause in enumerate(pauses):
        longest = 0.02 * 2 ** (number % 4)
        assert longest / 2 - 0.001 <= pause <= longest
    assert len(set(pauses[3::4])) > 1, "the same each time"
    assert took >= sum(pauses) - 0.01


def test_the_pauses_of_run_end_at_2_s(storage: MeshStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: UnitOfWork) -> None:
        raise UnavailableError

    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(UnavailableError):
        storage.run(fails, attempts=1100)  # more than a float has powers of two
    assert len(pauses) == 1099
    assert all(1 <= pause <= 2 for pause in pauses[7:])
    assert all(pause < 1.3 for pause in pauses[:7])


def test_a_connection_in_doubt_is_never_lent_again(mesh_storage_url: str) -> None:
    """A request to cancel may come late, and hit the statement of another."""
    with opened(mesh_storage_url, pool_size=1) as storage:
        with pytest.raises(StorageTimeoutError), storage.begin(timeout=0.2) as uow:
            pid = backend(uow)
            uow.session.execute(text("SELECT pg_sleep(30)"))
        with storage.begin() as uow:
            assert backend(uow) != pid
        assert eventually(lambda: has_ended(mesh_storage_url, pid)), "it is kept for nobody"


def test_a_connection_as_old_as_one_that_was_lost_is_never_lent_again(mesh_storage_url: str) -> None:
    with opened(mesh_storage_url, pool_size=2) as storage, opened(mesh_storage_url) as other:
        with storage.begin() as old:
            pid = backend(old)
            with pytest.raises(UnavailableError), storage.begin() as lost:
                terminate(other, backend(lost))
                lost.state.count()
        with storage.begin() as uow:
            assert backend(uow) != pid
