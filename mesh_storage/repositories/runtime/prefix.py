"""Listing by the prefix of a key, character by character: `%` and `_` are ordinary, and an index is used."""

from __future__ import annotations

from collections.abc import Generator
from functools import cached_property
from typing import Any

from sqlalchemy import ColumnElement, bindparam, collate, func, select

from mesh_storage.postgres.connection import Connection
from mesh_storage.postgres.driver import Row
from mesh_storage.postgres.statement import Statement
from mesh_storage.repositories import checks
from mesh_storage.repositories.base import LIMIT, Listing, Page, Position, Rows
from mesh_storage.repositories.loading import M
from mesh_storage.repositories.runtime.entries import Entries, EntryRepository, values_by_key

_LAST_CHARACTER = "\U0010ffff"
_SURROGATES = range(0xD800, 0xE000)


class PrefixEntries(Entries[M]):
    """Entries whose keys have an order by code point (collation "C") beside that of the database."""

    def __init__(self, model: type[M]) -> None:
        super().__init__(model)
        self.page = Statement(lambda: self._in_range(select(self.table)).order_by(self._ordered_key).limit(LIMIT))
        self.all = Statement(lambda: self._in_range(select(self.key, self.value)).order_by(self._ordered_key))
        self.count = Statement(lambda: self._in_range(select(func.count()).select_from(self.table)))

    @cached_property
    def _ordered_key(self) -> ColumnElement[str]:
        return collate(self.key, "C")

    def _in_range(self, rows: Rows) -> Rows:
        return rows.where(self._ordered_key >= bindparam("start"), self._ordered_key < bindparam("stop"))


class PrefixRepository(EntryRepository[M]):
    """A kind of entry that is listed by the prefix of its key, in the order of code points."""

    def __init__(self, connection: Connection, entries: PrefixEntries[M]) -> None:
        super().__init__(connection, entries)
        self._prefixed = entries

    def page(self, prefix: str = "", *, after: str | None = None, limit: int = 100) -> Page[M]:
        """Return up to `limit` (10,000 at most) entries whose key begins with `prefix`, from behind `after`."""
        return self._by_prefix(prefix).page(after, limit)

    def stream(self, prefix: str = "", *, batch_size: int = 1000) -> Generator[M]:
        """Yield all entries whose key begins with `prefix`, in order, with no more than `batch_size` in memory."""
        return self._by_prefix(prefix).stream(batch_size)

    def count(self, prefix: str = "") -> int:
        """Count the entries whose key begins with `prefix`; exact, so it reads them all."""
        return int(self._fetch_value(self._aggregate.count, **_range(prefix)))

    def _all(self, prefix: str) -> dict[str, Any]:
        """Return the keys and values in one statement, which sees one version of the table."""
        return values_by_key(self._connection.fetch_all(self._prefixed.all, _range(prefix)))

    def _by_prefix(self, prefix: str) -> Listing[M]:
        whole = _range(prefix)

        def fetch(after: Position | None, limit: int) -> list[Row]:
            # No text can have NUL, so U+0001 makes the next one in the order.
            start = prefix if after is None else max(prefix, f"{after[0]}\x01")
            return self._connection.fetch_all(self._aggregate.page, {**whole, "start": start, "limit": limit})

        return Listing(fetch, self._aggregate.load.many)


def _range(prefix: str) -> dict[str, str]:
    checks.text("prefix", prefix, empty=True)
    return {"start": prefix, "stop": _behind(prefix)}


def _behind(prefix: str) -> str:
    """Return the first text in the order of code points that is behind all that begin with `prefix`."""
    stem = prefix.rstrip(_LAST_CHARACTER)
    if not stem:
        return _LAST_CHARACTER * 256  # Behind every key of up to 255 characters.
    following = ord(stem[-1]) + 1
    return stem[:-1] + chr(_SURROGATES.stop if following in _SURROGATES else following)
