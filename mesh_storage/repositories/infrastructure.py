"""What the three infrastructure tables share: aggregates with an id of their own that are added and updated whole."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import repeat
from typing import Any

from sqlalchemy import Column, ColumnElement, bindparam, func, literal_column, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm.attributes import set_attribute
from sqlalchemy.sql.dml import ReturningInsert, ReturningUpdate
from sqlalchemy.sql.schema import ScalarElementColumnDefault

from mesh_storage.connection import Connection
from mesh_storage.errors import InvalidInputError, NotFoundError
from mesh_storage.models.base import new_id
from mesh_storage.repositories import checks
from mesh_storage.repositories.base import Aggregate, KeyedRepository, M, Rows
from mesh_storage.repositories.batch import Batch, parameter_type
from mesh_storage.statement import Statement

_TIMES = ("created", "updated")


class Infrastructure(Aggregate[M]):
    """How one kind of infrastructure is added and updated: all its columns, as arrays with a place for each row."""

    def __init__(self, model: type[M], *, prefix: str, kept: tuple[str, ...] = ()) -> None:
        """Build the statements; `prefix` begins new ids, and an update leaves the attributes `kept` alone."""
        super().__init__(model)
        self.prefix = prefix
        self.adding = cache(self._adding)
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
        self._changed = [name for name in self.columns if name not in ("id", *_TIMES, *kept)]
        self.update = Statement(self._update)

    def _update(self) -> ReturningUpdate[Any]:
        values: dict[Column[Any], ColumnElement[Any]] = {self.columns[name]: bindparam(name) for name in self._changed}
        values[self.columns["updated"]] = func.now()
        changed = update(self.table).where(self.columns["id"] == bindparam("id")).values(values)
        return changed.returning(self.columns["updated"])

    def _adding(self, shared: frozenset[str]) -> tuple[Statement, Batch]:
        """Build the statement that adds rows which have the same value in the columns `shared`: that is sent once."""
        batch = Batch({name: column.type for name, column in self.columns.items() if name not in shared})

        def add() -> Rows:
            arrays = batch.table()
            values: dict[str, ColumnElement[Any]] = {
                name: bindparam(name, type_=parameter_type(column.type)) if name in shared else arrays.c[name]
                for name, column in self.columns.items()
            }
            values |= {name: func.coalesce(values[name], func.now()) for name in _TIMES}
            rows = select(*values.values()).select_from(arrays)
            added: ReturningInsert[Any] = (
                insert(self.table).from_select(list(self.table.columns), rows).returning(literal_column("1"))
            )
            # One row comes back, however many went there: the transaction's time, which all of them got.
            return select(func.now()).add_cte(added.cte("added"))

        return Statement(add, writes=True), batch

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
        kind, sent, shared = self._infrastructure, dict[str, Any](), set[str]()
        given = checks.many("entities", entities)
        instances = kind.attributes(kind.name, given)
        if len(set(map(id, given))) < len(given):  # It would be stored under two ids, of which it has one.
            raise InvalidInputError(f"entities must not have the same {kind.name} twice", field="entities")
        if not given:
            return given
        for name in kind.columns:
            column = [instance.get(name) for instance in instances]
            if name == "id" or column.count(None) < len(column):
                sent[name] = kind.column(name, column, new=True)
            else:
                sent[name] = kind.checks[name](kind.defaults.get(name))
                shared.add(name)
        statement, batch = kind.adding(frozenset(shared))
        now = self._fetch_value(statement, **{**sent, **batch.parameters(sent)})
        for name, values in sent.items():
            for instance, value in zip(instances, repeat(values) if name in shared else values, strict=False):
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
        self._infrastructure.attributes(self._infrastructure.name, [entity])
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
