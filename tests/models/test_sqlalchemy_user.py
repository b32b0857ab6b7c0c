"""An afternoon of one who knows SQLAlchemy and nothing of this library: the models are as good as any others.

On both sides, behind the names of the sync one.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import pytest
from fastapi.encoders import jsonable_encoder
from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection, Engine, ForeignKey, MetaData, event, func, inspect, select, update
from sqlalchemy.engine import ExecutionContext
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.orm import Mapped, backref, joinedload, mapped_column, relationship, selectinload, undefer
from sqlalchemy.orm.exc import DetachedInstanceError

from mesh_storage import (
    ConfigEntry,
    InvalidInputError,
    LogEntry,
    Mesh,
    MeshStorage,
    Message,
    Node,
    NodeState,
    Route,
    RoutingEntry,
    StateEntry,
    UnitOfWork,
)
from mesh_storage.models.base import Base, attribute_names, deferred_names, table_of
from tests.contract.conftest import opener


class Service(Base):
    """The base of a service's own models, whose tables are not in the metadata that other tests look at."""

    __abstract__ = True

    metadata = MetaData()


class Alert(Service):
    """Something that a service has to say about a node."""

    __tablename__ = "alerts"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]
    node_id: Mapped[str] = mapped_column(ForeignKey(table_of(Node).c.node_id, ondelete="CASCADE"))
    node: Mapped[Node] = relationship(backref=backref("alerts", lazy="raise_on_sql", passive_deletes="all"))


class Gateway(Node):
    """A service's own kind of node, of one table with ours."""


@pytest.fixture(params=["sync", "asyncio"])
def storage(request: pytest.FixtureRequest, mesh_storage_url: str) -> Iterator[MeshStorage]:
    """Yield a storage of one side, in a database that has the service's table too."""
    with MeshStorage.open(mesh_storage_url) as deploying, deploying.begin() as uow:
        Service.metadata.create_all(uow.session.connection())
    with opener(request.param) as opens, opens(mesh_storage_url) as opened:
        yield opened


@pytest.fixture
def uow(storage: MeshStorage) -> Iterator[UnitOfWork]:
    with storage.unit_of_work() as unit:
        yield unit


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """Yield the statements that sessions send, by their first word and table."""
    sent: list[str] = []

    def note(
        _connection: Connection, _cursor: object, statement: str, _parameters: object, context: object, _many: bool
    ) -> None:
        if isinstance(context, ExecutionContext):  # Those of repositories have no such context.
            sent.append(" ".join(statement.split()[:3]))

    event.listen(Engine, "before_cursor_execute", note)
    yield sent
    event.remove(Engine, "before_cursor_execute", note)


@contextmanager
def listening(target: Any, name: str, listener: Any) -> Generator[None]:
    event.listen(target, name, listener)
    try:
        yield
    finally:
        event.remove(target, name, listener)


def node(name: str = "node-a", **values: Any) -> Node:
    return Node(**{"name": name, "ip_address": "10.0.0.1", **values})


def message() -> Message:
    return Message(id="m", from_node="a", to_node="b", content=b"x", timestamp=5)


def two_nodes_and_a_route(uow: UnitOfWork) -> tuple[Node, Node, Route]:
    a, b = uow.nodes.add_many([node("a"), node("b")])
    return a, b, uow.routes.add(Route(source_node_id=a.id, target_node_id=b.id, cost=7))


def test_what_a_session_adds_has_its_id_its_defaults_and_its_times(storage: MeshStorage) -> None:
    mesh, route = Mesh(name="main"), Route(source=node("a"), target=node("b"))
    with storage.begin() as uow:
        uow.session.add_all([mesh, route])
    assert mesh.id.startswith("mesh_")
    assert route.id.startswith("route_")
    assert (route.source_node_id, route.target_node_id) == (route.source.id, route.target.id)
    for each in (mesh, route, route.source, route.target):
        assert each.status == "STATUS_PENDING"
        assert each.created is not None
        assert each.created == each.updated
    with storage.begin(read_only=True) as uow:
        for stored, added in ((uow.routes.get(route.id), route), (uow.nodes.get(route.source.id), route.source)):
            assert vars(stored) == {name: getattr(added, name) for name in attribute_names(type(added))}


@pytest.mark.parametrize(
    ("made", "attribute", "value", "time"),
    [
        (Mesh(name="main"), "name", "other", "updated"),
        (node(), "port", 5, "updated"),
        (StateEntry(key="k", value=b"1"), "value", b"2", "updated_at"),
        (NodeState(node_id="n", state={}), "state", {"load": 1}, "updated_at"),
        (RoutingEntry(destination="d", route={}), "route", [1], "updated_at"),
        (ConfigEntry(key="k", value=1), "value", None, "updated_at"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Base) else "",
)
def test_a_change_through_a_session_sets_when_it_was_updated(
    storage: MeshStorage, made: Base, attribute: str, value: Any, time: str
) -> None:
    made = copy.copy(made)
    with storage.begin() as uow:
        uow.session.add(made)
    before = getattr(made, time)
    with storage.begin() as uow:
        uow.session.add(made)
        setattr(made, attribute, value)
    assert getattr(made, time) > before
    assert getattr(made, attribute) == value
    with storage.begin(read_only=True) as uow:
        [stored] = uow.session.scalars(select(type(made))).all()
        assert (getattr(stored, attribute), getattr(stored, time)) == (value, getattr(made, time))


def test_a_bulk_update_sets_when_it_was_updated(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        before = uow.nodes.add_many([node("a"), node("b"), node("c", port=1)])
    with storage.begin() as uow:
        uow.session.execute(update(Node).where(Node.port == 8443).values(port=9000))
    with storage.begin(read_only=True) as uow:
        after = [uow.nodes.get(each.id) for each in before]
    assert [each.port for each in after] == [9000, 9000, 1]
    assert [now.updated > then.updated for now, then in zip(after, before, strict=True)] == [True, True, False]


def test_what_a_repository_returned_is_stored_to_a_session(storage: MeshStorage, statements: list[str]) -> None:
    touched = node("touched")
    assert inspect(touched).transient
    with storage.begin() as uow:
        nodes = uow.nodes.add_many([node("a"), node("b")])
        mesh = uow.meshes.add(Mesh(name="main"))
        changed = uow.meshes.get(mesh.id)
        changed.description = "changed"
        returned: list[Any] = [
            *nodes,
            uow.nodes.add(touched),
            uow.nodes.add(Gateway(name="gateway", ip_address="10.0.0.2")),
            uow.meshes.update(changed),
            uow.routes.add(Route(source_node_id=nodes[0].id, target_node_id=nodes[1].id)),
            uow.messages.store(message()),
            uow.state.put("k", b"v"),
            uow.node_states.put("n", {}),
            *uow.node_states.put_many({"m": {}}),
            uow.node_states.merge("o", {}),
            uow.consensus_log.append(1, 1, {}),
            uow.routing_table.put("d", {}),
            uow.runtime_config.put("k", 1),
        ]
        assert all(inspect(each).detached for each in returned)
        uow.session.add_all(returned)
        uow.session.flush()
        assert all(inspect(each).persistent for each in returned)
        assert statements == []
        touched.port = 5
    with storage.begin(read_only=True) as uow:
        assert uow.nodes.get(touched.id).port == 5
        assert uow.nodes.count() == 4
        assert uow.meshes.get(mesh.id).description == "changed"


class Undo(Exception):  # noqa: N818 - nothing went wrong
    """Ends a block without a commit."""


@pytest.mark.parametrize("taken", ["", "touched", "in the session", "changed in the session"])
@pytest.mark.parametrize("in_savepoint", [False, True])
def test_what_was_rolled_back_is_new_again(storage: MeshStorage, taken: str, in_savepoint: bool) -> None:
    made, kept = [node("a"), node("b"), message()], node("kept")

    def store(uow: UnitOfWork) -> None:
        uow.nodes.add(made[0])
        with uow.savepoint():
            uow.nodes.add_many([made[1]])
        uow.messages.store(made[2])
        for each in made if taken else []:
            assert inspect(each).detached
            if taken != "touched":
                uow.session.add(each)
        if taken.startswith("changed"):
            made[0].port = 5
        raise Undo

    with storage.begin() as uow:
        uow.nodes.add(kept)
    with pytest.raises(Undo), storage.begin() as uow:
        kept.port = 5
        uow.nodes.update(kept)
        store(uow)
    if in_savepoint:
        with storage.begin() as uow:
            with pytest.raises(Undo), uow.savepoint():
                store(uow)
            assert uow.nodes.count() == 1
    assert inspect(kept).detached
    assert all(inspect(each).transient for each in made)
    with storage.begin() as uow:
        uow.session.add_all(made)
    with storage.begin(read_only=True) as uow:
        assert (uow.nodes.count(), uow.messages.count()) == (3, 1)


def test_a_node_that_waits_for_a_flush_may_be_added_at_once(uow: UnitOfWork, statements: list[str]) -> None:
    waiting = node()
    uow.session.add(waiting)
    assert uow.nodes.add(waiting) is waiting
    assert inspect(waiting).persistent
    uow.session.flush()
    assert statements == []
    assert uow.nodes.count() == 1


def test_an_update_by_the_repository_leaves_a_session_nothing_to_store(uow: UnitOfWork, statements: list[str]) -> None:
    changed = uow.nodes.add(node())
    uow.session.add(changed)
    changed.port = 5
    uow.nodes.update(changed)
    uow.session.flush()
    assert statements == []
    assert uow.nodes.get(changed.id).port == 5


def test_what_a_repository_returned_is_stored_to_a_relationship(uow: UnitOfWork) -> None:
    a, b = uow.nodes.add(node("a")), uow.nodes.add(node("b"))
    alert = Alert(text="down", node=a)
    route = Route(source=a, target=b)
    uow.session.add_all([alert, route])
    uow.session.flush()
    assert (alert.node_id, route.source_node_id, route.target_node_id) == (a.id, a.id, b.id)
    assert uow.nodes.count() == 2
    assert uow.routes.get(route.id).source_node_id == a.id


def test_a_backref_of_a_service_is_an_argument_of_our_constructor(storage: MeshStorage) -> None:
    values: dict[str, Any] = {"alerts": [Alert(text="down"), Alert(text="up")]}
    assert vars(node(alerts=[]))["alerts"] == []
    with storage.begin() as uow:
        uow.session.add(node(**values))
    with storage.begin(read_only=True) as uow:
        alerts = uow.session.scalars(select(Alert).join(Alert.node).where(Node.name == "node-a")).all()
        assert sorted(each.text for each in alerts) == ["down", "up"]
        with pytest.raises(TypeError, match="Node has no attribute alarms"):
            node(alarms=[])


@pytest.mark.parametrize("name", ["nme", "metadata", "registry", "_sa_instance_state", "__dict__"])
def test_the_constructor_takes_nothing_that_is_not_mapped(name: str) -> None:
    with pytest.raises(TypeError, match=f"Node has no attribute {name}"):
        node(**{name: 1})


def test_a_join_goes_by_the_relationships(uow: UnitOfWork) -> None:
    a, b, route = two_nodes_and_a_route(uow)
    uow.node_states.put(b.id, {"load": 1})
    scalars = uow.session.scalars
    assert scalars(select(Node).join(Node.routes_out).where(Route.cost == 7)).all() == [uow.session.get(Node, a.id)]
    assert scalars(select(Node.id).join(Node.routes_in)).all() == [b.id]
    assert scalars(select(Route.id).join(Route.source).where(Node.name == "a")).all() == [route.id]
    assert scalars(select(Route.id).join(Route.target).where(Node.name == "a")).all() == []
    assert scalars(select(Node.id).join(Node.state).where(NodeState.state["load"].as_integer() == 1)).all() == [b.id]


def test_nothing_is_loaded_that_was_not_asked_for(uow: UnitOfWork, statements: list[str]) -> None:
    a, _, route = two_nodes_and_a_route(uow)
    uow.session.add_all([a, route])
    for access in (lambda: a.routes_out, lambda: a.routes_in, lambda: a.state, lambda: route.target):
        with pytest.raises(InvalidRequestError, match="raise_on_sql"):
            access()
    assert route.source is a  # It is in the session.
    assert statements == []


@pytest.mark.parametrize("load", [selectinload, joinedload])
def test_relationships_load_eagerly(storage: MeshStorage, load: Any) -> None:
    with storage.begin() as uow:
        a, b, route = two_nodes_and_a_route(uow)
        uow.node_states.put(a.id, {"load": 1})
    with storage.begin(read_only=True) as uow:
        query = (
            select(Node)
            .order_by(Node.name)
            .options(load(Node.routes_out).options(load(Route.target)), load(Node.routes_in), load(Node.state))
        )
        found = uow.session.scalars(query).unique().all()
    assert [each.id for each in found] == [a.id, b.id]
    assert [each.id for each in found[0].routes_out] == [route.id]
    assert found[0].routes_out[0].target is found[1]
    assert found[0].routes_out[0] is found[1].routes_in[0]
    assert found[0].state is not None
    assert found[0].state.state == {"load": 1}
    assert found[1].state is None


@pytest.mark.parametrize("loaded", [False, True])
def test_a_node_goes_with_its_routes_in_one_statement(uow: UnitOfWork, statements: list[str], loaded: bool) -> None:
    a, _, route = two_nodes_and_a_route(uow)
    options = [selectinload(Node.routes_out), selectinload(Node.routes_in)] if loaded else []
    found = uow.session.scalars(select(Node).where(Node.id == a.id).options(*options)).one()
    statements.clear()
    uow.session.delete(found)
    uow.session.flush()
    assert statements == ["DELETE FROM nodes"]
    assert uow.routes.find(route.id) is None


def test_a_route_goes_alone(uow: UnitOfWork, statements: list[str]) -> None:
    a, b, route = two_nodes_and_a_route(uow)
    uow.session.delete(route)
    uow.session.flush()
    assert statements == ["DELETE FROM routes"]
    assert [uow.nodes.find(each.id) is None for each in (a, b)] == [False, False]


def test_a_session_has_one_object_for_a_row(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        stored = uow.nodes.add(node())
        uow.session.add(stored)
        assert uow.session.scalars(select(Node)).all() == [stored]
        assert uow.session.get(Node, stored.id) is stored
    with storage.begin(read_only=True) as uow:
        first, second = (uow.session.scalars(select(Node)).one() for _ in range(2))
        assert first is second
        assert first is not stored
        with pytest.raises(InvalidRequestError, match="already present"):
            uow.session.add(uow.nodes.get(stored.id))


def test_merge_refresh_and_expire(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        stored = uow.nodes.add(node())
    stored.port = 5
    with storage.begin() as uow:
        merged = uow.session.merge(stored)
        assert merged is not stored
        assert merged.port == 5
    with storage.begin() as uow:
        found = uow.nodes.get(stored.id)
        assert found.port == 5
        uow.session.add(found)
        uow.session.execute(update(Node).values(port=6).execution_options(synchronize_session=False))
        assert found.port == 5
        uow.session.refresh(found)
        assert found.port == 6
        uow.session.expire(found)
        assert "port" not in vars(found)
        uow.session.refresh(found, ["port"])
        assert found.port == 6


def test_attribute_events_are_heard_in_the_constructor_too() -> None:
    heard: list[Any] = []

    def note(_node: Node, value: Any, *_: object) -> None:
        heard.append(value)

    node(port=1)
    with listening(Node.port, "set", note):
        made = node(port=2)
        made.port = 3
        node()
    assert vars(node(port=4))["port"] == 4
    assert "_sa_instance_state" not in vars(node(port=4))
    assert heard == [2, 3]


def test_a_constructor_may_be_listened_to() -> None:
    heard: list[Any] = []

    def note(_node: Node, _args: Any, values: dict[str, Any]) -> None:
        heard.append(values["name"])
        values.setdefault("region_id", "north")

    with listening(Node, "init", note):
        assert node("a").region_id == "north"
        assert node("b", region_id="south").region_id == "south"
    assert list(vars(node("c"))) == ["name", "ip_address"]
    assert heard == ["a", "b"]


def test_mapper_events_are_heard(uow: UnitOfWork) -> None:
    heard: list[str] = []

    def note(name: str) -> Any:
        return lambda _mapper, _connection, target: heard.append(f"{name} {target.name}")

    with (
        listening(Node, "before_insert", note("before_insert")),
        listening(Node, "after_update", note("after_update")),
        listening(Node, "before_delete", note("before_delete")),
    ):
        made = node()
        uow.session.add(made)
        uow.session.flush()
        made.port = 5
        uow.session.flush()
        uow.session.delete(made)
        uow.session.flush()
    assert heard == ["before_insert node-a", "after_update node-a", "before_delete node-a"]


class Shown(BaseModel):
    """A node as a service answers it."""

    model_config = ConfigDict(from_attributes=True)

    id: str
    name: str
    port: int
    created: datetime


@pytest.mark.parametrize("taken", [False, True], ids=["read", "in a session"])
def test_pydantic_and_fastapi_show_what_is_mapped(uow: UnitOfWork, taken: bool) -> None:
    stored = uow.nodes.get(uow.nodes.add(node()).id)
    mesh = uow.meshes.add(Mesh(name="main"))
    uow.meshes.set_join_key(mesh.id, "secret")
    found = uow.meshes.get(mesh.id)
    if taken:
        uow.session.add_all([stored, mesh])
        found = uow.session.scalars(select(Mesh)).one()
    shown = Shown.model_validate(stored)
    assert (shown.id, shown.name, shown.created) == (stored.id, "node-a", stored.created)
    assert list(jsonable_encoder(stored)) == list(attribute_names(Node))
    visible = [name for name in attribute_names(Mesh) if name != "join_key_hash"]
    for each in (mesh, found):
        assert sorted(jsonable_encoder(each)) == sorted(visible)
        assert "scrypt" not in repr(each) + repr(vars(each)) + pickle.dumps(each).decode("latin-1")


def test_the_hash_of_a_join_key_is_given_to_who_asks_for_it(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        mesh = uow.meshes.add(Mesh(name="main"))
        uow.meshes.set_join_key(mesh.id, "secret")
    with pytest.raises(DetachedInstanceError):
        str(mesh.join_key_hash)
    with storage.begin(read_only=True) as uow:
        found = uow.session.scalars(select(Mesh)).one()
        with pytest.raises(InvalidRequestError, match="raiseload"):
            str(found.join_key_hash)
        asked = uow.session.scalars(
            select(Mesh).options(undefer(Mesh.join_key_hash)).execution_options(populate_existing=True)
        ).one()
        assert str(asked.join_key_hash).startswith("scrypt$")
    with storage.begin() as uow:
        copied = Mesh(name="copy", allow_join=True, join_key_hash=asked.join_key_hash)
        assert "join_key_hash" not in vars(uow.meshes.add(copied))
        assert [uow.meshes.admits(copied.id, key) for key in ("secret", "other")] == [True, False]


def test_an_aggregate_holds_its_attributes_and_nothing_else(uow: UnitOfWork) -> None:
    made = node(port=5)
    assert vars(made) == {"name": "node-a", "ip_address": "10.0.0.1", "port": 5}
    a, b = uow.nodes.add(made), uow.nodes.add_many([node("b")])[0]
    entities: list[Any] = [
        a,
        b,
        uow.nodes.get(a.id),
        uow.nodes.page().items[0],
        next(iter(uow.nodes.stream())),
        uow.routes.add(Route(source_node_id=a.id, target_node_id=b.id)),
        uow.messages.store(message()),
        uow.state.put("k", b"v"),
        uow.node_states.put("n", {}),
        uow.consensus_log.append(1, 1, {}),
        uow.consensus_log.get(1),
        uow.routing_table.put("d", {}),
        uow.runtime_config.put("k", 1),
    ]
    for each in entities:
        assert sorted(vars(each)) == sorted(set(attribute_names(type(each))) - deferred_names(type(each)))
    assert list(vars(LogEntry(term=1, index=1, entry={}))) == ["term", "index", "entry"]


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])  # noqa: S301
def test_so_is_a_copy_of_a_subclass(how: Any) -> None:
    gateway = Gateway(name="gateway", ip_address="10.0.0.2")
    copied = how(gateway)
    assert inspect(copied).transient
    assert inspect(copied) is not inspect(gateway)
    copied.name = "other"
    assert gateway.name == "gateway"


@pytest.mark.parametrize("touched", [False, True])
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])  # noqa: S301
def test_a_copy_is_as_new_or_stored_as_its_original(storage: MeshStorage, how: Any, touched: bool) -> None:
    with storage.begin() as uow:
        stored = uow.node_states.put("n", {"load": [1]})
    new = NodeState(node_id="new", state={"load": [2]})
    if touched:
        assert inspect(stored).detached
        assert inspect(new).transient
    copied, other = how(stored), how(new)
    assert (inspect(copied).detached, inspect(other).transient) == (True, True)
    assert inspect(copied) is not inspect(stored)
    copied.state = {"load": [3]}
    assert not inspect(stored).modified
    with storage.begin() as uow:
        uow.session.add_all([copied, other])
    with storage.begin(read_only=True) as uow:
        assert {each.node_id: each.state for each in uow.node_states.stream()} == {
            "n": {"load": [3]},
            "new": {"load": [2]},
        }
    assert stored.state == {"load": [1]}


def test_a_change_that_waits_goes_with_a_pickle(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        stored = uow.nodes.add(node())
    stored.port = 5
    with storage.begin() as uow:
        uow.session.add(pickle.loads(pickle.dumps(stored)))  # noqa: S301 - our own
    with storage.begin(read_only=True) as uow:
        assert uow.nodes.get(stored.id).port == 5


def test_a_subclass_of_a_service_has_all_of_sqlalchemy_at_once(uow: UnitOfWork) -> None:
    gateway = Gateway(name="gateway", ip_address="10.0.0.2", alerts=[])
    assert inspect(gateway).transient
    assert not isinstance(node(), Gateway)
    with pytest.raises(TypeError, match="nme"):
        Gateway(nme="gateway")
    uow.session.add(gateway)
    uow.session.flush()
    assert gateway.created is not None
    assert uow.session.scalar(select(func.count()).select_from(Node)) == 1


def test_an_error_of_the_session_names_the_attribute(storage: MeshStorage) -> None:
    with pytest.raises(InvalidInputError) as bad_port, storage.begin() as uow:
        uow.session.add(node(port=0))
    assert bad_port.value.field == "Node.port"
    with pytest.raises(InvalidInputError) as no_name, storage.begin() as uow:
        uow.session.add(Mesh(description="nameless"))
    assert no_name.value.field == "Mesh.name"
    with pytest.raises(InvalidInputError) as removed, storage.begin() as uow:
        a, *_ = two_nodes_and_a_route(uow)
        found = uow.session.scalars(select(Node).where(Node.id == a.id).options(selectinload(Node.routes_out))).one()
        found.routes_out.clear()
        with pytest.raises(IntegrityError) as refused:
            uow.session.flush()
        raise refused.value
    assert removed.value.field == "Route.source_node_id"
