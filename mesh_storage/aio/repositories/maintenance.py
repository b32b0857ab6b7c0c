"""The removal of what has expired and what is no longer kept, which `MeshStorage.maintain` repeats step by step."""

from __future__ import annotations

from datetime import timedelta

from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.repositories import queueing, removal
from mesh_storage.repositories.removal import Maintained


class AsyncMaintenance:
    """Removes rows, up to `removal.STEP` of each kind in a unit of work."""

    def __init__(self, connection: AsyncUnitOfWorkConnection) -> None:
        self._connection = connection

    async def step(self, changes_older_than: timedelta, messages_older_than: timedelta | None) -> Maintained:
        """Remove one step's rows of each kind, the oldest first, and return how many there were."""
        execute = self._connection.execute
        expired = [await execute(each, {"limit": removal.STEP}) for each in removal.EXPIRED]
        row = await self._connection.fetch_one(
            removal.CHANGES, {"limit": removal.STEP, "older_than": changes_older_than}
        )
        messages = 0
        if messages_older_than is not None:
            asked = await self._connection.fetch_one(queueing.IS_DISTRIBUTED)
            statement = removal.MESSAGES[asked is not None and asked[0]]
            messages = await execute(statement, {"limit": removal.STEP, "older_than": messages_older_than})
        return Maintained(sum(expired), 0 if row is None else row[0], messages)
