"""Runtime config: operational settings as JSON under a key."""

from __future__ import annotations

from typing import Any

from mesh_storage.errors import NotFoundError
from mesh_storage.models import JSON, ConfigEntry
from mesh_storage.postgres.connection import Connection
from mesh_storage.repositories.runtime.prefix import PrefixEntries, PrefixRepository

_RUNTIME_CONFIG = PrefixEntries(ConfigEntry)


class RuntimeConfigRepository(PrefixRepository[ConfigEntry]):
    """The settings that may change while the mesh runs."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection, _RUNTIME_CONFIG)

    def put(self, key: str, value: JSON) -> ConfigEntry:
        """Store a JSON value under a key of 1 to 255 characters, in place of the one that is there."""
        return self._put(key, value)

    def value(self, key: str, default: Any = ...) -> JSON:
        """Return the value alone, or `default` where there is none.

        Raises:
            NotFoundError: There is none, and no default was given.
        """
        found = self.find(key)
        if found is not None:
            return found.value
        if default is ...:
            raise NotFoundError(ConfigEntry.__name__, key)
        return default

    def all(self, prefix: str = "") -> dict[str, JSON]:
        """Return all values whose key begins with `prefix`, by key and in the order of the keys."""
        return self._all(prefix)
