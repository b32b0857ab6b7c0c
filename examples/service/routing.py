"""The best routes between all nodes, computed from the configured ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import networkx as nx

from mesh_storage import JSON, Route
from mesh_storage.aio import AsyncCached, AsyncMeshStorage

UP = "STATUS_CONNECTED"
DOWN = "STATUS_DISCONNECTED"


def table_key(source: str, target: str) -> str:
    """Return the key that the best route between two nodes has in the routing table."""
    return f"{source}>{target}"


def best_routes(routes: Iterable[Route]) -> dict[str, JSON]:
    """Return the routes of least latency between all nodes, as entries of the routing table."""
    graph: Any = nx.DiGraph()
    for route in routes:
        if route.status == UP:
            ends = (route.source_node_id, route.target_node_id)
            for a, b in (ends, ends[::-1]) if route.bidirectional else (ends,):
                graph.add_edge(a, b, latency=float(route.latency_ms or 0))
    return {
        table_key(source, target): {"next": path[1], "latency_ms": round(latencies[target], 3), "hops": len(path) - 1}
        for source, (latencies, paths) in nx.all_pairs_dijkstra(graph, weight="latency")
        for target, path in paths.items()
        if target != source
    }


async def routing_table(storage: AsyncMeshStorage, cached: AsyncCached | None) -> dict[str, JSON]:
    """Return the best routes, from Redis if there is one: they are many, often asked for, and change seldom."""
    if cached is not None:
        return await cached.routing_table.all()
    async with storage.begin(read_only=True) as uow:
        return await uow.routing_table.all()


def follow(table: Mapping[str, Any], source: str, target: str) -> list[str]:
    """Return the nodes along the best route, none if the target cannot be reached."""
    path = [source]
    while path[-1] != target:
        route = table.get(table_key(path[-1], target))
        if route is None or route["next"] in path:
            return []
        path.append(route["next"])
    return path
