"""The repository of the runtime configuration: operational settings as JSON by key."""

from __future__ import annotations

from typing import Any

from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.repositories.runtime.prefix import AsyncPrefixRepository
from mesh_storage.errors import NotFoundError
from mesh_storage.models import JSON, ConfigEntry
from mesh_storage.repositories.aggregates import PrefixEntries

_RUNTIME_CONFIG = PrefixEntries(ConfigEntry)


class AsyncRuntimeConfigRepository(AsyncPrefixRepository[ConfigEntry]):
    """The repository of the runtime configuration."""

    def __init__(self, connection: AsyncUnitOfWorkConnection) -> None:
        super().__init__(connection, _RUNTIME_CONFIG)

    async def put(self, key: str, value: JSON) -> ConfigEntry:
        """Store a JSON value by key (1 to 255 characters), replacing any existing one."""
        return await self._put(key, value)

    async def value(self, key: str, default: Any = ...) -> JSON:
        """Return the value of this key, or `default` if there is none.

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
        """Return the values of all keys that start with `prefix`, by key, in key order."""
        return await self._all(prefix)
