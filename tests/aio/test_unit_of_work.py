"""Shows that units of work that are used wrongly, or that the server leaves alone, end soon and with a clear error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import text

from mesh_storage import (
    ClosedError,
    InvalidInputError,
    MeshStorageError,
    StateEntry,
    StorageTimeoutError,
    UnavailableError,
)
from mesh_storage.aio import AsyncMeshStorage, AsyncUnitOfWork
from mesh_storage.aio.postgres import concurrency
from tests.aio.conftest import Run, Watch, opened, storage_at_rest
from tests.conftest import FROZEN_S, frozen
from tests.processes import eventually, has_ended


async def backend(uow: AsyncUnitOfWork) -> int:
    return int((await uow.session.execute(text("SELECT pg_backend_pid()"))).scalar_one())


def test_who_waits_for_a_connection_learns_at_once_that_the_storage_was_closed(run: Run, mesh_storage_url: str) -> None:
    async def main() -> None:
        storage = await opened(mesh_storage_url, pool_size=1, pool_timeout=60)

        async def wait() -> None:
            async with storage.begin():
                pass

        async with storage.begin():
            waiters = [asyncio.create_task(wait()) for _ in range(3)]
            await asyncio.sleep(0)  # They begin to wait.
            await storage.close()
            for ended in await asyncio.wait_for(asyncio.gather(*waiters, return_exceptions=True), 10):
                assert isinstance(ended, ClosedError)

    run(main())


@pytest.mark.parametrize("end", [AsyncUnitOfWork.commit, AsyncUnitOfWork.rollback, lambda uow: uow.session.rollback()])
def test_inside_of_a_savepoint_the_whole_cannot_end(
    run: Run, mesh_storage_url: str, watch: Watch, end: Callable[[AsyncUnitOfWork], Awaitable[None]]
) -> None:
    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch, pool_size=1) as storage:
            async with storage.begin() as uow, uow.savepoint():
                await uow.state.put("goes on", b"")
                with pytest.raises(MeshStorageError, match="savepoint"):
                    await end(uow)
            with pytest.raises(MeshStorageError, match="savepoint"):
                async with storage.begin() as uow:
                    await uow.state.put("before", b"")
                    async with uow.savepoint():
                        await uow.state.put("inside", b"")
                        await end(uow)
            assert watch.keys() == ["goes on"]

    run(main())


def test_one_unit_of_work_cannot_be_entered_twice_at_once(run: Run, mesh_storage_url: str, watch: Watch) -> None:
    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch, pool_size=2) as storage:
            scope = storage.begin()
            with pytest.raises(MeshStorageError, match="already open"):
                async with scope as one:
                    await one.state.put("a", b"")
                    async with scope:
                        pass
            async with scope as again:
                await again.state.put("b", b"")
            assert watch.keys() == ["b"]

    run(main())


def test_a_rollback_after_a_lost_connection_raises_nothing(run: Run, mesh_storage_url: str, watch: Watch) -> None:
    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch, pool_size=1) as storage:
            async with storage.unit_of_work() as uow:
                await uow.state.put("lost", b"")
                watch.connection.execute("SELECT pg_terminate_backend(%s, 10000)", [await backend(uow)])
                await uow.rollback()
            assert watch.keys() == []

    run(main())


@pytest.mark.parametrize("leave", ["flush", "commit", "execute"])
def test_a_lost_connection_leaves_one_record(
    run: Run, mesh_storage_url: str, watch: Watch, leave: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch, pool_size=1) as storage:
            with pytest.raises(UnavailableError):
                async with storage.begin() as uow:
                    watch.connection.execute("SELECT pg_terminate_backend(%s, 10000)", [await backend(uow)])
                    if leave == "execute":
                        await uow.session.execute(text("SELECT 1"))
                    uow.session.add(StateEntry(key="lost", value=b""))
                    if leave == "flush":
                        await uow.session.flush()

    run(main())
    assert [getattr(record, "event", "") for record in caplog.records] == ["connection_lost"]


def test_run_refuses_a_plain_function(run: Run, mesh_storage_url: str, watch: Watch) -> None:
    def work(_uow: AsyncUnitOfWork) -> None:
        """Do nothing, as a plain function can."""

    async def main() -> None:
        plain: Any = work
        async with storage_at_rest(mesh_storage_url, watch, pool_size=1) as storage:
            with pytest.raises(InvalidInputError, match="async def") as error:
                await storage.run(plain)
            assert error.value.field == "work"

    run(main())


Freeze = Callable[[AsyncUnitOfWork], Awaitable[None]]


async def by_a_repository(storage: AsyncMeshStorage, freeze: Freeze) -> None:
    with pytest.raises(StorageTimeoutError):
        async with storage.begin(timeout=0.3) as uow:
            await freeze(uow)
            await uow.state.put("k", b"")


async def by_the_session(storage: AsyncMeshStorage, freeze: Freeze) -> None:
    with pytest.raises(StorageTimeoutError):
        async with storage.begin(timeout=0.3) as uow:
            await freeze(uow)
            await uow.session.execute(text("SELECT 1"))


async def in_the_commit(storage: AsyncMeshStorage, freeze: Freeze) -> None:
    with pytest.raises(StorageTimeoutError):
        async with storage.begin(timeout=0.3) as uow:
            await uow.state.put("k", b"")
            await freeze(uow)


async def in_the_rollback(storage: AsyncMeshStorage, freeze: Freeze) -> None:
    async with storage.unit_of_work(timeout=0.3) as uow:
        await uow.state.put("k", b"")
        await freeze(uow)


async def cancelled(storage: AsyncMeshStorage, freeze: Freeze) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1), storage.begin(timeout=0.3) as uow:
            await freeze(uow)
            await uow.state.put("k", b"")


async def cancelled_between_two_calls(storage: AsyncMeshStorage, freeze: Freeze) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1), storage.begin() as uow:
            await uow.state.put("k", b"")
            await freeze(uow)
            await asyncio.sleep(FROZEN_S)


async def cancelled_in_the_undoing(storage: AsyncMeshStorage, freeze: Freeze) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(None) as limit, storage.begin() as uow, uow.savepoint():
            await freeze(uow)
            limit.reschedule(asyncio.get_running_loop().time() + 0.1)
            raise ValueError


@pytest.mark.parametrize(
    "act",
    [
        by_a_repository,
        by_the_session,
        in_the_commit,
        in_the_rollback,
        cancelled,
        cancelled_between_two_calls,
        cancelled_in_the_undoing,
    ],
)
def test_a_server_that_stands_still_keeps_nobody_longer_than_the_timeout(
    run: Run, act: Callable[[AsyncMeshStorage, Freeze], Awaitable[None]]
) -> None:
    async def main() -> None:
        async with AsyncMeshStorage.open("memory:") as storage:
            with ExitStack() as thaw:

                async def freeze(uow: AsyncUnitOfWork) -> None:
                    thaw.enter_context(frozen(await backend(uow)))

                begun = time.monotonic()
                await act(storage, freeze)
                assert time.monotonic() - begun < FROZEN_S / 2
            health = await storage.health()
            assert (health.ok, health.pool_in_use) == (True, 0)

    run(main())


def test_of_a_server_that_stands_still_health_tells_soon(run: Run) -> None:
    async def main() -> None:
        async with AsyncMeshStorage.open("memory:") as storage:
            async with storage.begin() as uow:
                pid = await backend(uow)
            with frozen(pid):
                begun = time.monotonic()
                health = await storage.health()
                assert time.monotonic() - begun < FROZEN_S / 2
            assert (health.ok, health.connected, type(health.error)) == (False, False, StorageTimeoutError)

    run(main())


def test_what_ran_in_the_background_is_forgotten_when_it_is_done(run: Run, mesh_storage_url: str) -> None:
    async def main() -> None:
        async with AsyncMeshStorage.open(mesh_storage_url) as storage:
            for number in range(5):
                async with storage.unit_of_work() as uow:
                    await uow.state.put(f"{number}", b"v")
                    await uow.rollback()
                    await uow.state.put(f"{number}", b"v")
            await asyncio.sleep(0)
            assert [task for task in concurrency._background if task.done()] == []
            assert storage._pool._connecting == set()

    run(main())


def test_an_ordinary_unit_of_work_takes_no_task_of_its_own(run: Run, mesh_storage_url: str) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        made = list[asyncio.Task[Any]]()

        def note(loop: asyncio.AbstractEventLoop, work: Any, **more: Any) -> asyncio.Task[Any]:
            made.append(asyncio.Task(work, loop=loop, **more))
            return made[-1]

        async with AsyncMeshStorage.open(mesh_storage_url) as storage:
            async with storage.begin() as uow:  # It connects, which is a task.
                await uow.state.put("k", b"v")
            loop.set_task_factory(note)
            async with storage.begin() as uow:
                await uow.state.put("k", b"v")
            async with storage.unit_of_work(read_only=True) as uow:
                assert (await uow.state.get("k")).value == b"v"
            loop.set_task_factory(None)
        assert made == []

    run(main())


def test_a_connection_in_doubt_is_never_lent_again(run: Run, mesh_storage_url: str) -> None:
    async def main() -> None:
        async with opened(mesh_storage_url, pool_size=1) as storage:
            with pytest.raises(StorageTimeoutError):
                async with storage.begin(timeout=0.2) as uow:
                    pid = await backend(uow)
                    await uow.session.execute(text("SELECT pg_sleep(30)"))
            async with storage.begin() as uow:
                assert await backend(uow) != pid
            assert await asyncio.to_thread(eventually, lambda: has_ended(mesh_storage_url, pid)), (
                "it is kept for nobody"
            )

    run(main())
