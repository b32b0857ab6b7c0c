"""The repository of routes: the configured network paths between nodes."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, CompoundSelect, bindparam, select, union_all

from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.repositories.infrastructure.base import AsyncInfrastructureRepository
from mesh_storage.models import Route
from mesh_storage.postgres.statement import Statement
from mesh_storage.repositories import checks
from mesh_storage.repositories.aggregates import Infrastructure

_ROUTES = Infrastructure(Route, prefix="route")
_TABLE = _ROUTES.table
_SOURCE, _TARGET = _TABLE.c.source_node_id, _TABLE.c.target_node_id


def _both(there: ColumnElement[bool], back: ColumnElement[bool]) -> CompoundSelect[Any]:
    """Combine two conditions by UNION ALL, so that each uses its own index, which a single OR would not."""
    halves = select(_TABLE).where(there), select(_TABLE).where(back, _TABLE.c.route_bidirectional)
    return union_all(*halves).order_by(_TABLE.c.route_id.name)


_FOR_NODE = Statement(lambda: _both(_SOURCE == bindparam("node_id"), _TARGET == bindparam("node_id")))
_BETWEEN = Statement(
    lambda: _both(
        (_SOURCE == bindparam("a")) & (_TARGET == bindparam("b")),
        (_SOURCE == bindparam("b")) & (_TARGET == bindparam("a")),
    )
)


class AsyncRouteRepository(AsyncInfrastructureRepository[Route]):
    """The repository of routes."""

    def __init__(self, connection: AsyncUnitOfWorkConnection) -> None:
        super().__init__(connection, _ROUTES)

    async def between(self, a: str, b: str) -> list[Route]:
        """Return the routes from node `a` to node `b`, including bidirectional ones from `b` to `a`, in id order."""
        return await self._fetch_all(_BETWEEN, a=checks.text("a", a, 255), b=checks.text("b", b, 255))

    async def for_node(self, node_id: str) -> list[Route]:
        """Return the routes that start at a node, and the bidirectional ones that end there, in id order."""
        return await self._fetch_all(_FOR_NODE, node_id=checks.text("node_id", node_id, 255))
