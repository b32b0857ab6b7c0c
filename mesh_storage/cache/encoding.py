"""Aggregates as bytes for Redis: JSON, since who can write to Redis must not be able to run code, as pickle would."""

from __future__ import annotations

import hashlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable
from datetime import datetime
from decimal import Decimal
from typing import Any, Generic

from pydantic_core import to_json
from sqlalchemy import DateTime, LargeBinary, Numeric
from sqlalchemy.dialects.postgresql import JSONB

from mesh_storage.errors import MeshStorageError
from mesh_storage.postgres import jsonb
from mesh_storage.repositories.aggregates import Aggregate
from mesh_storage.repositories.changelog import AGGREGATES
from mesh_storage.repositories.loading import M

LAYOUT = hashlib.md5(repr([kind.names for kind in AGGREGATES.values()]).encode(), usedforsecurity=False).hexdigest()[:8]
"""Stands for the attributes, so that versions of this library with other ones do not read each other's entries."""


def _plain(value: Any) -> str:
    return to_json(value).decode()


# For each type of column that JSON has no type for: how a value is written, and how it is read.
_TYPES: list[tuple[type[Any], Callable[[Any], str], Callable[[Any], Any]]] = [
    (LargeBinary, lambda value: _plain(b64encode(value).decode()), lambda text: b64decode(text, validate=True)),
    (DateTime, lambda value: _plain(value.isoformat()), datetime.fromisoformat),
    (Numeric, lambda value: _plain(str(value)), Decimal),
]


class Encoding(Generic[M]):
    """The encoding of one kind of aggregate, all of whose attributes come back equal and with their types."""

    def __init__(self, aggregate: Aggregate[M]) -> None:
        self._aggregate = aggregate
        self._writers: list[Callable[[Any], str]] = []
        self._readers: list[tuple[int, Callable[[Any], Any]]] = []
        for number, column in enumerate(aggregate.table.columns):
            type_: Any = column.type
            writer: Callable[[Any], str] = jsonb.dumps if isinstance(type_, JSONB) else _plain
            for kind, write, read in _TYPES:
                if isinstance(type_, kind):
                    writer = write
                    self._readers.append((number, read))
            self._writers.append(writer)

    def dumps(self, entities: Iterable[M]) -> str | None:
        """Return aggregates as JSON; None if one has a value that is not sure to come back."""
        try:
            return f"[{','.join(map(self._row, entities))}]"
        except (ValueError, MeshStorageError):  # others may store JSON that this library refuses
            return None

    def loads(self, text: str | bytes) -> list[M]:
        """Return the aggregates of a JSON text.

        Raises:
            ValueError: It is not what `dumps` wrote.
        """
        try:
            rows = jsonb.loads(text)
            for row in rows:
                for number, read in self._readers:
                    if row[number] is not None:
                        row[number] = read(row[number])
            return list(map(self._aggregate.load.of_values, rows))
        except (TypeError, LookupError, ArithmeticError, MeshStorageError) as error:
            raise ValueError("not an entry of this cache") from error

    def _row(self, entity: M) -> str:
        values = vars(entity)
        texts = [
            "null" if (value := values.get(name)) is None and write is not jsonb.dumps else write(value)
            for name, write in zip(self._aggregate.names, self._writers, strict=True)
        ]
        return f"[{','.join(texts)}]"
