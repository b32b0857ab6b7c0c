"""Shows that the day of the example can be lived again and on any network, and that its report is what is stored."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from mesh_storage import testing
from mesh_storage.schema import head
from tests.examples.days import EXAMPLES, graphml, live, rows, run

pytestmark = pytest.mark.slow


@pytest.fixture
def url(mesh_storage_databases: testing.Databases) -> Iterator[str]:
    """Yield the URL of an empty database: the example deploys the schema itself."""
    with mesh_storage_databases.fresh(with_schema=False) as made:
        yield made


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
    assert numbers(report, "\n  N node") == [counts["nodes"]]
    assert numbers(report, "\n  N node state") == [counts["mesh_node_state"]]
    assert numbers(report, "\n  N route") == [counts["routes"]]
    assert numbers(report, "\n  N message") == [counts["mesh_messages"]]
    assert numbers(report, "\n  N best route") == [counts["mesh_routing_table"]]
    log = rows(url, "SELECT count(*), min(index), max(index), max(term) FROM mesh_consensus_log")[0]
    entries, first, last, term = log
    assert numbers(report, "\n  N log entries") == [entries]
    assert numbers(report, "the leader of term N") == [term]
    assert numbers(report, "; indexes N to N") == [first, last]
    config = rows(url, "SELECT key, value FROM mesh_runtime_config ORDER BY key")
    assert f"  {len(config)} settings: " + ", ".join(f"{key} = {value}" for key, value in config) in report
    ((name, join_key_hash),) = rows(url, "SELECT mesh_name, mesh_join_key_hash FROM mesh")
    assert f"the mesh {name} admits a node that shows the join key, and refuses one that guesses" in report
    assert join_key_hash.startswith("scrypt$")
    assert "failed half-way left nothing behind" in report
    assert "delivered to its receiver once, and none of them is left to deliver" in report
    assert rows(url, "SELECT FROM mesh_deliveries") == []
    if counts["mesh_messages"]:
        assert rows(url, "SELECT FROM mesh_node_state WHERE NOT state ? 'greeted_by'") == []
    assert rows(url, "SELECT FROM mesh_state") == []
    assert f"it is healthy, and its schema is revision {head()}\n" in report
    table = dict(rows(url, "SELECT destination, route FROM mesh_routing_table"))
    source = re.search(r"those that begin in (.+) \(\d+, and no city has more\)", report)
    for target, now in re.findall(r"^    to (.+?)  .+  now (.+)$", report, re.MULTILINE):
        assert source is not None
        route = table.get(f"{source[1]} > {target.rstrip()}")
        if route is None:
            assert now == "unreachable"
        else:
            way = "directly" if route["next_hop"] == target.rstrip() else f"via {route['next_hop']}"
            assert now == f"{route['latency_ms']:.1f} ms {way}"


def test_two_days_on_one_database(url: str) -> None:
    for day in (1, 2):
        report = live(url)
        check(report, url)
        assert numbers(report, "N cities and N links") == [11, 14]
        assert "  11 nodes: one for each city\n" in report
        assert "  11 node states: what each node reported last; none of them older than an hour\n" in report
        assert "  14 routes: one for each link" in report
        assert "  110 best routes in the routing table: one from each city to each other city, 11 x 10\n" in report
        reasons = {
            "messages": "one from each city to each other city, 11 x 10",
            "log entries": f"one for the leader of term {day} and one for each city that joined",
        }
        for noun, each in (("messages", 110), ("log entries", 12)):
            before = f"{each} of this day ({reasons[noun]}) and {each} from before"
            assert f"  {each * day} {noun}: {reasons[noun] if day == 1 else before}" in report
        # The link that failed on an earlier day is repaired before one fails on this one.
        failed = re.search(r"link between (.+) and (.+) failed", report)
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
    failed = re.search(r"link between (.+) and (.+) failed", report)
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
    network = tmp_path / "odd.graphml"
    places = [("A", 0, 0), ("A", 0, 10), ("Ünlü ' %", 0, 20), ("Nowhere", None, None), (None, None, None)]
    links = [(0, 1), (1, 0), (0, 1), (1, 2), (2, 2), (2, 3), (0, 2)]
    network.write_text(graphml(places, links), encoding="utf-8")
    for day in (1, 2):
        report = live(url, network)
        check(report, url)
        assert numbers(report, "N cities and N links") == [5, 4]
        assert numbers(report, "\n  N messages") == [20 * day]
        assert "one from each city to each other city that it can reach\n" in report
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
    network.write_text(graphml([(None, None, None)] * cities, []))
    report = live(url, network)
    check(report, url)
    assert numbers(report, "\n  N message") == [cities * (cities - 1)]
    assert numbers(report, "\n  N best route") == [0]
    assert "failed:" not in report


def test_a_link_that_no_best_route_takes_may_fail(url: str, tmp_path: Path) -> None:
    network = tmp_path / "detour.graphml"
    # All in one line; by their rounded latencies the direct way from A to C is a little longer than that through B.
    network.write_text(graphml([("A", 0, 0), ("B", 0, 1.0006), ("C", 0, 2.0012)], [(0, 1), (1, 2), (0, 2)]))
    report = live(url, network)
    check(report, url)
    assert "\nThe link between A and C failed:\n  0 of the 6 best routes changed\n\n" in report


def test_a_day_on_a_throw_away_database_of_its_own() -> None:
    report = live()
    started, lived = report.splitlines()[:2]
    assert re.fullmatch(r"Starting a PostgreSQL for this day alone \.\.\. \d+\.\d s", started)
    assert re.fullmatch(r"Living a day of abilene, a network of 11 cities and 14 links \.\.\. \d+\.\d s", lived)
    assert numbers(report, "\n  N messages") == [110]
    assert "  it is healthy, " in report
    assert numbers(report, "\n  N of the N best routes changed") == [22, 110]
    assert numbers(report, "begin in Sunnyvale (N, and") == [len(re.findall(r"\n    to ", report))] == [7]


def test_a_step_that_fails_says_so(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, EXAMPLES / "mesh_day.py", "--picture", tmp_path / "day.svg"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MESH_STORAGE_URL": "postgresql://nobody@127.0.0.1:1/none"},
    )
    assert ran.returncode == 1
    assert ran.stdout == "Deploying the schema to the database of MESH_STORAGE_URL ... failed\n"
    assert "UnavailableError" in ran.stderr


@pytest.mark.parametrize("writable", [True, False])
def test_the_picture_is_in_the_checkout_or_else_among_the_temporary_files(tmp_path: Path, writable: bool) -> None:
    examples = shutil.copytree(EXAMPLES, tmp_path / "checkout" / "examples")
    build, temporary = tmp_path / "checkout" / "build", tmp_path / "temporary"
    temporary.mkdir()
    if not writable:
        build.touch()  # Not by permissions, which do not hold root back.
    report = run(examples / "mesh_day.py", TMPDIR=str(temporary))
    found = re.search(r"A picture of it, to open in a browser: (.+)\n$", report)
    assert found is not None
    picture = Path(found[1])
    assert picture.parent == build if writable else picture.parent.parent == temporary
    assert picture.name == "abilene.svg"
    assert picture.read_text(encoding="utf-8").startswith("<svg ")
