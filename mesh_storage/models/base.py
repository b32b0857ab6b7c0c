"""What all models share: the metadata with its naming convention, typed constructors, and the late state of ours."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Self, TypeAlias, cast, dataclass_transform
from weakref import ref

from sqlalchemy import MetaData, Table, inspect
from sqlalchemy.orm import (
    DeclarativeBase,
    InstanceState,
    Mapper,
    make_transient,
    make_transient_to_detached,
    mapped_column,
)

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


_WRITTEN = "_written"


class Writes:
    """What a transaction, or a savepoint in one, writes of the aggregates that were made in code."""

    def __init__(self, outer: Writes | None = None) -> None:
        self.stand = True
        """Whether they were not rolled back."""
        self.states: list[ref[InstanceState[Any]]] = []
        """Those that say that the row is there."""
        self.inner: list[Writes] = []
        if outer is not None:
            outer.inner.append(self)

    def __reduce__(self) -> str:
        return "_NEVER"  # No other is in a pickle.

    def undo(self) -> None:
        """Let them be new again, as a rollback makes them."""
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
    """The base of every model: of ours, and of a service's own that refer to them."""

    metadata = MetaData(naming_convention=NAMING_CONVENTION)

    def __repr__(self) -> str:
        # Only the key: it is always loaded, and no value that a caller stored gets into a log by accident.
        names = _key_names(inspect(type(self)))
        return f"{type(self).__name__}({', '.join(f'{name}={self.__dict__.get(name)!r}' for name in names)})"


class _LateState:
    """SQLAlchemy's record of an aggregate's changes, made when a session or a change first asks for it.

    It costs several times what the aggregate itself does, and keeps the garbage collector busy; most aggregates are
    read or stored by a repository and never need one. A subclass of somebody else's has it at once, as ever.
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
    """What the models of this library are: their constructors are typed, and their states late.

    To a type checker, an attribute without a `default` must be given. A service's own models have `Base`, and with it
    SQLAlchemy's constructor.
    """

    __abstract__ = True
    # The times that the database sets come back with the INSERT or UPDATE: later there may be no way to load them.
    __mapper_args__ = {"eager_defaults": True}  # noqa: RUF012 - SQLAlchemy declares it so
    # Beside `__dict__`, which is for the attributes alone.
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
                        self._written = _NEVER  # What came out of the database has no such mark.
                        entity: Any = self  # whose attributes pyright takes for those of its class
                        entity.__dict__ = values
                        return
            except KeyError:
                late.check_names(values)
            if "_sa_instance_state" not in self.__dict__:
                late.construct(self, **values)  # It comes back here, with the state made.
                return
        self.registry.constructor(self, **values)

    def __getstate__(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return vars(self), {_WRITTEN: _NEVER if _is_new(self) else None}

    def __copy__(self) -> Self:
        copied = type(self).__new__(type(self))
        vars(copied).update(vars(self))
        setattr(copied, _WRITTEN, _NEVER if _is_new(self) else None)
        if (state := vars(self).get("_sa_instance_state")) is not None:
            # SQLAlchemy's would go on to speak of the original.
            own = vars(copied)["_sa_instance_state"] = InstanceState(copied, state.manager)
            own.key, own.expired_attributes = state.key, set(state.expired_attributes)
        return copied


class _Late:
    """What the constructor of a class whose states are late goes by: whether anybody is to hear of a new instance."""

    def __init__(self, model: type[Entity]) -> None:
        manager = model.__mapper__.class_manager
        self._model = model
        self.listeners = {name: manager[name].dispatch for name in attribute_names(model)}
        self.nobody = self.listeners[attribute_names(model)[0]].set
        """What SQLAlchemy has in the place of an attribute's listeners before there are any; after them it is empty."""
        self.init_listeners = manager.dispatch.init.listeners
        self.of_sqlalchemy = len(self.init_listeners)
        self.construct = model.__init__
        """The constructor as SQLAlchemy has instrumented it: it makes the state at once, and its listeners hear of it.
        """

    def check_names(self, values: dict[str, Any]) -> None:
        """Refuse what is not mapped; a service's backrefs are when the mappers are configured.

        Raises:
            TypeError: There is no such attribute.
        """
        unknown = values.keys() - inspect(self._model).all_orm_descriptors.keys()
        if unknown:
            raise TypeError(f"{self._model.__name__} has no attribute {', '.join(sorted(unknown))}") from None


_LATE: dict[type[Entity], _Late] = {}


def make_late(model: type[Entity]) -> None:
    """Leave SQLAlchemy's states of a model's instances for later; its mapper must be configured."""
    _LATE[model] = _Late(model)
    delattr(model, "__init__")  # That of SQLAlchemy, which would make the state at once.


def _is_new(entity: Entity) -> bool:
    written: Writes | None = getattr(entity, _WRITTEN, None)
    return written is not None and not written.stand


def mark_written(entity: Entity, writes: Writes) -> None:
    """Let a session that takes up an aggregate know that its row is there, unless that is rolled back."""
    if "_sa_instance_state" not in vars(entity):
        if _is_new(entity):
            setattr(entity, _WRITTEN, writes)
        return
    state = inspect(entity)
    if state.key is None:
        writes.states.append(ref(state))
        session = state.session
        if session is not None:  # It was to be added by its next flush.
            session.expunge(entity)
        make_transient_to_detached(entity)
        if session is not None:
            session.add(entity)


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


def attribute_of(table: str, column: str) -> str | None:
    """Return the attribute that a column is mapped to, such as `Node.name`, or None where it is to none."""
    for mapper in Base.registry.mappers:
        model: type[Base] = mapper.class_
        columns = [each.name for each in table_of(model).columns]
        if mapper.inherits is None and table_of(model).name == table and column in columns:
            return f"{model.__name__}.{attribute_names(model)[columns.index(column)]}"
    return None


@cache
def deferred_names(model: type[Base]) -> frozenset[str]:
    """Return the names of the attributes that are in no aggregate unless a session is asked for them."""
    return frozenset(prop.key for prop in model.__mapper__.column_attrs if prop.deferred)


@cache
def _key_names(mapper: Mapper[Any]) -> tuple[str, ...]:
    """Return the names of the attributes of the primary key, in its order."""
    return tuple(mapper.get_property_by_column(column).key for column in mapper.primary_key)
