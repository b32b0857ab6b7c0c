"""The changes of all watched aggregates since a cursor."""

from __future__ import annotations

from collections.abc import Iterable

from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.repositories.changelog import MOMENT, Batch, decode, parameters, position, select
from mesh_storage.repositories.prefixes import key_range


class AsyncChangeRepository:
    """What changed in `meshes`, `nodes`, `routes`, `state`, `runtime_config` and `routing_table`, whoever wrote."""

    def __init__(self, connection: AsyncUnitOfWorkConnection) -> None:
        self._connection = connection

    async def since(self, cursor: str | None, aggregates: Iterable[str], prefix: str = "") -> Batch:
        """Return the last change of every key that changed since a cursor, or all that is there if it is None.

        One statement reads all of it into memory, as of one moment: of the statement, or of the transaction's snapshot
        at "repeatable read" and "serializable". `storage.watch` reads a large batch in parts.

        Args:
            cursor: The cursor of a batch, or None.
            aggregates: Names of repositories, such as `["state", "runtime_config"]`.
            prefix: Only keys that start with it.

        Raises:
            CompactedError: The changes since the cursor are no longer kept, or it is from before a restore, a TRUNCATE
                or a failover; begin anew with None.
            ConfigurationError: The server is a standby.
            InvalidInputError: An argument is invalid, or this unit of work has itself changed what can be watched.
        """
        selection, since = select(aggregates), decode("cursor", cursor)
        rows = await self._connection.fetch_all(selection.whole(since), parameters(since, key_range(prefix), None))
        now, _, changed = selection.read(rows, since)
        return Batch(selection.changes(changed), str(now))

    async def cursor(self) -> str:
        """Return the cursor of this moment: what is committed later comes after it.

        In a unit of work at "repeatable read" or "serializable" it is the cursor of its snapshot, so that a listing
        and the changes after it make a whole.

        Raises:
            ConfigurationError: The server is a standby.
        """
        row = await self._connection.fetch_one(MOMENT)
        assert row is not None, "the statement always returns one row"
        return str(position(row))
