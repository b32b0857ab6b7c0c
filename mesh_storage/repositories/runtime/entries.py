"""What the four runtime tables of a key and a value share: state, node states, routing table, runtime config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Column, ColumnElement, Text, bindparam, cast, func, select
from sqlalchemy.dialects.postgresql import JSONB, Insert, insert

from mesh_storage.errors import InvalidInputError
from mesh_storage.models import JSON
from mesh_storage.postgres import jsonb
from mesh_storage.postgres.batch import Batch
from mesh_storage.postgres.connection import Connection
from mesh_storage.postgres.driver import Row
from mesh_storage.postgres.statement import Statement
from mesh_storage.repositories import checks
from mesh_storage.repositories.base import Aggregate, KeyedRepository
from mesh_storage.repositories.loading import M


class Entries(Aggregate[M]):
    """A key, a value (bytes or JSON) and the times of the database's clock, by which an entry is put."""

    def __init__(self, model: type[M]) -> None:
        super().__init__(model)
        columns: tuple[Column[Any], ...] = tuple(self.table.columns)
        self.key, self.value, self.created_at, self.updated_at = columns
        self.is_json = isinstance(self.value.type, JSONB)
        self._field = f"{self.name}.{self.names[1]}"
        self._check_bytes = None if self.is_json else checks.of_column(self._field, self.value)
        self.batch = Batch({"key": Text(), "value": Text() if self.is_json else self.value.type})
        self.put = Statement(lambda: self.replacing(self._insert()).returning(self.created_at, self.updated_at))
        self.put_many = Statement(
            lambda: self.replacing(self.insert_many()).returning(self.key, self.created_at, self.updated_at)
        )

    def _insert(self) -> Insert:
        return insert(self.table).values(
            {self.key: bindparam("key", type_=Text), self.value: bindparam("value", type_=self.value.type)}
        )

    def insert_many(self) -> Insert:
        """Insert the arrays `key` and `value`, a row for each position."""
        rows = self.batch.table()
        value = cast(rows.c.value, self.value.type) if self.is_json else rows.c.value
        return insert(self.table).from_select([self.key, self.value], select(rows.c.key, value))

    def replacing(self, statement: Insert, where: ColumnElement[bool] | None = None) -> Insert:
        """Let an insert replace the value of a key that is there (PostgreSQL manual, INSERT, ON CONFLICT)."""
        return statement.on_conflict_do_update(
            index_elements=[self.key],
            set_={self.value: statement.excluded[self.value.name], self.updated_at: func.now()},
            where=where,
        )

    def check_values(self, values: list[Any]) -> tuple[list[Any], list[Any]]:
        """Check values; give what is sent for them, and what is stored, which shares nothing with the caller's."""
        if self._check_bytes is None:
            return jsonb.write(values, self._field)
        checked = self._check_bytes.column(values)
        return checked, checked


class EntryRepository(KeyedRepository[M]):
    """A kind of entry that is put under a key."""

    def __init__(self, connection: Connection, entries: Entries[M]) -> None:
        super().__init__(connection, entries)
        self._entries = entries

    def _put(self, key: str, value: object) -> M:
        [sent], [stored] = self._entries.check_values([value])
        parameters = {"key": self._entries.check_key(key), "value": sent}
        row = self._connection.fetch_one(self._entries.put, parameters)
        assert row is not None, "an upsert gives its row"
        return self._entries.load.of_values((key, stored, *row))

    def _put_many(self, entries: Mapping[str, object]) -> list[M]:
        arrays, stored = self._arrays(entries)
        if not entries:
            return []
        values = dict(zip(arrays["key"], stored, strict=True))
        rows = self._connection.fetch_all(self._entries.put_many, self._entries.batch.parameters(arrays))
        load = self._entries.load.of_values
        made = {key: load((key, values[key], created_at, updated_at)) for key, created_at, updated_at in rows}
        return [made[key] for key in entries]

    def _arrays(self, entries: Mapping[str, object]) -> tuple[dict[str, list[Any]], list[Any]]:
        """Check the entries and sort them by key, so that two that put the same keys cannot deadlock.

        Gives what is sent, and the values that are stored by it.
        """
        if not isinstance(entries, Mapping):
            raise InvalidInputError(f"entries must be a mapping, not {type(entries).__name__}", field="entries")
        keys = self._entries.check_key.column(list(entries))
        keys.sort()
        sent, stored = self._entries.check_values([entries[key] for key in keys])
        return {"key": keys, "value": sent}, stored


def values_by_key(rows: Sequence[Row]) -> dict[str, JSON]:
    """Read rows of a key and a JSON value."""
    return dict(zip([row[0] for row in rows], jsonb.read_all(row[1] for row in rows), strict=True))
