"""The day of mesh_day.py once more, for asyncio: the same calls awaited, and what may go on at once does.

    python examples/mesh_day_async.py [NETWORK.graphml]

It works on the database of MESH_STORAGE_URL, where it deploys the schema, or on a throw-away one of its own; and it may
be run again on the same one.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from datetime import timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path

from mesh_day import BATCH, JOIN_KEY, all_pairs, batches, describe, routing_table
from network import Network, read_network

from mesh_storage import AlreadyExistsError, LogEntry, Mesh, Message, Node, Route, schema
from mesh_storage.aio import AsyncMeshStorage, AsyncUnitOfWork


async def main() -> None:
    """Live the day and report it."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("abilene.graphml")
    url = os.environ.get("MESH_STORAGE_URL")
    if url:
        await asyncio.to_thread(schema.upgrade, url)
    async with AsyncMeshStorage.open(url or "memory:") as storage:
        await run(storage, read_network(path))


async def run(storage: AsyncMeshStorage, network: Network) -> None:
    """Live one day of a network."""
    begun = time.perf_counter()
    async with storage.begin() as uow:
        mesh = await define_mesh(uow, network)
    async with storage.begin() as uow:
        nodes = await register_nodes(uow, network)
        await configure_routes(uow, network, nodes)
    async with storage.begin(durability="relaxed") as uow:  # What a heartbeat says is said again soon.
        await report_states(uow, nodes)
    async with storage.begin() as uow:
        await uow.runtime_config.put("gossip.interval_ms", 500)
        await uow.runtime_config.put("gossip.fanout", min(3, len(nodes) - 1))
    async with asyncio.TaskGroup() as group:  # Each task has units of work of its own.
        group.create_task(agree(storage, network))
        for batch in batches(all_pairs(network), BATCH):
            group.create_task(storage.run(partial(store, batch)))

    async with storage.begin() as uow:
        await uow.routing_table.replace_all(routing_table(network))
    failed = network.links[len(network.links) // 2 :][:1]  # None where the cities have no links.
    changes = [(link, *await fail_link(storage, network, nodes, (link.a, link.b))) for link in failed]
    undone = await fail_half_way(storage, nodes)

    print(f"{network.name}: {len(network.cities)} cities, {len(network.links)} links")
    await report(storage, mesh.id, undone=undone)
    for link, before, after in changes:
        print(f"  link {link.a} - {link.b} failed: {len(before)} best routes changed")
        for destination in sorted(before)[:3]:
            print(f"    {destination}: {describe(before[destination])}, then {describe(after.get(destination))}")
    print(f"  done in {time.perf_counter() - begun:.1f} s")


async def define_mesh(uow: AsyncUnitOfWork, network: Network) -> Mesh:
    """Define the mesh, or find the one of an earlier run, and set the key that a node must show to join."""
    try:
        async with uow.savepoint():
            mesh = await uow.meshes.add(Mesh(name=network.name, description="a day of a real network", allow_join=True))
    except AlreadyExistsError:
        mesh = await uow.meshes.get_by_name(network.name)
        mesh.allow_join = True  # Somebody may have closed it since.
        await uow.meshes.update(mesh)
    await uow.meshes.set_join_key(mesh.id, JOIN_KEY)
    return mesh


async def register_nodes(uow: AsyncUnitOfWork, network: Network) -> dict[str, Node]:
    """Register a node for each city that has none."""
    there = {node.name: node async for node in uow.nodes.stream()}
    new = [
        Node(name=f"{network.name}/{city}", ip_address=f"10.{i >> 16 & 255}.{i >> 8 & 255}.{i & 255}")
        for i, city in enumerate(network.cities)
        if f"{network.name}/{city}" not in there
    ]
    there |= {node.name: node for node in await uow.nodes.add_many(new)}
    return {city: there[f"{network.name}/{city}"] for city in network.cities}


async def configure_routes(uow: AsyncUnitOfWork, network: Network, nodes: dict[str, Node]) -> None:
    """Configure a route for each link that has none, and repair those that failed on an earlier day."""
    there = {(route.source_node_id, route.target_node_id): route async for route in uow.routes.stream()}
    new = []
    for link in network.links:
        ends = (nodes[link.a].id, nodes[link.b].id)
        route = there.get(ends)
        if route is None:
            new.append(
                Route(
                    source_node_id=ends[0],
                    target_node_id=ends[1],
                    bidirectional=True,
                    latency_ms=Decimal(link.latency_ms),
                    bandwidth_mbps=Decimal(10_000),
                    status="STATUS_CONNECTED",
                )
            )
        elif route.status != "STATUS_CONNECTED":
            route.status = "STATUS_CONNECTED"
            await uow.routes.update(route)
    await uow.routes.add_many(new)


async def report_states(uow: AsyncUnitOfWork, nodes: dict[str, Node]) -> None:
    """Let every node report its state, all in one statement, and one of them add something."""
    states = {node.id: {"status": "up", "load": i % 10 / 10} for i, node in enumerate(nodes.values())}
    await uow.node_states.put_many(states)
    await uow.node_states.merge(next(iter(nodes.values())).id, {"leader": True})


async def store(batch: list[Message], uow: AsyncUnitOfWork) -> None:
    """Store messages; it may be done twice, as `run` does after a lost connection, since each id is stored once."""
    await uow.messages.store_many(batch)


async def agree(storage: AsyncMeshStorage, network: Network) -> None:
    """Grow the log, once: behind a last index that is read anew, `run` could append the entries twice."""
    async with storage.begin() as uow:
        await grow_log(network, uow)


async def grow_log(network: Network, uow: AsyncUnitOfWork) -> None:
    """Agree on the day's events: a new term begins, and each city is an entry."""
    term, index = await uow.consensus_log.last_term() + 1, await uow.consensus_log.last_index()
    await uow.consensus_log.append(term, index + 1, {"command": "leader", "city": network.cities[0]})
    await uow.consensus_log.append_many(
        LogEntry(term=term, index=index + 2 + i, entry={"command": "join", "city": city})
        for i, city in enumerate(network.cities)
    )


async def fail_link(
    storage: AsyncMeshStorage, network: Network, nodes: dict[str, Node], ends: tuple[str, str]
) -> tuple[dict[str, object], dict[str, object]]:
    """Let a link fail: mark its route, swap the routing table, and give the routes that changed, before and after."""
    async with storage.begin(read_only=True) as uow:
        before = await uow.routing_table.all()
    network.down.add(frozenset(ends))
    async with storage.begin() as uow:
        for route in await uow.routes.between(nodes[ends[0]].id, nodes[ends[1]].id):
            route.status = "STATUS_DISCONNECTED"
            await uow.routes.update(route)
        await uow.routing_table.replace_all(routing_table(network))
    async with storage.begin(read_only=True) as uow:
        after = await uow.routing_table.all()
    return {key: route for key, route in before.items() if after.get(key) != route}, after


async def fail_half_way(storage: AsyncMeshStorage, nodes: dict[str, Node]) -> bool:
    """Begin something that fails in its middle, and say whether all of it was undone."""
    name = next(iter(nodes.values())).name
    try:
        async with storage.begin() as uow:
            await uow.state.put("half-way", b"this must not stay")
            await uow.nodes.add(Node(name=name, ip_address="10.0.0.1"))  # The name is taken.
    except AlreadyExistsError:
        async with storage.begin(read_only=True) as uow:
            return await uow.state.find("half-way") is None
    return False


async def report(storage: AsyncMeshStorage, mesh_id: str, *, undone: bool) -> None:
    """Print what the database holds."""
    async with storage.unit_of_work(read_only=True, isolation="repeatable read") as uow:
        mesh = await uow.meshes.get(mesh_id)
        right, wrong = await uow.meshes.admits(mesh.id, JOIN_KEY), await uow.meshes.admits(mesh.id, "a guess")
        reporting = sum([state is not None async for _, state in uow.nodes.with_state()])
        log = uow.consensus_log
        print(f"  mesh {mesh.name} ({mesh.id}): the join key admits {right}, a wrong one {wrong}")
        print(f"  {await uow.nodes.count()} nodes, {reporting} report their state; {await uow.routes.count()} routes")
        print(f"  stale for an hour: {len(await uow.node_states.stale(timedelta(hours=1)))}")
        print(f"  {await uow.messages.count()} messages; {await uow.routing_table.count()} best routes")
        first, last, term = await log.first_index(), await log.last_index(), await log.last_term()
        print(f"  consensus log: indexes {first} to {last}, term {term}")
        print(f"  runtime config: {await uow.runtime_config.all('gossip.')}")
    print(f"  a unit of work that failed half-way left {'nothing' if undone else 'something'} behind")
    health = await storage.health()
    print(f"  healthy: {health.ok} (schema {health.revision}, {health.pool_size} connections at most)")


if __name__ == "__main__":
    asyncio.run(main())
