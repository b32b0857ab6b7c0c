"""Threads and tasks go on while sessions and servers are killed, frozen, restarted and replaced.

A run of a minute is one of the tests; `make chaos` makes a longer one and prints its figures.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr

from mesh_storage import MeshStorage, Settings, schema
from mesh_storage.aio import AsyncMeshStorage
from tests.chaos.disturber import APPLICATION, Disturber
from tests.chaos.record import TOLERANCE_S, Record, Starvation
from tests.chaos.sides import InThread, finish, sleep_in_thread
from tests.chaos.worker import CONNECT_TIMEOUT_S, LOCK_TIMEOUT_S, POOL_TIMEOUT_S, STATEMENT_TIMEOUT_S, Worker
from tests.processes import eventually, sockets
from tests.servers import Cluster, new_cluster
from tools.test_matrix import find

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("CHAOS_SECONDS") or 60)
SEED = os.environ.get("CHAOS_SEED") or str(random.randrange(10**6))
THREADS, THREADS_POOL = 6, 4
TASKS, TASKS_POOL = 15, 6
SESSIONS = THREADS_POOL + TASKS_POOL

_OURS = f"FROM pg_stat_activity WHERE application_name = '{APPLICATION}'"


def settings(cluster: Cluster, pool_size: int) -> Settings:
    return Settings(
        url=SecretStr(cluster.url),
        application_name=APPLICATION,
        pool_size=pool_size,
        pool_timeout=POOL_TIMEOUT_S,
        connect_timeout=CONNECT_TIMEOUT_S,
        statement_timeout=STATEMENT_TIMEOUT_S,
        lock_timeout=LOCK_TIMEOUT_S,
        slow_unit_of_work=0,
    )


class Load:
    """The threads and tasks that work until they are told to stop."""

    def __init__(self, cluster: Cluster, record: Record) -> None:
        self._cluster = cluster
        self._record = record
        self._stopped = threading.Event()
        self._checked = threading.Event()
        self.complaints: list[str] = []
        """What an event loop, or a thread, had to report."""
        self.in_use: dict[str, int] = {}
        """The connections that count as in use when nobody uses any."""

    def run(self, disturb: Callable[[], None], check: Callable[[], None]) -> None:
        """Disturb the workers, and check what is left of them before their storages are closed."""
        tasks = threading.Thread(target=self._guarded, args=[lambda: asyncio.run(self._tasks())])
        with MeshStorage.open(settings=settings(self._cluster, THREADS_POOL)) as storage:
            workers = [self._worker(InThread(storage), "thread", number, sleep_in_thread) for number in range(THREADS)]
            threads = [threading.Thread(target=self._guarded, args=[self._thread, each]) for each in workers]
            watching = threading.Thread(target=self._watch_threads)
            for thread in (watching, tasks, *threads):
                thread.start()
            try:
                disturb()
            finally:
                self._stopped.set()
                for thread in threads:
                    thread.join()
                try:
                    check()
                finally:
                    self.in_use["threads"] = storage.health().pool_in_use
                    self._checked.set()
                    tasks.join()
                    watching.join()

    def _worker(self, storage: Any, side: str, number: int, sleep: Callable[[float], Awaitable[None]]) -> Worker:
        return Worker(storage, self._record, side, number, seed=SEED, sleep=sleep)

    def _guarded(self, work: Callable[..., None], *args: Any) -> None:
        try:
            work(*args)
        except BaseException as error:  # noqa: BLE001 - none is expected
            self.complaints.append(repr(error))

    def _thread(self, worker: Worker) -> None:
        while not self._stopped.is_set():
            finish(worker.step())
            self._stopped.wait(worker.pause())

    def _watch_threads(self) -> None:
        while not self._checked.is_set():
            self._record.starvation["thread"].asleep()
            time.sleep(Starvation.NAP_S)
            self._record.starvation["thread"].woken()

    async def _watch_loop(self) -> None:
        """Measure how late a task is; if no thread is, the library has blocked the loop."""
        threads, tasks = self._record.starvation["thread"], self._record.starvation["task"]
        while True:
            begun = time.monotonic()
            tasks.asleep()
            await asyncio.sleep(Starvation.NAP_S)
            tasks.woken()
            blocked = time.monotonic() - begun - threads.since(begun)
            if blocked > TOLERANCE_S:
                self._record.faults.append(f"the event loop was blocked for {blocked:.2f} s")

    async def _tasks(self) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self.complaints.append(str(context)))
        async with AsyncMeshStorage.open(settings=settings(self._cluster, TASKS_POOL)) as storage:
            workers = [self._worker(storage, "task", number, asyncio.sleep) for number in range(TASKS)]
            watching = asyncio.create_task(self._watch_loop())
            await asyncio.gather(*map(self._task, workers))
            watching.cancel()
            await asyncio.to_thread(self._checked.wait)
            self.in_use["tasks"] = (await storage.health()).pool_in_use

    async def _task(self, worker: Worker) -> None:
        while not self._stopped.is_set():
            step = asyncio.create_task(worker.step())
            done, _ = await asyncio.wait([step], timeout=worker.patience())
            if not done:
                step.cancel()
                self._record.disturbances["task cancelled"] += 1
                with self._record.limit("task", f"cancelled {worker.doing}", 0):
                    await asyncio.wait([step])
            if not step.cancelled():
                step.result()
            await asyncio.sleep(worker.pause())


def remaining(cluster: Cluster, what: str, number: int, seconds: float = 10) -> list[Any]:
    """Return which of our sessions are in a state, once there are no more than a number of them, or time is up."""
    deadline = time.monotonic() + seconds
    while True:
        with cluster.session() as session:
            found = session.execute(f"SELECT pid, state, query {_OURS} {what}".encode()).fetchall()
        if len(found) <= number or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


@pytest.mark.timeout(SECONDS + 180)
def test_what_is_acknowledged_is_kept_whatever_happens_to_the_servers(mesh_storage_url: str) -> None:
    with psycopg.connect(mesh_storage_url) as connection:
        programs = find(str(connection.info.server_version // 10_000))
    assert programs is not None
    print(f"\nCHAOS_SEED={SEED}")
    record = Record()
    with new_cluster(programs) as cluster:
        schema.upgrade(cluster.url)
        load = Load(cluster, record)
        before = sockets()

        def check() -> None:
            record.expect_none("in a transaction", remaining(cluster, "AND xact_start IS NOT NULL", 0))
            record.expect_none("beyond the pools", remaining(cluster, "", SESSIONS)[SESSIONS:])

        load.run(lambda: Disturber(cluster, record, SEED).disturb(SECONDS), check)
        record.expect_none("after close", remaining(cluster, "", 0))
        if not eventually(lambda: sockets() <= before, seconds=10):  # attempts to connect that nobody waits for end
            record.faults.append(f"{sockets() - before} sockets are still open")
        with cluster.session() as session:
            record.judge(session)
    figures = record.figures(SECONDS)
    print(figures)
    outcomes = {outcome for outcome, _ in record.told.values()}
    assert {"acknowledged", "no"} <= outcomes, figures
    assert (load.complaints, load.in_use, record.faults) == ([], {"threads": 0, "tasks": 0}, []), figures
    assert not any(record.wrong.values()), record.wrong
