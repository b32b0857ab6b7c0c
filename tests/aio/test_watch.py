"""A watch in an event loop: it is cancelled, left and closed at any moment, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from mesh_storage import Batch, CompactedError
from mesh_storage.aio import AsyncMeshStorage
from tests.aio.conftest import Run, Watch, storage_at_rest

POLL = 0.02


async def keys(storage: AsyncMeshStorage, cursor: str) -> list[str]:
    async with storage.begin(read_only=True) as uow:
        return [change.key for change in (await uow.changes.since(cursor, ["state"])).changes]


@pytest.mark.parametrize("delay", [0, 0.005, 0.01, 0.1])
def test_a_cancelled_watch_leaves_nothing_behind(run: Run, mesh_storage_url: str, watch: Watch, delay: float) -> None:
    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch, pool_size=2) as storage:
            seen: list[Batch] = []

            async def follow() -> None:
                async for batch in storage.watch("state", poll=POLL):
                    seen[:] = [batch]

            task = asyncio.create_task(follow())
            await asyncio.sleep(delay)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            if seen:
                async with storage.begin() as uow:
                    await uow.state.put("a", b"")
                assert await keys(storage, seen[-1].cursor) == ["a"]

    run(main())


def test_tasks_follow_while_others_write(run: Run, mesh_storage_url: str, watch: Watch) -> None:
    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch, pool_size=2) as storage:

            async def follow() -> dict[str, bytes]:
                copy: dict[str, bytes] = {}
                async for batch in storage.watch("state", poll=POLL):
                    copy |= {change.key: change.entry.value for change in batch.changes}
                    if "last" in copy:
                        break
                return copy

            async with asyncio.TaskGroup() as group:
                followers = [group.create_task(follow()) for _ in range(3)]
                for n in range(20):
                    async with storage.begin() as uow:
                        await uow.state.put(f"{n % 7}", b"%d" % n)
                async with storage.begin() as uow:
                    await uow.state.put("last", b"")
                    table = {entry.key: entry.value async for entry in uow.state.stream()}
            assert [follower.result() for follower in followers] == [table] * 3

    run(main())


def test_closing_ends_all_of_them(run: Run, mesh_storage_url: str) -> None:
    async def main() -> None:
        storage = await AsyncMeshStorage.open(mesh_storage_url)
        started = asyncio.Semaphore(0)

        async def follow(poll: float) -> None:
            async for _ in storage.watch("state", poll=poll):
                started.release()

        tasks = [asyncio.create_task(follow(poll)) for poll in (0.001, 0.02, 60)]
        for _ in tasks:
            await started.acquire()
        await storage.close()
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks)

    run(main())


def test_an_error_ends_it(run: Run, mesh_storage_url: str, watch: Watch) -> None:
    async def main() -> None:
        async with (
            AsyncMeshStorage.open(mesh_storage_url) as storage,
            contextlib.aclosing(storage.watch("state", poll=POLL)) as batches,
        ):
            await anext(batches)
            watch.other.execute("TRUNCATE mesh_state")
            with pytest.raises(CompactedError):
                await anext(batches)

    run(main())
