"""The base class of the four runtime key-value repositories: state, node states, routing table, runtime config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.repositories.base import AsyncKeyedRepository
from mesh_storage.errors import InvalidInputError
from mesh_storage.repositories.aggregates import Entries
from mesh_storage.repositories.loading import M


class AsyncEntryRepository(AsyncKeyedRepository[M]):
    """A kind of entry stored by key."""

    def __init__(self, connection: AsyncUnitOfWorkConnection, entries: Entries[M]) -> None:
        super().__init__(connection, entries)
        self._entries = entries

    async def _put(self, key: str, value: object) -> M:
        [sent], [stored] = self._entries.check_values([value])
        parameters = {"key": self._entries.check_key(key), "value": sent}
        row = await self._connection.fetch_one(self._entries.put, parameters)
        assert row is not None, "an upsert returns its row"
        return self._entries.load.of_values((key, stored, *row))

    async def _put_many(self, entries: Mapping[str, object]) -> list[M]:
        arrays, stored = self._arrays(entries)
        if not entries:
            return []
        values = dict(zip(arrays["key"], stored, strict=True))
        rows = await self._connection.fetch_all(self._entries.put_many, arrays)
        load = self._entries.load.of_values
        made = {key: load((key, values[key], created_at, updated_at)) for key, created_at, updated_at in rows}
        return [made[key] for key in entries]

    def _arrays(self, entries: Mapping[str, object]) -> tuple[dict[str, list[Any]], list[Any]]:
        """Validate entries and sort them by key, so that concurrent upserts of the same keys cannot deadlock.

        Returns the statement parameters and the stored values.
        """
        if not isinstance(entries, Mapping):
            raise InvalidInputError(f"entries must be a mapping, not {type(entries).__name__}", field="entries")
        keys = self._entries.check_key.column(list(entries))
        keys.sort()
        sent, stored = self._entries.check_values([entries[key] for key in keys])
        return {"key": keys, "value": sent}, stored
