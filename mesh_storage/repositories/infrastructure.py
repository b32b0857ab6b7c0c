"""What the three infrastructure tables share: aggregates with an id of their own that are added and updated whole."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Column, ColumnElement, bindparam, func, literal_column, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm.attributes import set_attribute
from sqlalchemy.sql.dml import ReturningInsert
from sqlalchemy.sql.schema import ScalarElementColumnDefault

from mesh_storage.connection import Connection
from mesh_storage.errors import InvalidInputError, NotFoundError
from mesh_storage.models.base import new_id
from mesh_storage.repositories import checks
from mesh_storage.repositories.base import Aggregate, KeyedRepository, M, rows_of
from mesh_storage.statement import Statement

_TIMES = ("created", "updated")


class Infrastructure(Aggregate[M]):
    """How one kind of infrastructure is added and updated: all its columns, as arrays with a place for each row."""

    def __init__(self, model: type[M], *, prefix: str, kept: tuple[str, ...] = ()) -> None:
        """Build the statements; `prefix` begins new ids, and an update leaves the attributes `kept` alone."""
        super().__init__(model)
        self.prefix = prefix
        self.columns: dict[str, Column[Any]] = dict(zip(self.names, self.table.columns, strict=True))
        self.checks = {name: checks.of_column(f"{self.name}.{name}", column) for name, column in self.columns.items()}
        self.defaults: dict[str, Any] = {
            name: column.default.arg
            for name, column in self.columns.items()
            if isinstance(column.default, ScalarElementColumnDefault)
        }
        given = rows_of({name: column.type for name, column in self.columns.items()})
        rows = select(
            *(func.coalesce(given.c[name], func.now()) if name in _TIMES else given.c[name] for name in self.columns)
        )
        added: ReturningInsert[Any] = (
            insert(self.table).from_select(list(self.table.columns), rows).returning(literal_column("1"))
        )
        # One row comes back, however many went there: the transaction's time, which all of them got.
        self.add = Statement(select(func.now()).add_cte(added.cte("added")), writes=True)
        changed = [name for name in self.columns if name not in ("id", *_TIMES, *kept)]
        values: dict[Column[Any], ColumnElement[Any]] = {self.columns[name]: bindparam(name) for name in changed}
        values[self.columns["updated"]] = func.now()
        self.update = Statement(
            update(self.table)
            .where(self.columns["id"] == bindparam("id"))
            .values(values)
            .returning(self.columns["updated"])
        )

    def values(self, entity: M, *, new: bool = True) -> dict[str, Any]:
        """Check an aggregate and give what is sent of it; a default stands in for None, a made id too if it is new."""
        if not isinstance(entity, self.model):
            raise InvalidInputError(f"a {self.name} is needed, not a {type(entity).__name__}", field=self.name)
        values: dict[str, Any] = {}
        for name, column in self.columns.items():
            value = getattr(entity, name)
            if value is None:
                value = new_id(self.prefix) if new and name == "id" else self.defaults.get(name)
            values[name] = None if value is None and column.nullable else self.checks[name](value)
        return values


class InfrastructureRepository(KeyedRepository[M]):
    """A kind of infrastructure that administrators define."""

    def __init__(self, connection: Connection, infrastructure: Infrastructure[M]) -> None:
        super().__init__(connection, infrastructure)
        self._infrastructure = infrastructure

    def add(self, entity: M) -> M:
        """Add one and give it back with its id (made where it has none), its defaults and its times.

        Raises:
            AlreadyExistsError: The id or the name is taken.
            MissingReferenceError: It refers to something that is not there.
            InvalidInputError: Names the field.
        """
        self.add_many([entity])
        return entity

    def add_many(self, entities: Iterable[M]) -> list[M]:
        """Add many in one statement, all or none, and give them back as `add` does."""
        given = checks.many("entities", entities)
        rows = [self._infrastructure.values(entity) for entity in given]
        if not rows:
            return given
        arrays = {name: [row[name] for row in rows] for name in self._infrastructure.columns}
        now = self._fetch_value(self._infrastructure.add, **arrays)
        for entity, row in zip(given, rows, strict=True):
            for name, value in (row | {name: row[name] or now for name in _TIMES}).items():
                if getattr(entity, name) is None:
                    set_attribute(entity, name, value)
        return given

    def update(self, entity: M) -> M:
        """Store what was changed in an aggregate, by its id, and give it back with its new `updated`.

        Raises:
            NotFoundError: It is not there.
            AlreadyExistsError, MissingReferenceError, InvalidInputError: As for `add`.
        """
        values = self._infrastructure.values(entity, new=False)
        row = self._connection.fetch_one(self._infrastructure.update, values)
        if row is None:
            raise NotFoundError(self._infrastructure.name, values["id"])
        set_attribute(entity, "updated", row[0])
        return entity
