"""How rows become aggregates.

An aggregate is *detached* in SQLAlchemy's terms: it is readable for ever, and `session.add` takes it up as persistent.
It is made without the events of the ORM's own loading, and its `InstanceState` when something asks for it (see
models/base.py). With states made at once a page takes 2.2 times the CPU, a stream 2.1, storing 1,000 new messages 3.5,
and one `get` 1.04. The code that is written for each model is a part of that: with `dict(zip(names, row))` in its place
a page takes 1.3 times, a stream 1.4. It can all go when SQLAlchemy itself makes its states late, or when a listing may
take twice as long: then `mapper.class_manager.new_instance()` and a loop are enough.
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

# Written out as code, as dataclasses do.
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
    """Makes aggregates of rows that have the columns of their table, in its order."""

    of_values: Callable[[Row], M]
    """Makes an aggregate of a row whose JSON was read already."""
    one: Callable[[Row], M]
    """Makes an aggregate of a row."""

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
        exec(code, made)  # noqa: S102 - all that is in it are the names of our own attributes
        self._many: Callable[..., Iterator[M]] = made["many"]
        self.of_values = made["of_values"]
        self.one = self._one if self._json else self.of_values

    def many(self, rows: Sequence[Row]) -> Iterator[M]:
        """Make the aggregates of many rows, each when it is asked for."""
        return self._many(rows, *(jsonb.read_all(map(itemgetter(number), rows)) for number in self._json))

    def _one(self, row: Row) -> M:
        return next(self.many([row]))
