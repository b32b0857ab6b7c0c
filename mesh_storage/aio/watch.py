"""The loop behind `watch`: it polls for changes, waits out outages, and yields batches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from mesh_storage.aio.postgres.pool import AsyncPool
from mesh_storage.errors import ClosedError, MeshStorageError
from mesh_storage.postgres.characteristics import Characteristics
from mesh_storage.postgres.outage import Outage
from mesh_storage.postgres.spool import Spool
from mesh_storage.repositories import checks
from mesh_storage.repositories.changelog import (
    BEGINNING,
    MOMENT,
    PART,
    WHOLE,
    Batch,
    Cursor,
    decode,
    parameters,
    position,
    select,
)
from mesh_storage.repositories.prefixes import key_range

_LONGEST_POLL_S = 60.0
_BOOKMARK_S = 300.0
"""After so many seconds without a change, an empty batch brings a new cursor, before the old one is compacted."""
_NOTICE_CLOSING_S = 0.25

_POLLING = Characteristics(read_only=True)
_READING = Characteristics(read_only=True, isolation="repeatable read")


class AsyncWatch:
    """A watch of some aggregates of one storage."""

    def __init__(
        self,
        storage: object,
        pool: AsyncPool,
        aggregates: tuple[str, ...],
        *,
        prefix: str,
        after: str | None,
        poll: float,
    ) -> None:
        """Validate the arguments of `watch`.

        Raises:
            InvalidInputError: An argument is invalid; names it.
        """
        self._storage = storage  # keeps the bundled server running
        self._pool = pool
        self._selection = select(aggregates)
        self._prefix = key_range(prefix)
        self._cursor: Cursor | None = decode("after", after)
        self._poll = checks.seconds("poll", poll, _LONGEST_POLL_S)
        self.seen_at: float | None = None
        """The time, by `time.monotonic()`, up to which the caller has seen everything; None before the first look."""

    async def batches(self) -> AsyncGenerator[Batch, None]:
        """Yield batches until the storage is closed."""
        outage = Outage()
        bookmark = time.monotonic() + _BOOKMARK_S
        self.seen_at = time.monotonic()
        while True:
            begun = time.monotonic()
            due = begun + self._poll
            with Spool() as spool:
                try:
                    now = await self._read(spool)
                except ClosedError:
                    return
                except MeshStorageError as error:
                    due = time.monotonic() + outage.pause(error)
                else:
                    outage.over()
                    if not len(spool) and (self._cursor is None or time.monotonic() >= bookmark):
                        spool.append([])
                    if len(spool):
                        bookmark = time.monotonic() + _BOOKMARK_S
                    before = BEGINNING if self._cursor is None else str(self._cursor)
                    for number, rows in enumerate(spool, start=1):
                        more = number < len(spool)
                        yield Batch(self._selection.changes(rows), before if more else str(now), more)
                    self._cursor, self.seen_at = now, begun
            await self._sleep_until(due)

    async def _read(self, spool: Spool) -> Cursor:
        """Write what changed to the spool, and return the cursor of that moment."""
        connection = await self._pool.acquire(_POLLING)
        try:
            rows = await connection.fetch_all(self._selection.whole(self._cursor), self._parameters(WHOLE + 1))
        finally:
            await self._pool.release(connection)
        now, number, changed = self._selection.read(rows, self._cursor)
        if number > WHOLE:
            return await self._read_in_parts(spool)
        if changed:
            spool.append(changed)
        return now

    async def _read_in_parts(self, spool: Spool) -> Cursor:
        """Read a batch of any size, all at once, so that no snapshot is held while the caller works."""
        connection = await self._pool.acquire(_READING)
        try:
            row = await connection.fetch_one(MOMENT)
            assert row is not None, "the statement always returns one row"
            now = position(row, self._cursor)
            statement = self._selection.streamed(self._cursor)
            await connection.stream(statement, self._parameters(None), spool.append, PART)
        finally:
            await self._pool.release(connection)
        return now

    def _parameters(self, limit: int | None) -> dict[str, object]:
        return parameters(self._cursor, self._prefix, limit)

    async def _sleep_until(self, due: float) -> None:
        while (left := due - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _NOTICE_CLOSING_S))
            if self._pool.closed:
                return
