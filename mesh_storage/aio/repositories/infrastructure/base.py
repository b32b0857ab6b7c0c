"""The base class of the three infrastructure repositories, whose aggregates have their own id and are written whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, repeat
from typing import Any

from sqlalchemy import func, inspect, select
from sqlalchemy.orm.attributes import set_committed_value

from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.repositories.base import AsyncKeyedRepository
from mesh_storage.errors import ConflictError, InvalidInputError, NotFoundError
from mesh_storage.models.base import mark_written, new_id
from mesh_storage.postgres.statement import Statement
from mesh_storage.repositories import checks
from mesh_storage.repositories.aggregates import TIMES, Infrastructure
from mesh_storage.repositories.loading import M

_NOW = Statement(lambda: select(func.now()), writes=True)  # asked for only ahead of a write


class AsyncInfrastructureRepository(AsyncKeyedRepository[M]):
    """A kind of infrastructure that administrators define."""

    def __init__(self, connection: AsyncUnitOfWorkConnection, infrastructure: Infrastructure[M]) -> None:
        super().__init__(connection, infrastructure)
        self._infrastructure = infrastructure

    async def add(self, entity: M) -> M:
        """Add an aggregate and return it with its id (generated if it has none), its defaults and its times.

        Raises:
            AlreadyExistsError: The id or the name is taken.
            MissingReferenceError: It refers to an aggregate that does not exist.
            InvalidInputError: A value is invalid; names the field.
        """
        kind = self._infrastructure
        [instance] = kind.new(kind.name, [entity])
        id_ = instance.get("id")
        values = kind.values({**instance, "id": new_id(kind.prefix) if id_ is None else id_})
        given = await self._connection.fetch_one(kind.add, values)
        assert given is not None, "a row was added"
        *times, instance[kind.version_name] = given
        values.update(zip(TIMES, times, strict=True))
        instance.update((name, value) for name, value in values.items() if instance.get(name) is None)
        for name in kind.deferred:
            del instance[name]
        mark_written(entity, self._connection.writes)
        return entity

    async def add_many(self, entities: Iterable[M]) -> list[M]:
        """Add many aggregates by COPY, all or none, and return them as `add` does."""
        kind = self._infrastructure
        given = checks.many("entities", entities)
        instances = kind.new(kind.name, given)
        if len(set(map(id, given))) < len(given):  # it would be stored twice, under two ids
            raise InvalidInputError(f"entities must not contain the same {kind.name} twice", field="entities")
        if not given:
            return given
        named = set(chain.from_iterable(instances))
        ids = [instance.get("id") for instance in instances]
        kind.checks["id"].column([id_ for id_ in ids if id_ is not None])
        # An attribute that no entity sets has the same value in all rows; a time defaults to now() in the database.
        shared = {name: kind.column(name, [None])[0] for name in kind.others if name not in named}
        columns = {
            name: kind.column(name, [instance.get(name) for instance in instances])
            for name in kind.others
            if name in named
        }
        now = await self._fetch_value(_NOW)
        for name in TIMES:
            if name in columns:
                columns[name] = [now if value is None else value for value in columns[name]]
        sent: dict[str, Iterable[Any]] = {
            **{name: repeat(value) for name, value in shared.items() if value is not None},
            **columns,
        }
        shared |= {name: now for name in TIMES if name in shared}
        columns["id"] = []
        rows = zip(_ids(kind.prefix, ids, columns["id"]), *sent.values(), strict=False)
        await self._connection.copy(kind.table.name, [kind.columns[name].name for name in ("id", *sent)], rows)
        versions: dict[str, int] = dict(await self._connection.fetch_all(kind.versions, {"id": columns["id"]}))
        columns[kind.version_name] = [versions[id_] for id_ in columns["id"]]
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

    async def update(self, entity: M) -> M:
        """Update an aggregate, identified by its id, and return it with its new version and `updated`.

        `created` keeps its stored value; None is replaced by the default, as in `add`.

        Raises:
            NotFoundError: The aggregate does not exist.
            ConflictError: It was changed since it was read, so it has another version; see `actual`.
            AlreadyExistsError, MissingReferenceError, InvalidInputError: As for `add`.
        """
        kind = self._infrastructure
        kind.attributes(kind.name, [entity])
        values = kind.values({name: getattr(entity, name) for name in kind.columns if name not in kind.deferred})
        expected = getattr(entity, kind.version_name)
        row = await self._connection.fetch_one(kind.update, {**values, "expected_version": expected})
        if row is None:
            raise await self._changed(values["id"], expected)
        # Mark the attributes as committed, so that a session does not flush them again.
        history = inspect(entity).committed_state
        for name in kind.changed:
            given = getattr(entity, name)
            if name in history or name not in vars(entity) or (given is None and values[name] is not None):
                set_committed_value(entity, name, values[name] if given is None else given)
        for name, value in zip((*TIMES, kind.version_name), row, strict=True):
            set_committed_value(entity, name, value)
        mark_written(entity, self._connection.writes)
        return entity

    async def _changed(self, id_: str, expected: int | None) -> NotFoundError | ConflictError:
        """Return the error for an aggregate that has not the expected version."""
        kind = self._infrastructure
        row = await self._connection.fetch_one(kind.version, {"id": id_})
        if row is None:
            return NotFoundError(kind.name, id_)
        known = "was not read before" if expected is None else f"was read in version {expected}"
        return ConflictError(
            f"the {kind.name} {id_!r} {known}, but has version {row[0]}; read it and change it again", actual=row[0]
        )


def _ids(prefix: str, given: Iterable[str | None], used: list[str]) -> Iterator[str]:
    """Yield an id for each row, generated if none is given, and append it to `used`."""
    for id_ in given:
        used.append(new_id(prefix) if id_ is None else id_)
        yield used[-1]
