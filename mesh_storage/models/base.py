"""What all models share: the metadata with its naming convention, and the late state of their aggregates."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeAlias, cast

from sqlalchemy import MetaData, Table, inspect
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.orm.state import InstanceState

JSON: TypeAlias = Any
"""A JSON value (RFC 8259): dict with str keys, list, str, int, float, bool or None, nested at will."""

# PostgreSQL's own default names, so that the tables of the earlier Go service have them already. All columns are
# in the name, so that two constraints over different columns never collide.
NAMING_CONVENTION = {
    "pk": "%(table_name)s_pkey",
    "uq": "%(table_name)s_%(column_0_N_name)s_key",
    "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
    "ix": "%(table_name)s_%(column_0_N_name)s_idx",
    "ck": "%(table_name)s_%(constraint_name)s_check",
}


class _LateState:
    """SQLAlchemy's record of an aggregate's changes, made when a session or a change first asks for it.

    It costs several times what the aggregate itself does, and keeps the garbage collector busy; most aggregates are
    read or stored by a repository and never need one. A subclass of somebody else's has it at once, as ever.
    """

    def __get__(self, entity: Base | None, owner: type[Base]) -> InstanceState[Any]:
        if entity is None or not owner.is_late():
            raise AttributeError("_sa_instance_state")
        values = vars(entity)
        mapper = owner.__mapper__
        state = InstanceState(entity, mapper.class_manager)
        if not values.get("_is_new"):
            key = (values[mapper.get_property_by_column(column).key] for column in mapper.primary_key)
            state.key = mapper.identity_key_from_primary_key(tuple(key))
        made: InstanceState[Any] = values.setdefault("_sa_instance_state", state)
        return made


class Base(DeclarativeBase):
    """The base of every model."""

    metadata = MetaData(naming_convention=NAMING_CONVENTION)
    _sa_instance_state = _LateState()

    def __init__(self, **values: Any) -> None:
        attributes = _LATE.get(type(self))
        if attributes is None:
            self.registry.constructor(self, **values)
            return
        if not attributes.issuperset(values):
            unknown = ", ".join(sorted(values.keys() - attributes))
            raise TypeError(f"{type(self).__name__} has no attribute {unknown}")
        values["_is_new"] = True  # What came out of the database has no such mark.
        entity: Any = self  # whose attributes pyright takes for those of its class
        entity.__dict__ = values

    @classmethod
    def be_late(cls) -> None:
        """Leave SQLAlchemy's state of this class's instances for later; its mapper must be configured."""
        # The constructor that SQLAlchemy has put there would make the state at once.
        delattr(cls, "__init__")
        _LATE[cls] = frozenset(attribute_names(cls))

    @classmethod
    def is_late(cls) -> bool:
        """Whether that holds for this very class, which a subclass does not inherit."""
        return cls in _LATE

    def __repr__(self) -> str:
        # Only the key: it is always loaded, and no value that a caller stored gets into a log by accident.
        mapper = inspect(type(self))
        key = ", ".join(
            f"{mapper.get_property_by_column(column).key}={self.__dict__.get(mapper.get_property_by_column(column).key)!r}"
            for column in mapper.primary_key
        )
        return f"{type(self).__name__}({key})"


_LATE: dict[type[Base], frozenset[str]] = {}
"""The classes whose instances have their state late, and their attributes."""


def new_id(prefix: str) -> str:
    """Make a prefixed ULID such as `node_01J9ZQ4E8G3Q1M1V7W2T5K6X8Y` (github.com/ulid/spec)."""
    from ulid import ULID

    return f"{prefix}_{ULID()}"


def table_of(model: type[Base]) -> Table[Any]:
    """Return the table of a model."""
    return cast("Table[Any]", model.__table__)


@cache
def attribute_names(model: type[Base]) -> tuple[str, ...]:
    """Return the names of the mapped attributes in the order of the table's columns."""
    mapper = model.__mapper__
    return tuple(mapper.get_property_by_column(column).key for column in table_of(model).columns)
