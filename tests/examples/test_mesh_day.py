"""Shows that the day of the example can be lived again and on any network, and that its report is what is stored."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from mesh_storage import testing
from mesh_storage.schema import head

EXAMPLES = Path(__file__).parents[2] / "examples"
GRAPHML = (
    '<graphml xmlns="http://graphml.graphdrawing.org/xmlns">{keys}<graph edgedefault="{kind}">{body}</graph></graphml>'
)
KEYS = "".join(
    f'<key id="{name}" for="node" attr.name="{name}" attr.type="{kind}"/>'
    for name, kind in {"label": "string", "Country": "string", "Latitude": "double", "Longitude": "double"}.items()
)


@pytest.fixture
def url(mesh_storage_databases: testing.Databases) -> Iterator[str]:
    """Yield the URL of an empty database: the example deploys the schema itself."""
    with mesh_storage_databases.fresh(with_schema=False) as made:
        yield made


def live(url: str | None = None, network: Path | None = None) -> str:
    environment = {**os.environ, **({"MESH_STORAGE_URL": url} if url else {})}
    ran = subprocess.run(
        [sys.executable, str(EXAMPLES / "mesh_day.py"), *([str(network)] if network else [])],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=120,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


def rows(url: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(query.encode()).fetchall()


def numbers(report: str, words: str) -> list[int]:
    """Return the numbers in the place of each N of some words of the report."""
    found = re.search(re.escape(words).replace("N", r"(\d+)"), report)
    assert found is not None, (words, report)
    return [int(number) for number in found.groups()]


def check(report: str, url: str) -> None:
    """Hold everything that the report says against the database."""
    counts = {
        table: rows(url, f"SELECT count(*) FROM {table}")[0][0]
        for table in ("nodes", "routes", "mesh_node_state", "mesh_messages", "mesh_routing_table")
    }
    assert numbers(report, "N nodes, N report their state; N routes") == [
        counts["nodes"],
        counts["mesh_node_state"],
        counts["routes"],
    ]
    assert numbers(report, "N messages; N best routes") == [counts["mesh_messages"], counts["mesh_routing_table"]]
    log = rows(url, "SELECT min(index), max(index), max(term) FROM mesh_consensus_log")[0]
    assert numbers(report, "consensus log: indexes N to N, term N") == list(log)
    config = dict(rows(url, "SELECT key, value FROM mesh_runtime_config ORDER BY key"))
    assert f"runtime config: {config}" in report
    ((mesh_id, name, join_key_hash),) = rows(url, "SELECT mesh_id, mesh_name, mesh_join_key_hash FROM mesh")
    assert f"mesh {name} ({mesh_id}): the join key admits True, a wrong one False" in report
    assert join_key_hash.startswith("scrypt$")
    assert "failed half-way left nothing behind" in report
    assert rows(url, "SELECT FROM mesh_state") == []
    assert f"healthy: True (schema {head()}, " in report
    table = dict(rows(url, "SELECT destination, route FROM mesh_routing_table"))
    for destination, then in re.findall(r"^    (.+): by .+, then (.+)$", report, re.MULTILINE):
        route = table.get(destination)
        assert then == ("none" if route is None else f"by {route['next_hop']} in {route['latency_ms']} ms")


def test_two_days_on_one_database(url: str) -> None:
    for day in (1, 2):
        report = live(url)
        check(report, url)
        assert numbers(report, "N cities, N links") == [11, 14]
        assert numbers(report, "N nodes, N report their state; N routes") == [11, 11, 14]
        assert numbers(report, "N messages; N best routes") == [110 * day, 110]
        assert numbers(report, "consensus log: indexes N to N, term N") == [1, 12 * day, day]
        # The link that failed on an earlier day is repaired before one fails on this one.
        failed = re.search(r"link (.+) - (.+) failed", report)
        assert failed is not None
        assert rows(
            url,
            "SELECT source.node_name, target.node_name FROM routes"
            " JOIN nodes AS source ON source.node_id = source_node_id"
            " JOIN nodes AS target ON target.node_id = target_node_id WHERE routes.status = 'STATUS_DISCONNECTED'",
        ) == [(f"abilene/{failed[1]}", f"abilene/{failed[2]}")]
        # What others did to the names that the next day finds.
        with psycopg.connect(url) as connection:
            connection.execute("UPDATE mesh SET allow_join = false")
            connection.execute("UPDATE routes SET status = 'STATUS_DISCONNECTED'")


def test_latencies_are_those_of_light_in_fibre_along_the_best_path(url: str) -> None:
    report = live(url)
    failed = re.search(r"link (.+) - (.+) failed", report)
    assert failed is not None
    links = {
        (a.removeprefix("abilene/"), b.removeprefix("abilene/")): float(latency)
        for a, b, latency in rows(
            url,
            "SELECT source.node_name, target.node_name, route_latency FROM routes"
            " JOIN nodes AS source ON source.node_id = source_node_id"
            " JOIN nodes AS target ON target.node_id = target_node_id",
        )
    }
    # New York and Washington are some 328 km apart.
    assert links["New York", "Washington DC"] == pytest.approx(328 / 200, rel=0.01)
    del links[failed[1], failed[2]]
    cities = {city for link in links for city in link}
    best = {
        (a, b): 0.0 if a == b else min(links.get((a, b), math.inf), links.get((b, a), math.inf))
        for a in cities
        for b in cities
    }
    for middle in cities:  # Floyd and Warshall's way, another one than the example's.
        for a in cities:
            for b in cities:
                best[a, b] = min(best[a, b], best[a, middle] + best[middle, b])
    table = dict(rows(url, "SELECT destination, route FROM mesh_routing_table"))
    assert len(table) == 110
    for (a, b), latency in best.items():
        if a != b:
            route = table[f"{a} > {b}"]
            assert route["latency_ms"] == pytest.approx(latency, abs=0.01)
            hop = route["next_hop"]
            first = min(links.get((a, hop), math.inf), links.get((hop, a), math.inf))
            assert first + best[hop, b] == pytest.approx(latency, abs=0.01)


def test_missing_positions_shared_names_loops_and_parallel_links(url: str, tmp_path: Path) -> None:
    places = {
        0: ("A", 0, 0),
        1: ("A", 0, 10),
        2: ("Ünlü ' %", 0, 20),
        3: ("Nowhere", None, None),
        4: (None, None, None),
    }
    body = "".join(
        f'<node id="{number}">'
        + (f'<data key="label">{label}</data>' if label else "")
        + (
            f'<data key="Latitude">{latitude}</data><data key="Longitude">{longitude}</data>'
            if latitude is not None
            else ""
        )
        + "</node>"
        for number, (label, latitude, longitude) in places.items()
    )
    for a, b in ((0, 1), (1, 0), (0, 1), (1, 2), (2, 2), (2, 3), (0, 2)):
        body += f'<edge source="{a}" target="{b}"/>'
    network = tmp_path / "odd.graphml"
    network.write_text(GRAPHML.format(keys=KEYS, kind="directed", body=body))
    for day in (1, 2):
        report = live(url, network)
        check(report, url)
        assert numbers(report, "N cities, N links") == [5, 4]
        assert numbers(report, "N messages; N best routes")[0] == 20 * day
    names = [name for (name,) in rows(url, "SELECT node_name FROM nodes ORDER BY node_id")]
    assert sorted(names) == sorted(f"odd/{name}" for name in ("A", "A (2)", "Ünlü ' %", "Nowhere", "node 4"))
    degree = math.pi / 180 * 6371 / 200  # Of the equator, in milliseconds.
    latencies = sorted(float(latency) for (latency,) in rows(url, "SELECT route_latency FROM routes"))
    known = [10 * degree, 10 * degree, 20 * degree]
    assert latencies == pytest.approx(sorted([*known, sum(known) / 3]), abs=0.01)
    # Nobody reaches the city without links.
    assert not [key for (key,) in rows(url, "SELECT destination FROM mesh_routing_table") if "node 4" in key]


@pytest.mark.parametrize("cities", [1, 2])
def test_cities_without_links(url: str, tmp_path: Path, cities: int) -> None:
    network = tmp_path / "still.graphml"
    body = "".join(f'<node id="{number}"/>' for number in range(cities))
    network.write_text(GRAPHML.format(keys="", kind="undirected", body=body))
    report = live(url, network)
    check(report, url)
    assert numbers(report, "N messages; N best routes") == [cities * (cities - 1), 0]
    assert "failed:" not in report


def test_a_day_on_a_throw_away_database_of_its_own() -> None:
    report = live()
    assert numbers(report, "N messages; N best routes") == [110, 110]
    assert "healthy: True" in report
