"""Timestamps outside the range of Python's datetime, which are loaded as its minimum or maximum."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any, NamedTuple

import psycopg
from psycopg.abc import AdaptContext, Buffer
from psycopg.adapt import AdaptersMap, Loader, Transformer
from psycopg.pq import Format
from psycopg.rows import tuple_row

FIRST = datetime.min.replace(tzinfo=UTC)
"""Loaded for `-infinity` and times before the year 1."""
LAST = datetime.max.replace(tzinfo=UTC)
"""Loaded for `infinity` and times after the year 9999."""

_TYPE = "timestamptz"
_OUT_OF_RANGE = re.compile(rb"(-infinity|.* BC)|infinity|\d{5,}-.*")
_SIGN = 0x80


class _Loader(Loader):
    def __init__(self, oid: int, context: AdaptContext | None = None) -> None:
        super().__init__(oid, context)
        exact = psycopg.adapters.get_loader(oid, self.format)
        assert exact is not None, "psycopg has a loader for timestamptz"
        self._exact = exact(oid, context)

    def load(self, data: Buffer) -> datetime:
        try:
            exact: datetime = self._exact.load(data)
        except psycopg.DataError:
            nearest = self.nearest(bytes(data))
            if nearest is None:
                raise
            return nearest
        return exact

    def nearest(self, data: bytes) -> datetime | None:
        raise NotImplementedError


class _TextLoader(_Loader):
    format = Format.TEXT

    def nearest(self, data: bytes) -> datetime | None:
        found = _OUT_OF_RANGE.fullmatch(data)
        return found and (FIRST if found[1] else LAST)


class _BinaryLoader(_Loader):
    format = Format.BINARY

    def nearest(self, data: bytes) -> datetime | None:
        return FIRST if data[0] & _SIGN else LAST


class _Context(NamedTuple):
    adapters: AdaptersMap
    connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]


def register(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    """Register a loader of such times for the text format, which sessions use.

    The repositories use the binary format, and there psycopg's own loader is kept, since one in Python takes half as
    much again as the rest of a row. They call `read_again` instead.
    """
    connection.adapters.register_loader(_TYPE, _TextLoader)


def nearest(time: str) -> str:
    """Return SQL for a time that is at least `FIRST` and at most `LAST`."""
    first, last = (f"CAST('{limit.isoformat()}' AS timestamptz)" for limit in (FIRST, LAST))
    return f"CASE WHEN {time} < {first} THEN {first} WHEN {time} > {last} THEN {last} ELSE {time} END"


def read_again(cursor: psycopg.Cursor[Any] | psycopg.AsyncCursor[Any]) -> list[tuple[Any, ...]]:
    """Return all rows of a result in which psycopg's own loader failed on such a time."""
    adapters = AdaptersMap(cursor.adapters)
    adapters.register_loader(_TYPE, _BinaryLoader)
    result = cursor.pgresult
    assert result is not None, "there was a row that could not be read"
    transformer = Transformer(_Context(adapters, cursor.connection))
    transformer.set_pgresult(result)
    return transformer.load_rows(0, result.ntuples, tuple_row(cursor))
