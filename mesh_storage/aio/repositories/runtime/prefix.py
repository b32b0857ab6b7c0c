"""Listing by key prefix, using an index; `%` and `_` are literal characters."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.repositories.base import AsyncListing
from mesh_storage.aio.repositories.runtime.entries import AsyncEntryRepository
from mesh_storage.postgres.statement import Row
from mesh_storage.repositories.aggregates import values_by_key
from mesh_storage.repositories.expiring import ExpiringEntries
from mesh_storage.repositories.loading import M
from mesh_storage.repositories.pages import Page, Position
from mesh_storage.repositories.prefixes import key_range


class AsyncPrefixRepository(AsyncEntryRepository[M]):
    """A kind of entry that is listed by key prefix, in code point order."""

    def __init__(self, connection: AsyncUnitOfWorkConnection, entries: ExpiringEntries[M]) -> None:
        super().__init__(connection, entries)
        self._expiring = entries

    async def page(self, prefix: str = "", *, after: str | None = None, limit: int = 100) -> Page[M]:
        """Return up to `limit` (at most 10,000) entries whose key starts with `prefix`, after the cursor `after`."""
        return await self._by_prefix(prefix).page(after, limit)

    def stream(self, prefix: str = "", *, batch_size: int = 1000) -> AsyncGenerator[M, None]:
        """Yield all entries whose key starts with `prefix`, in key order, with at most `batch_size` in memory."""
        return self._by_prefix(prefix).stream(batch_size)

    async def count(self, prefix: str = "") -> int:
        """Return the exact number of entries whose key starts with `prefix`, which takes an index scan over them."""
        return int(await self._fetch_value(self._aggregate.count, **key_range(prefix)))

    async def _all(self, prefix: str) -> dict[str, Any]:
        """Return keys and values by a single statement, which sees a consistent state of the table."""
        return values_by_key(await self._connection.fetch_all(self._expiring.all, key_range(prefix)))

    def _by_prefix(self, prefix: str) -> AsyncListing[M]:
        whole = key_range(prefix)

        async def fetch(after: Position | None, limit: int) -> list[Row]:
            # Strings cannot contain NUL, so appending U+0001 yields the next string in order.
            start = prefix if after is None else max(prefix, f"{after[0]}\x01")
            return await self._connection.fetch_all(self._aggregate.page, {**whole, "start": start, "limit": limit})

        return AsyncListing(fetch, self._aggregate.load.many)
