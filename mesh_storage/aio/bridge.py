"""How sync code runs over an asyncio connection: SQLAlchemy's greenlet bridge, crossed once a call.

The repositories and the connection of a unit of work stay sync. Where they would wait for the database, the bridge lets
the event loop go on; that place is the executor, and SQLAlchemy's own begin and commit.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from itertools import islice
from typing import Any, Generic, ParamSpec, TypeVar

import psycopg
import sqlalchemy
from sqlalchemy.ext.asyncio import AsyncConnection

from mesh_storage.connection import Executor, Parameters, Row

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R")


class Bridge:
    """The way across for one connection."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a sync function that may use the connection."""
        return await self._connection.run_sync(lambda _: function(*args, **kwargs))

    async def stream(self, generator: Generator[T], batch_size: int) -> AsyncGenerator[T]:
        """Give what a sync generator gives, crossing once for each batch of its own."""
        while True:
            batch = await self.call(_take, generator, batch_size)
            for item in batch:
                yield item
            if len(batch) < batch_size:
                return


class AsyncRepository(Generic[R]):
    """The asyncio twin of a repository."""

    def __init__(self, repository: R, bridge: Bridge) -> None:
        self._repository = repository
        self._bridge = bridge


def executor(connection: sqlalchemy.Connection) -> Executor:
    """Make the executor of psycopg's asyncio connection, with one cursor for all statements."""
    adapted: Any = connection.connection.dbapi_connection
    cursor: psycopg.AsyncCursor[Row] = adapted.driver_connection.cursor(binary=True)

    async def run(sql: bytes, parameters: Parameters | None) -> tuple[list[Row], int]:
        await cursor.execute(sql, parameters)
        return (await cursor.fetchall() if cursor.description else []), cursor.rowcount

    def execute(sql: bytes, parameters: Parameters | None = None, /) -> tuple[list[Row], int]:
        def begin(_driver: object) -> Coroutine[Any, Any, tuple[list[Row], int]]:
            return run(sql, parameters)

        result: tuple[list[Row], int] = adapted.run_async(begin)
        return result

    return execute


def _take(generator: Generator[T], size: int) -> list[T]:
    return list(islice(generator, size))
