"""The repository of nodes, which may take part in the mesh."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from sqlalchemy import Column, Text, bindparam, func, select

from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.repositories.base import AsyncListing
from mesh_storage.aio.repositories.infrastructure.base import AsyncInfrastructureRepository
from mesh_storage.models import Node, NodeState
from mesh_storage.postgres.statement import Row, Statement
from mesh_storage.repositories import checks
from mesh_storage.repositories.aggregates import LIMIT, Aggregate, Infrastructure, Rows
from mesh_storage.repositories.pages import Page, Position

_NODES = Infrastructure(Node, prefix="node")
_TABLE = _NODES.table
_STATES = Aggregate(NodeState)
_BY_NAME = Statement(lambda: select(_TABLE).where(_TABLE.c.node_name == bindparam("name")))


def _after_cursor(rows: Rows) -> Rows:
    return rows.where(_TABLE.c.node_id > bindparam("after", type_=Text)).order_by(_TABLE.c.node_id).limit(LIMIT)


def _with_state() -> Rows:
    states = _STATES.table
    both = _TABLE.outerjoin(states, states.c.node_id == _TABLE.c.node_id)
    return _after_cursor(select(_TABLE, states).select_from(both))


_WITH_STATE = Statement(_with_state)


class _Filtered:
    """The statements that list all nodes, or those with a status, in a region, or both."""

    def __init__(self, *columns: Column[Any]) -> None:
        self._columns = columns
        self.page = Statement(lambda: _after_cursor(self._matching(select(_TABLE))))
        self.count = Statement(lambda: self._matching(select(func.count()).select_from(_TABLE)))

    def _matching(self, rows: Rows) -> Rows:
        return rows.where(*(column == bindparam(column.name) for column in self._columns))


_FILTERED = {
    (False, False): _Filtered(),
    (True, False): _Filtered(_TABLE.c.status),
    (False, True): _Filtered(_TABLE.c.region_id),
    (True, True): _Filtered(_TABLE.c.status, _TABLE.c.region_id),
}


class AsyncNodeRepository(AsyncInfrastructureRepository[Node]):
    """The repository of nodes."""

    def __init__(self, connection: AsyncUnitOfWorkConnection) -> None:
        super().__init__(connection, _NODES)

    async def get_by_name(self, name: str) -> Node:
        """Return the node with this name.

        Raises:
            NotFoundError: There is none.
        """
        return self._get(name, await self._fetch_one(_BY_NAME, name=checks.text("name", name, 255)))

    async def page(
        self, *, status: str | None = None, region_id: str | None = None, after: str | None = None, limit: int = 100
    ) -> Page[Node]:
        """Return up to `limit` (at most 10,000) nodes in id order, starting after the cursor `after`."""
        return await self._filtered(status, region_id).page(after, limit)

    def stream(
        self, *, status: str | None = None, region_id: str | None = None, batch_size: int = 1000
    ) -> AsyncGenerator[Node, None]:
        """Yield all nodes in id order, with at most `batch_size` in memory."""
        return self._filtered(status, region_id).stream(batch_size)

    async def count(self, *, status: str | None = None, region_id: str | None = None) -> int:
        """Return the exact number of nodes, which takes a full scan."""
        statements, parameters = _choose(status, region_id)
        return int(await self._fetch_value(statements.count, **parameters))

    def with_state(self, *, batch_size: int = 1000) -> AsyncGenerator[tuple[Node, NodeState | None], None]:
        """Yield each node with its runtime state (None if it has none), in id order."""

        async def fetch(after: Position | None, limit: int) -> list[Row]:
            parameters = {"after": "" if after is None else after[0], "limit": limit}
            return await self._connection.fetch_all(_WITH_STATE, parameters)

        return AsyncListing(fetch, _load_both).stream(batch_size)

    def _filtered(self, status: str | None, region_id: str | None) -> AsyncListing[Node]:
        statements, parameters = _choose(status, region_id)

        async def fetch(after: Position | None, limit: int) -> list[Row]:
            start = "" if after is None else after[0]
            return await self._connection.fetch_all(statements.page, {**parameters, "after": start, "limit": limit})

        return AsyncListing(fetch, _NODES.load.many)


def _choose(status: str | None, region_id: str | None) -> tuple[_Filtered, dict[str, str]]:
    parameters: dict[str, str] = {}
    if status is not None:
        parameters["status"] = checks.text("status", status, 255)
    if region_id is not None:
        parameters["region_id"] = checks.text("region_id", region_id)
    return _FILTERED[status is not None, region_id is not None], parameters


def _load_both(rows: list[Row]) -> list[tuple[Node, NodeState | None]]:
    width = len(_NODES.names)
    nodes = _NODES.load.many([row[:width] for row in rows])
    found = [row[width:] for row in rows if row[width] is not None]
    states = {state.node_id: state for state in _STATES.load.many(found)}
    return [(node, states.get(node.id)) for node in nodes]
