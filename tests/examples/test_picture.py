"""Shows that the picture of a network is right by the database, and that it can be read, in light and in dark."""

from __future__ import annotations

import itertools
import random
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import pytest

from mesh_storage import testing
from tests.examples.days import graphml, live, rows

pytestmark = pytest.mark.slow

SVG = "{http://www.w3.org/2000/svg}"
Place = tuple[float, float]


class Box(NamedTuple):
    """A rectangle of the picture and what is in it."""

    left: float
    top: float
    right: float
    bottom: float
    what: str


@dataclass
class Map:
    """A network as one map of the picture shows it, read back from where things are drawn."""

    cities: dict[str, Place]
    names: list[str]
    details: dict[str, str]
    links: list[set[str]]
    failed: list[set[str]]
    crosses: list[Place]
    routes: list[list[str]]


@dataclass
class Day:
    """A picture, and what the database holds at the end of the day."""

    svg: ET.Element
    table: dict[str, Any]
    links: dict[frozenset[str], float]
    disconnected: list[set[str]]


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a network whose cities have long and strange names, and are close to each other."""
    chance = random.Random(7)
    names = [f"City {number} of the <crowd> & 'Ünlü' 東京" for number in range(40)]
    places = [(name, chance.uniform(50, 52), chance.uniform(8, 11)) for name in names]
    links = [(number, chance.randrange(max(0, number - 6), number)) for number in range(1, 40)]
    path = tmp_path_factory.mktemp("networks") / "crowded.graphml"
    path.write_text(graphml(places, [*links, (0, 39), (3, 33), (12, 27)]), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=["abilene", "crowded"])
def day(
    request: pytest.FixtureRequest,
    mesh_storage_databases: testing.Databases,
    tmp_path_factory: pytest.TempPathFactory,
    crowded: Path,
) -> Day:
    """Live a day of a network."""
    picture = tmp_path_factory.mktemp("pictures") / "day.svg"
    with mesh_storage_databases.fresh(with_schema=False) as url:
        live(url, crowded if request.param == "crowded" else None, picture)
        table = dict(rows(url, "SELECT destination, route FROM mesh_routing_table"))
        links = rows(
            url,
            "SELECT source.node_name, target.node_name, route_latency, routes.status FROM routes"
            " JOIN nodes AS source ON source.node_id = source_node_id"
            " JOIN nodes AS target ON target.node_id = target_node_id",
        )
    ends = [{name.removeprefix(f"{request.param}/") for name in link[:2]} for link in links]
    return Day(
        ET.parse(picture).getroot(),  # noqa: S314 - the example wrote it
        table,
        {frozenset(pair): float(link[2]) for pair, link in zip(ends, links, strict=True)},
        [pair for pair, link in zip(ends, links, strict=True) if link[3] == "STATUS_DISCONNECTED"],
    )


def read_map(svg: ET.Element, name: str) -> Map:
    [group] = svg.findall(f"{SVG}g[@id='{name}']")
    cities = {
        circle.findtext(f"{SVG}title", ""): (float(circle.attrib["cx"]), float(circle.attrib["cy"]))
        for circle in group.iter(f"{SVG}circle")
    }
    at = {place: city for city, place in cities.items()}

    def drawn(kind: str) -> list[list[Place]]:
        paths = [path.attrib["d"] for path in group.iter(f"{SVG}path") if path.attrib["class"] == kind]
        return [[(float(x), float(y)) for x, y in re.findall(r"([-.\d]+),([-.\d]+)", path)] for path in paths]

    def between(kind: str) -> list[list[str]]:
        return [[at[place] for place in path] for path in drawn(kind)]

    texts = [text for text in group.iter(f"{SVG}text") if text.attrib["class"] in ("name", "detail")]
    details = {
        above.text or "": text.text or ""
        for above, text in itertools.pairwise(texts)
        if text.attrib["class"] == "detail"
    }
    return Map(
        cities,
        [text.text or "" for text in texts if text.attrib["class"] == "name"],
        details,
        [set(link) for link in between("link")],
        [set(link) for link in between("failed")],
        [(sum(x for x, _ in cross) / 4, sum(y for _, y in cross) / 4) for cross in drawn("cross")],
        between("route"),
    )


def latencies(links: dict[frozenset[str], float]) -> Any:
    graph: Any = nx.Graph()
    graph.add_weighted_edges_from((*link, latency) for link, latency in links.items())
    return graph


@pytest.mark.parametrize("panel", ["before", "after"])
def test_each_map_names_every_city_once_and_draws_every_link(day: Day, panel: str) -> None:
    drawn = read_map(day.svg, panel)
    cities = {city for link in day.links for city in link}
    assert sorted(drawn.names) == sorted(cities)
    assert set(drawn.cities) == cities
    assert sorted(map(sorted, drawn.links + drawn.failed)) == sorted(map(sorted, day.links))


def test_the_link_that_failed_is_marked_and_no_other(day: Day) -> None:
    before, after = read_map(day.svg, "before"), read_map(day.svg, "after")
    assert (before.failed, before.crosses) == ([], [])
    assert after.failed == day.disconnected
    [(a, b)] = after.failed
    middle = [(after.cities[a][axis] + after.cities[b][axis]) / 2 for axis in (0, 1)]
    assert after.crosses == [pytest.approx(tuple(middle), abs=0.1)]


def test_the_routes_after_the_failure_are_those_of_the_routing_table(day: Day) -> None:
    drawn = read_map(day.svg, "after")
    assert len(drawn.details) > 3
    source = read_map(day.svg, "before").routes[0][0]
    reachable = {target for target in drawn.details if f"{source} > {target}" in day.table}
    assert {target for target, detail in drawn.details.items() if detail != "unreachable"} == reachable
    assert {(route[0], route[-1]) for route in drawn.routes} == {(source, target) for target in reachable}
    for route in drawn.routes:
        target = route[-1]
        for at, hop in itertools.pairwise(route):
            assert day.table[f"{at} > {target}"]["next_hop"] == hop
        stored = day.table[f"{source} > {target}"]
        assert len(route) - 1 == stored["hops"]
        assert drawn.details[target].startswith(f"{stored['latency_ms']:.1f} ms (+")


def test_the_routes_before_the_failure_were_the_shortest_and_those_over_the_link(day: Day) -> None:
    drawn = read_map(day.svg, "before")
    graph = latencies(day.links)
    [failed] = day.disconnected
    by_target = {route[-1]: route for route in drawn.routes}
    [source] = {route[0] for route in drawn.routes}
    shortest = nx.single_source_dijkstra_path(graph, source)
    over_the_link = {
        target for target, path in shortest.items() if any({a, b} == failed for a, b in itertools.pairwise(path))
    }
    assert set(by_target) == over_the_link
    for target, route in by_target.items():
        assert route == shortest[target]
        latency = nx.path_weight(graph, route, "weight")
        assert float(drawn.details[target].removesuffix(" ms")) == pytest.approx(latency, abs=0.06)


def boxes(element: ET.Element, x: float = 0, y: float = 0) -> Iterator[Box]:
    """Yield about where texts and cities are, by letters of an average width of wide fonts."""
    moved = re.match(r"translate\(([-.\d]+) ([-.\d]+)\)", element.get("transform", ""))
    x, y = (x + float(moved[1]), y + float(moved[2])) if moved else (x, y)
    if element.tag == f"{SVG}text":
        text, size = element.text or "", float(element.attrib["font-size"])
        width = size * sum(1.0 if letter > "\u2fff" else 0.6 for letter in text)
        start = {"start": 0.0, "middle": 0.5, "end": 1.0}[element.attrib["text-anchor"]]
        left, line = x + float(element.attrib["x"]) - start * width, y + float(element.attrib["y"])
        yield Box(left, line - 0.75 * size, left + width, line + 0.2 * size, text)
    elif element.tag == f"{SVG}circle":
        cx, cy, r = x + float(element.attrib["cx"]), y + float(element.attrib["cy"]), float(element.attrib["r"])
        yield Box(cx - r, cy - r, cx + r, cy + r, "a city")
    for child in element:
        yield from boxes(child, x, y)


def test_no_text_overlaps_another_or_a_city_and_none_is_cut_off(day: Day) -> None:
    drawn = list(boxes(day.svg))
    _, _, width, height = map(float, day.svg.attrib["viewBox"].split())
    assert [box for box in drawn if min(box[:2]) < 0 or box.right > width or box.bottom > height] == []
    texts = [box for box in drawn if box.what != "a city"]
    assert len(texts) > 2 * 11
    assert [
        (a.what, b.what)
        for a, b in itertools.product(texts, drawn)
        if a is not b and a.left < b.right and b.left < a.right and a.top < b.bottom and b.top < a.bottom
    ] == []


def test_north_is_up_and_west_is_left(tmp_path: Path) -> None:
    picture = tmp_path / "day.svg"
    live(picture=picture)
    cities = read_map(ET.parse(picture).getroot(), "before").cities  # noqa: S314 - the example wrote it
    assert cities["Seattle"][1] < cities["Los Angeles"][1]
    assert cities["Seattle"][0] < cities["Denver"][0] < cities["New York"][0]
    # Los Angeles and Atlanta are equally far north.
    assert cities["Los Angeles"][1] == pytest.approx(cities["Atlanta"][1], abs=10)


def luminance(colour: str) -> float:
    """Return the relative luminance of a colour (WCAG 2.2)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_texts_and_lines_stand_out_in_light_and_in_dark(day: Day) -> None:
    light, dark = (style.text or "" for style in day.svg.findall(f"{SVG}style"))
    assert dark.startswith("@media (prefers-color-scheme: dark)")
    least = {("text", "fill"): 4.5, (".detail", "fill"): 4.5, (".faint", "fill"): 4.5, (".city", "fill"): 3}
    least |= {(kind, "stroke"): 3 for kind in (".link", ".route", ".failed", ".cross")}
    for style in (light, dark):
        colours = {
            (kind, use): colour
            for kinds, body in re.findall(r"^([.\w, ]+) {(.*?)}$", style, re.MULTILINE)
            for kind in kinds.split(", ")
            for use, colour in re.findall(r"(fill|stroke): (#\w{6})", body)
        }
        for ground in (colours[".paper", "fill"], colours[".map", "fill"]):
            for drawn, ratio in least.items():
                darker, lighter = sorted(map(luminance, (colours[drawn], ground)))
                assert (lighter + 0.05) / (darker + 0.05) >= ratio, (drawn, colours[drawn], ground)
