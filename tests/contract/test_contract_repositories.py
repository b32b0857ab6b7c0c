"""Shows every method of every repository, with the same results on the sync and the async side."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

from mesh_storage import (
    AlreadyExistsError,
    ConflictError,
    InvalidInputError,
    LogEntry,
    Mesh,
    MeshStorage,
    Message,
    MissingReferenceError,
    Node,
    NotFoundError,
    Page,
    Route,
    UnitOfWork,
    repositories,
)
from mesh_storage.models.base import new_id
from mesh_storage.repositories.base import Repository

REPOSITORIES: dict[str, type[Repository[Any]]] = {
    "meshes": repositories.MeshRepository,
    "nodes": repositories.NodeRepository,
    "routes": repositories.RouteRepository,
    "messages": repositories.MessageRepository,
    "state": repositories.StateRepository,
    "node_states": repositories.NodeStateRepository,
    "consensus_log": repositories.ConsensusLogRepository,
    "routing_table": repositories.RoutingTableRepository,
    "runtime_config": repositories.RuntimeConfigRepository,
}


def message(number: int, **given: Any) -> Message:
    parts = {"id": f"m{number}", "from_node": "a", "to_node": "b", "content": b"hello", "timestamp": number}
    return Message(**(parts | given))


def node(name: str, **given: Any) -> Node:
    return Node(name=name, ip_address="10.0.0.1", **given)


def entry(index: int, term: int = 1, **given: Any) -> LogEntry:
    return LogEntry(term=term, index=index, entry=given)


def each(name: str, aggregates: Iterable[Any]) -> list[Any]:
    return [getattr(aggregate, name) for aggregate in aggregates]


def test_this_file_and_those_of_versions_and_deliveries_call_every_method_of_every_repository() -> None:
    here, versions, deliveries = (
        Path(__file__).with_name(f"test_contract_{name}.py").read_text()
        for name in ("repositories", "versions", "deliveries")
    )
    called = set(re.findall(r"\buow\.(\w+)\.(\w+)\(", here + versions + deliveries))
    # There, most tests are run with each of the two.
    called |= {
        (name, method) for name in ("state", "runtime_config") for method in re.findall(r"\bown\.(\w+)\(", versions)
    }
    called |= {("messages", method) for method in re.findall(r'\bsettle\(storage, "(\w+)"', deliveries)}
    methods = {
        (name, method)
        for name, repository in REPOSITORIES.items()
        for method in dir(repository)
        if not method.startswith("_") and isinstance(getattr(repository, method), FunctionType)
    }
    assert len(methods) > 80
    assert methods == called & methods


DEFAULTS = {
    "page": ("limit", 100),
    "stale": ("limit", 1000),
    "stream": ("batch_size", 1000),
    "with_state": ("batch_size", 1000),
}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_pages_and_batches_have_their_sizes_where_none_is_given(name: str) -> None:
    repository = REPOSITORIES[name]
    for method, (parameter, default) in DEFAULTS.items():
        if hasattr(repository, method):
            assert inspect.signature(getattr(repository, method)).parameters[parameter].default == default


def test_meshes(uow: UnitOfWork) -> None:
    first = uow.meshes.add(Mesh(name="one", description="the first", public_key="key"))
    second, third = uow.meshes.add_many([Mesh(name="two", allow_join=True), Mesh(name="three")])
    assert first.id.startswith("mesh_")
    assert (second.status, second.description, third.allow_join) == ("STATUS_PENDING", "", False)
    assert uow.meshes.get(first.id).public_key == "key"
    assert uow.meshes.get_by_name("two").id == second.id
    assert uow.meshes.count() == 3
    first.description = "changed"
    assert uow.meshes.update(first) is first
    found = uow.meshes.find(first.id)
    assert found is not None
    assert found.description == "changed"
    page = uow.meshes.page(limit=2)
    assert each("id", page.items + uow.meshes.page(after=page.next).items) == sorted([first.id, second.id, third.id])
    assert each("id", uow.meshes.stream(batch_size=1)) == sorted([first.id, second.id, third.id])
    uow.meshes.delete(third.id)
    assert uow.meshes.find(third.id) is None
    with pytest.raises(NotFoundError) as error:
        uow.meshes.get_by_name("three")
    assert (error.value.entity, error.value.key) == ("Mesh", "three")


def test_meshes_admit_by_their_join_key(uow: UnitOfWork) -> None:
    open_, closed = uow.meshes.add_many([Mesh(name="open", allow_join=True), Mesh(name="closed")])
    assert uow.meshes.admits(open_.id)
    assert not uow.meshes.admits(closed.id)
    uow.meshes.set_join_key(open_.id, "secret")
    assert [uow.meshes.admits(open_.id, key) for key in ("secret", "wrong", None)] == [True, False, False]
    assert "join_key_hash" not in vars(uow.meshes.get(open_.id))
    uow.meshes.set_join_key(open_.id, None)
    assert uow.meshes.admits(open_.id)
    with pytest.raises(NotFoundError):
        uow.meshes.admits(new_id("mesh"))


def test_nodes(uow: UnitOfWork) -> None:
    region = new_id("region")
    one = uow.nodes.add(node("one", port=1, region_id=region, status="STATUS_CONNECTED"))
    two, three = uow.nodes.add_many([node("two", region_id=region), node("three")])
    ids = sorted([one.id, two.id, three.id])
    assert (two.port, two.status, two.platform) == (8443, "STATUS_PENDING", "linux-amd64")
    assert uow.nodes.get(one.id).port == uow.nodes.get_by_name("one").port == 1
    assert each("id", uow.nodes.page(limit=10).items) == each("id", uow.nodes.stream(batch_size=2)) == ids
    assert each("id", uow.nodes.page(status="STATUS_CONNECTED").items) == [one.id]
    assert sorted(each("name", uow.nodes.stream(region_id=region))) == ["one", "two"]
    assert (uow.nodes.count(), uow.nodes.count(region_id=region, status="STATUS_PENDING")) == (3, 1)
    two.version = "2.0.0"
    uow.nodes.update(two)
    uow.node_states.put(two.id, {"load": 1})
    states = {found.name: state and (found.version, state.state) for found, state in uow.nodes.with_state(batch_size=1)}
    assert states == {"one": None, "two": ("2.0.0", {"load": 1}), "three": None}
    uow.nodes.delete(three.id)
    assert uow.nodes.find(three.id) is None
    with pytest.raises(NotFoundError):
        uow.nodes.update(three)


def test_routes(uow: UnitOfWork) -> None:
    a, b, c = each("id", uow.nodes.add_many([node("a"), node("b"), node("c")]))
    there = uow.routes.add(Route(source_node_id=a, target_node_id=b, bidirectional=True, latency_ms=5, cost=1))
    onward, home = uow.routes.add_many(
        [Route(source_node_id=b, target_node_id=c), Route(source_node_id=c, target_node_id=a)]
    )
    assert uow.routes.get(there.id).latency_ms == 5
    assert each("id", uow.routes.between(a, b)) == each("id", uow.routes.between(b, a)) == [there.id]
    assert uow.routes.between(c, b) == []
    assert each("id", uow.routes.for_node(b)) == sorted([there.id, onward.id])
    there.cost = 7
    uow.routes.update(there)
    found = uow.routes.find(there.id)
    assert found is not None
    assert found.cost == 7
    page = uow.routes.page(limit=1)
    assert (len(page.items), page.next is None) == (1, False)
    assert each("id", uow.routes.stream()) == sorted([there.id, onward.id, home.id])
    uow.routes.delete(home.id)
    assert uow.routes.count() == 2
    uow.nodes.delete(a)
    assert each("id", uow.routes.stream()) == [onward.id]


def test_messages(uow: UnitOfWork) -> None:
    stored = uow.messages.store(message(1))
    assert stored.created_at is not None
    assert uow.messages.store_many([message(number, to_node="c") for number in (3, 2, 1)[:2]]) == 2
    assert uow.messages.get("m1").content == b"hello"
    assert uow.messages.find("m9") is None
    assert each("id", uow.messages.page(since=2).items) == ["m2", "m3"]
    assert each("id", uow.messages.stream(to_node="c", until=3, batch_size=1)) == ["m2"]
    assert (uow.messages.count(from_node="a"), uow.messages.count(to_node="c")) == (3, 2)
    uow.messages.delete("m1")
    with pytest.raises(NotFoundError):
        uow.messages.delete("m1")


def test_storing_a_message_is_idempotent_and_never_overwrites(storage: MeshStorage) -> None:
    for _ in range(2):
        with storage.begin() as uow:
            first = uow.messages.store(message(1))
            assert uow.messages.store_many([message(2), message(2)]) in (0, 1)
    with storage.begin() as uow:
        assert uow.messages.store(message(1)).created_at == first.created_at
        with pytest.raises(AlreadyExistsError):
            uow.messages.store(message(1, content=b"other"))
        assert uow.messages.get("m1").content == b"hello"
    with storage.unit_of_work() as uow:
        assert uow.messages.count() == 2


def test_state(uow: UnitOfWork) -> None:
    assert uow.state.put("a.1", b"\0\xff").value == b"\0\xff"
    uow.state.put("a.2", b"")
    uow.state.put("b", b"other")
    assert uow.state.put("a.1", b"new").created_at == uow.state.get("a.1").created_at
    assert each("value", uow.state.page("a.").items) == each("value", uow.state.stream("a.")) == [b"new", b""]
    assert (uow.state.count(), uow.state.count("a.")) == (3, 2)
    uow.state.delete("b")
    assert uow.state.find("b") is None


def test_node_states(uow: UnitOfWork) -> None:
    assert uow.node_states.put("n1", {"load": 1, "up": True}).state == {"load": 1, "up": True}
    assert each("node_id", uow.node_states.put_many({"n3": None, "n2": [1, "two", 3.5]})) == ["n3", "n2"]
    assert uow.node_states.merge("n1", {"load": 2}).state == {"load": 2, "up": True}
    assert uow.node_states.merge("n4", {"new": 1}).state == uow.node_states.get("n4").state == {"new": 1}
    with pytest.raises(ConflictError):
        uow.node_states.merge("n2", {"load": 1})
    assert uow.node_states.stale(timedelta(hours=1)) == []
    assert each("node_id", uow.node_states.stale(timedelta(seconds=-1), limit=3)) == ["n1", "n2", "n3"]
    assert each("node_id", uow.node_states.page(limit=2).items) == ["n1", "n2"]
    assert each("state", uow.node_states.stream(batch_size=3))[1:3] == [[1, "two", 3.5], None]
    uow.node_states.delete("n4")
    assert (uow.node_states.count(), uow.node_states.find("n4")) == (3, None)


def test_consensus_log(uow: UnitOfWork) -> None:
    assert (uow.consensus_log.first_index(), uow.consensus_log.last_index(), uow.consensus_log.last_term()) == (0, 0, 0)
    assert uow.consensus_log.append(1, 5, {"n": 5}).created_at is not None
    uow.consensus_log.append_many([entry(6, n=6), entry(7, term=2, n=7), entry(8, term=2, n=8)])
    assert (uow.consensus_log.first_index(), uow.consensus_log.last_index(), uow.consensus_log.last_term()) == (5, 8, 2)
    assert each("entry", uow.consensus_log.range(6, 7)) == [{"n": 6}, {"n": 7}]
    assert uow.consensus_log.get(8).entry == {"n": 8}
    assert uow.consensus_log.find(9) is None
    with pytest.raises(InvalidInputError):
        uow.consensus_log.delete_range(6, 7)
    assert uow.consensus_log.delete_range(1, 5) == 1
    assert uow.consensus_log.delete_range(8, 100) == 1
    assert (uow.consensus_log.count(), each("index", uow.consensus_log.range(1, 100))) == (2, [6, 7])


@pytest.mark.parametrize(
    "breach",
    [entry(2, n="other"), entry(2, term=2, n=2), entry(4, n=4), entry(3, term=0, n=3)],
    ids=["another entry", "another term", "a gap", "a falling term"],
)
def test_a_breach_of_the_rules_of_the_log_is_a_conflict(uow: UnitOfWork, breach: LogEntry) -> None:
    uow.consensus_log.append_many([entry(1, n=1), entry(2, n=2)])
    assert uow.consensus_log.append(1, 2, {"n": 2}).index == 2
    with pytest.raises(ConflictError):
        uow.consensus_log.append(breach.term, breach.index, breach.entry)
    with pytest.raises(ConflictError):
        uow.consensus_log.append_many([breach])
    assert each("entry", uow.consensus_log.range(1, 9)) == [{"n": 1}, {"n": 2}]


def test_routing_table(uow: UnitOfWork) -> None:
    assert uow.routing_table.put("a", {"hop": "b"}).route == {"hop": "b"}
    assert each("destination", uow.routing_table.put_many({"c": 1, "b": 2})) == ["c", "b"]
    assert uow.routing_table.all() == {"a": {"hop": "b"}, "b": 2, "c": 1}
    uow.routing_table.replace_all({"b": 2, "d": None})
    assert uow.routing_table.all() == {"b": 2, "d": None}
    assert uow.routing_table.get("b").route == 2
    assert uow.routing_table.find("a") is None
    assert each("route", uow.routing_table.page().items) == each("route", uow.routing_table.stream()) == [2, None]
    uow.routing_table.delete("d")
    assert uow.routing_table.count() == 1


def test_runtime_config(uow: UnitOfWork) -> None:
    assert uow.runtime_config.put("gossip.interval_ms", 500).value == 500
    uow.runtime_config.put("gossip.peers", ["a"])
    uow.runtime_config.put("other", None)
    assert uow.runtime_config.value("gossip.interval_ms") == uow.runtime_config.get("gossip.interval_ms").value
    assert (uow.runtime_config.value("missing", None), uow.runtime_config.value("other", 5)) == (None, None)
    assert uow.runtime_config.all("gossip.") == {"gossip.interval_ms": 500, "gossip.peers": ["a"]}
    assert each("key", uow.runtime_config.page("gossip.", limit=1).items) == ["gossip.interval_ms"]
    assert each("value", uow.runtime_config.stream()) == [500, ["a"], None]
    assert (uow.runtime_config.count("gossip."), uow.runtime_config.find("missing")) == (2, None)
    uow.runtime_config.delete("other")
    with pytest.raises(NotFoundError):
        uow.runtime_config.value("other")


def pages(uow: UnitOfWork, **given: Any) -> list[Page[Message]]:
    found = [uow.messages.page(**given)]
    while found[-1].next is not None:
        found.append(uow.messages.page(**given, after=found[-1].next))
    return found


def test_pages_give_everything_once_and_in_order(uow: UnitOfWork) -> None:
    uow.messages.store_many(message(number, timestamp=number // 3) for number in range(10, 30))
    for limit in (1, 7, 20, 21):
        assert [id_ for page in pages(uow, limit=limit) for id_ in each("id", page.items)] == [
            f"m{number}" for number in range(10, 30)
        ]
    with pytest.raises(InvalidInputError) as error:
        uow.messages.page(after="no cursor")
    assert error.value.field == "after"


def test_a_stream_gives_everything_and_may_be_left_early(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.messages.store_many(message(number) for number in range(100, 125))
        for batch_size in (1, 5, 24, 25, 26):
            assert each("timestamp", uow.messages.stream(batch_size=batch_size)) == list(range(100, 125))
        for found in uow.messages.stream(batch_size=2):
            if found.timestamp == 104:
                break
        left = uow.messages.stream(batch_size=2)
        assert next(left).timestamp == 100
        uow.messages.delete("m124")
        left.close()
    assert storage.health().pool_in_use == 0
    with storage.unit_of_work() as uow:
        assert uow.messages.count() == 24


def test_two_streams_and_other_calls_may_take_turns(uow: UnitOfWork) -> None:
    uow.messages.store_many(message(number) for number in range(10, 16))
    for one, other in zip(uow.messages.stream(batch_size=1), uow.messages.stream(batch_size=2), strict=True):
        assert one.id == other.id
        uow.state.put(one.id, b"seen")
    assert uow.state.count() == 6


def test_a_missing_reference_is_told(storage: MeshStorage) -> None:
    with pytest.raises(MissingReferenceError) as error, storage.begin() as uow:
        uow.routes.add(Route(source_node_id=new_id("node"), target_node_id=new_id("node")))
    assert error.value.sqlstate == "23503"
    assert error.value.constraint is not None
    assert not error.value.retryable


def test_one_object_is_not_added_twice(uow: UnitOfWork) -> None:
    mesh = Mesh(name="one")
    with pytest.raises(InvalidInputError) as error:
        uow.meshes.add_many([mesh, Mesh(name="two"), mesh])
    assert error.value.field == "entities"
    assert uow.meshes.count() == 0
