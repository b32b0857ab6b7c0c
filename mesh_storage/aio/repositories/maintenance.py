"""The removal of what has expired and what is no longer kept, which `MeshStorage.maintain` repeats step by step."""

from __future__ import annotations

from datetime import timedelta

from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.postgres.floors import FIRST, Place
from mesh_storage.postgres.statement import Statement
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
            messages = await self.remove_messages(removal.MESSAGES, removal.STEP, older_than=messages_older_than)
        return Maintained(sum(expired), 0 if row is None else row[0], messages)

    async def remove_messages(self, statements: dict[bool, Statement], limit: int, **parameters: object) -> int:
        """Remove up to `limit` messages by a statement of `queueing.purge`, and return how many these were.

        It goes on where the step before has ended, and from the beginning again once no more are found there.
        """
        asked = await self._connection.fetch_one(queueing.IS_DISTRIBUTED)
        statement = statements[asked is not None and asked[0]]
        removed, number = self._connection.driver.removed, 0
        while True:
            behind, left = removed.last, limit - number
            row = await self._connection.fetch_one(statement, {**parameters, **behind._asdict(), "limit": left})
            assert row is not None, "the statement always returns one row"
            deleted, found, *last = row
            number += int(deleted)
            if found == left:
                removed.note(Place(*last), behind)
                return number
            removed.forget()
            if behind == FIRST:
                return number
