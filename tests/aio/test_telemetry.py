"""Telemetry of the asyncio side: the same spans and metrics."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from opentelemetry import trace
from pydantic import SecretStr

from mesh_storage import (
    InvalidInputError,
    MeshStorage,
    Message,
    NotFoundError,
    SerializationError,
    Settings,
    UnavailableError,
    UnitOfWork,
    repositories,
)
from mesh_storage.aio import AsyncMeshStorage, AsyncUnitOfWork
from mesh_storage.aio.parts import AsyncParts
from tests.aio.conftest import Run, eventually
from tests.telemetry.recorder import Recorder

DURATION = "db.client.operation.duration"
POOL = "db.client.connection."


def opened(url: str, recorder: Recorder, *, statistics: bool = False, **settings: Any) -> Any:
    given = Settings(url=SecretStr(url), **settings)
    return AsyncMeshStorage.open(settings=given, telemetry=recorder.telemetry(statistics=statistics))


def message(number: int) -> Message:
    return Message(id=f"m{number}", from_node="a", to_node="b", content=b"content")


def shape(recorder: Recorder) -> dict[str, Any]:
    """Return all that is recorded, without times and identities."""
    spans = recorder.spans()
    names = {span.context.span_id: span.name for span in spans if span.context}
    return {
        "spans": [
            (
                span.name,
                span.kind,
                span.status.status_code,
                dict(span.attributes or {}),
                names.get(span.parent.span_id) if span.parent else None,
            )
            for span in spans
        ],
        "metrics": {
            name: sorted(
                (sorted(attributes.items()), count if isinstance(count, int) else None)
                for attributes, count in recorder.points(name)
            )
            for name in recorder.metrics()
        },
    }


def test_both_sides_record_the_same(run: Run, mesh_storage_url: str) -> None:
    blocking, asynchronous = Recorder(), Recorder()

    def sync_work(uow: UnitOfWork) -> None:
        uow.state.put("k", b"v")
        uow.messages.store_many([message(1), message(2)])
        assert len(list(uow.messages.stream(batch_size=1))) == 2
        with pytest.raises(NotFoundError):
            uow.nodes.get("nobody")

    async def work(uow: AsyncUnitOfWork) -> None:
        await uow.state.put("k", b"v")
        await uow.messages.store_many([message(1), message(2)])
        assert len([row async for row in uow.messages.stream(batch_size=1)]) == 2
        with pytest.raises(NotFoundError):
            await uow.nodes.get("nobody")

    async def main() -> dict[str, Any]:
        async with opened(mesh_storage_url, asynchronous) as storage:
            async with storage.begin() as uow:
                await work(uow)
            with pytest.raises(ZeroDivisionError):
                async with storage.begin():
                    raise ZeroDivisionError
            async with storage.lease("leader", b"a", ttl=timedelta(minutes=1)):
                watch = storage.watch("state")
                await anext(watch)
                made = shape(asynchronous)
                await watch.aclose()
                return made

    with MeshStorage.open(mesh_storage_url, telemetry=blocking.telemetry()) as storage:
        with storage.begin() as uow:
            sync_work(uow)
        with pytest.raises(ZeroDivisionError), storage.begin():
            raise ZeroDivisionError
        with storage.lease("leader", b"a", ttl=timedelta(minutes=1)):
            watch = storage.watch("state")
            next(watch)
            expected = shape(blocking)
            watch.close()
    assert run(main()) == expected
    assert len(expected["spans"]) == 6
    assert len(expected["metrics"]) == 10


def test_each_task_has_spans_of_its_own(run: Run, mesh_storage_url: str) -> None:
    recorder = Recorder()

    async def main() -> None:
        async with opened(mesh_storage_url, recorder) as storage:
            met = asyncio.Barrier(2)

            async def one(number: int) -> None:
                async with storage.begin() as uow:
                    await met.wait()
                    await uow.state.put(f"k{number}", b"v")
                    await met.wait()

            await asyncio.gather(one(1), one(2))
        assert not trace.get_current_span().is_recording()

    run(main())
    parents = {span.parent.span_id for span in recorder.spans("state.put") if span.parent}
    assert parents == {span.context.span_id for span in recorder.spans("unit_of_work") if span.context}
    assert len(parents) == 2


def test_a_cancelled_call_and_a_stream_that_is_left_end_their_spans(run: Run, mesh_storage_url: str) -> None:
    recorder = Recorder()

    async def main() -> None:
        async with opened(mesh_storage_url, recorder) as storage:
            async with storage.begin() as uow:
                await uow.messages.store_many([message(1), message(2), message(3)])
                rows = uow.messages.stream(batch_size=1)
                await anext(rows)
                await rows.aclose()
            async with storage.begin() as holder:
                await holder.state.put("k", b"v")

                async def wait() -> None:
                    async with storage.begin() as uow:
                        await uow.state.put("k", b"w")

                task = asyncio.create_task(wait())
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(task), 0.2)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

    run(main())
    assert recorder.by(DURATION, "db.operation.name", "error.type") == {
        ("messages.store_many", None): 1,
        ("messages.stream", None): 1,
        ("state.put", None): 1,
        ("state.put", "CancelledError"): 1,
    }
    assert len(recorder.spans()) == 4 + 3


def test_retries_pool_and_statistics(run: Run, mesh_storage_url: str) -> None:
    recorder = Recorder()
    failures: list[Exception] = [SerializationError()]

    async def work(uow: AsyncUnitOfWork) -> None:
        await uow.state.put("k", b"v")
        if failures:
            raise failures.pop()

    async def main() -> None:
        async with opened(mesh_storage_url, recorder, statistics=True, pool_size=1, pool_timeout=0.05) as storage:
            await storage.run(work)
            async with storage.begin():
                with pytest.raises(UnavailableError):
                    async with storage.begin():
                        pass
                assert recorder.by(f"{POOL}count", f"{POOL}state") == {"idle": 0, "used": 1}
            assert recorder.by(f"{POOL}count", f"{POOL}state") == {"idle": 1, "used": 0}
            # In the thread of the event loop, and in another.
            assert "mesh_storage.changes.length" in recorder.metrics()
            assert "mesh_storage.changes.length" in await asyncio.to_thread(recorder.metrics)

    run(main())
    assert recorder.by("mesh_storage.unit_of_work.retries", "error.type") == {"SerializationError": 1}
    assert recorder.by(f"{POOL}timeouts") == {(): 1}
    assert recorder.by(f"{POOL}wait_time") == {(): 3}
    assert recorder.by(f"{POOL}use_time") == {(): 3}
    assert recorder.by(f"{POOL}create_time") == {(): 1}
    assert recorder.by(f"{POOL}max") == {}  # closed
    spans = recorder.spans(f"unit_of_work {work.__qualname__}")
    assert [(span.attributes or {})["mesh_storage.attempt"] for span in spans] == [1, 2]


def test_who_waits_is_counted_and_a_lost_lease_too(run: Run, mesh_storage_url: str) -> None:
    recorder = Recorder()

    async def wait(storage: AsyncMeshStorage) -> None:
        async with storage.begin():
            pass

    async def main() -> None:
        async with opened(mesh_storage_url, recorder, pool_size=1) as storage:
            async with storage.begin():
                task = asyncio.create_task(wait(storage))
                await eventually(lambda: recorder.by(f"{POOL}pending_requests") == {(): 1})
            await task
            assert recorder.by(f"{POOL}pending_requests") == {(): 0}
            async with storage.lease("leader", b"a", ttl=timedelta(seconds=0.3)) as lease:
                async with storage.begin() as uow:
                    await uow.state.delete("leader")
                await eventually(lambda: not lease.held)
                await eventually(lambda: bool(recorder.points("mesh_storage.lease.lost")))

    run(main())
    assert recorder.by("mesh_storage.lease.lost", "mesh_storage.lease.reason") == {"taken": 1}


def test_every_method_is_measured_and_without_telemetry_none(run: Run, mesh_storage_url: str) -> None:
    recorder = Recorder()

    async def main() -> None:
        async with AsyncMeshStorage.open(mesh_storage_url) as plain:
            assert (plain._scope, plain._lease, plain._watch) == AsyncParts()[1:4]
            assert type(plain._pool) is AsyncParts().pool
            async with plain.begin() as uow:
                assert type(uow) is AsyncUnitOfWork
        async with opened(mesh_storage_url, recorder) as storage, storage.begin() as uow:
            for name in ("meshes", "nodes", "routes", "messages", "state", "node_states", "consensus_log",
                         "routing_table", "runtime_config", "changes"):  # fmt: skip
                class_ = type(getattr(uow, name))
                plain_class = vars(repositories)[class_.__name__.removeprefix("Async")]
                assert {each for each in dir(plain_class) if not each.startswith("_")} <= vars(class_).keys()

    run(main())


def test_what_is_no_telemetry_is_refused_when_opening_is_asked_for() -> None:
    wrong: Any = object()
    with pytest.raises(InvalidInputError, match="telemetry"):
        AsyncMeshStorage.open("postgresql://nowhere.invalid/none", telemetry=wrong)
