"""Aggregates as Python objects: made, copied, pickled, taken up by a session, and subclassed by a service."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from sqlalchemy import MetaData, inspect
from sqlalchemy.orm import Mapped, mapped_column, validates

from mesh_storage import MeshStorage, Message, Node, StateEntry, UnitOfWork
from mesh_storage.models import Base


def message(**values: Any) -> Message:
    return Message(**{"id": "m", "from_node": "a", "to_node": "b", "content": b"x", **values})


@pytest.fixture
def stored(storage: MeshStorage) -> Message:
    with storage.begin() as uow:
        uow.messages.store(message())
    with storage.begin(read_only=True) as uow:
        return uow.messages.get("m")


def test_an_unknown_attribute_is_refused() -> None:
    with pytest.raises(TypeError, match="Message has no attribute text, title"):
        Message(id="m", title="", text="")


def test_one_that_was_read_is_detached_and_one_that_was_made_is_transient(stored: Message) -> None:
    assert inspect(stored).detached
    assert inspect(message()).transient
    assert not inspect(stored).modified


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("touched", [False, True])
def test_it_is_pickled_with_what_it_is(stored: Message, protocol: int, touched: bool) -> None:
    new = message(id="new")
    for aggregate, detached in ((stored, True), (new, False)):
        if touched:
            assert inspect(aggregate).detached == detached
        again = pickle.loads(pickle.dumps(aggregate, protocol))  # noqa: S301 - our own
        assert (again.id, again.content) == (aggregate.id, b"x")
        assert inspect(again).detached == detached


def test_a_copy_is_one_of_its_own(stored: Message) -> None:
    other = copy.copy(stored)
    other.content = b"y"
    assert stored.content == b"x"
    assert not inspect(stored).modified


def test_a_session_takes_up_what_was_read_and_stores_what_changes(storage: MeshStorage, stored: Message) -> None:
    with storage.begin() as uow:
        uow.session.add(stored)
        stored.content = b"changed"
    with storage.begin(read_only=True) as uow:
        assert uow.messages.get("m").content == b"changed"


def test_a_change_before_a_session_is_stored_too(storage: MeshStorage, stored: Message) -> None:
    stored.content = b"changed"
    with storage.begin() as uow:
        uow.session.add(stored)
    with storage.begin(read_only=True) as uow:
        assert uow.messages.get("m").content == b"changed"


def test_a_session_adds_deletes_and_merges(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.session.add(StateEntry(key="a", value=b"1"))
        uow.session.add(StateEntry(key="b", value=b"1"))
    with storage.begin() as uow:
        uow.session.delete(uow.state.get("a"))
        uow.session.merge(StateEntry(key="b", value=b"2"))
    with storage.begin(read_only=True) as uow:
        assert [(entry.key, entry.value) for entry in uow.state.stream()] == [("b", b"2")]


class Labelled(Node):
    """A service's own subclass, of one table with ours, with a constructor and an attribute that is not mapped."""

    def __init__(self, name: str, **values: Any) -> None:
        self.label = name.upper()
        super().__init__(name=name, ip_address="10.0.0.1", **values)

    @validates("port")
    def check_port(self, _key: str, port: int) -> int:
        assert port != 1
        return port


class Abstract(Base):
    """A service's own base."""

    __abstract__ = True

    metadata = MetaData()

    note: Mapped[str]


class Gateway(Abstract):
    """A service's own table."""

    __tablename__ = "gateway"

    node_id: Mapped[str] = mapped_column(primary_key=True)

    def __init__(self, **values: Any) -> None:
        super().__init__(**{"note": "made", **values})


@pytest.fixture
def gateway(uow: UnitOfWork) -> UnitOfWork:
    Abstract.metadata.create_all(uow.session.connection())
    return uow


def test_a_subclass_has_its_own_constructor_and_validation(storage: MeshStorage) -> None:
    labelled = Labelled("edge", port=8443)
    assert (labelled.label, labelled.name, labelled.port) == ("EDGE", "edge", 8443)
    with pytest.raises(AssertionError):
        Labelled("edge", port=1)
    with pytest.raises(TypeError, match="colour"):
        Labelled("edge", colour="red")
    with storage.begin() as uow:
        id_ = uow.nodes.add(labelled).id
    with storage.begin(read_only=True) as uow:
        assert uow.nodes.get(id_).port == 8443


def test_a_table_of_the_services_own_is_stored_by_the_session(gateway: UnitOfWork) -> None:
    node = gateway.nodes.add(Node(name="edge", ip_address="10.0.0.1"))
    gateway.session.add(Gateway(node_id=node.id))
    gateway.session.flush()
    gateway.session.expunge_all()
    found = gateway.session.get(Gateway, node.id)
    assert found is not None
    assert found.note == "made"
