"""Shared state: bytes under a key, the same for all nodes."""

from __future__ import annotations

from mesh_storage.models import StateEntry
from mesh_storage.postgres.connection import Connection
from mesh_storage.repositories.runtime.prefix import PrefixEntries, PrefixRepository

_STATE = PrefixEntries(StateEntry)


class StateRepository(PrefixRepository[StateEntry]):
    """The shared state."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection, _STATE)

    def put(self, key: str, value: bytes) -> StateEntry:
        """Store a value under a key of 1 to 255 characters, in place of the one that is there."""
        return self._put(key, value)
