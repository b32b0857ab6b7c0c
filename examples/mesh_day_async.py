"""The day of mesh_day.py once more, for asyncio: the same calls awaited, and what may go on at once does.

    python examples/mesh_day_async.py [NETWORK.graphml] [--picture FILE.svg]

It works on the database of MESH_STORAGE_URL, where it deploys the schema, or on a throw-away one of its own; and it may
be run again on the same one.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from decimal import Decimal
from functools import partial

from mesh_day import BATCH, JOIN_KEY, all_pairs, batches
from network import LinkFailure, Network, read_network
from picture import draw, save
from report import Facts, arguments, in_short, print_report, step

from mesh_storage import AlreadyExistsError, Batch, LogEntry, Mesh, Message, Node, Route, schema
from mesh_storage.aio import AsyncLease, AsyncMeshStorage, AsyncUnitOfWork


async def main() -> None:
    """Live the day, report it, and draw its network."""
    options = arguments(__doc__)
    network = read_network(options.network)
    url = os.environ.get("MESH_STORAGE_URL")
    if url:
        with step("Deploying the schema to the database of MESH_STORAGE_URL"):
            await asyncio.to_thread(schema.upgrade, url)
        storage = await AsyncMeshStorage.open(url)
    else:
        with step("Starting a PostgreSQL for this day alone"):
            storage = await AsyncMeshStorage.open("memory:")
    async with storage:
        failure = await run(storage, network)
    picture = save(draw(network, failure), network.name, options.picture)
    print(f"\nA picture of it, to open in a browser: {picture}")


async def run(storage: AsyncMeshStorage, network: Network) -> LinkFailure | None:
    """Live one day of a network, report it, and return what failed."""
    with step(f"Living a day of {in_short(network)}"):
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
                group.create_task(storage.run(partial(send, batch)))
        async with asyncio.TaskGroup() as group:
            for city, node in nodes.items():
                group.create_task(receive(storage, city, node))

        # One node at a time computes the best routes, anew after each change of the configured ones.
        async with storage.lease("routing", network.cities[0].encode(), ttl=timedelta(seconds=10)) as lease:
            changes = storage.watch("routes")
            await compute_routes(storage, network, nodes, lease, changes)
            failure = await fail_link(
                storage, network, nodes, lambda: compute_routes(storage, network, nodes, lease, changes)
            )
            await changes.aclose()
        undone = await fail_half_way(storage, nodes)
    print_report(network, await collect_facts(storage, mesh.id, undone=undone), failure)
    return failure


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


async def send(batch: list[Message], uow: AsyncUnitOfWork) -> None:
    """Send messages; it may be done twice, as `run` does after a lost connection, since each id is sent once."""
    await uow.messages.send_many(batch)


async def receive(storage: AsyncMeshStorage, city: str, node: Node) -> None:
    """Let a city claim what was sent to it, and acknowledge it in the transaction of the effect, which happens once."""
    while True:
        async with storage.begin() as uow:
            deliveries = await uow.messages.claim(city[:64], limit=BATCH)
        if not deliveries:
            return
        async with storage.begin() as uow:
            await uow.node_states.merge(node.id, {"greeted_by": deliveries[-1].message.from_node})
            await uow.messages.ack(deliveries)


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


async def compute_routes(
    storage: AsyncMeshStorage,
    network: Network,
    nodes: dict[str, Node],
    lease: AsyncLease,
    changes: AsyncIterator[Batch],
) -> None:
    """Await a change of the configured routes, and swap the whole routing table at once."""
    cities = {node.id: city for city, node in nodes.items()}
    async for batch in changes:
        for change in batch.changes:
            route = change.entry
            if isinstance(route, Route) and route.source_node_id in cities:  # not of another network
                link = frozenset((cities[route.source_node_id], cities[route.target_node_id]))
                (network.down.add if route.status == "STATUS_DISCONNECTED" else network.down.discard)(link)
        if not batch.more:
            break
    async with storage.begin() as uow:
        await uow.state.check("routing", version=lease.token)  # refused if another has the lease by now
        await uow.routing_table.replace_all(network.routing_table())


async def fail_link(
    storage: AsyncMeshStorage, network: Network, nodes: dict[str, Node], follow: Callable[[], Awaitable[None]]
) -> LinkFailure | None:
    """Let a link fail, if there is one: mark its route as disconnected, and let the routes follow."""
    link = network.link_to_fail()
    if link is None:
        return None
    async with storage.begin(read_only=True) as uow:
        before = await uow.routing_table.all()
    async with storage.begin() as uow:
        for route in await uow.routes.between(nodes[link.a].id, nodes[link.b].id):
            route.status = "STATUS_DISCONNECTED"
            await uow.routes.update(route)
    await follow()
    async with storage.begin(read_only=True) as uow:
        return LinkFailure(network.cities, link, before, await uow.routing_table.all())


async def fail_half_way(storage: AsyncMeshStorage, nodes: dict[str, Node]) -> bool:
    """Begin something that fails in its middle, and return whether all of it was undone."""
    name = next(iter(nodes.values())).name
    try:
        async with storage.begin() as uow:
            await uow.state.put("half-way", b"this must not stay")
            await uow.nodes.add(Node(name=name, ip_address="10.0.0.1"))  # The name is taken.
    except AlreadyExistsError:
        async with storage.begin(read_only=True) as uow:
            return await uow.state.find("half-way") is None
    return False


async def collect_facts(storage: AsyncMeshStorage, mesh_id: str, *, undone: bool) -> Facts:
    """Read what the database holds, all as of one moment."""
    health = await storage.health()
    async with storage.unit_of_work(read_only=True, isolation="repeatable read") as uow:
        return Facts(
            mesh=await uow.meshes.get(mesh_id),
            right_key_admitted=await uow.meshes.admits(mesh_id, JOIN_KEY),
            wrong_key_admitted=await uow.meshes.admits(mesh_id, "a guess"),
            nodes=await uow.nodes.count(),
            reporting=sum([state is not None async for _, state in uow.nodes.with_state()]),
            silent=len(await uow.node_states.stale(timedelta(hours=1))),
            routes=await uow.routes.count(),
            messages=await uow.messages.count(),
            backlog=await uow.messages.backlog(),
            best_routes=await uow.routing_table.count(),
            log_entries=await uow.consensus_log.count(),
            first_index=await uow.consensus_log.first_index(),
            last_index=await uow.consensus_log.last_index(),
            term=await uow.consensus_log.last_term(),
            settings=await uow.runtime_config.all("gossip."),
            undone=undone,
            health=health,
        )


if __name__ == "__main__":
    asyncio.run(main())
