"""Shows the nodes: registered one or many, found by name, filtered by status and region, read beside their state."""

from __future__ import annotations

import itertools
from datetime import datetime, timedelta, timezone
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from sqlalchemy import func, select

from mesh_storage import (
    AlreadyExistsError,
    InvalidInputError,
    MeshStorage,
    Node,
    NotFoundError,
    Route,
    Settings,
    UnitOfWork,
)
from mesh_storage.models.base import attribute_names, new_id
from mesh_storage.testing import MeshFactory, NodeFactory, RouteFactory

NORTH, SOUTH = new_id("region"), new_id("region")


def ids(nodes: Any) -> list[str]:
    return [node.id for node in nodes]


def test_add_gives_the_node_back_with_its_id_defaults_and_times(uow: UnitOfWork) -> None:
    node = Node(name="n", ip_address="10.0.0.1")
    assert uow.nodes.add(node) is node
    assert node.id.startswith("node_")
    assert (node.description, node.platform, node.version) == ("", "linux-amd64", "1.0.0")
    assert (node.region_id, node.public_key, node.port, node.status) == (None, "", 8443, "STATUS_PENDING")
    assert node.created is not None
    assert node.created == node.updated


def test_add_keeps_everything_that_is_given(storage: MeshStorage) -> None:
    values: dict[str, Any] = {
        "id": new_id("node"),
        "name": "n",
        "description": "d",
        "platform": "darwin-arm64",
        "version": "2.0.0",
        "region_id": NORTH,
        "public_key": "key",
        "ip_address": "fe80::1",
        "port": 65535,
        "status": "STATUS_CONNECTED",
    }
    with storage.begin() as uow:
        uow.nodes.add(Node(**values))
    with storage.unit_of_work() as uow:
        found = uow.nodes.get_by_name("n")
        assert {name: getattr(found, name) for name in values} == values


@pytest.mark.parametrize("taken", ["id", "name"])
def test_one_taken_id_or_name_refuses_all(uow: UnitOfWork, taken: str) -> None:
    there = NodeFactory.create(uow=uow)
    new = [NodeFactory.build(), NodeFactory.build(**{taken: getattr(there, taken)})]
    with pytest.raises(AlreadyExistsError) as error, uow.savepoint():
        uow.nodes.add_many(new)
    assert error.value.constraint == {"id": "nodes_pkey", "name": "nodes_node_name_key"}[taken]
    assert [node.created for node in new] == [None, None]
    assert ids(uow.nodes.stream()) == [there.id]


def test_add_many_refuses_one_name_given_twice(uow: UnitOfWork) -> None:
    with pytest.raises(AlreadyExistsError), uow.savepoint():
        uow.nodes.add_many([NodeFactory.build(name="n"), NodeFactory.build(name="n")])
    assert uow.nodes.count() == 0


def test_add_many_gives_them_back_in_the_order_given(uow: UnitOfWork) -> None:
    nodes = NodeFactory.build_batch(3)
    assert uow.nodes.add_many(iter(nodes)) == nodes
    assert uow.nodes.add_many([]) == []
    assert sorted(ids(nodes)) == ids(uow.nodes.stream())
    assert len({(node.created, node.updated) for node in nodes}) == 1


@given(texts=st.lists(st.none() | st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"])), max_size=9))
@example(["\\N", "\\.", "\\", "a\tb\nc\rd", "", None, "\x0b\x7f\u2028🕸", "\x1f\x1e"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_add_many_stores_texts_as_they_are(uow: UnitOfWork, texts: list[str | None]) -> None:
    added = uow.nodes.add_many([NodeFactory.build(description=text) for text in texts])
    assert [uow.nodes.get(node.id).description for node in added] == [text or "" for text in texts]


def test_some_of_many_say_what_others_leave_open(storage: MeshStorage) -> None:
    own_id, then = new_id("node"), datetime(2020, 2, 20, tzinfo=timezone(timedelta(hours=2)))
    with storage.begin() as uow:
        new = uow.nodes.add_many(
            [
                Node(name="a", ip_address="::1"),
                Node(name="b", ip_address="::1", id=own_id, created=then, port=1, region_id=NORTH, status=None),
                Node(name="c", ip_address="::1", updated=None, description=None, platform="os-9"),
            ]
        )
        now = uow.session.scalar(select(func.now()))
    _, b, _ = new
    assert b.id == own_id
    assert [node.created for node in new] == [now, then, now]
    assert [node.updated for node in new] == [now, now, now]
    assert [node.port for node in new] == [8443, 1, 8443]
    assert [node.region_id for node in new] == [None, NORTH, None]
    assert [node.platform for node in new] == ["linux-amd64", "linux-amd64", "os-9"]
    assert {node.status for node in new} == {"STATUS_PENDING"}
    names = attribute_names(Node)
    with storage.begin(read_only=True) as uow:
        for node in new:
            found = uow.nodes.get(node.id)
            assert {name: getattr(found, name) for name in names} == {name: getattr(node, name) for name in names}


def test_an_interrupt_among_many_does_not_wait_for_the_lock_that_the_server_waits_for(
    mesh_storage_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [new_id("node") for _ in range(2000)]
    settings_ = Settings(url=SecretStr(mesh_storage_url), pool_size=1, lock_timeout=0, statement_timeout=0)
    with MeshStorage.open(settings=settings_) as storage, psycopg.connect(mesh_storage_url) as other:
        other.execute("INSERT INTO nodes (node_id, node_name, ip_address) VALUES (%s, 'node-0', '::1')", [made[0]])
        ids_ = iter(made[1:1500])
        monkeypatch.setattr(
            "mesh_storage.repositories.infrastructure.base.new_id", lambda _: next(ids_, None) or interrupt()
        )
        with pytest.raises(KeyboardInterrupt), storage.begin() as uow:
            uow.nodes.add_many([Node(name=f"node-{n}", ip_address="::1") for n in range(2000)])
        other.rollback()
        with storage.begin(read_only=True) as uow:
            assert uow.nodes.count() == 0


def interrupt() -> str:
    raise KeyboardInterrupt


def test_a_read_only_unit_of_work_refuses_many_before_it_asks_the_server(storage: MeshStorage) -> None:
    with storage.unit_of_work(read_only=True, isolation="repeatable read") as uow:
        with pytest.raises(InvalidInputError, match="read-only"):
            uow.nodes.add_many([NodeFactory.build()])
        with storage.begin() as other:
            NodeFactory.create(uow=other)
        assert uow.nodes.count() == 1  # Its snapshot is taken only now.


def test_add_many_takes_ten_thousand_at_once(uow: UnitOfWork) -> None:
    uow.nodes.add_many(NodeFactory.build_batch(10_000))
    assert uow.nodes.count() == 10_000


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"id": "x"}, "id"),
        ({"id": "node_" + "I" * 26}, "id"),
        ({"id": new_id("node") + "\n"}, "id"),
        ({"name": ""}, "name"),
        ({"name": None}, "name"),
        ({"name": "x" * 256}, "name"),
        ({"ip_address": ""}, "ip_address"),
        ({"ip_address": None}, "ip_address"),
        ({"ip_address": "x" * 256}, "ip_address"),
        ({"platform": "x" * 256}, "platform"),
        ({"version": "x" * 256}, "version"),
        ({"description": "\0"}, "description"),
        ({"public_key": "\ud800"}, "public_key"),
        ({"region_id": ""}, "region_id"),
        ({"port": 0}, "port"),
        ({"port": 65536}, "port"),
        ({"port": -1}, "port"),
        ({"port": 2**31}, "port"),
        ({"port": 2**63}, "port"),
        ({"port": True}, "port"),
        ({"port": "8443"}, "port"),
        ({"port": 8443.0}, "port"),
        ({"status": "pending"}, "status"),
        ({"status": "STATUS_\n"}, "status"),
        ({"status": ""}, "status"),
        ({"status": "STATUS_" + "X" * 249}, "status"),
    ],
)
def test_a_node_that_cannot_be_stored_is_refused_by_name(uow: UnitOfWork, values: dict[str, Any], field: str) -> None:
    there = NodeFactory.create(uow=uow)
    with pytest.raises(InvalidInputError) as error, uow.savepoint():
        uow.nodes.add(NodeFactory.build(**values))
    assert error.value.field is not None
    assert field in error.value.field
    for name, value in values.items():
        setattr(there, name, value)
    if None in values.values() or "id" in values:
        return
    with pytest.raises(InvalidInputError) as error, uow.savepoint():
        uow.nodes.update(there)
    assert error.value.field is not None
    assert field in error.value.field


@pytest.mark.parametrize("given", [None, "node", 5, MeshFactory.build(), {"name": "n"}])
def test_what_is_no_node_is_refused(uow: UnitOfWork, given: Any) -> None:
    for call in (uow.nodes.add, uow.nodes.update, lambda node: uow.nodes.add_many([node])):
        with pytest.raises(InvalidInputError) as error:
            call(given)
        assert error.value.field == "Node"


def test_update_stores_what_was_changed_in_a_node_that_was_read(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        created = NodeFactory.create(uow=uow, region_id=NORTH)
    with storage.begin() as uow:
        node = uow.nodes.get(created.id)
        node.status, node.port, node.region_id = "STATUS_CONNECTED", 1, None
        assert uow.nodes.update(node) is node
    with storage.unit_of_work() as uow:
        found = uow.nodes.get(created.id)
        assert (found.status, found.port, found.region_id) == ("STATUS_CONNECTED", 1, None)
        assert (found.name, found.ip_address, found.created) == (created.name, created.ip_address, created.created)
        assert found.updated == node.updated
        assert found.updated is not None
        assert created.updated is not None
        assert found.updated > created.updated


def test_update_stores_the_default_for_none_where_there_is_one(storage: MeshStorage) -> None:
    def values(node: Node) -> tuple[Any, ...]:
        return node.description, node.platform, node.public_key, node.port, node.region_id, node.status

    with storage.begin() as uow:
        node = NodeFactory.create(uow=uow, region_id=NORTH, port=1, description="d", public_key="key", platform="os")
    for name in ("description", "platform", "public_key", "port", "region_id"):
        setattr(node, name, None)
    with storage.begin() as uow:
        uow.nodes.update(node)
        assert values(node) == ("", "linux-amd64", "", 8443, None, node.status)
        uow.session.add(node)
        assert not uow.session.is_modified(node)
    with storage.unit_of_work() as uow:
        assert values(uow.nodes.get(node.id)) == values(node)


def test_update_gives_an_object_that_was_made_anew_its_defaults(uow: UnitOfWork) -> None:
    there = NodeFactory.create(uow=uow, port=1, description="d")
    node = uow.nodes.update(Node(id=there.id, name="renamed", ip_address="::1", row_version=there.row_version))
    assert (node.description, node.port) == ("", 8443)
    found = uow.nodes.get(there.id)
    assert (found.name, found.description, found.port) == ("renamed", "", 8443)


def test_update_of_a_deleted_node_is_not_found_and_does_not_bring_it_back(uow: UnitOfWork) -> None:
    node = NodeFactory.create(uow=uow)
    uow.nodes.delete(node.id)
    with pytest.raises(NotFoundError) as error:
        uow.nodes.update(node)
    assert (error.value.entity, error.value.key) == ("Node", node.id)
    assert uow.nodes.count() == 0


def test_update_to_a_taken_name_is_refused(uow: UnitOfWork) -> None:
    first, second = NodeFactory.create_batch(2, uow=uow)
    second.name = first.name
    with pytest.raises(AlreadyExistsError) as error, uow.savepoint():
        uow.nodes.update(second)
    assert error.value.constraint == "nodes_node_name_key"


def test_get_by_name_finds_the_very_name(uow: UnitOfWork) -> None:
    node = NodeFactory.create(uow=uow, name="Node%_")
    assert uow.nodes.get_by_name("Node%_").id == node.id
    for other in ("node%_", "Node", "NodeXX", "Node%_ "):
        with pytest.raises(NotFoundError) as error:
            uow.nodes.get_by_name(other)
        assert (error.value.entity, error.value.key) == ("Node", other)


def test_delete_takes_the_routes_of_the_node_with_it(uow: UnitOfWork) -> None:
    a, b, c = ids(NodeFactory.create_batch(3, uow=uow))
    for source, target in ((a, b), (b, a), (b, c)):
        RouteFactory.create(uow=uow, source_node_id=source, target_node_id=target)
    uow.nodes.delete(a)
    assert [(route.source_node_id, route.target_node_id) for route in uow.routes.stream()] == [(b, c)]


def test_listings_are_filtered_by_status_and_region(uow: UnitOfWork) -> None:
    statuses, regions = ("STATUS_PENDING", "STATUS_CONNECTED"), (NORTH, SOUTH, None)
    nodes = [
        NodeFactory.create(uow=uow, status=status, region_id=region)
        for status, region, _ in itertools.product(statuses, regions, range(3))
    ]
    for status, region in itertools.product((*statuses, "STATUS_NONE", None), (NORTH, SOUTH, new_id("region"), None)):
        expected = [
            node.id for node in nodes if status in (None, node.status) and (region is None or region == node.region_id)
        ]
        assert uow.nodes.count(status=status, region_id=region) == len(expected)
        assert ids(uow.nodes.stream(status=status, region_id=region, batch_size=2)) == expected
        first = uow.nodes.page(status=status, region_id=region, limit=2)
        rest = uow.nodes.page(status=status, region_id=region, after=first.next).items if first.next else []
        assert ids(first.items) + ids(rest) == expected


@pytest.mark.parametrize("given", [{"status": ""}, {"status": "\0"}, {"status": 5}, {"region_id": ""}])
def test_a_filter_that_no_node_can_have_is_refused(uow: UnitOfWork, given: dict[str, Any]) -> None:
    calls: tuple[Any, ...] = (uow.nodes.page, uow.nodes.stream, uow.nodes.count)
    for call in calls:
        with pytest.raises(InvalidInputError) as error:
            list(call(**given))
        assert error.value.field == next(iter(given))


def test_with_state_gives_each_node_beside_its_state_or_none(uow: UnitOfWork) -> None:
    nodes = NodeFactory.create_batch(5, uow=uow)
    uow.node_states.put_many({nodes[1].id: {"status": "active"}, nodes[3].id: None, "node-unknown": 1})
    for batch_size in (1, 2, 5, 1000):
        pairs = list(uow.nodes.with_state(batch_size=batch_size))
        assert ids(node for node, _ in pairs) == ids(nodes)
        assert [None if state is None else (state.node_id, state.state) for _, state in pairs] == [
            None,
            (nodes[1].id, {"status": "active"}),
            None,
            (nodes[3].id, None),
            None,
        ]
    node, state = next(uow.nodes.with_state())
    assert isinstance(node, Node)
    assert state is None
    with pytest.raises(InvalidInputError):
        list(uow.nodes.with_state(batch_size=0))


def test_a_node_holds_no_more_than_its_columns(uow: UnitOfWork) -> None:
    route = RouteFactory.create(uow=uow)
    assert tuple(vars(uow.nodes.get(route.source_node_id))) == attribute_names(Node)
    assert tuple(vars(uow.routes.get(route.id))) == attribute_names(Route)


def test_related_objects_are_refused_and_not_lost(uow: UnitOfWork) -> None:
    other = uow.nodes.add(Node(name="other", ip_address="10.0.0.2"))
    with_route = Node(name="node", ip_address="10.0.0.1", routes_out=[Route(target_node_id=other.id)])
    for call in (lambda: uow.nodes.add(with_route), lambda: uow.nodes.add_many([with_route])):
        with pytest.raises(InvalidInputError, match=r"uow\.session") as error:
            call()
        assert error.value.field == "Node.routes_out"
