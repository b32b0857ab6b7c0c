"""Leases in tasks: cancelled at any moment, ended with the block, and lost while the event loop stands still."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest

from mesh_storage import ConflictError
from mesh_storage.aio import AsyncLease, AsyncMeshStorage
from tests.aio.conftest import Run, Watch, eventually, opened, storage_at_rest

TTL = timedelta(seconds=0.6)
LONG = timedelta(hours=1)


def renewing() -> list[asyncio.Task[Any]]:
    return [each for each in asyncio.all_tasks() if "AsyncRepeated" in repr(each.get_coro())]


async def lead(storage: AsyncMeshStorage, leads: asyncio.Event | None = None) -> None:
    async with storage.lease("leader", b"a", ttl=LONG):
        if leads is not None:
            leads.set()
        await asyncio.Event().wait()


def test_cancelled_at_any_moment_it_leaves_nothing(run: Run, mesh_storage_url: str, watch: Watch) -> None:
    moments = 40

    async def main() -> None:
        led = 0
        async with storage_at_rest(mesh_storage_url, watch, pool_size=2) as storage:
            started = time.monotonic()
            async with storage.lease("leader", b"a", ttl=LONG):
                took = time.monotonic() - started
            for number in itertools.count():
                leads = asyncio.Event()
                task = asyncio.create_task(lead(storage, leads))
                asyncio.get_running_loop().call_later(number * took / moments, task.cancel)
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert watch.keys() == [], number
                assert not renewing()
                led += leads.is_set()
                if led >= 5 and number >= moments:
                    break

    run(main())


def test_cancelled_twice_it_is_given_back_all_the_same(run: Run, mesh_storage_url: str, watch: Watch) -> None:
    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch) as storage:
            leads = asyncio.Event()
            task = asyncio.create_task(lead(storage, leads))
            await leads.wait()
            assert watch.keys() == ["leader"]
            for _ in range(5):
                task.cancel()
                await asyncio.sleep(0)
            with suppress(asyncio.CancelledError):
                await task
            await eventually(lambda: watch.keys() == [])

    run(main())


def test_cancelled_while_it_waits_it_does_not_disturb_the_holder(run: Run, mesh_storage_url: str, watch: Watch) -> None:
    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch) as storage:
            async with storage.lease("leader", b"holder", ttl=TTL) as lease:
                tasks = [asyncio.create_task(lead(storage)) for _ in range(5)]
                for task in tasks:
                    await asyncio.sleep(0.1)
                    task.cancel()
                for task in tasks:
                    with pytest.raises(asyncio.CancelledError):
                        await task
                assert lease.held
            assert watch.keys() == []

    run(main())


def test_the_task_ends_with_the_block_or_the_lease(run: Run, mesh_storage_url: str) -> None:
    async def main() -> None:
        async with opened(mesh_storage_url) as storage:
            async with storage.lease("leader", b"a", ttl=LONG):
                assert len(renewing()) == 1
            assert not renewing()
            dropped: AsyncLease = storage.lease("leader", b"a", ttl=TTL)
            await dropped.__aenter__()
            del dropped
            gc.collect()
            async with storage.lease("leader", b"b", ttl=LONG, wait=TTL.total_seconds() + 1) as lease:
                assert lease.held
                await eventually(lambda: len(renewing()) == 1)

    run(main())


def test_it_is_lost_while_the_event_loop_stands_still(run: Run, mesh_storage_url: str) -> None:
    async def main() -> None:
        async with opened(mesh_storage_url) as storage, storage.lease("leader", b"a", ttl=TTL) as lease:
            time.sleep(TTL.total_seconds())  # noqa: ASYNC251 - this is what must not be done
            assert not lease.held
            async with storage.lease("leader", b"b", ttl=LONG, wait=5) as following:
                assert following.token > lease.token
                await asyncio.sleep(TTL.total_seconds())
                assert following.held
                assert not lease.held

    run(main())


def test_tasks_hold_it_one_at_a_time(run: Run, mesh_storage_url: str) -> None:
    async def main() -> None:
        leading: set[int] = set()
        tokens: list[int] = []

        async def elect(number: int) -> None:
            for _ in range(3):
                async with storage.lease("leader", b"%d" % number, ttl=LONG, wait=60) as lease:
                    assert not leading
                    leading.add(number)
                    tokens.append(lease.token)
                    await asyncio.sleep(0.01)
                    leading.discard(number)

        async with opened(mesh_storage_url, pool_size=2) as storage:
            async with asyncio.TaskGroup() as group:
                for number in range(8):
                    group.create_task(elect(number))
            with pytest.raises(ConflictError):
                async with storage.lease("leader", b"", ttl=LONG), storage.lease("leader", b"", ttl=LONG, wait=0):
                    pass
        assert tokens == sorted(set(tokens))
        assert len(tokens) == 24

    run(main())
