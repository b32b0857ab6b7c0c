"""The statements of entries that may expire, and whose version is compared before they are written."""

from __future__ import annotations

from datetime import timedelta
from functools import cached_property
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Interval,
    Text,
    bindparam,
    case,
    collate,
    delete,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import Insert
from sqlalchemy.sql.base import ReadOnlyColumnCollection
from sqlalchemy.sql.dml import ReturningInsert, ReturningUpdate

from mesh_storage.errors import InvalidInputError
from mesh_storage.postgres.batch import Batch
from mesh_storage.postgres.statement import Statement
from mesh_storage.repositories.aggregates import LIMIT, Entries, Rows
from mesh_storage.repositories.loading import M

# Not now(), which is the start of the transaction. As a subquery it is evaluated once, and Citus accepts it in UPDATE.
_MOMENT = select(func.clock_timestamp()).scalar_subquery()
_EXPIRY = _MOMENT + bindparam("ttl", type_=Interval)
_LONGEST_TTL = timedelta(days=36_500)


class ExpiringEntries(Entries[M]):
    """The statements of a key-value table whose entries may expire, in the order of their keys by code point."""

    def __init__(self, model: type[M]) -> None:
        super().__init__(model)
        columns = self.table.c
        self._expires_at: Column[Any] = columns.expires_at
        self._found = (self.key == bindparam("key", type_=Text), self.live)
        """Conditions of the live entry with a key."""
        self._expected = (*self._found, columns.version == bindparam("expected_version", type_=BigInteger))
        """Conditions of the live entry with a key and a version."""
        self.select = Statement(lambda: select(self.table).where(*self._found))
        self.select_many = Statement(self._select_many)
        self.version = Statement(lambda: select(columns.version).where(*self._found))
        self.page = Statement(lambda: self._listed(self.table).order_by(self._ordered_key).limit(LIMIT))
        self.all = Statement(lambda: self._listed(self.key, self.value).order_by(self._ordered_key))
        self.count = Statement(lambda: self._listed(func.count()).select_from(self.table))
        self.delete = Statement(lambda: delete(self.table).where(*self._found))
        self.delete_expected = Statement(lambda: delete(self.table).where(*self._expected))
        self.delete_range = Statement(lambda: delete(self.table).where(*self._range))
        self.put_expiring = Statement(lambda: self.replacing(self._insert_expiring()).returning(*self.given))
        self.put_new = Statement(self._put_new)
        self.put_expected = Statement(self._put_expected)
        self.put_many_expiring = Statement(self._put_many_expiring)
        self.touch = Statement(self._touch)

    @cached_property
    def live(self) -> ColumnElement[bool]:
        """The condition that a row has not expired."""
        return or_(self._expires_at.is_(None), self._expires_at > _MOMENT)

    @cached_property
    def _ordered_key(self) -> ColumnElement[str]:
        return collate(self.key, "C")

    @cached_property
    def _range(self) -> tuple[ColumnElement[bool], ...]:
        return self._ordered_key >= bindparam("start"), self._ordered_key < bindparam("stop"), self.live

    def _listed(self, *columns: Any) -> Rows:
        return select(*columns).where(*self._range)

    def _select_many(self) -> Rows:
        keys = Batch({"key": Text()}).table()
        return select(self.table).select_from(keys.join(self.table, self.key == keys.c.key)).where(self.live)

    def _insert_expiring(self) -> Insert:
        # No subqueries: Citus accepts none among VALUES.
        moment = func.clock_timestamp()
        expiry = moment + bindparam("ttl", type_=Interval)
        return self._insert().values({self.created_at: moment, self.updated_at: moment, self._expires_at: expiry})

    def _replaced(self, new: ReadOnlyColumnCollection[str, Any]) -> dict[Column[Any], ColumnElement[Any]]:
        # Not the clock again: Citus accepts no volatile function here.
        expired = self._expires_at <= new.updated_at
        return {
            **super()._replaced(new),
            self.created_at: case((expired, new.created_at), else_=self.created_at),
            self._expires_at: new.expires_at,
        }

    def _put_new(self) -> ReturningInsert[Any]:
        """Insert an entry, or take the place of an expired one."""
        new = self._insert_expiring()
        return self.replacing(new, where=self._expires_at <= new.excluded.updated_at).returning(*self.given)

    def _put_expected(self) -> ReturningUpdate[Any]:
        value = bindparam("value", type_=self.value.type)
        changed = update(self.table).where(*self._expected)
        return changed.values({self.value: value, self.updated_at: _MOMENT, self._expires_at: _EXPIRY}).returning(
            *self.given
        )

    def _put_many_expiring(self) -> ReturningInsert[Any]:
        new = self.insert_many({self.created_at: _MOMENT, self.updated_at: _MOMENT, self._expires_at: _EXPIRY})
        return self.replacing(new).returning(*[self.key, *self.given])

    def _touch(self) -> ReturningUpdate[Any]:
        """Change nothing but the expiry, not even the time of the last update: that gives no new version."""
        changed = update(self.table).where(*self._expected)
        return changed.ordered_values((self._expires_at, _EXPIRY), (self.updated_at, self.updated_at)).returning(
            self.table
        )


def check_ttl(ttl: object) -> timedelta | None:
    """Check a time to live: None, or a positive timedelta of up to 100 years.

    Raises:
        InvalidInputError: It is something else.
    """
    if ttl is not None and (not isinstance(ttl, timedelta) or not timedelta(0) < ttl <= _LONGEST_TTL):
        raise InvalidInputError("ttl must be None or a timedelta of more than 0, up to 100 years", field="ttl")
    return ttl
