"""The base class of the four runtime key-value repositories: state, node states, routing table, runtime config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.repositories.base import AsyncKeyedRepository
from mesh_storage.errors import InvalidInputError
from mesh_storage.postgres.statement import Statement
from mesh_storage.repositories.aggregates import Entries
from mesh_storage.repositories.loading import M


class AsyncEntryRepository(AsyncKeyedRepository[M]):
    """A kind of entry stored by key."""

    def __init__(self, connection: AsyncUnitOfWorkConnection, entries: Entries[M]) -> None:
        super().__init__(connection, entries)
        self._entries = entries

    async def _put(self, key: str, value: object) -> M:
        made = await self._put_by(self._entries.put, key, value)
        assert made is not None, "an upsert returns its row"
        return made

    async def _put_by(self, statement: Statement, key: str, value: object, **parameters: object) -> M | None:
        """Store a value by a statement that returns what the database gives, or nothing if a condition fails."""
        [sent], [stored] = self._entries.check_values([value])
        sending = {"key": self._entries.check_key(key), "value": sent, **parameters}
        row = await self._connection.fetch_one(statement, sending)
        return None if row is None else self._entries.load.of_values((key, stored, *row))

    async def _put_many(self, entries: Mapping[str, object]) -> list[M]:
        return await self._put_many_by(self._entries.put_many, entries)

    async def _put_many_by(self, statement: Statement, entries: Mapping[str, object], **parameters: object) -> list[M]:
        arrays, stored = self._arrays(entries)
        if not entries:
            return []
        values = dict(zip(arrays["key"], stored, strict=True))
        rows = await self._connection.fetch_all(statement, {**arrays, **parameters})
        load = self._entries.load.of_values
        made = {key: load((key, values[key], *given)) for key, *given in rows}
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
