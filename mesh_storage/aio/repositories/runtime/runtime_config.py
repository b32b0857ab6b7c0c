"""The repository of the runtime configuration: operational settings as JSON by key."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.repositories.runtime.expiring import AsyncExpiringRepository
from mesh_storage.errors import NotFoundError
from mesh_storage.models import JSON, ConfigEntry
from mesh_storage.repositories.expiring import ExpiringEntries

_RUNTIME_CONFIG = ExpiringEntries(ConfigEntry)


class AsyncRuntimeConfigRepository(AsyncExpiringRepository[ConfigEntry]):
    """The repository of the runtime configuration."""

    def __init__(self, connection: AsyncUnitOfWorkConnection) -> None:
        super().__init__(connection, _RUNTIME_CONFIG)

    async def put(
        self, key: str, value: JSON, *, if_version: int | None = None, ttl: timedelta | None = None
    ) -> ConfigEntry:
        """Store a JSON value by key (1 to 255 characters), replacing any existing one.

        The arguments and errors are those of `state.put`.
        """
        return await self._put_if(key, value, if_version, ttl)

    async def put_many(self, entries: Mapping[str, JSON], *, ttl: timedelta | None = None) -> list[ConfigEntry]:
        """Store many values in one statement, all of which expire after `ttl` from now, or never if None."""
        return await self._put_many_until(entries, ttl)

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
