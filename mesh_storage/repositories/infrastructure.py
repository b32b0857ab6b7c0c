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

    def checked(self, entities: Iterable[M]) -> list[M]:
        """Check that these are aggregates of this kind.

        Raises:
            InvalidInputError: One is not.
        """
        given = checks.many("entities", entities)
        for entity in given:
            if not isinstance(entity, self.model):
                raise InvalidInputError(f"a {self.name} is needed, not a {type(entity).__name__}", field=self.name)
        return given

    def column(self, name: str, values: list[Any], *, new: bool) -> list[Any]:
        """Check the values of one attribute and give what is sent; a default or a made id stands in for None."""
        if None in values:
            if name == "id" and new:
                values = [new_id(self.prefix) if value is None else value for value in values]
            elif name in self.defaults:
                default = self.defaults[name]
                values = [default if value is None else value for value in values]
        return self.checks[name].column(values)


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
        given = self._infrastructure.checked(entities)
        if not given:
            return given
        # Straight from the instances: new ones have nothing to load, and instrumented access costs five times that.
        instances = [vars(entity) for entity in given]
        sent = {
            name: self._infrastructure.column(name, [instance.get(name) for instance in instances], new=True)
            for name in self._infrastructure.columns
        }
        now = self._fetch_value(self._infrastructure.add, **sent)
        for name, column in sent.items():
            for instance, value in zip(instances, column, strict=True):
                if instance.get(name) is None:
                    instance[name] = now if value is None and name in _TIMES else value
        return given

    def update(self, entity: M) -> M:
        """Store what was changed in an aggregate, by its id, and give it back with its new `updated`.

        `created` stays as it is stored; a default stands in for None, as for `add`.

        Raises:
            NotFoundError: It is not there.
            AlreadyExistsError, MissingReferenceError, InvalidInputError: As for `add`.
        """
        self._infrastructure.checked([entity])
        values = {
            name: self._infrastructure.column(name, [getattr(entity, name)], new=False)[0]
            for name in self._infrastructure.columns
        }
        row = self._connection.fetch_one(self._infrastructure.update, values)
        if row is None:
            raise NotFoundError(self._infrastructure.name, values["id"])
        for name, value in values.items():
            if value is not None and getattr(entity, name) is None:
                set_attribute(entity, name, value)
        set_attribute(entity, "updated", row[0])
        return entity
