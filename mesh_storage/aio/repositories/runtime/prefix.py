"""Listing by the prefix of a key, character by character: `%` and `_` are ordinary, and an index is used."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.repositories.base import AsyncListing
from mesh_storage.aio.repositories.runtime.entries import AsyncEntryRepository
from mesh_storage.postgres.statement import Row
from mesh_storage.repositories import checks
from mesh_storage.repositories.aggregates import PrefixEntries, values_by_key
from mesh_storage.repositories.loading import M
from mesh_storage.repositories.pages import Page, Position

_LAST_CHARACTER = "\U0010ffff"
_SURROGATES = range(0xD800, 0xE000)


class AsyncPrefixRepository(AsyncEntryRepository[M]):
    """A kind of entry that is listed by the prefix of its key, in the order of code points."""

    def __init__(self, connection: AsyncUnitOfWorkConnection, entries: PrefixEntries[M]) -> None:
        super().__init__(connection, entries)
        self._prefixed = entries

    async def page(self, prefix: str = "", *, after: str | None = None, limit: int = 100) -> Page[M]:
        """Return up to `limit` (10,000 at most) entries whose key begins with `prefix`, from behind `after`."""
        return await self._by_prefix(prefix).page(after, limit)

    def stream(self, prefix: str = "", *, batch_size: int = 1000) -> AsyncGenerator[M, None]:
        """Yield all entries whose key begins with `prefix`, in order, with no more than `batch_size` in memory."""
        return self._by_prefix(prefix).stream(batch_size)

    async def count(self, prefix: str = "") -> int:
        """Count the entries whose key begins with `prefix`; exact, so it reads them all."""
        return int(await self._fetch_value(self._aggregate.count, **_range(prefix)))

    async def _all(self, prefix: str) -> dict[str, Any]:
        """Return the keys and values in one statement, which sees one version of the table."""
        return values_by_key(await self._connection.fetch_all(self._prefixed.all, _range(prefix)))

    def _by_prefix(self, prefix: str) -> AsyncListing[M]:
        whole = _range(prefix)

        async def fetch(after: Position | None, limit: int) -> list[Row]:
            # No text can have NUL, so U+0001 makes the next one in the order.
            start = prefix if after is None else max(prefix, f"{after[0]}\x01")
            return await self._connection.fetch_all(self._aggregate.page, {**whole, "start": start, "limit": limit})

        return AsyncListing(fetch, self._aggregate.load.many)


def _range(prefix: str) -> dict[str, str]:
    checks.text("prefix", prefix, empty=True)
    return {"start": prefix, "stop": _behind(prefix)}


def _behind(prefix: str) -> str:
    """Return the first text in the order of code points that is behind all that begin with `prefix`."""
    stem = prefix.rstrip(_LAST_CHARACTER)
    if not stem:
        return _LAST_CHARACTER * 256  # Behind every key of up to 255 characters.
    following = ord(stem[-1]) + 1
    return stem[:-1] + chr(_SURROGATES.stop if following in _SURROGATES else following)
