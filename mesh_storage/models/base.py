"""What all models share: the metadata with its naming convention, and the constructor of loaded aggregates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar, cast

from sqlalchemy import MetaData, Table, inspect
from sqlalchemy.orm import DeclarativeBase, Mapper
from sqlalchemy.orm.attributes import instance_state
from ulid import ULID

JSON: TypeAlias = Any
"""A JSON value (RFC 8259): dict with str keys, list, str, int, float, bool or None, nested at will."""

M = TypeVar("M", bound="Base")

# PostgreSQL's own default names, so that the tables of the earlier Go service have them already. All columns are
# in the name, so that two constraints over different columns never collide.
NAMING_CONVENTION = {
    "pk": "%(table_name)s_pkey",
    "uq": "%(table_name)s_%(column_0_N_name)s_key",
    "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
    "ix": "%(table_name)s_%(column_0_N_name)s_idx",
    "ck": "%(table_name)s_%(constraint_name)s_check",
}


class Base(DeclarativeBase):
    """The base of every model."""

    metadata = MetaData(naming_convention=NAMING_CONVENTION)

    def __repr__(self) -> str:
        # Only the key: it is always loaded, and no value that a caller stored gets into a log by accident.
        mapper = inspect(type(self))
        key = ", ".join(
            f"{mapper.get_property_by_column(column).key}={self.__dict__.get(mapper.get_property_by_column(column).key)!r}"
            for column in mapper.primary_key
        )
        return f"{type(self).__name__}({key})"


def new_id(prefix: str) -> str:
    """Make a prefixed ULID such as `node_01J9ZQ4E8G3Q1M1V7W2T5K6X8Y` (github.com/ulid/spec)."""
    return f"{prefix}_{ULID()}"


def loader(model: type[M]) -> Callable[[Sequence[Any]], M]:
    """Make the function that turns a row, its values in the order of the table's columns, into an aggregate.

    The aggregate is *detached* in SQLAlchemy's terms: it is readable for ever, and `session.add` takes it up as
    persistent. It is made without the events of the ORM's own loading, which cost more than the query.
    """
    mapper: Mapper[M] = inspect(model)
    new_instance = mapper.class_manager.new_instance
    names = attribute_names(model)
    keys = tuple(names.index(mapper.get_property_by_column(column).key) for column in mapper.primary_key)

    def load(row: Sequence[Any]) -> M:
        entity = new_instance()
        vars(entity).update(zip(names, row, strict=False))
        instance_state(entity).key = (model, tuple([row[position] for position in keys]), None)
        return entity

    return load


def table_of(model: type[Base]) -> Table[Any]:
    """Give the table of a model."""
    return cast("Table[Any]", model.__table__)


def attribute_names(model: type[Base]) -> tuple[str, ...]:
    """Give the names of the mapped attributes in the order of the table's columns."""
    mapper: Mapper[Any] = inspect(model)
    return tuple(mapper.get_property_by_column(column).key for column in table_of(model).columns)
