"""What threads and tasks do all the time, with a record of what they were told."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

from sqlalchemy import text

from mesh_storage import MeshStorageError, Message, Node, SerializationError, StorageTimeoutError, UnavailableError
from mesh_storage.errors import NotFoundError
from mesh_storage.models.base import new_id
from tests.chaos.record import Record

POOL_TIMEOUT_S = 3.0
CONNECT_TIMEOUT_S = 4.0
STATEMENT_TIMEOUT_S = 2.0
LOCK_TIMEOUT_S = 1.0
OPENING_S = POOL_TIMEOUT_S + CONNECT_TIMEOUT_S
"""The limit of beginning a unit of work without a timeout (docs/operations.md, High availability)."""
SILENCE_S = STATEMENT_TIMEOUT_S + 5
"""The limit of a call without a timeout on a server that does not answer (docs/semantics.md, Timeouts)."""
HEALTH_S = 2.0
BULK = 100
JOURNAL = 40
"""Entries of a journal: few, so that each change of one is small."""


class Worker:
    """One thread or task: one transaction after the other, each with rows of its own."""

    def __init__(
        self,
        storage: Any,
        record: Record,
        side: str,
        number: int,
        *,
        seed: str,
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        name = f"{side}{number}"
        self._storage = storage
        self._sleep = sleep
        self._record = record
        self._name = name
        self._limit = partial(record.limit, side)
        self._random = random.Random(f"{seed} {name}")
        self._number = 0
        self.doing = ""
        """What the current step is."""
        self._acknowledged: list[str] = []
        self._kinds: list[Callable[[str], Coroutine[Any, Any, None]]] = [
            self._timed, self._plain, self._savepoint, self._session, self._twice, self._journal, self._journal,
            self._bulk, self._left_open, self._read, self._health,
        ]  # fmt: skip

    async def step(self) -> None:
        """Do one thing."""
        self._number += 1
        token = f"{self._name}-{self._number}"
        kind = self._random.choice(self._kinds)
        self.doing = kind.__name__.strip("_").replace("_", " ")
        await kind(token)

    def pause(self) -> float:
        """Return the seconds until the next step."""
        return self._random.uniform(0.0, 0.1)

    def patience(self) -> float | None:
        """Return the seconds after which the step is cancelled, if at all."""
        return self._random.expovariate(5.0) if self._random.random() < 0.3 else None

    @asynccontextmanager
    async def _told(self, token: str, rows: int) -> AsyncGenerator[None]:
        """Record what the caller of a transaction is told."""
        outcome = "cancelled"
        try:
            yield
            outcome = "acknowledged"
            self._acknowledged.append(token)
        except MeshStorageError as error:
            outcome = error.committed
            self._note(error)
        except asyncio.CancelledError:
            pass
        finally:
            self._record.told[token] = outcome, rows

    def _note(self, error: MeshStorageError) -> None:
        kind = type(error)
        self._record.errors[f"{kind.__name__} {error.committed}"] += 1
        if kind not in (UnavailableError, StorageTimeoutError, SerializationError, MeshStorageError):
            self._record.faults.append(f"{kind.__name__}: {error}")

    @asynccontextmanager
    async def _begun(self) -> AsyncGenerator[Any]:
        """Begin without a timeout; each call of the unit of work has a limit of its own."""
        scope = self._storage.begin()
        with self._limit("opening", OPENING_S):
            uow = await scope.__aenter__()
        try:
            yield uow
        except BaseException as error:
            with self._limit("rollback", SILENCE_S):
                await scope.__aexit__(type(error), error, error.__traceback__)
            raise
        with self._limit("commit", SILENCE_S):
            await scope.__aexit__(None, None, None)

    async def _store(self, uow: Any, token: str, part: str) -> None:
        await uow.messages.store(_message(token, part))

    async def _within(self, seconds: float, call: Awaitable[Any]) -> None:
        with self._limit("call", seconds):
            await call

    async def _timed(self, token: str) -> None:
        timeout = self._random.uniform(0.2, 3.0)
        async with self._told(token, 2):
            with self._limit("begin(timeout)", timeout):
                async with self._storage.begin(timeout=timeout) as uow:
                    await self._store(uow, token, "a")
                    await self._store(uow, token, "b")

    async def _plain(self, token: str) -> None:
        async with self._told(token, 2), self._begun() as uow:
            await self._within(SILENCE_S, self._store(uow, token, "a"))
            await self._sleep(self._random.uniform(0.0, 0.2))
            await self._within(SILENCE_S, self._store(uow, token, "b"))

    async def _savepoint(self, token: str) -> None:
        timeout = self._random.uniform(0.5, 3.0)
        async with self._told(token, 2):
            with self._limit("savepoint(timeout)", timeout):
                async with self._storage.begin(timeout=timeout) as uow:
                    await self._store(uow, token, "a")
                    with suppress(UndoneError):
                        async with uow.savepoint():
                            await self._store(uow, token, "undone")
                            raise UndoneError
                    async with uow.savepoint():
                        await self._store(uow, token, "b")

    async def _session(self, token: str) -> None:
        timeout = self._random.uniform(0.5, 3.0)
        async with self._told(token, 2):
            with self._limit("session(timeout)", timeout):
                async with self._storage.begin(timeout=timeout) as uow:
                    await uow.session.merge(Node(id=new_id("node"), name=token, ip_address="10.0.0.1"))
                    await uow.session.execute(text("SELECT set_config('application.name', 'of the session', false)"))
                    await self._store(uow, token, "a")

    async def _twice(self, token: str) -> None:
        """Commit twice in one unit of work."""
        timeout = self._random.uniform(0.5, 3.0)
        try:
            with self._limit("two commits(timeout)", timeout):
                async with self._storage.unit_of_work(timeout=timeout) as uow:
                    for part in ("first", "second"):
                        async with self._told(f"{token}.{part}", 1):
                            await self._store(uow, f"{token}.{part}", "a")
                            await uow.commit()
        except MeshStorageError as error:
            self._note(error)

    async def _journal(self, token: str) -> None:
        """Read, change and write what others change too; done twice, it would be there twice."""
        within = self._random.uniform(0.5, 6.0)
        timeout = self._random.choice([None, 1.0])
        key = f"journal-{self._random.randrange(3)}-{self._number // JOURNAL}"

        async def work(uow: Any) -> None:
            entry = await uow.state.find(key)
            tokens = entry.value.decode().split() if entry else []
            if token not in tokens:  # an attempt whose outcome was unknown may have been committed
                await uow.state.put(key, " ".join([*tokens, token]).encode())
                await self._store(uow, token, "a")

        async with self._told(token, 2):
            with self._limit("run(within)", within):
                await self._storage.run(work, within=within, timeout=timeout, isolation="serializable")

    async def _bulk(self, token: str) -> None:
        timeout = self._random.uniform(0.5, 3.0)
        async with self._told(token, BULK):
            with self._limit("bulk(timeout)", timeout):
                async with self._storage.begin(timeout=timeout) as uow:
                    await uow.messages.store_many([_message(token, str(part)) for part in range(BULK)])

    async def _left_open(self, token: str) -> None:
        """Commit nothing."""
        timeout = self._random.uniform(0.5, 3.0)
        try:
            with self._limit("no commit(timeout)", timeout):
                async with self._storage.unit_of_work(timeout=timeout) as uow:
                    self._record.told[token] = "no", 1
                    await self._store(uow, token, "a")
        except MeshStorageError as error:
            self._note(error)

    async def _read(self, _token: str) -> None:
        """Read what was acknowledged: it is there at any time, also after a promotion."""
        if not self._acknowledged:
            return
        token = self._random.choice(self._acknowledged)
        timeout = self._random.uniform(0.2, 3.0)
        part = "0" if self._record.told[token][1] == BULK else "a"
        try:
            with self._limit("read(timeout)", timeout):
                async with self._storage.begin(read_only=True, timeout=timeout) as uow:
                    await uow.messages.get(f"{token}/{part}")
        except NotFoundError:
            self._record.faults.append(f"{token} was acknowledged and is not there")
        except MeshStorageError as error:
            self._note(error)

    async def _health(self, _token: str) -> None:
        with self._limit("health", HEALTH_S):
            await self._storage.health()


class UndoneError(Exception):
    """Ends the block of a savepoint."""


def _message(token: str, part: str) -> Message:
    return Message(id=f"{token}/{part}", from_node="a", to_node="b", content=token.encode())
