"""What a type checker must refuse, each line by itself; see test_types.py."""
# ruff: noqa: B018, ARG005 - they are never run

from __future__ import annotations

from mesh_storage import (
    ConfigEntry,
    LogEntry,
    Mesh,
    MeshStorage,
    Message,
    Node,
    NodeState,
    Route,
    RoutingEntry,
    Settings,
    StateEntry,
    UnitOfWork,
)
from mesh_storage.aio import AsyncMeshStorage, AsyncUnitOfWork
from mesh_storage.testing import NodeFactory


def sync_side(storage: MeshStorage, uow: UnitOfWork) -> None:
    uow.state.put("key", "text")  # wrong
    uow.state.get(5)  # wrong
    uow.messages.store(Node(name="n", ip_address="i"))  # wrong
    uow.messages.page(100)  # wrong
    uow.consensus_log.append(1, "1", {})  # wrong
    uow.nodes.find("n").name  # wrong
    uow.no_such_repository  # wrong
    storage.begin(isolation="chaos")  # wrong
    storage.begin(durability="eternal")  # wrong
    storage.run(5)  # wrong
    number: str = storage.run(lambda uow: uow.messages.count())  # wrong
    print(number)


async def async_side(storage: AsyncMeshStorage, uow: AsyncUnitOfWork) -> None:
    await uow.state.put("key", "text")  # wrong
    await uow.messages.store(Node(name="n", ip_address="i"))  # wrong
    uow.messages.get("m").content  # wrong
    await uow.messages.stream()  # wrong
    for _ in uow.messages.stream():  # wrong
        pass
    with storage.begin():  # wrong
        pass
    storage.begin(isolation="chaos")  # wrong
    await storage.run(lambda uow: 5)  # wrong
    entry: Message = await uow.state.get("k")  # wrong
    print(entry)


def models() -> None:
    Mesh(nme="m", name="m")  # wrong
    Mesh()  # wrong
    Mesh(name=5)  # wrong
    Node(nme="n", name="n", ip_address="i")  # wrong
    Node(name="n")  # wrong
    Node(ip_address="i")  # wrong
    Node(name=5, ip_address="i")  # wrong
    Node(name="n", ip_address="i", port="8443")  # wrong
    Node("n", "i")  # wrong
    Route(source="a", source_node_id="a", target_node_id="b")  # wrong
    Route(source_node_id="a")  # wrong
    Route(source_node_id="a", target_node_id="b", cost="7")  # wrong
    Message(text="t", id="m", from_node="a", to_node="b", content=b"")  # wrong
    Message(id="m", from_node="a", content=b"")  # wrong
    Message(id="m", from_node="a", to_node="b", content="text")  # wrong
    StateEntry(name="k", key="k", value=b"")  # wrong
    StateEntry(key="k")  # wrong
    StateEntry(key="k", value="text")  # wrong
    NodeState(node="n", node_id="n", state={})  # wrong
    NodeState(node_id="n")  # wrong
    NodeState(node_id=5, state={})  # wrong
    LogEntry(key=1, term=1, index=1, entry={})  # wrong
    LogEntry(term=1, index=1)  # wrong
    LogEntry(term="1", index=1, entry={})  # wrong
    RoutingEntry(to="d", destination="d", route={})  # wrong
    RoutingEntry(destination="d")  # wrong
    RoutingEntry(destination=5, route={})  # wrong
    ConfigEntry(name="k", key="k", value=1)  # wrong
    ConfigEntry(key="k")  # wrong
    ConfigEntry(key=5, value=1)  # wrong


def settings() -> None:
    Settings(pool_sze=3)  # wrong
    Settings(pool_size="three")  # wrong


async def factories(uow: UnitOfWork, async_uow: AsyncUnitOfWork) -> None:
    NodeFactory.create(name="n")  # wrong
    NodeFactory.create(uow=async_uow).name  # wrong
    await NodeFactory.create(uow=uow)  # wrong
