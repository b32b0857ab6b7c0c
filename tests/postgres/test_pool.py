"""The pool on a bad day: signal handlers, finalizers, other event loops, dead and silent servers, borrowed sessions."""

from __future__ import annotations

import asyncio
import gc
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import IntegrityError

from mesh_storage import MeshStorage, MeshStorageError, Settings, StorageTimeoutError, UnavailableError, UnitOfWork
from mesh_storage.aio import AsyncMeshStorage, AsyncUnitOfWork
from mesh_storage.models import StateEntry
from mesh_storage.postgres.pool import Slots, response_timeout
from mesh_storage.postgres.server import Server
from tests.conftest import frozen


def opened(url: str, **settings: Any) -> MeshStorage:
    return MeshStorage.open(settings=Settings(url=SecretStr(url), **settings))


@pytest.fixture
def observer(mesh_storage_url: str) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
    with psycopg.connect(mesh_storage_url, autocommit=True) as connection:
        yield connection


def backend(uow: UnitOfWork) -> int:
    uow.state.count()
    return int(uow.session.execute(text("SELECT pg_backend_pid()")).scalar_one())


def sessions(observer: psycopg.Connection[tuple[Any, ...]]) -> set[int]:
    rows = observer.execute(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        " AND backend_type = 'client backend'"
    )
    return {row[0] for row in rows}


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.01)


def test_a_signal_handler_may_open_units_of_work(storage: MeshStorage) -> None:
    handled = nested = 0

    def handler(*_: object) -> None:
        nonlocal handled, nested
        if nested:
            return
        nested += 1
        with storage.begin(read_only=True, timeout=5) as uow:
            uow.state.find("k")
        handled += 1
        nested -= 1

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
    try:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            with storage.begin() as uow:
                uow.state.put("k", b"v")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert handled > 100
    assert storage.health().pool_in_use == 0


def test_a_finalizer_may_open_and_end_units_of_work(storage: MeshStorage) -> None:
    class Cyclic:
        def __init__(self) -> None:
            self.me = self
            self.scope = storage.begin(read_only=True)
            self.scope.__enter__()

        def __del__(self) -> None:
            self.scope.__exit__(None, None, None)
            with storage.begin(read_only=True) as uow:
                uow.state.find("k")
            ended.append(1)

    ended: list[int] = []
    thresholds = gc.get_threshold()
    gc.freeze()  # what is there already need not be looked through each time
    gc.set_threshold(20)  # so that the collector runs inside of the pool as well
    try:
        for number in range(300):
            Cyclic()
            with storage.begin() as uow:
                uow.state.put("k", b"v")
            if number % 5 == 0:
                gc.collect()  # those that the collector has left for later have a connection each
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
    gc.collect()
    assert len(ended) == 300
    assert storage.health().pool_in_use == 0


def test_another_event_loop_is_one_clear_error(mesh_storage_url: str) -> None:
    async def use(storage: AsyncMeshStorage) -> None:
        async with storage.begin() as uow:
            await uow.state.put("k", b"v")

    async def open_and_use() -> AsyncMeshStorage:
        storage = await AsyncMeshStorage.open(mesh_storage_url)
        await use(storage)
        return storage

    with asyncio.Runner() as first, asyncio.Runner() as second:
        storage = first.run(open_and_use())
        with pytest.raises(MeshStorageError, match="event loop"):
            second.run(use(storage))
        first.run(use(storage))
        first.run(storage.close())


def test_short_runs_leave_no_session(mesh_storage_url: str, observer: psycopg.Connection[tuple[Any, ...]]) -> None:
    async def main() -> None:
        async with AsyncMeshStorage.open(mesh_storage_url) as storage:

            async def use() -> None:
                async with storage.begin() as uow:
                    await uow.state.find("k")

            tasks = [asyncio.create_task(use()) for _ in range(5)]
            await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    for _ in range(20):
        asyncio.run(main())
    eventually(lambda: not sessions(observer))


LEFT_BEHIND = [
    ("SET ROLE pg_monitor", "SELECT current_user = session_user"),
    ("SET statement_timeout = 1", "SELECT current_setting('statement_timeout') = '30s'"),
    ("SET TIME ZONE 'Asia/Tokyo'", "SELECT current_setting('timezone') = 'UTC'"),
    ("LISTEN something", "SELECT count(*) = 0 FROM pg_listening_channels()"),
    (
        "SELECT pg_advisory_lock(7)",
        "SELECT count(*) = 0 FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
    ),
    ("CREATE TEMPORARY TABLE mesh_state (LIKE mesh_state)", "SELECT to_regclass('pg_temp.mesh_state') IS NULL"),
    ("DECLARE held CURSOR WITH HOLD FOR SELECT 1", "SELECT count(*) = 0 FROM pg_cursors WHERE name = 'held'"),
]


@pytest.mark.parametrize(("left", "gone"), LEFT_BEHIND, ids=[left for left, _ in LEFT_BEHIND])
def test_what_a_session_sets_is_gone_for_the_next_unit_of_work(mesh_storage_url: str, left: str, gone: str) -> None:
    with opened(mesh_storage_url, pool_size=1) as storage:
        with storage.begin() as uow:
            first = backend(uow)
            uow.session.execute(text(left))
        with storage.begin() as uow:
            uow.state.put("k", b"v")
        with storage.begin() as uow:
            assert backend(uow) == first
            assert uow.session.execute(text(gone)).scalar_one()
            assert uow.state.get("k").value == b"v"


def test_the_same_for_asyncio(mesh_storage_url: str) -> None:
    async def main() -> None:
        settings = Settings(url=SecretStr(mesh_storage_url), pool_size=1)
        async with AsyncMeshStorage.open(settings=settings) as storage:
            for left, gone in LEFT_BEHIND:
                async with storage.begin() as uow:
                    await uow.session.execute(text(left))
                async with storage.begin() as uow:
                    assert (await uow.session.execute(text(gone))).scalar_one(), left

    asyncio.run(main())


def test_statements_stay_prepared_when_a_session_was_used(mesh_storage_url: str) -> None:
    with opened(mesh_storage_url, pool_size=1) as storage:
        for _ in range(20):
            with storage.begin() as uow:
                uow.state.put("k", b"v")
                uow.session.execute(text("SELECT 1"))
        with storage.begin() as uow:
            prepared = uow.session.execute(text("SELECT count(*) FROM pg_prepared_statements")).scalar_one()
        assert prepared >= 1


def warm(storage: MeshStorage, number: int) -> list[int]:
    """Let the pool have so many idle connections; return their backends."""
    with ExitStack() as stack:
        return [backend(stack.enter_context(storage.begin())) for _ in range(number)]


def test_one_dead_connection_condemns_those_that_are_as_old(
    storage: MeshStorage, observer: psycopg.Connection[tuple[Any, ...]]
) -> None:
    old = set(warm(storage, 5))
    with pytest.raises(UnavailableError), storage.begin() as uow:
        observer.execute("SELECT pg_terminate_backend(%s, 10000)", [backend(uow)])
        uow.state.put("k", b"v")
    eventually(lambda: not sessions(observer) & old)
    assert not set(warm(storage, 5)) & old


def test_a_connection_that_is_older_than_half_an_hour_is_replaced(mesh_storage_url: str) -> None:
    with opened(mesh_storage_url, pool_size=1) as storage:
        backends = []
        for age in (0, 1790, 1801):
            with storage.begin() as uow:
                backends.append(backend(uow))
                uow._connection.driver.liveness.born = time.monotonic() - age  # when it is taken next
        with storage.begin() as uow:
            backends.append(backend(uow))
    assert backends[0] == backends[1] == backends[2] != backends[3]


def test_the_same_of_asyncio(mesh_storage_url: str) -> None:
    async def main() -> None:
        settings = Settings(url=SecretStr(mesh_storage_url), pool_size=1)
        async with AsyncMeshStorage.open(settings=settings) as storage:
            backends = []
            for age in (0, 1790, 1801, 0):
                async with storage.begin() as uow:
                    backends.append((await uow.session.execute(text("SELECT pg_backend_pid()"))).scalar_one())
                    uow._connection.driver.liveness.born = time.monotonic() - age  # when it is taken next
        assert backends[0] == backends[1] == backends[2] != backends[3]

    asyncio.run(main())


def test_a_demotion_is_learnt_once(storage: MeshStorage, observer: psycopg.Connection[tuple[Any, ...]]) -> None:
    """The connections that were idle then are not lent again, so the next unit of work has a fresh one."""
    old = set(warm(storage, 5))
    with pytest.raises(UnavailableError, match="read-only") as error, storage.begin() as uow:
        uow.session.execute(text("SET TRANSACTION READ ONLY"))  # as all transactions are after a demotion
        uow.state.put("k", b"v")
    assert error.value.retryable
    eventually(lambda: not sessions(observer) & old)
    with storage.begin() as uow:
        uow.state.put("k", b"v")


def test_a_silent_server_ends_a_unit_of_work_without_a_timeout(
    mesh_storage_url: str, observer: psycopg.Connection[tuple[Any, ...]]
) -> None:
    """statement_timeout lives on the server, which stands still."""
    with opened(mesh_storage_url, statement_timeout=0.1, pool_size=1) as storage:
        with storage.begin() as uow:
            pid = backend(uow)
        with frozen(pid):
            begun = time.monotonic()
            with pytest.raises(UnavailableError) as error, storage.begin() as uow:
                uow.state.put("k", b"v")
            assert time.monotonic() - begun < 0.1 + 5 + 1
            assert error.value.retryable
            storage.run(lambda uow: uow.state.put("k", b"v"))  # on a connection of its own
    assert observer.execute("SELECT count(*) FROM mesh_state").fetchone() == (1,)


def test_a_cancelled_task_returns_within_a_second_from_a_silent_server(mesh_storage_url: str) -> None:
    async def main() -> None:
        async with AsyncMeshStorage.open(mesh_storage_url) as storage:
            sleeping = asyncio.Event()

            async def sleep(uow: AsyncUnitOfWork) -> None:
                pids.append((await uow.session.execute(text("SELECT pg_backend_pid()"))).scalar_one())
                sleeping.set()
                await uow.state.put("k", b"v")
                await uow.session.execute(text("SELECT pg_sleep(30)"))

            pids: list[int] = []
            task = asyncio.create_task(storage.run(sleep))
            await sleeping.wait()
            await asyncio.sleep(0.1)
            with frozen(pids[0]):
                begun = time.monotonic()
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
                assert time.monotonic() - begun < 1
            assert task.cancelled()
            async with storage.begin(timeout=5) as uow:
                assert await uow.state.find("k") is None

    asyncio.run(main())


def test_run_goes_on_within_its_time(storage: MeshStorage) -> None:
    calls = 0

    def fails_often(uow: UnitOfWork) -> str:
        nonlocal calls
        calls += 1
        uow.state.put("k", b"v")
        if calls < 8:  # more than the five attempts without a time
            raise UnavailableError
        return "done"

    assert storage.run(fails_often, within=30) == "done"
    begun = time.monotonic()
    calls = -1000
    with pytest.raises(UnavailableError):
        storage.run(fails_often, within=0.5)
    assert time.monotonic() - begun < 1.5


def test_no_attempt_outlasts_the_time_of_run(storage: MeshStorage) -> None:
    begun = time.monotonic()
    with pytest.raises(StorageTimeoutError):
        storage.run(lambda uow: uow.session.execute(text("SELECT pg_sleep(30)")), within=0.5)
    assert time.monotonic() - begun < 3


def test_the_time_of_run_is_at_most_a_year(storage: MeshStorage) -> None:
    assert storage.run(lambda _: "done", within=365 * 86_400) == "done"


@pytest.mark.parametrize("within", [0, -1, "3", True, float("nan"), float("inf"), 365 * 86_400 + 1])
def test_run_refuses_a_time_that_is_none(storage: MeshStorage, within: Any) -> None:
    with pytest.raises(ValueError, match="within"):
        storage.run(lambda _: None, within=within)


@pytest.mark.parametrize("attempts", [0, "3", 2.5, True])
def test_run_refuses_attempts_that_are_none(storage: MeshStorage, attempts: Any) -> None:
    with pytest.raises(ValueError, match="attempts"):
        storage.run(lambda _: None, attempts=attempts)


def test_listeners_of_the_engine_see_the_statements_of_repositories(storage: MeshStorage) -> None:
    seen: list[tuple[str, str]] = []

    def before(_c: Any, _cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool) -> None:
        context.mine = "kept"
        assert not executemany
        assert parameters is not None
        seen.append(("before", statement))

    def after(_c: Any, _cursor: Any, statement: str, _p: Any, context: Any, _e: bool) -> None:
        assert context.mine == "kept"
        seen.append(("after", statement))

    event.listen(Engine, "before_cursor_execute", before)
    event.listen(Engine, "after_cursor_execute", after)
    try:
        with storage.begin() as uow:
            uow.state.put("k", b"v")
    finally:
        event.remove(Engine, "before_cursor_execute", before)
        event.remove(Engine, "after_cursor_execute", after)
    ours = [(when, statement) for when, statement in seen if "mesh_state" in statement]
    assert [when for when, _ in ours] == ["before", "after"]
    with storage.begin() as uow:
        uow.state.put("k", b"w")
    assert len([statement for _, statement in seen if "mesh_state" in statement]) == 2


def test_execution_options_of_a_session_do_not_stay(mesh_storage_url: str) -> None:
    with opened(mesh_storage_url, pool_size=1) as storage:
        with storage.begin() as uow:
            uow.session.execute(text("CREATE SCHEMA other"))
            uow.session.execute(text("CREATE TABLE other.mesh_state (LIKE public.mesh_state INCLUDING ALL)"))
        with storage.begin() as uow:
            uow.session.connection(execution_options={"schema_translate_map": {None: "other"}})
        with storage.begin() as uow:
            uow.session.add(StateEntry(key="k", value=b"v"))
        with storage.begin() as uow:
            assert uow.session.execute(text("SELECT count(*) FROM public.mesh_state")).scalar_one() == 1


def test_an_interrupt_while_queueing_loses_no_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = Slots(1)
    assert slots.acquire(1)

    def interrupt(_slots: Slots) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Slots, "_hand_over", interrupt)
        with pytest.raises(KeyboardInterrupt):
            slots.acquire(1)
    slots.release()
    assert slots.acquire(1)


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ("-c statement_timeout=1000", 6.0),
        ("-cstatement_timeout=2s", 7.0),
        ("--statement-timeout=1min", 65.0),
        ("-c statement_timeout=60\\ min", 3605.0),
        ("-c statement_timeout=1000000 -c my.statement_timeout=7", 1005.0),
        ("-c statement_timeout=30000 -c STATEMENT_TIMEOUT=10min", 605.0),
        ("-c statement_timeout=1e6", None),
        ("-c statement_timeout=0", None),
    ],
)
def test_a_silent_server_is_given_what_statement_timeout_says(options: str, seconds: float | None) -> None:
    assert response_timeout(Settings(), Server({"options": options})) == seconds


def test_a_flush_that_fails_in_a_savepoint_of_the_callers_session_ends_that_alone(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.state.put("before", b"v")
        uow.session.execute(text("INSERT INTO mesh_state (key, value) VALUES ('taken', 'v')"))
        with pytest.raises(IntegrityError), uow.session.begin_nested():
            uow.session.add(StateEntry(key="taken", value=b"v"))
            uow.session.flush()
        uow.state.put("after", b"v")
    with storage.begin(read_only=True) as uow:
        assert [entry.key for entry in uow.state.stream()] == ["after", "before", "taken"]


def test_no_error_of_the_session_leaves_the_block_raw(
    storage: MeshStorage, observer: psycopg.Connection[tuple[Any, ...]]
) -> None:
    with pytest.raises(MeshStorageError), storage.begin() as uow:
        uow.session.execute(text("SELECT :missing"))
    with pytest.raises(UnavailableError), storage.begin() as uow:
        uow.session.begin_nested()
        observer.execute("SELECT pg_terminate_backend(%s, 10000)", [backend(uow)])
