"""Limits: of the pool, of a statement, of a lock, of a whole unit of work; none of them leaves anything behind."""

from __future__ import annotations

import asyncio
import linecache
import logging
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import text

from mesh_storage import MeshStorage, MeshStorageError, Settings, StorageTimeoutError, UnavailableError, UnitOfWork
from mesh_storage.aio import AsyncMeshStorage, AsyncUnitOfWork
from tests.processes import eventually, has_ended


def opened(url: str, **settings: Any) -> MeshStorage:
    return MeshStorage.open(settings=Settings(url=SecretStr(url), **settings))


def sessions(storage: MeshStorage) -> list[tuple[str, str]]:
    """Return the state and query of the database's other connections."""
    with storage.begin(read_only=True) as uow:
        rows = uow.session.execute(
            text(
                "SELECT state, query FROM pg_stat_activity WHERE datname = current_database() "
                "AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
            )
        )
        return [(str(state), str(query)) for state, query in rows]


def test_an_exhausted_pool_is_unavailable_after_its_timeout_and_works_again(mesh_storage_url: str) -> None:
    with opened(mesh_storage_url, pool_size=2, pool_timeout=0.2) as storage:
        with storage.begin(), storage.begin():
            begun = time.monotonic()
            with pytest.raises(UnavailableError, match="pool_size") as error, storage.begin():
                pass
            assert time.monotonic() - begun >= 0.2
            assert error.value.retryable
            with pytest.raises(UnavailableError, match="pool_size"), storage.begin(timeout=60):
                pass
            with pytest.raises(StorageTimeoutError), storage.begin(timeout=0.05):
                pass
            health = storage.health()
            assert (health.ok, health.connected, health.pool_size, health.pool_in_use) == (True, True, 2, 2)
        with storage.begin(), storage.begin():
            pass


def test_many_threads_share_a_small_pool(mesh_storage_url: str) -> None:
    with opened(mesh_storage_url, pool_size=3) as storage:

        def work(number: int) -> None:
            for i in range(20):
                with storage.begin() as uow:
                    uow.state.put(f"{number}-{i}", b"v")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with storage.begin(read_only=True) as uow:
            assert uow.state.count() == 240
        assert len(sessions(storage)) <= 2


def slow_in_a_repository(uow: UnitOfWork) -> None:
    uow.session.execute(
        text(
            "CREATE OR REPLACE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN PERFORM pg_sleep(30); RETURN NEW; END $$"
        )
    )
    uow.session.execute(text("CREATE TRIGGER slow BEFORE INSERT ON mesh_state EXECUTE FUNCTION slowly()"))
    uow.state.put("k", b"v")


def test_a_statement_over_its_limit_is_a_timeout_and_leaves_the_connection_clean(mesh_storage_url: str) -> None:
    with opened(mesh_storage_url, statement_timeout=0.2, pool_size=1) as storage:
        with pytest.raises(StorageTimeoutError) as error, storage.begin() as uow:
            slow_in_a_repository(uow)
        assert (error.value.sqlstate, error.value.retryable) == ("57014", False)
        with storage.begin() as uow:
            uow.state.put("k", b"v")
        assert sessions(storage) == []


def limits_in(uow: UnitOfWork) -> list[str]:
    uow.state.count()
    names = ("statement_timeout", "idle_in_transaction_session_timeout")
    return [str(uow.session.execute(text("SELECT current_setting(:name)"), {"name": name}).scalar()) for name in names]


@pytest.mark.parametrize("timeout", [10, 0.9])
def test_a_timeout_of_a_unit_of_work_lifts_no_limit_of_the_settings(mesh_storage_url: str, timeout: float) -> None:
    with opened(mesh_storage_url, statement_timeout=0.2, idle_in_transaction_timeout=0.6) as storage:
        with pytest.raises(StorageTimeoutError) as error, storage.begin(timeout=timeout) as uow:
            uow.state.put("k", b"v")
            uow.session.execute(text("SELECT pg_sleep(30)"))
        assert error.value.sqlstate == "57014"
        with storage.begin(timeout=timeout) as uow:
            assert limits_in(uow) == ["200ms", "600ms"]
            uow.commit()
            assert limits_in(uow) == ["200ms", "600ms"]
        with storage.begin() as uow:
            assert limits_in(uow) == ["200ms", "600ms"]


@pytest.mark.parametrize("limit", ["5500ms", "7s", "3min", "2h", "1d", "2147483647ms", "0"])
def test_a_timeout_of_a_unit_of_work_lifts_no_limit_of_the_url(mesh_storage_url: str, limit: str) -> None:
    name = "idle_in_transaction_session_timeout"
    url = f"{mesh_storage_url}&options=-c%20{name}%3D{limit}%20-c%20statement_timeout%3D0"
    with opened(url) as storage, storage.begin(timeout=86_400 * 7) as uow:
        asked = "SELECT extract(epoch FROM CAST(:limit AS interval))"
        given, seconds = (
            float(uow.session.execute(text(asked), {"limit": each}).scalar() or 0)
            for each in (limit, limits_in(uow)[1])
        )
        week = 86_400 * 7
        assert seconds == given or (not 0 < given < week and week - 60 < seconds <= week + 2)


def test_a_lock_over_its_limit_is_a_timeout(mesh_storage_url: str) -> None:
    with opened(mesh_storage_url, lock_timeout=0.2) as storage:
        with storage.begin() as uow:
            uow.state.put("k", b"1")
            with pytest.raises(StorageTimeoutError) as error, storage.begin() as other:
                other.state.put("k", b"2")
            assert error.value.sqlstate == "55P03"
        with storage.begin(read_only=True) as uow:
            assert uow.state.get("k").value == b"1"


def wait_for_lock(storage: MeshStorage) -> None:
    with storage.begin(timeout=0.3) as uow:
        uow.routing_table.put("locked", 2)


def sleep_in_session(storage: MeshStorage) -> None:
    with storage.begin(timeout=0.3) as uow:
        uow.state.put("k", b"v")
        slow_in_a_repository(uow)


def think_too_long(storage: MeshStorage) -> None:
    with storage.begin(timeout=0.3) as uow:
        uow.state.put("k", b"v")
        time.sleep(0.4)


def commit_too_long(storage: MeshStorage) -> None:
    with storage.begin(timeout=0.5) as uow:
        uow.session.execute(
            text(
                "CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN PERFORM pg_sleep(30); RETURN NEW; END $$"
            )
        )
        uow.session.execute(
            text(
                "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON mesh_state DEFERRABLE INITIALLY "
                "DEFERRED FOR EACH ROW EXECUTE FUNCTION slowly()"
            )
        )
        uow.state.put("k", b"v")


@pytest.mark.parametrize("work", [wait_for_lock, sleep_in_session, think_too_long, commit_too_long])
def test_a_timeout_is_for_the_whole_unit_of_work(storage: MeshStorage, work: Callable[[MeshStorage], None]) -> None:
    with storage.begin() as holder:
        holder.routing_table.put("locked", 1)
        begun = time.monotonic()
        with pytest.raises(StorageTimeoutError):
            work(storage)
        assert time.monotonic() - begun < 10
    with storage.begin() as uow:
        assert uow.state.find("k") is None
        assert uow.routing_table.get("locked").route == 1


def test_a_caller_that_never_comes_back_loses_its_locks(mesh_storage_url: str) -> None:
    with opened(mesh_storage_url, idle_in_transaction_timeout=0.2, lock_timeout=5) as storage:
        with pytest.raises(MeshStorageError) as error, storage.begin() as forgetful:
            forgetful.state.put("k", b"1")
            with storage.begin() as other:  # Waits for the lock until the server ends the forgetful one.
                other.state.put("k", b"2")
            forgetful.state.put("k", b"3")
        assert isinstance(error.value, (StorageTimeoutError, UnavailableError))
        with storage.begin(read_only=True) as uow:
            assert uow.state.get("k").value == b"2"


def test_the_error_of_a_caller_that_came_back_too_late_names_the_setting(mesh_storage_url: str) -> None:
    with opened(mesh_storage_url, idle_in_transaction_timeout=0.1) as storage:
        with pytest.raises(StorageTimeoutError, match="idle_in_transaction_timeout") as error, storage.begin() as late:
            late.state.put("k", b"1")
            pid = int(late.session.execute(text("SELECT pg_backend_pid()")).scalar_one())
            assert eventually(lambda: has_ended(mesh_storage_url, pid))
            late.state.put("k", b"2")
        assert error.value.sqlstate == "25P03"


def test_run_tries_again_only_what_may_succeed(storage: MeshStorage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mesh_storage")
    calls = 0

    def fails_twice(uow: UnitOfWork) -> str:
        nonlocal calls
        calls += 1
        uow.state.put(f"attempt-{calls}", b"secret value")
        if calls < 3:
            raise UnavailableError
        return "done"

    assert storage.run(fails_twice) == "done"
    with storage.begin(read_only=True) as uow:
        assert [entry.key for entry in uow.state.stream()] == ["attempt-3"]
    retries = [record for record in caplog.records if getattr(record, "event", "") == "retry"]
    assert [getattr(record, "attempt", 0) for record in retries] == [1, 2]
    assert "secret value" not in caplog.text

    def never(_uow: UnitOfWork) -> None:
        nonlocal calls
        calls += 1
        raise StorageTimeoutError

    calls = 0
    with pytest.raises(StorageTimeoutError):
        storage.run(never)
    assert calls == 1
    with pytest.raises(ValueError, match="attempts"):
        storage.run(never, attempts=0)


def test_run_gives_up_after_its_attempts(storage: MeshStorage) -> None:
    calls = 0

    def fails(_uow: UnitOfWork) -> None:
        nonlocal calls
        calls += 1
        raise UnavailableError

    with pytest.raises(UnavailableError):
        storage.run(fails, attempts=2)
    assert calls == 2


def slow_records(caplog: pytest.LogCaptureFixture) -> list[tuple[str, list[str]]]:
    """Return the line at which each slow unit of work was opened, and the repositories that it used."""
    found: list[tuple[str, list[str]]] = []
    for record in caplog.records:
        if getattr(record, "event", "") == "slow_unit_of_work":
            assert getattr(record, "duration_s", 0) >= 0.05
            file, _, number = getattr(record, "opened_at", "").rpartition(":")
            assert f"{file}:{number}" in record.getMessage()
            found.append((linecache.getline(file, int(number)).strip(), getattr(record, "repositories", [])))
    return found


def test_a_slow_unit_of_work_says_which_it_was(mesh_storage_url: str, caplog: pytest.LogCaptureFixture) -> None:
    def work(uow: UnitOfWork) -> None:
        uow.messages.count()
        time.sleep(0.06)

    with opened(mesh_storage_url, slow_unit_of_work=0.05) as storage:
        with storage.begin() as uow:  # this one
            uow.state.put("k", b"v")
            uow.nodes.count()
            time.sleep(0.06)
        with storage.begin():
            pass
        storage.run(work)
        with ExitStack() as stack:  # the stack
            uow = stack.enter_context(storage.unit_of_work())
            uow.session.execute(text("SELECT 1"))
            time.sleep(0.06)
    assert slow_records(caplog) == [
        ("with storage.begin() as uow:  # this one", ["state", "nodes"]),
        ("storage.run(work)", ["messages"]),
        ("with ExitStack() as stack:  # the stack", ["session"]),
    ]


def test_a_slow_unit_of_work_of_the_asyncio_side_says_which_it_was(
    mesh_storage_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(uow: AsyncUnitOfWork) -> None:
        await uow.messages.count()
        await asyncio.sleep(0.06)

    async def main() -> None:
        settings = Settings(url=SecretStr(mesh_storage_url), slow_unit_of_work=0.05)
        async with AsyncMeshStorage.open(settings=settings) as storage:
            async with storage.begin() as uow:  # this one
                await uow.state.put("k", b"v")
                await asyncio.sleep(0.06)
            await storage.run(work)

    asyncio.run(main())
    assert slow_records(caplog) == [
        ("async with storage.begin() as uow:  # this one", ["state"]),
        ("await storage.run(work)", ["messages"]),
    ]


def test_nothing_stays_open_after_errors(storage: MeshStorage) -> None:
    for error in (KeyError, MeshStorageError, KeyboardInterrupt):
        with pytest.raises(error), storage.begin() as uow:
            uow.state.put("k", b"v")
            raise error
    assert all(state == "idle" for state, _ in sessions(storage))
    with storage.begin() as uow:
        assert uow.state.find("k") is None


def test_a_connection_goes_to_the_thread_that_waits_longest(mesh_storage_url: str) -> None:
    """Also when the one that gives it back asks again at once."""
    order: list[str] = []
    settings = Settings(url=SecretStr(mesh_storage_url), pool_size=1)
    with MeshStorage.open(settings=settings) as storage:

        def take(name: str) -> None:
            with storage.begin() as uow:
                order.append(name)
                uow.state.put(name, b"")

        threads = [threading.Thread(target=take, args=[name]) for name in ("second", "third")]
        with storage.begin():
            for waiting, thread in enumerate(threads, 1):
                thread.start()
                deadline = time.monotonic() + 30
                while len(storage._pool._free._waiting) < waiting:
                    assert time.monotonic() < deadline
                    time.sleep(0.001)
        take("first again")
        for thread in threads:
            thread.join()
    assert order == ["second", "third", "first again"]


def test_an_interrupt_while_waiting_for_a_connection_takes_none(mesh_storage_url: str) -> None:
    settings = Settings(url=SecretStr(mesh_storage_url), pool_size=1)
    with MeshStorage.open(settings=settings) as storage:
        with storage.begin():
            timer = threading.Timer(0.1, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
            timer.start()
            with pytest.raises(KeyboardInterrupt), storage.begin():
                pass
            timer.join()
        with storage.begin(timeout=5) as uow:
            uow.state.put("k", b"v")
