"""The base classes of the models: metadata with a naming convention, typed constructors, deferred instance state."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Self, TypeAlias, cast, dataclass_transform
from weakref import ref

from sqlalchemy import MetaData, Table, inspect
from sqlalchemy.orm import (
    DeclarativeBase,
    InstanceState,
    Mapper,
    declared_attr,
    make_transient,
    make_transient_to_detached,
    mapped_column,
)

JSON: TypeAlias = Any
"""A JSON value (RFC 8259): dict with str keys, list, str, int, float, bool or None, nested to any depth."""

# PostgreSQL's default names, which the tables of the earlier Go service already have. All columns are in the name, so
# that constraints over different columns never collide.
NAMING_CONVENTION = {
    "pk": "%(table_name)s_pkey",
    "uq": "%(table_name)s_%(column_0_N_name)s_key",
    "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
    "ix": "%(table_name)s_%(column_0_N_name)s_idx",
    "ck": "%(table_name)s_%(constraint_name)s_check",
}


_WRITTEN = "_written"


class Writes:
    """The objects written by a transaction or savepoint that were constructed in Python, not loaded."""

    def __init__(self, outer: Writes | None = None) -> None:
        self.stand = True
        """Whether the writes were not rolled back."""
        self.states: list[ref[InstanceState[Any]]] = []
        """The instance states marked as persistent by these writes."""
        self.inner: list[Writes] = []
        if outer is not None:
            outer.inner.append(self)

    def __reduce__(self) -> str:
        return "_NEVER"  # the only instance that is ever pickled

    def undo(self) -> None:
        """Make the objects transient again, as a rollback does."""
        self.stand = False
        for each in self.states:
            state = each()
            entity = None if state is None else state.obj()
            if entity is not None:
                make_transient(entity)
        for inner in self.inner:
            inner.undo()


_NEVER = Writes()
_NEVER.stand = False


class Base(DeclarativeBase):
    """The declarative base of all models: of this library, and of a service's own models that refer to them."""

    metadata = MetaData(naming_convention=NAMING_CONVENTION)

    def __repr__(self) -> str:
        # The key only: it is always loaded, and no stored value ends up in a log by accident.
        names = _key_names(inspect(type(self)))
        return f"{type(self).__name__}({', '.join(f'{name}={self.__dict__.get(name)!r}' for name in names)})"


class _LateState:
    """SQLAlchemy's instance state, created when a session or an attribute change first needs it.

    It costs several times as much as the object itself and burdens the garbage collector; most aggregates are read or
    stored by a repository and never need one. A subclass defined elsewhere gets its state eagerly, as usual.
    """

    def __get__(self, entity: Entity | None, owner: type[Entity]) -> InstanceState[Any]:
        if entity is None or owner not in _LATE or not (vars(entity) or _is_new(entity)):
            raise AttributeError("_sa_instance_state")
        values = vars(entity)
        mapper = owner.__mapper__
        state = InstanceState(entity, mapper.class_manager)
        if not _is_new(entity):
            state.key = mapper.identity_key_from_primary_key(tuple(values[name] for name in _key_names(mapper)))
            written = getattr(entity, _WRITTEN, None)
            if written is not None:
                written.states.append(ref(state))
        made: InstanceState[Any] = values.setdefault("_sa_instance_state", state)
        return made


@dataclass_transform(eq_default=False, kw_only_default=True, field_specifiers=(mapped_column,))
class Entity(Base):
    """The base of this library's models: with typed constructors and deferred instance state.

    To a type checker, attributes without a `default` are required. A service's own models derive from `Base`, which has
    SQLAlchemy's constructor.
    """

    __abstract__ = True
    # Fetch the times that the database sets by RETURNING; there may be no session to load them later.
    __mapper_args__ = {"eager_defaults": True}  # noqa: RUF012 - as SQLAlchemy declares it
    # Kept outside `__dict__`, which holds only mapped attributes.
    __slots__ = (_WRITTEN,)
    if TYPE_CHECKING:
        _written: Writes | None
    _sa_instance_state = _LateState()

    def __init__(self, **values: Any) -> None:
        late = _LATE.get(type(self))
        if late is not None:
            listeners, nobody = late.listeners, late.nobody
            try:
                for name in values:
                    if (heard := listeners[name].set) is not nobody and heard:
                        break
                else:
                    if len(late.init_listeners) == late.of_sqlalchemy:
                        self._written = _NEVER  # objects loaded from the database lack it
                        entity: Any = self  # pyright takes its attributes for those of the class
                        entity.__dict__ = values
                        return
            except KeyError:
                late.check_names(values)
            if "_sa_instance_state" not in self.__dict__:
                late.construct(self, **values)  # calls this constructor again, with the state created
                return
        self.registry.constructor(self, **values)

    def __getstate__(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return vars(self), {_WRITTEN: _NEVER if _is_new(self) else None}

    def __copy__(self) -> Self:
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))
        setattr(copied, _WRITTEN, _NEVER if _is_new(self) else None)
        if (state := vars(self).get("_sa_instance_state")) is not None:
            # A copy of SQLAlchemy's state would still refer to the original.
            own = vars(copied)["_sa_instance_state"] = InstanceState(copied, state.manager)
            own.key, own.expired_attributes = state.key, set(state.expired_attributes)
        return copied


class Versioned(Entity):
    """The base of the models whose rows have a version, which a session checks when it updates or deletes one."""

    __abstract__ = True

    @declared_attr.directive
    @classmethod
    def __mapper_args__(cls) -> dict[str, Any]:
        return {
            **Entity.__mapper_args__,
            "version_id_col": table_of(cls).c.version,
            "version_id_generator": False,  # the database gives it
        }


class _Late:
    """What the constructor of a class with deferred state checks: whether any listener expects new instances."""

    def __init__(self, model: type[Entity]) -> None:
        manager = model.__mapper__.class_manager
        self._model = model
        self.listeners = {name: manager[name].dispatch for name in attribute_names(model)}
        self.nobody = self.listeners[attribute_names(model)[0]].set
        """SQLAlchemy's placeholder for an attribute's listeners before there are any; replaced, and then empty,
        afterwards."""
        self.init_listeners = manager.dispatch.init.listeners
        self.of_sqlalchemy = len(self.init_listeners)
        self.construct = model.__init__
        """The constructor as instrumented by SQLAlchemy, which creates the state and notifies its listeners."""

    def check_names(self, values: dict[str, Any]) -> None:
        """Raise if an attribute is not mapped; a service's backrefs are mapped once the mappers are configured.

        Raises:
            TypeError: There is no such attribute.
        """
        unknown = values.keys() - inspect(self._model).all_orm_descriptors.keys()
        if unknown:
            raise TypeError(f"{self._model.__name__} has no attribute {', '.join(sorted(unknown))}") from None


_LATE: dict[type[Entity], _Late] = {}


def make_late(model: type[Entity]) -> None:
    """Defer the instance state of a model, whose mapper must be configured."""
    _LATE[model] = _Late(model)
    delattr(model, "__init__")  # SQLAlchemy's, which would create the state eagerly


def _is_new(entity: Entity) -> bool:
    written: Writes | None = getattr(entity, _WRITTEN, None)
    return written is not None and not written.stand


def mark_written(entity: Entity, writes: Writes) -> None:
    """Mark an aggregate as persistent for any session it is added to, unless these writes are rolled back."""
    if "_sa_instance_state" not in vars(entity):
        if _is_new(entity):
            setattr(entity, _WRITTEN, writes)
        return
    state = inspect(entity)
    if state.key is None:
        writes.states.append(ref(state))
        session = state.session
        if session is not None:  # pending, so the next flush would insert it again
            session.expunge(entity)
        make_transient_to_detached(entity)
        if session is not None:
            session.add(entity)


def new_id(prefix: str) -> str:
    """Return a new prefixed ULID such as `node_01J9ZQ4E8G3Q1M1V7W2T5K6X8Y` (github.com/ulid/spec)."""
    from ulid import ULID

    return f"{prefix}_{ULID()}"


def table_of(model: type[Base]) -> Table[Any]:
    """Return the table of a model."""
    return cast("Table[Any]", model.__table__)


@cache
def attribute_names(model: type[Base]) -> tuple[str, ...]:
    """Return the names of the mapped attributes in column order."""
    mapper = model.__mapper__
    return tuple(mapper.get_property_by_column(column).key for column in table_of(model).columns)


def attribute_of(table: str, column: str) -> str | None:
    """Return the attribute that a column is mapped to, such as `Node.name`, or None if it is not mapped."""
    for mapper in Base.registry.mappers:
        model: type[Base] = mapper.class_
        columns = [each.name for each in table_of(model).columns]
        if mapper.inherits is None and table_of(model).name == table and column in columns:
            return f"{model.__name__}.{attribute_names(model)[columns.index(column)]}"
    return None


@cache
def deferred_names(model: type[Base]) -> frozenset[str]:
    """Return the names of the deferred attributes, which only a session loads, on request."""
    return frozenset(prop.key for prop in model.__mapper__.column_attrs if prop.deferred)


@cache
def _key_names(mapper: Mapper[Any]) -> tuple[str, ...]:
    """Return the names of the primary key attributes, in order."""
    return tuple(mapper.get_property_by_column(column).key for column in mapper.primary_key)
