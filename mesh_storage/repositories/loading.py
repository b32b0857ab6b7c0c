"""How rows become aggregates.

An aggregate is *detached* in SQLAlchemy's terms: it is readable for ever, and `session.add` takes it up as persistent.
It is made without the events of the ORM's own loading, which cost more than the query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from sqlalchemy.dialects.postgresql import JSONB

from mesh_storage import jsonb
from mesh_storage.driver import Row
from mesh_storage.models.base import Base, attribute_names, table_of

M = TypeVar("M", bound=Base)


class Loader(Generic[M]):
    """Makes aggregates of rows that have the columns of their table, in its order."""

    def __init__(self, model: type[M]) -> None:
        self._json = [number for number, column in enumerate(table_of(model).columns) if isinstance(column.type, JSONB)]
        self.one: Callable[[Row], M] = _written(model, {number: f"read(_{number})" for number in self._json})
        """Makes an aggregate of a row."""
        self.of_values: Callable[[Row], M] = _written(model, {})
        """Makes an aggregate of a row whose JSON was read already."""
        self._with_documents = _written(model, {number: f"document_{number}" for number in self._json})

    def many(self, rows: Sequence[Row]) -> Iterator[M]:
        """Make the aggregates of many rows, whose JSON is read at once."""
        documents = (jsonb.read_all([row[number] for row in rows]) for number in self._json)
        return map(self._with_documents, rows, *documents)


def _written(model: type[M], values: dict[int, str]) -> Callable[..., M]:
    """Write the function that makes an aggregate of a row and of what else `values` takes for an attribute.

    Code is what dataclasses write too: to go through the names for each row would take twice as long.
    """
    names = attribute_names(model)
    parameters = ["row", *(value for value in values.values() if value.isidentifier())]
    attributes = ", ".join(f"{name!r}: {values.get(number, f'_{number}')}" for number, name in enumerate(names))
    code = f"""def load({", ".join(parameters)}):
        {", ".join(f"_{number}" for number in range(len(names)))} = row
        entity = new(model)
        entity.__dict__ = {{{attributes}}}
        return entity"""
    made: dict[str, Any] = {"model": model, "new": model.__new__, "read": jsonb.read}
    exec(code, made)  # noqa: S102 - all that is in it are the names of our own attributes
    load: Callable[..., M] = made["load"]
    return load
