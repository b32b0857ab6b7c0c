"""A day of a mesh: a real network is defined, lives through its hours, and is read back from the database.

    python examples/mesh_day.py [NETWORK.graphml]

It works on the database of MESH_STORAGE_URL, where it deploys the schema, or on a throw-away one of its own; and it may
be run again on the same one.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path

from network import Network, read_network

from mesh_storage import AlreadyExistsError, LogEntry, Mesh, MeshStorage, Message, Node, Route, UnitOfWork, schema

JOIN_KEY = "an example, not a secret"
BATCH = 1000


def main() -> None:
    """Live the day and report it."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("abilene.graphml")
    url = os.environ.get("MESH_STORAGE_URL")
    if url:
        schema.upgrade(url)
    with MeshStorage.open(url or "memory:") as storage:
        run(storage, read_network(path))


def run(storage: MeshStorage, network: Network) -> None:
    """Live one day of a network."""
    begun = time.perf_counter()
    with storage.begin() as uow:
        mesh = define_mesh(uow, network)
    with storage.begin() as uow:
        nodes = register_nodes(uow, network)
        configure_routes(uow, network, nodes)
    with storage.begin(durability="relaxed") as uow:  # What a heartbeat says is said again soon.
        report_states(uow, nodes)
    with storage.begin() as uow:
        uow.runtime_config.put("gossip.interval_ms", 500)
        uow.runtime_config.put("gossip.fanout", min(3, len(nodes) - 1))
    for batch in batches(all_pairs(network), BATCH):
        storage.run(partial(store, batch))
    with storage.begin() as uow:  # Not `run`: behind a last index that is read anew, the entries would go twice.
        grow_log(uow, network)

    with storage.begin() as uow:
        uow.routing_table.replace_all(routing_table(network))
    failed = network.links[len(network.links) // 2 :][:1]  # None where the cities have no links.
    changes = [(link, *fail_link(storage, network, nodes, (link.a, link.b))) for link in failed]
    undone = fail_half_way(storage, nodes)

    print(f"{network.name}: {len(network.cities)} cities, {len(network.links)} links")
    report(storage, mesh.id, undone=undone)
    for link, before, after in changes:
        print(f"  link {link.a} - {link.b} failed: {len(before)} best routes changed")
        for destination in sorted(before)[:3]:
            print(f"    {destination}: {describe(before[destination])}, then {describe(after.get(destination))}")
    print(f"  done in {time.perf_counter() - begun:.1f} s")


def define_mesh(uow: UnitOfWork, network: Network) -> Mesh:
    """Define the mesh, or find the one of an earlier run, and set the key that a node must show to join."""
    try:
        with uow.savepoint():
            mesh = uow.meshes.add(Mesh(name=network.name, description="a day of a real network", allow_join=True))
    except AlreadyExistsError:
        mesh = uow.meshes.get_by_name(network.name)
        mesh.allow_join = True  # Somebody may have closed it since.
        uow.meshes.update(mesh)
    uow.meshes.set_join_key(mesh.id, JOIN_KEY)
    return mesh


def register_nodes(uow: UnitOfWork, network: Network) -> dict[str, Node]:
    """Register a node for each city that has none."""
    there = {node.name: node for node in uow.nodes.stream()}
    new = [
        Node(name=f"{network.name}/{city}", ip_address=f"10.{i >> 16 & 255}.{i >> 8 & 255}.{i & 255}")
        for i, city in enumerate(network.cities)
        if f"{network.name}/{city}" not in there
    ]
    there |= {node.name: node for node in uow.nodes.add_many(new)}
    return {city: there[f"{network.name}/{city}"] for city in network.cities}


def configure_routes(uow: UnitOfWork, network: Network, nodes: dict[str, Node]) -> None:
    """Configure a route for each link that has none, and repair those that failed on an earlier day."""
    there = {(route.source_node_id, route.target_node_id): route for route in uow.routes.stream()}
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
            uow.routes.update(route)
    uow.routes.add_many(new)


def report_states(uow: UnitOfWork, nodes: dict[str, Node]) -> None:
    """Let every node report its state, all in one statement, and one of them add something."""
    uow.node_states.put_many({node.id: {"status": "up", "load": i % 10 / 10} for i, node in enumerate(nodes.values())})
    uow.node_states.merge(next(iter(nodes.values())).id, {"leader": True})


def all_pairs(network: Network) -> Iterator[Message]:
    """Make a message from each city to each other one."""
    day = uuid.uuid4().hex[:8]
    number = 0
    for source in network.cities:
        for target in network.cities:
            if source != target:
                number += 1
                content = f"{source} greets {target}".encode()
                yield Message(id=f"{day}-{number}", from_node=source[:64], to_node=target[:64], content=content)


def batches(messages: Iterator[Message], size: int) -> Iterator[list[Message]]:
    """Put messages together that go in one statement."""
    batch: list[Message] = []
    for message in messages:
        batch.append(message)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def store(batch: list[Message], uow: UnitOfWork) -> None:
    """Store messages; it may be done twice, as `run` does after a lost connection, since each id is stored once."""
    uow.messages.store_many(batch)


def grow_log(uow: UnitOfWork, network: Network) -> None:
    """Agree on the day's events: a new term begins, and each city is an entry."""
    term, index = uow.consensus_log.last_term() + 1, uow.consensus_log.last_index()
    uow.consensus_log.append(term, index + 1, {"command": "leader", "city": network.cities[0]})
    uow.consensus_log.append_many(
        LogEntry(term=term, index=index + 2 + i, entry={"command": "join", "city": city})
        for i, city in enumerate(network.cities)
    )


def routing_table(network: Network) -> dict[str, object]:
    """Find the best next hop from each city to each other one."""
    return {
        f"{source[:120]} > {target[:120]}": route
        for source in network.cities
        for target, route in network.best_routes(source).items()
    }


def fail_link(
    storage: MeshStorage, network: Network, nodes: dict[str, Node], ends: tuple[str, str]
) -> tuple[dict[str, object], dict[str, object]]:
    """Let a link fail: mark its route, swap the routing table, and give the routes that changed, before and after."""
    with storage.begin(read_only=True) as uow:
        before = uow.routing_table.all()
    network.down.add(frozenset(ends))
    with storage.begin() as uow:
        for route in uow.routes.between(nodes[ends[0]].id, nodes[ends[1]].id):
            route.status = "STATUS_DISCONNECTED"
            uow.routes.update(route)
        uow.routing_table.replace_all(routing_table(network))
    with storage.begin(read_only=True) as uow:
        after = uow.routing_table.all()
    return {key: route for key, route in before.items() if after.get(key) != route}, after


def fail_half_way(storage: MeshStorage, nodes: dict[str, Node]) -> bool:
    """Begin something that fails in its middle, and say whether all of it was undone."""
    name = next(iter(nodes.values())).name
    try:
        with storage.begin() as uow:
            uow.state.put("half-way", b"this must not stay")
            uow.nodes.add(Node(name=name, ip_address="10.0.0.1"))  # The name is taken.
    except AlreadyExistsError:
        with storage.begin(read_only=True) as uow:
            return uow.state.find("half-way") is None
    return False


def report(storage: MeshStorage, mesh_id: str, *, undone: bool) -> None:
    """Print what the database holds."""
    with storage.unit_of_work(read_only=True, isolation="repeatable read") as uow:
        mesh = uow.meshes.get(mesh_id)
        right, wrong = uow.meshes.admits(mesh.id, JOIN_KEY), uow.meshes.admits(mesh.id, "a guess")
        reporting = sum(state is not None for _, state in uow.nodes.with_state())
        log = uow.consensus_log
        print(f"  mesh {mesh.name} ({mesh.id}): the join key admits {right}, a wrong one {wrong}")
        print(f"  {uow.nodes.count()} nodes, {reporting} report their state; {uow.routes.count()} routes")
        print(f"  stale for an hour: {len(uow.node_states.stale(timedelta(hours=1)))}")
        print(f"  {uow.messages.count()} messages; {uow.routing_table.count()} best routes")
        print(f"  consensus log: indexes {log.first_index()} to {log.last_index()}, term {log.last_term()}")
        print(f"  runtime config: {uow.runtime_config.all('gossip.')}")
    print(f"  a unit of work that failed half-way left {'nothing' if undone else 'something'} behind")
    health = storage.health()
    print(f"  healthy: {health.ok} (schema {health.revision}, {health.pool_size} connections at most)")


def describe(route: object) -> str:
    """Put a route of the table into words."""
    if not isinstance(route, dict):
        return "none"
    return f"by {route['next_hop']} in {route['latency_ms']} ms"


if __name__ == "__main__":
    main()
