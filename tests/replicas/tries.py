"""Many processes that write, hand their positions on, and read after them from replicas; prints how that went, as JSON.

python -m tests.replicas.tries URL REPLICA_URL PROCESSES TRIES SECONDS
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from multiprocessing.connection import Connection, Pipe
from typing import Any

from pydantic import SecretStr

from mesh_storage import MeshStorage, Settings
from mesh_storage.aio import AsyncMeshStorage
from tests.chaos.sides import InThread, finish

Outcome = Counter[str]


def settings_of(url: str, replica_url: str) -> Settings:
    return Settings(
        url=SecretStr(url), replica_url=SecretStr(replica_url), pool_size=1, replica_pool_size=1, slow_unit_of_work=0,
        connect_timeout=60, pool_timeout=60, replica_timeout=2,
    )  # fmt: skip


def port_of(uow: Any) -> int:
    connection = getattr(uow, "_wrapped", uow)._connection
    connection = getattr(connection, "primary", None) or connection
    return int(connection.driver.connection.info.port)


async def hand_on(storage: Any, number: int, tries: int, inbox: Connection, outbox: Connection) -> Outcome:
    """Write and hand the position to the next process; read what the one before has written."""
    outcome = Outcome()
    me, before = (f"process {each}" for each in (number, inbox.recv()))
    for attempt in range(1, tries + 1):
        async with storage.begin(position=True) as uow:
            await uow.state.put(me, str(attempt).encode())
        outbox.send((attempt, getattr(uow, "_wrapped", uow).position))
        written, position = inbox.recv()
        isolation = random.choice([None, "repeatable read"])
        async with storage.begin(read_only=True, replica=True, after=position, isolation=isolation) as uow:
            found = int((await uow.state.get(before)).value)
            port = port_of(uow)
        outcome["stale" if found < written else "fresh"] += 1
        outcome[f"port {port}"] += 1
    return outcome


async def look(storage: Any, seconds: float, *, replica: bool) -> Outcome:
    """Read for some seconds, by connections that are there."""
    for _ in range(20):
        async with storage.begin(read_only=True, replica=replica) as uow:
            await uow.state.get("process 0")
    outcome = Outcome()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        async with storage.begin(read_only=True, replica=replica) as uow:
            await uow.state.get("process 0")
            outcome[f"port {port_of(uow)}"] += 1
    return outcome


def forked(
    settings: Settings, works: list[Callable[[Any], Coroutine[Any, Any, Outcome]]], *, blocking: bool | None = None
) -> Outcome:
    """Do each work in a process of its own, on either side in turn, and return the sum of their outcomes."""
    results: list[Connection] = []
    for number, work in enumerate(works):
        result, ours = Pipe(duplex=False)
        results.append(result)
        if os.fork() == 0:
            code = 1
            try:
                ours.send(_run(settings, work, blocking=number % 2 == 0 if blocking is None else blocking))
                code = 0
            finally:
                os._exit(code)
        ours.close()
    total = Outcome()
    for result in results:
        total += result.recv()
    for _ in works:
        os.wait()
    return total


def _run(settings: Settings, work: Callable[[Any], Coroutine[Any, Any, Outcome]], *, blocking: bool) -> Outcome:
    if blocking:
        with MeshStorage.open(settings=settings) as storage:
            return finish(work(InThread(storage)))

    async def main() -> Outcome:
        async with AsyncMeshStorage.open(settings=settings) as storage:
            return await work(storage)

    return asyncio.run(main())


def ring(number: int, tries: int) -> list[Callable[[Any], Coroutine[Any, Any, Outcome]]]:
    """Return the works of processes that stand in a circle."""
    pipes = [Pipe(duplex=False) for _ in range(number)]
    for each in range(number):
        pipes[(each + 1) % number][1].send(each)

    def work(each: int) -> Callable[[Any], Coroutine[Any, Any, Outcome]]:
        inbox, outbox = pipes[each][0], pipes[(each + 1) % number][1]
        return lambda storage: hand_on(storage, each, tries, inbox, outbox)

    return [work(each) for each in range(number)]


def main() -> None:
    url, replica_url, processes, tries, seconds = sys.argv[1:]
    settings = settings_of(url, replica_url)
    begun = time.monotonic()
    report: dict[str, Any] = {"tries": forked(settings, ring(int(processes), int(tries) // int(processes)))}
    report["tries took"] = round(time.monotonic() - begun, 1)
    for name, replica in (("primary", False), ("replicas", True)):
        outcome = forked(
            settings, [lambda storage, replica=replica: look(storage, float(seconds), replica=replica)] * 8
        )
        report[f"read from {name}"] = outcome
        report[f"reads/s from {name}"] = round(sum(outcome.values()) / float(seconds))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
