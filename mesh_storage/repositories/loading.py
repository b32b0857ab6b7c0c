"""Creation of aggregates from rows.

An aggregate is *detached* in SQLAlchemy's terms: it stays readable, and `session.add` makes it persistent. It is
created without the ORM's load events, and its `InstanceState` only when needed (see models/base.py). With eager states,
a page takes 2.2 times the CPU, a stream 2.1, storing 1,000 new messages 3.5, and a single `get` 1.04. The code
generated for each model is part of that: with `dict(zip(names, row))` instead, a page takes 1.3 times as long, a stream
1.4. All of this can be removed once SQLAlchemy defers its states itself, or once a listing may take twice as long: then
`mapper.class_manager.new_instance()` and a loop are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, Generic, TypeVar

from sqlalchemy.dialects.postgresql import JSONB

from mesh_storage.models.base import Entity, attribute_names, deferred_names, table_of
from mesh_storage.postgres import jsonb
from mesh_storage.postgres.statement import Row

M = TypeVar("M", bound=Entity)

# Generated code, as in dataclasses.
_CODE = """
def of_values(row):
    {values} = row
    entity = new(model)
    entity.__dict__ = {{{attributes}}}
    return entity

def many(rows, *documents):
    for {each}:
        entity = new(model)
        entity.__dict__ = {{{attributes}}}
        yield entity
"""


class Loader(Generic[M]):
    """Creates aggregates from rows with all columns of their table, in order."""

    of_values: Callable[[Row], M]
    """Creates an aggregate from a row whose JSON is already decoded."""
    one: Callable[[Row], M]
    """Creates an aggregate from a row."""

    def __init__(self, model: type[M]) -> None:
        names = attribute_names(model)
        values = [f"_{number}" for number in range(len(names))]
        self._json = [number for number, column in enumerate(table_of(model).columns) if isinstance(column.type, JSONB)]
        each = f"{', '.join(values)} in rows"
        if self._json:
            received = ", ".join("_" if number in self._json else value for number, value in enumerate(values))
            each = f"({received}), {', '.join(values[number] for number in self._json)} in zip(rows, *documents)"
        deferred = deferred_names(model)
        attributes = ", ".join(
            f"{name!r}: {value}" for name, value in zip(names, values, strict=True) if name not in deferred
        )
        made: dict[str, Any] = {"model": model, "new": model.__new__}
        code = _CODE.format(values=", ".join(values), attributes=attributes, each=each)
        exec(code, made)  # noqa: S102 - it contains only our own attribute names
        self._many: Callable[..., Iterator[M]] = made["many"]
        self.of_values = made["of_values"]
        self.one = self._one if self._json else self.of_values

    def many(self, rows: Sequence[Row]) -> Iterator[M]:
        """Yield the aggregates of many rows lazily."""
        return self._many(rows, *(jsonb.read_all(map(itemgetter(number), rows)) for number in self._json))

    def _one(self, row: Row) -> M:
        return next(self.many([row]))
