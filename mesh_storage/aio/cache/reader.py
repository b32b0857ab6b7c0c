"""Reading through the cache: when an entry is trusted, and how one is made."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING
from weakref import WeakMethod

from pydantic_core import to_json

from mesh_storage.aio.cache.entries import AsyncEntries
from mesh_storage.aio.postgres.concurrency import AsyncRepeated
from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.postgres.pool import AsyncPool
from mesh_storage.cache.encoding import LAYOUT, Encoding
from mesh_storage.cache.sparing import Sparing
from mesh_storage.cache.view import Position, Slot, View
from mesh_storage.errors import ClosedError, MeshStorageError, StorageTimeoutError
from mesh_storage.postgres.characteristics import Characteristics
from mesh_storage.postgres.ownership import Ownership
from mesh_storage.postgres.pool import keep_for_parent
from mesh_storage.postgres.tenure import now
from mesh_storage.repositories import checks
from mesh_storage.repositories.loading import M
from mesh_storage.repositories.positions import NEWS, read

if TYPE_CHECKING:  # OpenTelemetry is an extra
    from mesh_storage.telemetry.observed import Observed

logger = logging.getLogger("mesh_storage")

_LONGEST_AGE_S = 86_400.0
_LONGEST_POLL_S = 60.0
_LATE_S = 0.1
"""How much later than `poll` a look may be before a reader looks itself."""
_PAUSE_S = 1.0
"""How long the database is not looked at after it could not be reached."""

# A look that takes long is given up, since readers wait for it.
_LOOKING = Characteristics(read_only=True, timeout=1.0)
# The position is that of the snapshot in which the content is read.
_FILLING = Characteristics(read_only=True, isolation="repeatable read")
_READING = Characteristics(read_only=True)


class AsyncReader:
    """Reads the entries of one cache, and looks regularly at what has changed."""

    def __init__(
        self, storage: object, pool: AsyncPool, observed: Observed | None, url: str, *, max_age: float, poll: float
    ) -> None:
        """Validate the arguments of `cached`.

        Raises:
            ConfigurationError: redis-py is not installed, or the URL is invalid.
            InvalidInputError: An argument is invalid; names it.
        """
        self._storage = storage  # keeps the bundled server running
        self._pool = pool
        self._observed = observed
        self._url = url
        self._max_age = checks.seconds("max_age", max_age, _LONGEST_AGE_S)
        self._poll = checks.seconds("poll", poll, _LONGEST_POLL_S)
        self._fresh = min(poll + _LATE_S, max_age)
        self.closed = False
        self._prepare()

    def _prepare(self) -> None:
        """Begin anew in this process: connections, locks and threads do not survive a fork."""
        self._owner = Ownership()
        self._entries = AsyncEntries(self._url)
        self._view = View(self._max_age)
        self._looking = asyncio.Lock()
        self._next_look = float("-inf")
        self._records = Sparing()
        self._following: AsyncRepeated | None = None

    async def read(
        self, slot: Slot, encoding: Encoding[M], load: Callable[[AsyncUnitOfWorkConnection], Awaitable[list[M]]]
    ) -> list[M]:
        """Return what `load` reads, from Redis if that is as good."""
        if self.closed or self._pool.closed:
            raise ClosedError("the cache was closed" if self.closed else "the storage was closed")
        if self._owner.inherited:
            keep_for_parent((self._entries, self._following))
            self._prepare()
        if self._following is None:
            await self._start()
        found = None
        if self._entries.available:
            await self._look(self._fresh)
            if self._view.looked(self._pool.commits.latest, self._max_age):
                found = await self._find(slot, encoding)
        if self._observed is not None:
            self._observed.count_cache_lookup(f"{slot.aggregate}.{slot.call}", hit=found is not None)
        return await self._load(slot, encoding, load) if found is None else found

    async def _start(self) -> None:
        async with self._looking:
            if self._following is None:
                self._following = AsyncRepeated(WeakMethod(self._follow), self._poll)

    async def close(self) -> None:
        """Look no more, and close the connections to Redis."""
        if self.closed or self._owner.inherited:
            self.closed = True
            return
        self.closed = True
        if self._following is not None:
            await self._following.stop()
        await self._entries.close()

    async def _find(self, slot: Slot, encoding: Encoding[M]) -> list[M] | None:
        """Return the content of the entry in Redis; None if there is none that is true."""
        history = self._view.position.history
        entry = await self._entries.get(_name(history, slot))
        if entry is None:
            return None
        number, text = entry
        # One from ahead of what is known here, by another process, may be followed by changes of other keys.
        await self._look(self._max_age, number)
        if not self._view.holds(slot, Position(history, number)):
            return None
        try:
            found = encoding.loads(text)
        except ValueError:
            return None
        return found if self._lives(found) > 0 else None

    async def _load(
        self, slot: Slot, encoding: Encoding[M], load: Callable[[AsyncUnitOfWorkConnection], Awaitable[list[M]]]
    ) -> list[M]:
        """Return what the database answers, and store it in Redis."""
        stores = self._entries.available
        connection = await self._pool.acquire(_FILLING if stores else _READING)
        try:
            position = await self._learn(connection) if stores else None
            found = await load(connection)
        finally:
            await self._pool.release(connection)
        if position is None:
            self._view.doubt()
            return found
        text = encoding.dumps(found)
        if text is not None:
            name = _name(position.history, slot)
            await self._entries.put(name, position.number, text, min(self._max_age, self._lives(found)))
        return found

    def _lives(self, found: list[M]) -> float:
        """Return the seconds until the first of some aggregates expires, by the database's clock."""
        expiries = [vars(entity).get("expires_at") for entity in found]
        return min((self._view.left(at) for at in expiries if at is not None), default=float("inf"))

    async def _follow(self) -> float | None:
        """Look at what has changed; return the seconds until the next time."""
        try:
            await self._look(0.0)
        except ClosedError:
            return None
        except MeshStorageError as error:
            self._failed(error)
        return self._poll

    async def _look(self, within: float, number: int = 0) -> None:
        """Look at what has changed, unless somebody has within some seconds, and as far as a position.

        If the database cannot be reached, that is left to whoever needs it.
        """
        if self._has_looked(within, number):
            return
        async with self._looking:
            if self._has_looked(within, number) or now() < self._next_look:
                return
            try:
                connection = await self._pool.acquire(_LOOKING, beside=True)
                try:
                    await self._learn(connection)
                finally:
                    await self._pool.release(connection)
            except MeshStorageError as error:
                if not error.retryable and not isinstance(error, StorageTimeoutError):
                    raise
                self._failed(error)

    def _failed(self, error: MeshStorageError) -> None:
        self._next_look = now() + _PAUSE_S
        if self._records.due():
            logger.warning(
                "the cache cannot look at the database, and answers for as long as max_age",
                extra={"event": "cache", "error": type(error).__name__, "sqlstate": error.sqlstate},
            )

    def _has_looked(self, within: float, number: int) -> bool:
        return self._view.looked(self._pool.commits.latest, within) and self._view.position.number >= number

    async def _learn(self, connection: AsyncUnitOfWorkConnection) -> Position:
        """Look at what has changed, on a connection, and return the position of its snapshot."""
        history, snapshot = self._view.since
        commit, asked = self._pool.commits.latest, now()
        rows = await connection.fetch_all(NEWS, {"snapshot": snapshot})
        return self._view.learn(read(rows, history), asked, commit)


def _name(history: str, slot: Slot) -> str:
    return f"mesh:{history}:{LAYOUT}:{to_json([slot.aggregate, slot.call, *slot.arguments]).decode()}"
