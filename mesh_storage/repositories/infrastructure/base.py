"""What the three infrastructure tables share: aggregates with an id of their own that are added and updated whole."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from itertools import chain, repeat
from typing import Any

from sqlalchemy import Column, ColumnElement, bindparam, func, inspect, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.sql.dml import ReturningInsert, ReturningUpdate
from sqlalchemy.sql.schema import ScalarElementColumnDefault

from mesh_storage.errors import InvalidInputError, NotFoundError
from mesh_storage.models.base import deferred_names, mark_written, new_id
from mesh_storage.postgres.batch import parameter_type
from mesh_storage.postgres.connection import Connection
from mesh_storage.postgres.statement import Statement
from mesh_storage.repositories import checks
from mesh_storage.repositories.base import Aggregate, KeyedRepository
from mesh_storage.repositories.loading import M

_TIMES = ("created", "updated")
_NOW = Statement(lambda: select(func.now()), writes=True)  # It is asked for what is about to be written.


class Infrastructure(Aggregate[M]):
    """How one kind of infrastructure is added and updated: all its columns at once."""

    def __init__(self, model: type[M], *, prefix: str) -> None:
        """Build the statements; `prefix` begins new ids, and an update leaves deferred attributes alone."""
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
        self.others = [name for name in self.columns if name != "id"]
        self.deferred = deferred_names(model)
        self.changed = [name for name in self.columns if name not in ("id", *_TIMES, *self.deferred)]
        self.add = Statement(self._add)
        self.update = Statement(self._update)

    def _add(self) -> ReturningInsert[Any]:
        values: dict[str, ColumnElement[Any]] = {
            name: bindparam(name, type_=parameter_type(column.type)) for name, column in self.columns.items()
        }
        values |= {name: func.coalesce(values[name], func.now()) for name in _TIMES}
        added = insert(self.table).values({self.columns[name]: value for name, value in values.items()})
        return added.returning(*(self.columns[name] for name in _TIMES))

    def _update(self) -> ReturningUpdate[Any]:
        values: dict[Column[Any], ColumnElement[Any]] = {self.columns[name]: bindparam(name) for name in self.changed}
        values[self.columns["updated"]] = func.now()
        changed = update(self.table).where(self.columns["id"] == bindparam("id")).values(values)
        return changed.returning(self.columns["updated"])

    def values(self, attributes: Mapping[str, Any]) -> dict[str, Any]:
        """Check what one aggregate holds and give what is sent for it; a default stands in for None."""
        return {name: self.column(name, [attributes.get(name)])[0] for name in self.columns}

    def column(self, name: str, values: list[Any]) -> list[Any]:
        """Check the values of one attribute and give what is sent; a default stands in for None."""
        default = self.defaults.get(name)
        if default is not None and None in values:
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
        kind = self._infrastructure
        [instance] = kind.attributes(kind.name, [entity])
        id_ = instance.get("id")
        values = kind.values({**instance, "id": new_id(kind.prefix) if id_ is None else id_})
        times = self._connection.fetch_one(kind.add, values)
        assert times is not None, "a row was added"
        values.update(zip(_TIMES, times, strict=True))
        instance.update((name, value) for name, value in values.items() if instance.get(name) is None)
        for name in kind.deferred:
            del instance[name]
        mark_written(entity, self._connection.writes)
        return entity

    def add_many(self, entities: Iterable[M]) -> list[M]:
        """Add many, all or none, and give them back as `add` does; they go by COPY."""
        kind = self._infrastructure
        given = checks.many("entities", entities)
        instances = kind.attributes(kind.name, given)
        if len(set(map(id, given))) < len(given):  # It would be stored under two ids, of which it has one.
            raise InvalidInputError(f"entities must not have the same {kind.name} twice", field="entities")
        if not given:
            return given
        named = set(chain.from_iterable(instances))
        ids = [instance.get("id") for instance in instances]
        kind.checks["id"].column([id_ for id_ in ids if id_ is not None])
        # What none of them says is the same in all rows; the database's own default for a time is its now.
        shared = {name: kind.column(name, [None])[0] for name in kind.others if name not in named}
        columns = {
            name: kind.column(name, [instance.get(name) for instance in instances])
            for name in kind.others
            if name in named
        }
        now = self._fetch_value(_NOW)
        for name in _TIMES:
            if name in columns:
                columns[name] = [now if value is None else value for value in columns[name]]
        sent: dict[str, Iterable[Any]] = {
            **{name: repeat(value) for name, value in shared.items() if value is not None},
            **columns,
        }
        shared |= {name: now for name in _TIMES if name in shared}
        columns["id"] = []
        rows = zip(_ids(kind.prefix, ids, columns["id"]), *sent.values(), strict=False)
        self._connection.copy(kind.table.name, [kind.columns[name].name for name in ("id", *sent)], rows)
        for name, values in columns.items():
            for instance, value in zip(instances, values, strict=True):
                if instance.get(name) is None:
                    instance[name] = value
        for instance, entity in zip(instances, given, strict=True):
            instance.update(shared)
            for name in kind.deferred:
                del instance[name]
            mark_written(entity, self._connection.writes)
        return given

    def update(self, entity: M) -> M:
        """Store what was changed in an aggregate, by its id, and give it back with its new `updated`.

        `created` stays as it is stored; a default stands in for None, as for `add`.

        Raises:
            NotFoundError: It is not there.
            AlreadyExistsError, MissingReferenceError, InvalidInputError: As for `add`.
        """
        kind = self._infrastructure
        kind.attributes(kind.name, [entity])
        values = kind.values({name: getattr(entity, name) for name in kind.columns if name not in kind.deferred})
        row = self._connection.fetch_one(kind.update, values)
        if row is None:
            raise NotFoundError(kind.name, values["id"])
        # To a session there is nothing left to store.
        history = inspect(entity).committed_state
        for name in kind.changed:
            given = getattr(entity, name)
            if name in history or (given is None and values[name] is not None):
                set_committed_value(entity, name, values[name] if given is None else given)
        set_committed_value(entity, "updated", row[0])
        mark_written(entity, self._connection.writes)
        return entity


def _ids(prefix: str, given: Iterable[str | None], used: list[str]) -> Generator[str]:
    """Yield an id for each, made where none is given, and keep it."""
    for id_ in given:
        used.append(new_id(prefix) if id_ is None else id_)
        yield used[-1]
