"""The base classes of the repositories: pagination, and operations by primary key."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from operator import itemgetter
from typing import Any, Generic, TypeVar

from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.errors import NotFoundError
from mesh_storage.postgres.statement import Row, Statement
from mesh_storage.repositories import checks
from mesh_storage.repositories.aggregates import Aggregate
from mesh_storage.repositories.loading import M
from mesh_storage.repositories.pages import MAX_ROWS, Page, Position, decode, encode

T = TypeVar("T")


class AsyncListing(Generic[T]):
    """A listing by keyset pagination: each page or batch is one statement that starts after the last key."""

    def __init__(
        self,
        fetch: Callable[[Position | None, int], Awaitable[list[Row]]],
        load: Callable[[list[Row]], Iterable[T]],
        position: Callable[[Row], Position] = itemgetter(slice(1)),
        shape: tuple[type[str | int], ...] = (str,),
    ) -> None:
        """Initialize with functions that fetch rows, load items, and return a sort key, by default the first column."""
        self._fetch = fetch
        self._load = load
        self._position = position
        self._shape = shape

    async def page(self, after: str | None, limit: int) -> Page[T]:
        """Return up to `limit` rows after the cursor `after`."""
        checks.integer("limit", limit, 1, MAX_ROWS)
        rows = await self._fetch(None if after is None else decode(after, self._shape), limit + 1)
        following = encode(self._position(rows[limit - 1])) if len(rows) > limit else None
        return Page(list(self._load(rows[:limit])), following)

    def stream(self, batch_size: int) -> AsyncGenerator[T, None]:
        """Yield all rows, with at most `batch_size` in memory and nothing open on the server between batches."""
        checks.integer("batch_size", batch_size, 1, MAX_ROWS)
        return self._rows(batch_size)

    async def _rows(self, batch_size: int) -> AsyncGenerator[T, None]:
        position = None
        while True:
            rows = await self._fetch(position, batch_size)
            for item in self._load(rows):
                yield item
            if len(rows) < batch_size:
                return
            position = self._position(rows[-1])


class AsyncRepository(Generic[M]):
    """One kind of aggregate in the database, for the lifetime of its unit of work."""

    def __init__(self, connection: AsyncUnitOfWorkConnection, aggregate: Aggregate[M]) -> None:
        self._connection = connection
        self._aggregate = aggregate

    async def _fetch_all(self, statement: Statement, **parameters: object) -> list[M]:
        return list(self._aggregate.load.many(await self._connection.fetch_all(statement, parameters)))

    async def _fetch_one(self, statement: Statement, **parameters: object) -> M | None:
        row = await self._connection.fetch_one(statement, parameters)
        return None if row is None else self._aggregate.load.one(row)

    async def _fetch_value(self, statement: Statement, **parameters: object) -> Any:
        row = await self._connection.fetch_one(statement, parameters)
        assert row is not None, "the statement always returns one row"
        return row[0]

    def _get(self, key: object, found: M | None) -> M:
        if found is None:
            raise NotFoundError(self._aggregate.name, key)
        return found


class AsyncKeyedRepository(AsyncRepository[M]):
    """A kind of aggregate with a string as its primary key."""

    async def find(self, key: str) -> M | None:
        """Return the aggregate with this key, or None."""
        return await self._fetch_one(self._aggregate.select, key=self._aggregate.check_key(key))

    async def get(self, key: str) -> M:
        """Return the aggregate with this key.

        Raises:
            NotFoundError: There is none.
        """
        return self._get(key, await self.find(key))

    async def delete(self, key: str) -> None:
        """Delete the aggregate with this key.

        Raises:
            NotFoundError: There is none.
        """
        if not await self._connection.execute(self._aggregate.delete, {"key": self._aggregate.check_key(key)}):
            raise NotFoundError(self._aggregate.name, key)

    async def page(self, *, after: str | None = None, limit: int = 100) -> Page[M]:
        """Return up to `limit` (at most 10,000) aggregates in key order, starting after the cursor `after`."""
        return await self._by_key().page(after, limit)

    def stream(self, *, batch_size: int = 1000) -> AsyncGenerator[M, None]:
        """Yield all aggregates in key order, with at most `batch_size` in memory."""
        return self._by_key().stream(batch_size)

    async def count(self) -> int:
        """Return the exact number of aggregates, which takes a full scan."""
        return int(await self._fetch_value(self._aggregate.count))

    def _by_key(self) -> AsyncListing[M]:
        async def fetch(after: Position | None, limit: int) -> list[Row]:
            parameters = {"after": "" if after is None else after[0], "limit": limit}
            return await self._connection.fetch_all(self._aggregate.page, parameters)

        return AsyncListing(fetch, self._aggregate.load.many)
