"""The repository of the shared state: bytes by key, the same for all nodes."""

from __future__ import annotations

from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.repositories.runtime.prefix import AsyncPrefixRepository
from mesh_storage.models import StateEntry
from mesh_storage.repositories.aggregates import PrefixEntries

_STATE = PrefixEntries(StateEntry)


class AsyncStateRepository(AsyncPrefixRepository[StateEntry]):
    """The repository of the shared state."""

    def __init__(self, connection: AsyncUnitOfWorkConnection) -> None:
        super().__init__(connection, _STATE)

    async def put(self, key: str, value: bytes) -> StateEntry:
        """Store a value by key (1 to 255 characters), replacing any existing one."""
        return await self._put(key, value)
