"""Runtime config: operational settings as JSON under a key."""

from __future__ import annotations

from typing import Any

from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.repositories.runtime.prefix import AsyncPrefixRepository
from mesh_storage.errors import NotFoundError
from mesh_storage.models import JSON, ConfigEntry
from mesh_storage.repositories.aggregates import PrefixEntries

_RUNTIME_CONFIG = PrefixEntries(ConfigEntry)


class AsyncRuntimeConfigRepository(AsyncPrefixRepository[ConfigEntry]):
    """The settings that may change while the mesh runs."""

    def __init__(self, connection: AsyncUnitOfWorkConnection) -> None:
        super().__init__(connection, _RUNTIME_CONFIG)

    async def put(self, key: str, value: JSON) -> ConfigEntry:
        """Store a JSON value under a key of 1 to 255 characters, in place of the one that is there."""
        return await self._put(key, value)

    async def value(self, key: str, default: Any = ...) -> JSON:
        """Return the value alone, or `default` where there is none.

        Raises:
            NotFoundError: There is none, and no default was given.
        """
        found = await self.find(key)
        if found is not None:
            return found.value
        if default is ...:
            raise NotFoundError(ConfigEntry.__name__, key)
        return default

    async def all(self, prefix: str = "") -> dict[str, JSON]:
        """Return all values whose key begins with `prefix`, by key and in the order of the keys."""
        return await self._all(prefix)
