"""What a type checker sees of the asyncio API; see test_types.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from typing import Any, assert_type

from sqlalchemy.ext.asyncio import AsyncSession

from mesh_storage import (
    Backlog,
    ConfigEntry,
    Delivery,
    Health,
    LogEntry,
    Mesh,
    Message,
    Node,
    NodeState,
    NotFoundError,
    Page,
    Route,
    RoutingEntry,
    StateEntry,
)
from mesh_storage.aio import AsyncCached, AsyncLease, AsyncMeshStorage, AsyncUnitOfWork
from mesh_storage.testing import LogEntryFactory, MeshFactory, NodeFactory, RouteFactory


async def of_the_storage(storage: AsyncMeshStorage) -> None:
    assert_type(await AsyncMeshStorage.open("memory:"), AsyncMeshStorage)
    async with AsyncMeshStorage.open() as entered:
        assert_type(entered, AsyncMeshStorage)
    assert_type(await storage.health(), Health)
    assert_type(await storage.close(), None)
    assert_type(await storage.run(lambda uow: uow.messages.count()), int)
    assert_type(await storage.run(lambda uow: uow.nodes.find("n"), isolation="serializable"), Node | None)
    unit: AbstractAsyncContextManager[AsyncUnitOfWork] = storage.unit_of_work(read_only=True)
    async with storage.begin(timeout=1.0) as uow, unit, uow.savepoint():
        assert_type(uow, AsyncUnitOfWork)
    async with storage.lease("leader", b"node-a", ttl=timedelta(seconds=10), wait=30) as lease:
        assert_type(lease, AsyncLease)
        assert_type((lease.held, lease.token), tuple[bool, int])


async def handle(uow: AsyncUnitOfWork, delivery: Delivery) -> None:
    assert_type(await uow.state.put("k", delivery.message.content), StateEntry)


async def of_replicas(storage: AsyncMeshStorage) -> None:
    async with storage.begin(position=True) as uow:
        await uow.state.put("k", b"v")
    assert_type(uow.position, str)
    assert_type(await storage.position(), str)
    async with storage.begin(read_only=True, replica=True, after=uow.position, max_lag=timedelta(seconds=1)) as reading:
        assert_type(reading, AsyncUnitOfWork)
    assert_type([each.lag for each in (await storage.health()).replicas], list[timedelta | None])


async def of_the_worker(storage: AsyncMeshStorage) -> None:
    assert_type(await storage.consume("b", handle, batch=10, stop=asyncio.Event()), None)


async def of_the_unit_of_work(uow: AsyncUnitOfWork) -> None:
    assert_type(await uow.commit(), None)
    assert_type(uow.session, AsyncSession)
    assert_type(await uow.meshes.add(Mesh(name="m")), Mesh)
    assert_type(await uow.meshes.add_many([Mesh(name="m")]), list[Mesh])
    assert_type(await uow.meshes.admits("m", "key"), bool)
    assert_type(await uow.nodes.get("n"), Node)
    assert_type(await uow.nodes.find("n"), Node | None)
    assert_type(await uow.nodes.page(status="STATUS_PENDING"), Page[Node])
    assert_type((await uow.nodes.page()).items[0].port, int | None)
    assert_type((await uow.nodes.page()).next, str | None)
    assert_type(await uow.routes.between("a", "b"), list[Route])
    assert_type(await uow.messages.store(Message(id="m", from_node="a", to_node="b", content=b"")), Message)
    assert_type(await uow.messages.store_many([]), int)
    assert_type(await uow.messages.send(Message(id="m", from_node="a", to_node="b", content=b""), key="k"), Message)
    assert_type(await uow.messages.claim("b", limit=5, lease=timedelta(seconds=5)), list[Delivery])
    assert_type(await uow.messages.ack(await uow.messages.claim("b")), None)
    assert_type((await uow.messages.dead("b")).items[0].reason, str | None)
    assert_type(await uow.messages.backlog(), Backlog)
    assert_type(uow.messages.stream(since=5), AsyncGenerator[Message, None])
    assert_type(await uow.state.put("k", b"v"), StateEntry)
    assert_type((await uow.state.get("k")).value, bytes)
    assert_type(await uow.node_states.merge("n", {"load": 1}), NodeState)
    assert_type(await uow.node_states.stale(timedelta(hours=1)), list[NodeState])
    assert_type(await uow.consensus_log.append(1, 1, {}), LogEntry)
    assert_type(await uow.consensus_log.range(1, 5), list[LogEntry])
    assert_type(await uow.routing_table.put("d", {}), RoutingEntry)
    assert_type(await uow.routing_table.all(), dict[str, Any])
    assert_type(await uow.runtime_config.put("k", 5), ConfigEntry)
    assert_type(await uow.runtime_config.page("gossip."), Page[ConfigEntry])
    async for node, state in uow.nodes.with_state():
        assert_type(node, Node)
        assert_type(state, NodeState | None)
    async for message in uow.messages.stream():
        assert_type(message.content, bytes)


async def of_a_cache(storage: AsyncMeshStorage) -> None:
    async with storage.cached("redis://cache", max_age=30, poll=0.1) as cached:
        assert_type(cached, AsyncCached)
        assert_type(await cached.meshes.get("m"), Mesh)
        assert_type(await cached.nodes.get_by_name("n"), Node)
        assert_type(await cached.routes.for_node("n"), list[Route])
        assert_type(await cached.state.find("k"), StateEntry | None)
        assert_type(await cached.runtime_config.all(), dict[str, Any])
        assert_type(await cached.routing_table.get("d"), RoutingEntry)


async def of_the_factories(uow: AsyncUnitOfWork) -> None:
    assert_type(NodeFactory.build(name="n"), Node)
    assert_type(NodeFactory.build_batch(2), list[Node])
    assert_type(await NodeFactory.create(uow=uow, name="n"), Node)
    assert_type(await RouteFactory.create(uow=uow), Route)
    assert_type(await MeshFactory.create_batch(2, uow=uow), list[Mesh])
    assert_type(await LogEntryFactory.create_batch(2, uow=uow), list[LogEntry])


def of_an_error(error: NotFoundError) -> None:
    assert_type(error.entity, str)
    assert_type(error.retryable, bool)
    assert_type(error.sqlstate, str | None)
