"""A network as the examples know it: read from GraphML, latencies from distances, best routes from latencies."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import networkx as nx

KM_PER_MS = 200.0
"""Light in glass fibre."""
EARTH_RADIUS_KM = 6371.0

Table = dict[str, Any]
"""A routing table: the next hop, latency and number of hops by the key of a pair of cities."""


def table_key(source: str, target: str) -> str:
    """Return the key that the route between two cities has in the routing table."""
    return f"{source[:120]} > {target[:120]}"


@dataclass(frozen=True)
class Link:
    """A line between two cities."""

    a: str
    b: str
    latency_ms: float


@dataclass
class Network:
    """Cities and the links between them."""

    name: str
    cities: list[str]
    links: list[Link]
    positions: dict[str, tuple[float, float]]
    """Latitude and longitude of the cities that have them, in degrees."""
    down: set[frozenset[str]] = field(default_factory=set)
    """The pairs of cities whose link has failed."""

    def link_to_fail(self) -> Link | None:
        """Return the link in the middle of the list, which stands for any; None where there are no links."""
        return next(iter(self.links[len(self.links) // 2 :]), None)

    def best_routes(self, source: str) -> dict[str, dict[str, Any]]:
        """Return the route of least latency from a city to each other one that can be reached."""
        graph: Any = nx.Graph()
        graph.add_nodes_from(self.cities)
        for link in self.links:
            if frozenset((link.a, link.b)) not in self.down:
                graph.add_edge(link.a, link.b, latency=link.latency_ms)
        latencies, paths = nx.single_source_dijkstra(graph, source, weight="latency")
        return {
            city: {"next_hop": path[1], "latency_ms": round(latencies[city], 2), "hops": len(path) - 1}
            for city, path in paths.items()
            if city != source
        }

    def routing_table(self) -> Table:
        """Return the best route from each city to each other one that can be reached."""
        return {
            table_key(source, target): route
            for source in self.cities
            for target, route in self.best_routes(source).items()
        }


@dataclass(frozen=True)
class LinkFailure:
    """A link that failed, and the routing table before and after."""

    cities: list[str]
    link: Link
    before: Table
    after: Table

    @property
    def changed(self) -> list[tuple[str, str]]:
        """The pairs of cities between which the best route is another one now."""
        pairs = [(source, target) for source in self.cities for target in self.cities if source != target]
        return [pair for pair in pairs if self.before.get(table_key(*pair)) != self.after.get(table_key(*pair))]

    def most_affected(self) -> tuple[str, list[str]]:
        """Return the city from which most routes changed, and where those lead."""
        changed = self.changed
        [(city, _)] = Counter(source for source, _ in changed).most_common(1) or [(self.link.a, 0)]
        return city, [target for source, target in changed if source == city]


def follow(table: Table, source: str, target: str) -> list[str]:
    """Return the cities along a route, hop by hop as the routing table says; none if the target cannot be reached."""
    path = [source]
    while path[-1] != target:
        route = table.get(table_key(path[-1], target))
        if route is None or route["next_hop"] in path:  # Cities in one place may send to each other in circles.
            return []
        path.append(route["next_hop"])
    return path


def read_network(path: Path) -> Network:
    """Read a network in the form of the Internet Topology Zoo: nodes with label, Latitude and Longitude."""
    graph: Any = nx.read_graphml(path)
    cities: dict[Any, str] = {}
    positions: dict[str, tuple[float, float]] = {}
    for node, data in graph.nodes(data=True):
        name = _unique(str(data.get("label") or f"node {node}"), set(cities.values()))
        cities[node] = name
        if "Latitude" in data and "Longitude" in data:
            positions[name] = (float(data["Latitude"]), float(data["Longitude"]))
    pairs = sorted({(min(cities[a], cities[b]), max(cities[a], cities[b])) for a, b in graph.edges() if a != b})
    known = {(a, b): _latency(a, b, positions) for a, b in pairs}
    measured = [latency for latency in known.values() if latency is not None]
    # A place that is not known is taken to be as far away as the others are on average.
    average = sum(measured) / len(measured) if measured else 1.0
    links = [Link(a, b, average if latency is None else latency) for (a, b), latency in known.items()]
    return Network(path.stem, list(cities.values()), links, positions)


def _unique(name: str, taken: set[str]) -> str:
    number = 2
    unique = name
    while unique in taken:
        unique = f"{name} ({number})"
        number += 1
    return unique


def _latency(a: str, b: str, positions: dict[str, tuple[float, float]]) -> float | None:
    """Return the great-circle distance by the haversine formula, as milliseconds in fibre."""
    if a not in positions or b not in positions:
        return None
    (lat_a, lon_a), (lat_b, lon_b) = (tuple(map(math.radians, positions[city])) for city in (a, b))
    angle = math.sin((lat_b - lat_a) / 2) ** 2 + math.cos(lat_a) * math.cos(lat_b) * math.sin((lon_b - lon_a) / 2) ** 2
    return round(2 * EARTH_RADIUS_KM * math.asin(math.sqrt(angle)) / KM_PER_MS, 3)
