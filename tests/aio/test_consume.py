"""The worker loop for asyncio: how a cancelled task ends, and what it refuses."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from mesh_storage import Backlog, Delivery, InvalidInputError, Message, SerializationError
from mesh_storage.aio import AsyncMeshStorage, AsyncUnitOfWork


async def send(storage: AsyncMeshStorage, *numbers: int) -> None:
    async with storage.begin() as uow:
        for number in numbers:
            await uow.messages.send(Message(id=f"m-{number}", from_node="a", to_node="b", content=b""))


async def backlog(storage: AsyncMeshStorage) -> Backlog:
    async with storage.begin(read_only=True) as uow:
        return await uow.messages.backlog("b")


def test_a_cancelled_task_ends_after_the_message_in_hand(mesh_storage_url: str) -> None:
    handled: list[str] = []

    async def main() -> None:
        handling = asyncio.Event()

        async def handle(uow: AsyncUnitOfWork, delivery: Delivery) -> None:
            handling.set()
            await asyncio.sleep(0.1)
            await uow.state.put(delivery.message.id, b"")
            handled.append(delivery.message.id)

        async with AsyncMeshStorage.open(mesh_storage_url) as storage:
            await send(storage, 1, 2, 3)
            task = asyncio.create_task(storage.consume("b", handle, batch=3))
            await handling.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            found = await backlog(storage)
            assert (found.due, found.leased) == (2, 0)
            async with storage.begin(read_only=True) as uow:
                assert [entry.key async for entry in uow.state.stream()] == ["m-1"]

    asyncio.run(main())
    assert handled == ["m-1"]


def test_a_second_cancellation_reaches_the_handler(mesh_storage_url: str) -> None:
    async def main() -> None:
        handling = asyncio.Event()

        async def handle(uow: AsyncUnitOfWork, _: Delivery) -> None:
            await uow.state.put("effect", b"")
            handling.set()
            await asyncio.sleep(3600)

        async with AsyncMeshStorage.open(mesh_storage_url) as storage:
            await send(storage, 1)
            task = asyncio.create_task(storage.consume("b", handle))
            await handling.wait()
            for _ in range(2):
                task.cancel()
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            with pytest.raises(asyncio.CancelledError):
                await task
            found = await backlog(storage)
            assert (found.due, found.leased) == (1, 0)
            async with storage.begin(read_only=True) as uow:
                assert await uow.state.find("effect") is None

    asyncio.run(main())


def test_several_tasks_share_the_work(mesh_storage_url: str) -> None:
    handled: list[str] = []

    async def main() -> None:
        stop = asyncio.Event()

        async def handle(_: AsyncUnitOfWork, delivery: Delivery) -> None:
            handled.append(delivery.message.id)
            if len(handled) == 40:
                stop.set()

        async with AsyncMeshStorage.open(mesh_storage_url) as storage:
            await send(storage, *range(40))
            async with asyncio.TaskGroup() as group:
                for _ in range(4):
                    group.create_task(storage.consume("b", handle, batch=5, stop=stop))
            assert (await backlog(storage)).due == 0

    asyncio.run(main())
    assert sorted(handled) == sorted({f"m-{number}" for number in range(40)})


@pytest.mark.parametrize("handle", [None, lambda *_: None])
def test_what_cannot_be_awaited_is_refused(mesh_storage_url: str, handle: Any) -> None:
    async def main() -> None:
        async with AsyncMeshStorage.open(mesh_storage_url) as storage:
            with pytest.raises(InvalidInputError, match="coroutine function"):
                await storage.consume("b", handle)

    asyncio.run(main())


def test_what_a_handler_awaits_is_cancelled_and_the_worker_goes_on(mesh_storage_url: str) -> None:
    async def main() -> None:
        stop = asyncio.Event()

        async def handle(_: AsyncUnitOfWork, delivery: Delivery) -> None:
            if delivery.message.id == "m-1":
                shared = asyncio.create_task(asyncio.sleep(3600))
                shared.cancel()
                await shared
            stop.set()

        async with AsyncMeshStorage.open(mesh_storage_url) as storage:
            await send(storage, 1, 2)
            await asyncio.wait_for(storage.consume("b", handle, max_attempts=1, poll=0.02, stop=stop), 30)
            async with storage.begin(read_only=True) as uow:
                (dead,) = (await uow.messages.dead("b")).items
            assert str(dead.reason).startswith("CancelledError: ")
            assert (await backlog(storage)).due == 0

    asyncio.run(main())


def test_a_lost_one_a_failed_one_and_one_that_takes_long_end_as_on_the_blocking_side(
    mesh_storage_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    handled: list[str] = []

    async def main() -> None:
        stop = asyncio.Event()

        async def handle(uow: AsyncUnitOfWork, delivery: Delivery) -> None:
            handled.append(delivery.message.id)
            await uow.state.put(f"{delivery.message.id} {delivery.attempts}", b"")
            match delivery.message.id, delivery.attempts:
                case "m-1", _:
                    async with storage.begin() as other:
                        await other.messages.ack([delivery])
                case "m-2", 1:
                    raise SerializationError("try again")
                case "m-2", _:
                    raise ValueError("5 €")
                case "m-3", _:
                    await asyncio.sleep(4)  # longer than the lease
                    stop.set()

        async with AsyncMeshStorage.open(mesh_storage_url) as storage:
            await send(storage, 1, 2, 3)
            workers = (
                storage.consume("b", handle, batch=3, lease=timedelta(seconds=3), max_attempts=2, poll=0.1, stop=stop)
                for _ in range(2)
            )
            await asyncio.wait_for(asyncio.gather(*workers), 60)
            async with storage.begin(read_only=True) as uow:
                assert [entry.key async for entry in uow.state.stream()] == ["m-3 1"]
                (dead,) = (await uow.messages.dead("b")).items
                assert (dead.message.id, dead.reason) == ("m-2", "ValueError: 5 €")
            assert (await backlog(storage)) == Backlog(0, 0, 0, 0, 1, None, ())

    asyncio.run(main())
    assert sorted(handled) == ["m-1", "m-2", "m-2", "m-3"]
    records = [
        (vars(record)["message_id"], vars(record).get("error"))
        for record in caplog.records
        if "message_id" in vars(record)
    ]
    assert sorted(records, key=str) == [("m-1", None), ("m-2", "SerializationError"), ("m-2", "ValueError")]
