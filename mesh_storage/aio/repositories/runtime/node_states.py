"""The repository of node states: the state last reported by each node, as JSON; optimized for heartbeats."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from sqlalchemy import Interval, bindparam, func, literal_column, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.dml import ReturningInsert

from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.repositories.runtime.entries import AsyncEntryRepository
from mesh_storage.errors import ConflictError, InvalidInputError
from mesh_storage.models import JSON, NodeState
from mesh_storage.postgres import jsonb
from mesh_storage.postgres.statement import Statement
from mesh_storage.repositories import checks
from mesh_storage.repositories.aggregates import LIMIT, Entries
from mesh_storage.repositories.pages import MAX_ROWS

_NODE_STATES = Entries(NodeState)
_TABLE = _NODE_STATES.table


def _merge() -> ReturningInsert[Any]:
    patch = insert(_TABLE).values(node_id=bindparam("key"), state=bindparam("patch"))
    return patch.on_conflict_do_update(
        index_elements=[_TABLE.c.node_id],
        set_={"state": _TABLE.c.state.op("||")(patch.excluded.state), "updated_at": patch.excluded.updated_at},
        where=func.jsonb_typeof(_TABLE.c.state) == literal_column("'object'"),
    ).returning(_TABLE)


_MERGE = Statement(_merge)
_LONGEST_AGE = timedelta(days=365_000)

# Deliberately without an index: with one on a time that each heartbeat changes, no update would be HOT.
_STALE = Statement(
    lambda: (
        select(_TABLE)
        .where(_TABLE.c.updated_at < func.now() - bindparam("older_than", type_=Interval))
        .order_by(_TABLE.c.updated_at, _TABLE.c.node_id)
        .limit(LIMIT)
    )
)


class AsyncNodeStateRepository(AsyncEntryRepository[NodeState]):
    """The repository of node states."""

    def __init__(self, connection: AsyncUnitOfWorkConnection) -> None:
        super().__init__(connection, _NODE_STATES)

    async def put(self, node_id: str, state: JSON) -> NodeState:
        """Store the state of a node (id of 1 to 64 characters), replacing any existing one."""
        return await self._put(node_id, state)

    async def put_many(self, states: Mapping[str, JSON]) -> list[NodeState]:
        """Store the states of many nodes in one statement."""
        return await self._put_many(states)

    async def merge(self, node_id: str, patch: Mapping[str, JSON]) -> NodeState:
        """Replace the top-level keys of a node's state that are in `patch`, or create the state.

        Raises:
            ConflictError: The stored state is not a JSON object.
        """
        if not isinstance(patch, Mapping):
            raise InvalidInputError("patch must be a mapping", field="patch")
        key = self._aggregate.check_key(node_id)
        merged = await self._fetch_one(_MERGE, key=key, patch=jsonb.dumps(dict(patch), "patch"))
        if merged is None:
            raise ConflictError(
                "the stored state is not a JSON object, so nothing can be merged into it; replace it with put()"
            )
        return merged

    async def stale(self, older_than: timedelta, limit: int = 1000) -> list[NodeState]:
        """Return the states not stored for longer than `older_than` by the database's clock, oldest first.

        Reads the whole table, which is small compared to the messages; see the note on heartbeats in docs/schema.md.
        """
        if not isinstance(older_than, timedelta) or abs(older_than) > _LONGEST_AGE:
            raise InvalidInputError("older_than must be a timedelta of up to 1,000 years", field="older_than")
        checks.integer("limit", limit, 1, MAX_ROWS)
        return await self._fetch_all(_STALE, older_than=older_than, limit=limit)
