"""The repository of the routing table: the current best route to each destination."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy import Delete, Text, cast, delete, exists, select, text
from sqlalchemy.dialects.postgresql import Insert

from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.repositories.runtime.entries import AsyncEntryRepository
from mesh_storage.models import JSON, RoutingEntry
from mesh_storage.postgres.batch import Batch
from mesh_storage.postgres.statement import Statement
from mesh_storage.repositories.aggregates import Entries, values_by_key

_ROUTING_TABLE = Entries(RoutingEntry)
_TABLE = _ROUTING_TABLE.table

# A single statement, which sees a consistent state of the table.
_ALL = Statement(lambda: select(_TABLE.c.destination, _TABLE.c.route).order_by(_TABLE.c.destination))
# Concurrent replacements would interleave; the lock serializes them without blocking readers.
_LOCK = Statement(lambda: text("LOCK TABLE mesh_routing_table IN SHARE ROW EXCLUSIVE MODE"))


def _put_changed() -> Insert:
    new = _ROUTING_TABLE.insert_many()
    # As text, since 1 and 1.0 are equal in jsonb.
    differs = cast(_TABLE.c.route, Text).is_distinct_from(cast(new.excluded.route, Text))
    return _ROUTING_TABLE.replacing(new, where=differs)


def _delete_others() -> Delete:
    keys = _KEYS.table()
    # Not NOT IN: its hash table must fit in memory, else PostgreSQL scans all keys for each row.
    return delete(_TABLE).where(~exists().where(keys.c.key == _TABLE.c.destination))


_KEYS = Batch({"key": Text()})
_DELETE_OTHERS = Statement(_delete_others)
_PUT_CHANGED = Statement(_put_changed)


class AsyncRoutingTableRepository(AsyncEntryRepository[RoutingEntry]):
    """The repository of the routing table."""

    def __init__(self, connection: AsyncUnitOfWorkConnection) -> None:
        super().__init__(connection, _ROUTING_TABLE)

    async def put(self, destination: str, route: JSON) -> RoutingEntry:
        """Store the route to a destination (1 to 255 characters), replacing any existing one."""
        return await self._put(destination, route)

    async def put_many(self, routes: Mapping[str, JSON]) -> list[RoutingEntry]:
        """Store the routes to many destinations in one statement."""
        return await self._put_many(routes)

    async def all(self) -> dict[str, JSON]:
        """Return the whole table as a dict of routes by destination, in destination order."""
        return values_by_key(await self._connection.fetch_all(_ALL))

    async def replace_all(self, routes: Mapping[str, JSON]) -> None:
        """Replace the contents of the table; readers see the old table or the new one, never a mixture.

        Unchanged routes are not rewritten. Other writers of the table wait until this unit of work ends.
        """
        arrays, _ = self._arrays(routes)
        self._connection.check_sees_present()
        await self._connection.execute(_LOCK)
        await self._connection.execute(_DELETE_OTHERS, {"key": arrays["key"]})
        if routes:
            await self._connection.execute(_PUT_CHANGED, arrays)
