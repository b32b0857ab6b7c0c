"""A day of a mesh: a real network is defined, lives through its hours, and is read back from the database.

    python examples/mesh_day.py [NETWORK.graphml] [--picture FILE.svg]

It works on the database of MESH_STORAGE_URL, where it deploys the schema, or on a throw-away one of its own; and it may
be run again on the same one.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from decimal import Decimal
from functools import partial

from network import LinkFailure, Network, read_network
from picture import draw, save
from report import Facts, arguments, in_short, print_report, step

from mesh_storage import (
    AlreadyExistsError,
    Batch,
    Lease,
    LogEntry,
    Mesh,
    MeshStorage,
    Message,
    Node,
    Route,
    UnitOfWork,
    schema,
)

JOIN_KEY = "an example, not a secret"
BATCH = 1000


def main() -> None:
    """Live the day, report it, and draw its network."""
    options = arguments(__doc__)
    network = read_network(options.network)
    url = os.environ.get("MESH_STORAGE_URL")
    if url:
        with step("Deploying the schema to the database of MESH_STORAGE_URL"):
            schema.upgrade(url)
        storage = MeshStorage.open(url)
    else:
        with step("Starting a PostgreSQL for this day alone"):
            storage = MeshStorage.open("memory:")
    with storage:
        failure = run(storage, network)
    picture = save(draw(network, failure), network.name, options.picture)
    print(f"\nA picture of it, to open in a browser: {picture}")


def run(storage: MeshStorage, network: Network) -> LinkFailure | None:
    """Live one day of a network, report it, and return what failed."""
    with step(f"Living a day of {in_short(network)}"):
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
            storage.run(partial(send, batch))
        for city, node in nodes.items():
            receive(storage, city, node)
        with storage.begin() as uow:  # Not `run`: behind a last index that is read anew, the entries would go twice.
            grow_log(uow, network)

        # One node at a time computes the best routes, anew after each change of the configured ones.
        with storage.lease("routing", network.cities[0].encode(), ttl=timedelta(seconds=10)) as lease:
            changes = storage.watch("routes")
            compute_routes(storage, network, nodes, lease, changes)
            failure = fail_link(
                storage, network, nodes, lambda: compute_routes(storage, network, nodes, lease, changes)
            )
            changes.close()
        undone = fail_half_way(storage, nodes)
    print_report(network, collect_facts(storage, mesh.id, undone=undone), failure)
    return failure


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
    """Yield a message from each city to each other one."""
    day = uuid.uuid4().hex[:8]
    number = 0
    for source in network.cities:
        for target in network.cities:
            if source != target:
                number += 1
                content = f"{source} greets {target}".encode()
                yield Message(id=f"{day}-{number}", from_node=source[:64], to_node=target[:64], content=content)


def batches(messages: Iterator[Message], size: int) -> Iterator[list[Message]]:
    """Yield the messages in lists, each of which goes in one statement."""
    batch: list[Message] = []
    for message in messages:
        batch.append(message)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def send(batch: list[Message], uow: UnitOfWork) -> None:
    """Send messages; it may be done twice, as `run` does after a lost connection, since each id is sent once."""
    uow.messages.send_many(batch)


def receive(storage: MeshStorage, city: str, node: Node) -> None:
    """Let a city claim what was sent to it, and acknowledge it in the transaction of the effect, which happens once."""
    while True:
        with storage.begin() as uow:
            deliveries = uow.messages.claim(city[:64], limit=BATCH)
        if not deliveries:
            return
        with storage.begin() as uow:
            uow.node_states.merge(node.id, {"greeted_by": deliveries[-1].message.from_node})
            uow.messages.ack(deliveries)


def grow_log(uow: UnitOfWork, network: Network) -> None:
    """Agree on the day's events: a new term begins, and each city is an entry."""
    term, index = uow.consensus_log.last_term() + 1, uow.consensus_log.last_index()
    uow.consensus_log.append(term, index + 1, {"command": "leader", "city": network.cities[0]})
    uow.consensus_log.append_many(
        LogEntry(term=term, index=index + 2 + i, entry={"command": "join", "city": city})
        for i, city in enumerate(network.cities)
    )


def compute_routes(
    storage: MeshStorage, network: Network, nodes: dict[str, Node], lease: Lease, changes: Iterator[Batch]
) -> None:
    """Await a change of the configured routes, and swap the whole routing table at once."""
    cities = {node.id: city for city, node in nodes.items()}
    for batch in changes:
        for change in batch.changes:
            route = change.entry
            if isinstance(route, Route) and route.source_node_id in cities:  # not of another network
                link = frozenset((cities[route.source_node_id], cities[route.target_node_id]))
                (network.down.add if route.status == "STATUS_DISCONNECTED" else network.down.discard)(link)
        if not batch.more:
            break
    with storage.begin() as uow:
        uow.state.check("routing", version=lease.token)  # refused if another has the lease by now
        uow.routing_table.replace_all(network.routing_table())


def fail_link(
    storage: MeshStorage, network: Network, nodes: dict[str, Node], follow: Callable[[], None]
) -> LinkFailure | None:
    """Let a link fail, if there is one: mark its route as disconnected, and let the routes follow."""
    link = network.link_to_fail()
    if link is None:
        return None
    with storage.begin(read_only=True) as uow:
        before = uow.routing_table.all()
    with storage.begin() as uow:
        for route in uow.routes.between(nodes[link.a].id, nodes[link.b].id):
            route.status = "STATUS_DISCONNECTED"
            uow.routes.update(route)
    follow()
    with storage.begin(read_only=True) as uow:
        return LinkFailure(network.cities, link, before, uow.routing_table.all())


def fail_half_way(storage: MeshStorage, nodes: dict[str, Node]) -> bool:
    """Begin something that fails in its middle, and return whether all of it was undone."""
    name = next(iter(nodes.values())).name
    try:
        with storage.begin() as uow:
            uow.state.put("half-way", b"this must not stay")
            uow.nodes.add(Node(name=name, ip_address="10.0.0.1"))  # The name is taken.
    except AlreadyExistsError:
        with storage.begin(read_only=True) as uow:
            return uow.state.find("half-way") is None
    return False


def collect_facts(storage: MeshStorage, mesh_id: str, *, undone: bool) -> Facts:
    """Read what the database holds, all as of one moment."""
    health = storage.health()
    with storage.unit_of_work(read_only=True, isolation="repeatable read") as uow:
        return Facts(
            mesh=uow.meshes.get(mesh_id),
            right_key_admitted=uow.meshes.admits(mesh_id, JOIN_KEY),
            wrong_key_admitted=uow.meshes.admits(mesh_id, "a guess"),
            nodes=uow.nodes.count(),
            reporting=sum(state is not None for _, state in uow.nodes.with_state()),
            silent=len(uow.node_states.stale(timedelta(hours=1))),
            routes=uow.routes.count(),
            messages=uow.messages.count(),
            backlog=uow.messages.backlog(),
            best_routes=uow.routing_table.count(),
            log_entries=uow.consensus_log.count(),
            first_index=uow.consensus_log.first_index(),
            last_index=uow.consensus_log.last_index(),
            term=uow.consensus_log.last_term(),
            settings=uow.runtime_config.all("gossip."),
            undone=undone,
            health=health,
        )


if __name__ == "__main__":
    main()
