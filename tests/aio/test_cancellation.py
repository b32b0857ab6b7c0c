"""Shows that a task may be cancelled at any await: nothing stays open, nothing leaks, and nothing is half done."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, Self

import pytest
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import text

from mesh_storage import MeshStorageError, Message, Node, SerializationError, StorageTimeoutError, UnavailableError
from mesh_storage.aio import AsyncMeshStorage, AsyncUnitOfWork
from mesh_storage.models.base import new_id
from tests.aio.conftest import Run, Watch, assert_at_rest, eventually, opened, storage_at_rest

ID = new_id("node")
LOCKED_OUT = 42
"""The advisory lock that a commit waits for."""


async def cancelled(task: asyncio.Task[Any], times: int = 1) -> None:
    """Cancel a task and wait for its end."""
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task


async def put(storage: AsyncMeshStorage, key: str, **given: Any) -> None:
    async with storage.begin(**given) as uow:
        await uow.state.put(key, b"")


async def write_in_two_places(storage: AsyncMeshStorage, number: int, chance: random.Random) -> None:
    """Do a bit of everything; both keys are committed, or none."""
    async with storage.begin(timeout=chance.choice([None, 30.0])) as uow:
        await uow.state.put(f"first {number}", b"")
        with suppress(MeshStorageError):
            async with uow.savepoint():
                await uow.consensus_log.append(1, 1, {"by": number})
        async for _ in uow.messages.stream(batch_size=2):
            if chance.random() < 0.2:
                break
        if chance.random() < 0.3:
            await uow.session.execute(text("SELECT pg_sleep(0.002)"))
        async with uow.savepoint():
            await uow.state.put(f"second {number}", b"")
    async with storage.unit_of_work(read_only=True) as uow:
        assert await uow.state.find(f"second {number}") is not None


async def cancel_at_random(storage: AsyncMeshStorage, numbers: range, chance: random.Random) -> tuple[set[int], int]:
    """Start a task for each number and cancel most; give the numbers of those that came to their end."""
    tasks = {number: asyncio.create_task(write_in_two_places(storage, number, chance)) for number in numbers}
    hits = 0
    while pending := [task for task in tasks.values() if not task.done()]:
        await asyncio.sleep(chance.choice([0, 0, 0.001, 0.003]))
        victim = chance.choice(pending)
        for _ in range(chance.choice([1, 1, 1, 2])):
            hits += victim.cancel()
            await asyncio.sleep(0)
    ends = await asyncio.gather(*tasks.values(), return_exceptions=True)
    assert [end for end in ends if end is not None and not isinstance(end, asyncio.CancelledError)] == []
    return {number for number, end in zip(numbers, ends, strict=True) if end is None}, hits


def test_a_thousand_random_cancellations_leave_nothing(run: Run, mesh_storage_url: str, watch: Watch) -> None:
    rounds, tasks = 10, 120
    chance = random.Random(7)
    done: set[int] = set()

    async def main() -> int:
        hits = 0
        for round_ in range(rounds):  # Each with a pool that is empty, so that connecting is cancelled too.
            async with storage_at_rest(mesh_storage_url, watch, pool_size=5) as storage:
                await storage.run(fill)
                numbers = range(round_ * tasks, (round_ + 1) * tasks)
                survivors, cancellations = await cancel_at_random(storage, numbers, chance)
                done.update(survivors)
                hits += cancellations
        return hits

    async def fill(uow: AsyncUnitOfWork) -> None:
        await uow.messages.store_many(
            Message(id=str(number), from_node="a", to_node="b", content=b"", timestamp=number) for number in range(7)
        )

    assert run(main()) >= 1000
    committed = watch.keys()
    first, second = ({key for key in committed if key.startswith(name)} for name in ("first", "second"))
    assert {key.split()[1] for key in first} == {key.split()[1] for key in second}
    assert {f"first {number}" for number in done} <= first


@pytest.mark.parametrize("times", [1, 2, 3])
def test_cancelled_while_a_statement_waits_for_a_lock(
    run: Run, mesh_storage_url: str, watch: Watch, times: int
) -> None:
    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch, pool_size=1) as storage:
            await put(storage, "before")
            with watch.locked("mesh_state"):
                task = asyncio.create_task(put(storage, "never"))
                await eventually(watch.waiting)
                await cancelled(task, times)
                await eventually(lambda: not watch.waiting() and not watch.busy())
                async with storage.begin() as uow:
                    await uow.node_states.put("goes on", {})
            assert watch.keys() == ["before"]

    run(main())


@pytest.mark.parametrize("times", [1, 2])
def test_cancelled_while_the_commit_waits(run: Run, mesh_storage_url: str, watch: Watch, times: int) -> None:
    watch.connection.execute(
        f"CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN PERFORM pg_advisory_xact_lock_shared({LOCKED_OUT}); RETURN NULL; END $$"
    )
    watch.connection.execute(
        "CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON mesh_state DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION wait()"
    )

    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch, pool_size=1) as storage:
            watch.take(LOCKED_OUT)
            task = asyncio.create_task(put(storage, "never"))
            await eventually(watch.waiting)
            await cancelled(task, times)
            await eventually(lambda: not watch.waiting() and not watch.busy())
            watch.release()
            await put(storage, "after")
            assert watch.keys() == ["after"]

    run(main())


async def add_nodes(storage: AsyncMeshStorage, count: int, *last: str) -> None:
    names = [*(f"node-{number}" for number in range(count)), *last]
    async with storage.begin() as uow:
        await uow.nodes.add_many(Node(name=name, ip_address="::1") for name in names)


COPIED = "SELECT 1 FROM pg_stat_progress_copy WHERE datname = current_database() AND tuples_processed > {}"


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("when", ["before the rows", "among the rows", "behind the rows"])
def test_cancelled_while_rows_are_copied(run: Run, mesh_storage_url: str, watch: Watch, when: str, times: int) -> None:
    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch, pool_size=1) as storage:
            await add_nodes(storage, 0, "warm")
            with watch.locked("nodes" if when == "before the rows" else "mesh"):
                watch.other.execute(
                    "INSERT INTO nodes (node_id, node_name, ip_address) VALUES (%s, 'late', '::1')", [ID]
                )
                last = ["late"] if when == "behind the rows" else []
                task = asyncio.create_task(add_nodes(storage, 20_000, *last))
                if when == "among the rows":
                    await eventually(lambda: watch.connection.execute(COPIED.format(0)).fetchone())
                else:
                    await eventually(watch.waiting)
                await cancelled(task, times)
                await eventually(lambda: not watch.waiting() and not watch.busy())
                watch.other.execute("DELETE FROM nodes WHERE node_id = %s", [ID])
            async with storage.begin() as uow:
                assert await uow.nodes.count() == 1

    run(main())


def test_cancelled_between_rows_while_the_server_waits_for_a_lock(
    run: Run, mesh_storage_url: str, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = (new_id("node") for _ in itertools.count())

    async def main() -> None:
        async with storage_at_rest(
            mesh_storage_url, watch, pool_size=1, lock_timeout=0, statement_timeout=0
        ) as storage:
            await add_nodes(storage, 0, "warm")
            with watch.locked("mesh"):
                watch.other.execute(
                    "INSERT INTO nodes (node_id, node_name, ip_address) VALUES (%s, 'node-0', '::1')", [ID]
                )
                task = asyncio.create_task(add_nodes(storage, 2500))

                def made(_: str) -> str:
                    id_ = next(ids)
                    if len(used) == 1500:  # Some rows after this one, the task lets the others go on, and is cancelled.
                        task.cancel()
                    used.append(id_)
                    return id_

                used: list[str] = []
                monkeypatch.setattr("mesh_storage.aio.repositories.infrastructure.base.new_id", made)
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert len(used) < 2500
                monkeypatch.undo()
                await eventually(lambda: not watch.waiting() and not watch.busy())
                watch.other.execute("DELETE FROM nodes WHERE node_id = %s", [ID])

    run(main())


def test_other_tasks_go_on_while_rows_are_copied(run: Run, mesh_storage_url: str, watch: Watch) -> None:
    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch, pool_size=1) as storage:
            task, turns = asyncio.create_task(add_nodes(storage, 20_000)), 0
            await eventually(lambda: watch.connection.execute(COPIED.format(0)).fetchone())
            while watch.connection.execute(COPIED.format(0)).fetchone():
                await asyncio.sleep(0)
                turns += 1
            await task
            assert turns >= 10

    run(main())


def test_cancelled_while_waiting_for_the_pool(run: Run, mesh_storage_url: str, watch: Watch) -> None:
    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch, pool_size=1) as storage:
            async with storage.begin() as held:
                tasks = [asyncio.create_task(put(storage, f"waiter {number}")) for number in range(10)]
                await asyncio.sleep(0)  # All begin to wait.
                for task in tasks[:9]:
                    await cancelled(task)
                await held.state.put("held", b"")
                assert not tasks[9].done()
            # The permit comes free and its waiter is cancelled in the same turn of the loop.
            tasks[9].cancel()
            with suppress(asyncio.CancelledError):
                await tasks[9]
            assert set(watch.keys()) <= {"held", "waiter 9"}

    run(main())


class Gate:
    """Passes connections on to the server, or leaves them without an answer."""

    def __init__(self, url: str, directory: Path) -> None:
        self._server = f"{conninfo_to_dict(url)['host']}/.s.PGSQL.{conninfo_to_dict(url)['port']}"
        self.url = url.replace(url[url.index("host=") :].split("&", maxsplit=1)[0], f"host={directory}")
        self.url = self.url.replace("port=5432", "port=5433")
        self._path = directory / ".s.PGSQL.5433"
        self.held = 0
        self.closed = False
        self._streams: list[asyncio.StreamWriter] = []
        self._passing: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_unix_server(self._pass, self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        for stream in self._streams:
            stream.close()
        await asyncio.gather(*self._passing, return_exceptions=True)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task: asyncio.Task[None] | None = asyncio.current_task()
        assert task is not None
        self._passing.add(task)
        self._streams.append(writer)
        if self.closed:
            self.held += 1
            await reader.read()  # The startup packet, which ends when the client goes away.
            self.held -= 1
            writer.close()
            return
        answers, requests = await asyncio.open_unix_connection(self._server)
        self._streams.append(requests)
        await asyncio.gather(_copy(reader, requests), _copy(answers, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while some := await reader.read(65536):
            writer.write(some)
            await writer.drain()
    writer.close()


def test_cancelled_while_connecting(run: Run, mesh_storage_url: str, watch: Watch, tmp_path: Path) -> None:
    kinds: list[dict[str, Any]] = [{}, {"timeout": 30.0}, {"isolation": "serializable"}, {"read_only": True}]

    async def main() -> None:
        async with Gate(mesh_storage_url, tmp_path) as gate:
            async with opened(gate.url, pool_size=len(kinds), connect_timeout=2) as storage:
                gate.closed = True
                tasks = [asyncio.create_task(put(storage, "never", **given)) for given in kinds * 2]
                await eventually(lambda: gate.held == len(kinds))
                for task in tasks:
                    await cancelled(task)
                await eventually(lambda: gate.held == 0)
                gate.closed = False
                await put(storage, "after")
                await assert_at_rest(storage, watch)
            assert watch.keys() == ["after"]

    run(main())


def test_cancelled_between_two_statements_and_in_a_savepoint(run: Run, mesh_storage_url: str, watch: Watch) -> None:
    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch, pool_size=1) as storage:
            reached, never = asyncio.Event(), asyncio.Event()

            async def work() -> None:
                async with storage.begin() as uow:
                    await uow.state.put("outer", b"")
                    async with uow.savepoint():
                        await uow.state.put("inner", b"")
                        reached.set()
                        await never.wait()

            for times in (1, 2, 3):
                reached.clear()
                task = asyncio.create_task(work())
                await reached.wait()
                await cancelled(task, times)
                await assert_at_rest(storage, watch)
            assert watch.keys() == []

    run(main())


def test_a_timeout_in_a_savepoint_undoes_the_savepoint_alone(run: Run, mesh_storage_url: str, watch: Watch) -> None:
    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch, pool_size=1) as storage:
            async with storage.begin() as uow:
                await uow.state.put("kept", b"")
                with watch.locked("mesh_node_state"), pytest.raises(TimeoutError):
                    async with uow.savepoint(), asyncio.timeout(0.05):
                        await uow.state.put("undone", b"")
                        await uow.node_states.put("waits", {})
                await uow.state.put("kept too", b"")
            assert watch.keys() == ["kept", "kept too"]

    run(main())


def test_cancelled_while_streaming(run: Run, mesh_storage_url: str, watch: Watch) -> None:
    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch, pool_size=1) as storage:
            async with storage.begin() as uow:
                await uow.state.put("a", b"")
                await uow.state.put("b", b"")
            reached, never = asyncio.Event(), asyncio.Event()

            async def read() -> None:
                async with storage.begin() as uow:
                    async for _ in uow.state.stream(batch_size=1):
                        reached.set()
                        await never.wait()

            async def read_on() -> None:
                async with storage.begin() as uow:
                    async for _ in uow.state.stream(batch_size=1):
                        await uow.commit()  # So that the lock below is to be had.
                        if not reached.is_set():
                            reached.set()
                            await never.wait()

            reading = asyncio.create_task(read())
            await reached.wait()
            await cancelled(reading)
            reached.clear()
            reading = asyncio.create_task(read_on())
            await reached.wait()
            with watch.locked("mesh_state"):
                never.set()
                await eventually(watch.waiting)
                await cancelled(reading)
                await eventually(lambda: not watch.waiting())

    run(main())


def test_cancelled_while_a_large_batch_is_read(run: Run, mesh_storage_url: str, watch: Watch) -> None:
    watch.other.execute("INSERT INTO mesh_state (key, value) SELECT n, 'x' FROM generate_series(1, 10000) n")

    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch, pool_size=1) as storage:

            async def follow() -> int:
                seen = 0
                async with aclosing(storage.watch("state")) as batches:
                    async for batch in batches:
                        seen += len(batch.changes)
                        if not batch.more:
                            break
                return seen

            begun = time.monotonic()
            assert await follow() == 10_000
            whole = time.monotonic() - begun
            for share in range(20):
                task = asyncio.create_task(follow())
                await asyncio.sleep(whole * share / 20)
                if not task.done():
                    await cancelled(task)
                async with storage.begin(read_only=True) as uow:
                    assert await uow.state.count() == 10_000

    run(main())


def test_cancelled_in_the_pause_of_run(run: Run, mesh_storage_url: str, watch: Watch) -> None:
    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch, pool_size=1) as storage:
            tried = 0

            async def work(uow: AsyncUnitOfWork) -> None:
                nonlocal tried
                tried += 1
                await uow.state.put("never", b"")
                raise SerializationError

            task = asyncio.create_task(storage.run(work, attempts=1_000))
            await eventually(lambda: tried == 3)
            await cancelled(task)
            assert watch.keys() == []

    run(main())


Slow = Callable[[AsyncUnitOfWork], Awaitable[object]]


def test_asyncio_timeout_around_a_slow_statement(run: Run, mesh_storage_url: str, watch: Watch) -> None:
    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch, pool_size=1) as storage:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05), storage.begin() as uow:
                    await uow.state.put("never", b"")
                    await uow.session.execute(text("SELECT pg_sleep(100)"))
            await eventually(lambda: not watch.busy())
            with pytest.raises(MeshStorageError) as refused:
                async with storage.begin() as uow:
                    await uow.state.put("never", b"")
                    with pytest.raises(TimeoutError):
                        async with asyncio.timeout(0.05):
                            await uow.session.execute(text("SELECT pg_sleep(100)"))
                    await eventually(lambda: not any(state == "active" for _, state, _ in watch.busy()))
            assert not isinstance(refused.value, StorageTimeoutError)
            assert watch.keys() == []
            await put(storage, "after")
            assert watch.keys() == ["after"]

    run(main())


def test_a_commit_after_a_cancelled_statement_is_refused(run: Run, mesh_storage_url: str, watch: Watch) -> None:
    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch, pool_size=1) as storage:
            with pytest.raises(MeshStorageError) as refused:
                async with storage.begin() as uow:
                    await uow.state.put("never", b"")
                    with watch.locked("mesh_node_state"), pytest.raises(TimeoutError):
                        async with asyncio.timeout(0.05):
                            await uow.node_states.put("waits", {})
            assert isinstance(refused.value.__cause__, UnavailableError)
            assert watch.keys() == []

    run(main())


def test_two_hundred_tasks_share_a_pool_of_ten(run: Run, mesh_storage_url: str, watch: Watch) -> None:
    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch, pool_size=10) as storage:
            await eventually(lambda: watch.connections() == 0)  # the one that looked at the schema has ended
            most = 0

            async def work(number: int) -> None:
                nonlocal most
                async with storage.begin() as uow:
                    await uow.state.put(f"{number:03}", b"")
                    most = max(most, watch.connections())
                    assert most <= 10

            async with asyncio.TaskGroup() as group:
                for number in range(200):
                    group.create_task(work(number))
            assert 1 < most <= 10
            assert watch.keys() == [f"{number:03}" for number in range(200)]

    run(main())


async def _enter_savepoint(uow: AsyncUnitOfWork) -> None:
    async with uow.savepoint():
        pass


async def _read_stream(uow: AsyncUnitOfWork) -> None:
    async for _ in uow.messages.stream():
        pass


INTRUSIONS: dict[str, Slow] = {
    "a call": lambda uow: uow.state.put("intruder", b""),
    "a stream": _read_stream,
    "a savepoint": _enter_savepoint,
    "the session": lambda uow: uow.session.execute(text("SELECT 1")),
    "commit": lambda uow: uow.commit(),
    "rollback": lambda uow: uow.rollback(),
}


@pytest.mark.parametrize("intrude", INTRUSIONS.values(), ids=list(INTRUSIONS))
def test_two_tasks_on_one_unit_of_work_get_a_clear_error(
    run: Run, mesh_storage_url: str, watch: Watch, intrude: Slow
) -> None:
    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch, pool_size=1) as storage:
            async with storage.begin() as uow:
                await uow.state.put("first", b"")
                with watch.locked("mesh_node_state"):
                    owner = asyncio.create_task(uow.node_states.put("n", {}))
                    await eventually(watch.waiting)
                    intruder = asyncio.create_task(_outcome(intrude(uow)))
                    done, _ = await asyncio.wait([intruder], timeout=2)
                await owner
                error = await intruder
                assert done, "it waits instead"
                assert type(error) is MeshStorageError
                assert "two threads or tasks" in str(error)
                await uow.state.put("second", b"")
            assert watch.keys() == ["first", "second"]
            async with storage.begin() as uow:
                assert (await uow.node_states.get("n")).state == {}

    run(main())


async def _outcome(work: Awaitable[object]) -> BaseException | None:
    try:
        await work
    except MeshStorageError as error:
        return error
    return None


def test_many_tasks_on_one_unit_of_work_never_lose_half_of_it(run: Run, mesh_storage_url: str, watch: Watch) -> None:
    async def main() -> None:
        async with storage_at_rest(mesh_storage_url, watch, pool_size=1) as storage:
            async with storage.begin() as uow:
                calls = [_outcome(uow.state.put(f"{number:02}", b"")) for number in range(20)]
                outcomes = await asyncio.gather(*calls)
                stored = [f"{number:02}" for number, outcome in enumerate(outcomes) if outcome is None]
                assert 1 <= len(stored) < 20
            assert watch.keys() == stored

    run(main())
