"""The kinds of aggregates: their statements and validation, shared by the sync and asyncio repositories."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, Generic, TypeAlias

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Integer,
    Select,
    Table,
    Text,
    bindparam,
    cast,
    delete,
    func,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import JSONB, Insert, insert
from sqlalchemy.sql.base import ReadOnlyColumnCollection
from sqlalchemy.sql.dml import ReturningInsert, ReturningUpdate
from sqlalchemy.sql.schema import ScalarElementColumnDefault

from mesh_storage.errors import InvalidInputError
from mesh_storage.models import JSON
from mesh_storage.models.base import attribute_names, deferred_names, table_of
from mesh_storage.postgres import jsonb
from mesh_storage.postgres.batch import Batch, parameter_type
from mesh_storage.postgres.statement import Row, Statement
from mesh_storage.repositories import checks
from mesh_storage.repositories.loading import Loader, M

LIMIT = bindparam("limit", type_=Integer)
Rows: TypeAlias = Select[*tuple[Any, ...]]
"""A select of any columns."""
TIMES = ("created", "updated")
"""The attributes of infrastructure that are set by the database's clock."""


class Aggregate(Generic[M]):
    """The statements of one kind of aggregate, each compiled once, and the loader of its objects."""

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
        """The loader of aggregates; lazy, since generating its code takes as long as everything else."""
        return Loader(self.model)

    def attributes(self, field: str, entities: Iterable[M]) -> list[dict[str, Any]]:
        """Return the `__dict__` of each aggregate: there is nothing to load, and instrumented access is 5 times slower.

        Raises:
            InvalidInputError: An object is not an aggregate of this kind; names the field.
        """
        given = checks.many(field, entities)
        for kind in set(map(type, given)):
            if not issubclass(kind, self.model):
                raise InvalidInputError(f"a {self.name} is required, not {kind.__name__}", field=field)
        return list(map(vars, given))


class Infrastructure(Aggregate[M]):
    """The statements that add and update one kind of infrastructure, with all its columns."""

    def __init__(self, model: type[M], *, prefix: str) -> None:
        """Build the statements; `prefix` starts new ids, and updates skip deferred attributes."""
        super().__init__(model)
        self.prefix = prefix
        table_version: Column[Any] = self.table.c.version
        self.generated = table_version
        self.version_name = self.names[list(self.table.columns).index(table_version)]
        """The attribute with the version of the row, which the database gives."""
        self.columns: dict[str, Column[Any]] = {
            name: column
            for name, column in zip(self.names, self.table.columns, strict=True)
            if column is not table_version
        }
        self.checks = {
            name: check.optional() if column.nullable else check
            for name, column in self.columns.items()
            for check in [checks.of_column(f"{self.name}.{name}", column)]
        }
        self.defaults: dict[str, Any] = {
            name: column.default.arg
            for name, column in self.columns.items()
            if isinstance(column.default, ScalarElementColumnDefault)
        }
        self.others = [name for name in self.columns if name != "id"]
        self.deferred = deferred_names(model)
        self.changed = [name for name in self.columns if name not in ("id", *TIMES, *self.deferred)]
        self.add = Statement(self._add)
        self.update = Statement(self._update)
        self.version = Statement(lambda: select(self.generated).where(self.columns["id"] == bindparam("id")))
        self.versions = Statement(self._versions)

    def _add(self) -> ReturningInsert[Any]:
        values: dict[str, ColumnElement[Any]] = {
            name: bindparam(name, type_=parameter_type(column.type)) for name, column in self.columns.items()
        }
        values |= {name: func.coalesce(values[name], func.now()) for name in TIMES}
        added = insert(self.table).values({self.columns[name]: value for name, value in values.items()})
        return added.returning(*[self.columns[name] for name in TIMES] + [self.generated])

    def _update(self) -> ReturningUpdate[Any]:
        values: dict[Column[Any], ColumnElement[Any]] = {self.columns[name]: bindparam(name) for name in self.changed}
        values[self.columns["updated"]] = func.now()
        unchanged = self.generated == bindparam("expected_version", type_=BigInteger)
        changed = update(self.table).where(self.columns["id"] == bindparam("id"), unchanged).values(values)
        return changed.returning(*[self.columns[name] for name in TIMES] + [self.generated])

    def _versions(self) -> Rows:
        ids = Batch({"id": Text()}).table()
        return select(ids.c.id, self.generated).select_from(ids.join(self.table, self.columns["id"] == ids.c.id))

    def new(self, field: str, entities: Iterable[M]) -> list[dict[str, Any]]:
        """Return the attribute values of new aggregates, which may hold no related objects: only columns are stored.

        Raises:
            InvalidInputError: One is not of this kind, or holds related objects; names the field.
        """
        instances = self.attributes(field, entities)
        for relationship in self.model.__mapper__.relationships:
            name = relationship.key
            if any(instance.get(name) for instance in instances):
                raise InvalidInputError(
                    f"{self.name}.{name} holds related objects, which repositories do not store; add the {self.name} "
                    "to uow.session instead",
                    field=f"{self.name}.{name}",
                )
        return instances

    def values(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Validate an aggregate's attributes and return the statement parameters, with defaults in place of None."""
        return {name: self.column(name, [attributes.get(name)])[0] for name in self.columns}

    def column(self, name: str, values: list[Any]) -> list[Any]:
        """Validate the values of one attribute and return the statement parameters, the default in place of None."""
        default = self.defaults.get(name)
        if default is not None and None in values:
            values = [default if value is None else value for value in values]
        return self.checks[name].column(values)


class Entries(Aggregate[M]):
    """The statements of a key-value table: a key, a value (bytes or JSON), and what the database gives."""

    def __init__(self, model: type[M]) -> None:
        super().__init__(model)
        self.key, self.value, *given = tuple(self.table.columns)
        self.given: list[Column[Any]] = given
        """What the database gives: the times, and the version and expiry of those that have them."""
        self.created_at, self.updated_at, *_ = given
        self.is_json = isinstance(self.value.type, JSONB)
        self._field = f"{self.name}.{self.names[1]}"
        self._check_bytes = None if self.is_json else checks.of_column(self._field, self.value)
        self.batch = Batch({"key": Text(), "value": Text() if self.is_json else self.value.type})
        self.put = Statement(lambda: self.replacing(self._insert()).returning(*self.given))
        self.put_many = Statement(lambda: self.replacing(self.insert_many()).returning(*[self.key, *self.given]))

    def _insert(self) -> Insert:
        return insert(self.table).values(
            {self.key: bindparam("key", type_=Text), self.value: bindparam("value", type_=self.value.type)}
        )

    def insert_many(self, others: Mapping[Column[Any], ColumnElement[Any]] | None = None) -> Insert:
        """Insert the arrays `key` and `value` as rows, with the same values for all of them in `others`."""
        rows, same = self.batch.table(), others or {}
        value = cast(rows.c.value, self.value.type) if self.is_json else rows.c.value
        selected = select(*[rows.c.key, value, *same.values()])
        return insert(self.table).from_select([self.key, self.value, *same], selected)

    def replacing(self, statement: Insert, where: ColumnElement[bool] | None = None) -> Insert:
        """Add an ON CONFLICT clause that replaces the value of an existing key (PostgreSQL manual, INSERT)."""
        return statement.on_conflict_do_update(
            index_elements=[self.key], set_=self._replaced(statement.excluded), where=where
        )

    def _replaced(self, new: ReadOnlyColumnCollection[str, Any]) -> dict[Column[Any], ColumnElement[Any]]:
        return {self.value: new[self.value.name], self.updated_at: new.updated_at}

    def check_values(self, values: list[Any]) -> tuple[list[Any], list[Any]]:
        """Validate values; return the statement parameters, and the stored values, copied from the caller's."""
        if self._check_bytes is None:
            return jsonb.write(values, self._field)
        checked = self._check_bytes.column(values)
        return checked, checked


def values_by_key(rows: Sequence[Row]) -> dict[str, JSON]:
    """Return the JSON values of rows of key and value, by key."""
    return dict(zip([row[0] for row in rows], jsonb.read_all(row[1] for row in rows), strict=True))
