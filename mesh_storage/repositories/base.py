"""What the repositories share: listing in pages, and everything that works by the primary key alone."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any, Generic, TypeAlias, TypeVar

from sqlalchemy import (
    Column,
    Integer,
    Select,
    Table,
    bindparam,
    delete,
    func,
    select,
)

from mesh_storage.errors import InvalidInputError, NotFoundError
from mesh_storage.models.base import attribute_names, table_of
from mesh_storage.postgres.connection import Connection
from mesh_storage.postgres.driver import Row
from mesh_storage.postgres.statement import Statement
from mesh_storage.repositories import checks
from mesh_storage.repositories.loading import Loader, M

T = TypeVar("T")

MAX_ROWS = 10_000
"""Rows that one page or batch may have."""

Position: TypeAlias = tuple[str | int, ...]
"""The key of a row, in the order of the listing."""
LIMIT = bindparam("limit", type_=Integer)
Rows: TypeAlias = Select[*tuple[Any, ...]]
"""A select of any columns."""


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a listing, in the order of its key."""

    items: list[T]
    next: str | None
    """The cursor to give as `after` for the next page; None at the end. Its form is no promise."""


class Listing(Generic[T]):
    """A listing by key: each part is one statement that begins behind the last key, so its cost does not grow."""

    def __init__(
        self,
        fetch: Callable[[Position | None, int], list[Row]],
        load: Callable[[list[Row]], Iterable[T]],
        position: Callable[[Row], Position] = itemgetter(slice(1)),
        shape: tuple[type[str | int], ...] = (str,),
    ) -> None:
        """Take what fetches rows, what makes items of rows, and where a row is: by its first column, a text."""
        self._fetch = fetch
        self._load = load
        self._position = position
        self._shape = shape

    def page(self, after: str | None, limit: int) -> Page[T]:
        """Return up to `limit` rows from behind the cursor `after`."""
        checks.integer("limit", limit, 1, MAX_ROWS)
        rows = self._fetch(None if after is None else self._decode(after), limit + 1)
        following = self._encode(rows[limit - 1]) if len(rows) > limit else None
        return Page(list(self._load(rows[:limit])), following)

    def stream(self, batch_size: int) -> Generator[T]:
        """Yield all rows, with no more than `batch_size` in memory and nothing open on the server in between."""
        checks.integer("batch_size", batch_size, 1, MAX_ROWS)
        return self._all(batch_size)

    def _all(self, batch_size: int) -> Generator[T]:
        position = None
        while True:
            rows = self._fetch(position, batch_size)
            yield from self._load(rows)
            if len(rows) < batch_size:
                return
            position = self._position(rows[-1])

    def _encode(self, row: Row) -> str:
        return base64.urlsafe_b64encode(json.dumps(self._position(row)).encode()).decode()

    def _decode(self, cursor: str) -> Position:
        try:
            values: list[Any] = json.loads(base64.b64decode(cursor, altchars=b"-_", validate=True))
            fits = isinstance(values, list) and tuple(map(type, values)) == self._shape
        except (TypeError, ValueError, RecursionError):
            values, fits = [], False
        if not fits:
            raise InvalidInputError("after must be the `next` of a page of this listing", field="after")
        return tuple(
            checks.text("after", value) if isinstance(value, str) else checks.integer("after", value)
            for value in values
        )


class Aggregate(Generic[M]):
    """How one kind of aggregate is found by its key: statements compiled once, and the maker of its objects."""

    def __init__(self, model: type[M]) -> None:
        self.model = model
        self.name = model.__name__
        table: Table[Any] = table_of(model)
        self.table = table
        self.names = attribute_names(model)
        key: Column[Any] = table.primary_key.columns[0]
        self.key_name = self.names[list(table.columns).index(key)]
        self.check_key = checks.of_key(f"{self.name}.{self.key_name}", key)
        self.select = Statement(lambda: select(table).where(key == bindparam("key")))
        self.delete = Statement(lambda: delete(table).where(key == bindparam("key")))
        self.count = Statement(lambda: select(func.count()).select_from(table))
        self.page = Statement(lambda: select(table).where(key > bindparam("after")).order_by(key).limit(LIMIT))

    @cached_property
    def load(self) -> Loader[M]:
        """What makes aggregates of rows; writing its code takes as long as all the rest."""
        return Loader(self.model)

    def attributes(self, field: str, entities: Iterable[M]) -> list[dict[str, Any]]:
        """Return what aggregates hold: new ones have nothing to load, and instrumented access costs five times that.

        Raises:
            InvalidInputError: One is no aggregate of this kind; names the field.
        """
        given = checks.many(field, entities)
        for kind in set(map(type, given)):
            if not issubclass(kind, self.model):
                raise InvalidInputError(f"a {self.name} is needed, not a {kind.__name__}", field=field)
        return list(map(vars, given))


class Repository(Generic[M]):
    """One kind of aggregate in the database, for as long as its unit of work lasts."""

    def __init__(self, connection: Connection, aggregate: Aggregate[M]) -> None:
        self._connection = connection
        self._aggregate = aggregate

    def _fetch_all(self, statement: Statement, **parameters: object) -> list[M]:
        return list(self._aggregate.load.many(self._connection.fetch_all(statement, parameters)))

    def _fetch_one(self, statement: Statement, **parameters: object) -> M | None:
        row = self._connection.fetch_one(statement, parameters)
        return None if row is None else self._aggregate.load.one(row)

    def _fetch_value(self, statement: Statement, **parameters: object) -> Any:
        row = self._connection.fetch_one(statement, parameters)
        assert row is not None, "the statement gives one row always"
        return row[0]

    def _get(self, key: object, found: M | None) -> M:
        if found is None:
            raise NotFoundError(self._aggregate.name, key)
        return found


class KeyedRepository(Repository[M]):
    """A kind of aggregate with one text as its key."""

    def find(self, key: str) -> M | None:
        """Return the aggregate with this key, or None."""
        return self._fetch_one(self._aggregate.select, key=self._aggregate.check_key(key))

    def get(self, key: str) -> M:
        """Return the aggregate with this key.

        Raises:
            NotFoundError: There is none.
        """
        return self._get(key, self.find(key))

    def delete(self, key: str) -> None:
        """Delete the aggregate with this key.

        Raises:
            NotFoundError: There is none.
        """
        if not self._connection.execute(self._aggregate.delete, {"key": self._aggregate.check_key(key)}):
            raise NotFoundError(self._aggregate.name, key)

    def page(self, *, after: str | None = None, limit: int = 100) -> Page[M]:
        """Return up to `limit` (at most 10,000) aggregates in key order, beginning after the cursor `after`."""
        return self._by_key().page(after, limit)

    def stream(self, *, batch_size: int = 1000) -> Generator[M]:
        """Yield all aggregates in the order of their keys, with no more than `batch_size` in memory."""
        return self._by_key().stream(batch_size)

    def count(self) -> int:
        """Count the aggregates; exact, so it reads them all."""
        return int(self._fetch_value(self._aggregate.count))

    def _by_key(self) -> Listing[M]:
        def fetch(after: Position | None, limit: int) -> list[Row]:
            parameters = {"after": "" if after is None else after[0], "limit": limit}
            return self._connection.fetch_all(self._aggregate.page, parameters)

        return Listing(fetch, self._aggregate.load.many)
