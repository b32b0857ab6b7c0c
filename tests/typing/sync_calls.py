"""What a type checker sees of the sync API; see test_types.py."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, assert_type

from sqlalchemy.orm import Session

from mesh_storage import (
    ConfigEntry,
    Health,
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
    StateEntry,
    UnitOfWork,
)


def of_the_storage(storage: MeshStorage) -> None:
    assert_type(MeshStorage.open("memory:"), MeshStorage)
    assert_type(storage.health(), Health)
    assert_type(storage.close(), None)
    assert_type(storage.run(lambda uow: uow.messages.count()), int)
    assert_type(storage.run(lambda uow: uow.nodes.find("n"), isolation="serializable"), Node | None)
    unit: AbstractContextManager[UnitOfWork] = storage.unit_of_work(read_only=True)
    with storage.begin(timeout=1.0) as uow, unit, uow.savepoint():
        assert_type(uow, UnitOfWork)


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
    assert_type(uow.messages.store(Message(id="m")), Message)
    assert_type(uow.messages.store_many([]), int)
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


def of_an_error(error: NotFoundError) -> None:
    assert_type(error.entity, str)
    assert_type(error.retryable, bool)
    assert_type(error.sqlstate, str | None)
