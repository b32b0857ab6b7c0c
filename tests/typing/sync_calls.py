"""What a type checker sees of the sync API; see test_types.py."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import AbstractContextManager
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, assert_type

from pydantic import SecretStr
from sqlalchemy import ForeignKey, Select, select
from sqlalchemy.orm import Mapped, Session, mapped_column, relationship

from mesh_storage import (
    Backlog,
    Cached,
    ConfigEntry,
    Delivery,
    Health,
    Lease,
    LogEntry,
    Mesh,
    MeshStorage,
    Message,
    Node,
    NodeState,
    NotFoundError,
    Page,
    Route,
    RoutingEntry,
    Settings,
    StateEntry,
    UnitOfWork,
)
from mesh_storage.models import Base
from mesh_storage.testing import LogEntryFactory, MeshFactory, NodeFactory, RouteFactory


def of_the_storage(storage: MeshStorage) -> None:
    assert_type(MeshStorage.open("memory:"), MeshStorage)
    assert_type(storage.health(), Health)
    assert_type(storage.close(), None)
    assert_type(storage.run(lambda uow: uow.messages.count()), int)
    assert_type(storage.run(lambda uow: uow.nodes.find("n"), isolation="serializable"), Node | None)
    unit: AbstractContextManager[UnitOfWork] = storage.unit_of_work(read_only=True)
    with storage.begin(timeout=1.0) as uow, unit, uow.savepoint():
        assert_type(uow, UnitOfWork)
    with storage.lease("leader", b"node-a", ttl=timedelta(seconds=10), wait=30) as lease:
        assert_type(lease, Lease)
        assert_type((lease.held, lease.token), tuple[bool, int])


def handle(uow: UnitOfWork, delivery: Delivery) -> None:
    assert_type(uow.state.put("k", delivery.message.content), StateEntry)


def of_replicas(storage: MeshStorage) -> None:
    with storage.begin(position=True) as uow:
        uow.state.put("k", b"v")
    assert_type(uow.position, str)
    assert_type(storage.position(), str)
    with storage.begin(read_only=True, replica=True, after=uow.position, max_lag=timedelta(seconds=1)) as reading:
        assert_type(reading, UnitOfWork)
    assert_type([each.lag for each in (storage.health()).replicas], list[timedelta | None])


def of_the_worker(storage: MeshStorage) -> None:
    assert_type(storage.consume("b", handle, batch=10, stop=threading.Event()), None)


def of_the_unit_of_work(uow: UnitOfWork) -> None:
    assert_type(uow.commit(), None)
    assert_type(uow.session, Session)
    assert_type(uow.meshes.add(Mesh(name="m")), Mesh)
    assert_type(uow.meshes.add_many([Mesh(name="m")]), list[Mesh])
    assert_type(uow.meshes.admits("m", "key"), bool)
    assert_type(uow.nodes.get("n"), Node)
    assert_type(uow.nodes.find("n"), Node | None)
    assert_type(uow.nodes.page(status="STATUS_PENDING"), Page[Node])
    assert_type(uow.nodes.page().items[0].port, int | None)
    assert_type(uow.nodes.page().next, str | None)
    assert_type(uow.routes.between("a", "b"), list[Route])
    assert_type(uow.messages.store(Message(id="m", from_node="a", to_node="b", content=b"")), Message)
    assert_type(uow.messages.store_many([]), int)
    assert_type(uow.messages.send(Message(id="m", from_node="a", to_node="b", content=b""), key="k"), Message)
    assert_type(uow.messages.claim("b", limit=5, lease=timedelta(seconds=5)), list[Delivery])
    assert_type(uow.messages.ack(uow.messages.claim("b")), None)
    assert_type(uow.messages.dead("b").items[0].reason, str | None)
    assert_type(uow.messages.backlog(), Backlog)
    assert_type(uow.messages.stream(since=5), Generator[Message, None, None])
    assert_type(uow.state.put("k", b"v"), StateEntry)
    assert_type(uow.state.get("k").value, bytes)
    assert_type(uow.node_states.merge("n", {"load": 1}), NodeState)
    assert_type(uow.node_states.stale(timedelta(hours=1)), list[NodeState])
    assert_type(uow.consensus_log.append(1, 1, {}), LogEntry)
    assert_type(uow.consensus_log.range(1, 5), list[LogEntry])
    assert_type(uow.routing_table.put("d", {}), RoutingEntry)
    assert_type(uow.routing_table.all(), dict[str, Any])
    assert_type(uow.runtime_config.put("k", 5), ConfigEntry)
    assert_type(uow.runtime_config.page("gossip."), Page[ConfigEntry])
    for node, state in uow.nodes.with_state():
        assert_type(node, Node)
        assert_type(state, NodeState | None)
    for message in uow.messages.stream():
        assert_type(message.content, bytes)


def of_a_cache(storage: MeshStorage) -> None:
    with storage.cached("redis://cache", max_age=30, poll=0.1) as cached:
        assert_type(cached, Cached)
        assert_type(cached.meshes.get("m"), Mesh)
        assert_type(cached.nodes.get_by_name("n"), Node)
        assert_type(cached.routes.for_node("n"), list[Route])
        assert_type(cached.state.find("k"), StateEntry | None)
        assert_type(cached.runtime_config.all(), dict[str, Any])
        assert_type(cached.routing_table.get("d"), RoutingEntry)


def of_the_factories(uow: UnitOfWork) -> None:
    assert_type(NodeFactory.build(name="n"), Node)
    assert_type(NodeFactory.build_batch(2), list[Node])
    assert_type(NodeFactory.create(uow=uow, name="n"), Node)
    assert_type(RouteFactory.create(uow=uow), Route)
    assert_type(MeshFactory.create_batch(2, uow=uow), list[Mesh])
    assert_type(LogEntryFactory.create_batch(2, uow=uow), list[LogEntry])


def of_the_models(now: datetime) -> None:
    Mesh(name="m", description=None, allow_join=True, status="STATUS_CONNECTED", public_key="", created=now)
    node = Node(id="n", name="n", ip_address="i", port=1, region_id="r", platform="p", version="1", updated=now)
    route = Route(source_node_id="a", target_node_id="b", latency_ms=Decimal(1), cost=1, source=node, target=node)
    Message(id="m", from_node="a", to_node="b", content=b"", timestamp=1)
    StateEntry(key="k", value=b"")
    NodeState(node_id="n", state={"load": [1, None]})
    LogEntry(term=1, index=1, entry="e")
    RoutingEntry(destination="d", route=None)
    ConfigEntry(key="k", value=5)
    assert_type(route.latency_ms, Decimal | None)
    assert_type(route.source, Node)
    assert_type(node.routes_out, list[Route])
    assert_type(node.state, NodeState | None)
    assert_type({node: node.id}, dict[Node, str])
    assert_type(select(Node).join(Node.routes_out), Select[Node])


def of_the_settings() -> None:
    assert_type(Settings(pool_size=3, url=SecretStr("memory:"), port="5432,5433").pool_size, int)


class Alert(Base):
    """A service's own model, whose constructor is SQLAlchemy's: what the database makes need not be given."""

    __tablename__ = "alerts"

    id: Mapped[int] = mapped_column(primary_key=True)
    node_id: Mapped[str] = mapped_column(ForeignKey("nodes.node_id"))
    node: Mapped[Node] = relationship()


def of_a_service(node: Node) -> None:
    assert_type(Alert(node=node).node, Node)


def of_an_error(error: NotFoundError) -> None:
    assert_type(error.entity, str)
    assert_type(error.retryable, bool)
    assert_type(error.sqlstate, str | None)
