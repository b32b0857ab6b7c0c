"""A picture of a network as SVG: where its cities are, and the routes before and after a link failed."""

from __future__ import annotations

import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from layout import (
    LINE_HEIGHT,
    NAME_SIZE,
    RADIUS,
    TEXT_SIZE,
    Label,
    Point,
    around,
    place_labels,
    project,
    text_width,
)
from network import Link, LinkFailure, Network, follow, table_key
from report import counted, in_short, in_words

TITLE_SIZE, HEADING_SIZE = 22.0, 16.0
MARGIN = 28.0

LIGHT = {
    "paper": "#ffffff",
    "map": "#f3f5f8",
    "ink": "#1f2328",
    "faint": "#57606a",
    "link": "#7d8590",
    "route": "#0969da",
    "failed": "#cf222e",
}
DARK = {
    "paper": "#0d1117",
    "map": "#161b22",
    "ink": "#f0f6fc",
    "faint": "#9da7b1",
    "link": "#7d8590",
    "route": "#58a6ff",
    "failed": "#ff7b72",
}
# Verdana and DejaVu Sans are equally wide, and most others narrower: what fits with them fits with any.
SHAPES = """
text { font-family: Verdana, 'DejaVu Sans', sans-serif }
.title, .heading, .name { font-weight: bold }
.name, .detail { paint-order: stroke; stroke-width: 4px; stroke-linejoin: round }
.link, .route, .failed, .cross, .leader { fill: none; stroke-linecap: round; stroke-linejoin: round }
.leader { stroke-width: 1px }
.link, .city, .target { stroke-width: 2px }
.failed { stroke-width: 3px; stroke-dasharray: 1 7 }
.cross, .source { stroke-width: 4px }
.route { stroke-width: 5px }
"""
LEGEND = {
    "city": "city",
    "link": "link",
    "source": "routes begin here",
    "target": "routes end here",
    "route": "route",
    "failed": "failed link",
}
SAMPLE = 46.0
"""How wide a mark of the legend is."""


@dataclass(frozen=True)
class DrawnRoute:
    """A route as a map shows it."""

    path: list[str]
    """Its cities in order; none if there is no route any more."""
    title: str
    """What a viewer shows when it is pointed at."""
    detail: str
    """What stands below the name of its target."""


@dataclass(frozen=True)
class Panel:
    """One state of the network, which has a map of its own."""

    name: str
    heading: str
    explanation: str
    failed: Link | None = None
    source: str | None = None
    routes: Mapping[str, DrawnRoute] = field(default_factory=dict)
    """By their targets."""

    def kind(self, city: str) -> str:
        """Return how a city is marked."""
        return "source" if city == self.source else "target" if city in self.routes else "city"


def save(picture: str, name: str, path: Path | None = None) -> Path:
    """Write a picture and return where: by default in build/ or, where that cannot be written, a new directory."""
    if path is None:
        path = Path(__file__).parents[1] / "build" / f"{name}.svg"
        try:
            path.parent.mkdir(exist_ok=True)
            path.touch()
        except OSError:  # The checkout is read-only, or another user's.
            path = Path(tempfile.mkdtemp(prefix="mesh_day-")) / path.name
    path.write_text(picture, encoding="utf-8")
    return path.absolute()


def draw(network: Network, failure: LinkFailure | None) -> str:
    """Draw a network before and after a link failed, one map below the other; once, if no link did."""
    panels = before_and_after(failure) if failure else [Panel("network", "All day", "There is no link that could fail")]
    points = project(network)
    details = {city: [panel.routes[city].detail for panel in panels if city in panel.routes] for city in points}
    labels = place_labels(points, network.links, details)
    page = Page(f"The link between {failure.link.a} and {failure.link.b} fails" if failure else network.name)
    page.write(in_short(network), "text", TEXT_SIZE)
    for panel in panels:
        page.draw_map(network, points, labels, panel)
    page.draw_legend(LEGEND if failure else ["city"])
    return page.finish()


def before_and_after(failure: LinkFailure) -> list[Panel]:
    """Return the states of a network before and after a failure, with the routes of the city with most changes."""
    source, targets = failure.most_affected()
    routes: dict[str, dict[str, DrawnRoute]] = {"before": {}, "after": {}}
    for target in targets:
        before, after = (table.get(table_key(source, target)) for table in (failure.before, failure.after))
        details = {
            "before": f"{before['latency_ms']:.1f} ms" if before else "unreachable",
            "after": f"{after['latency_ms']:.1f} ms" if after else "unreachable",
        }
        if before and after:
            details["after"] += f" (+{after['latency_ms'] - before['latency_ms']:.1f})"
        for name, table in (("before", failure.before), ("after", failure.after)):
            title = f"{source} to {target}: {in_words(table, source, target)}"
            routes[name][target] = DrawnRoute(follow(table, source, target), title, details[name])
    changed = f"{len(failure.changed)} of the {counted(len(failure.before), 'best route', 'best routes')} will change"
    shown = f"the map shows those that begin in {source} ({len(targets)}, and no city has more)"
    return [
        Panel(
            "before",
            "Before",
            f"{changed}; {shown}" if targets else changed,
            source=source,
            routes=routes["before"],
        ),
        Panel(
            "after",
            "After",
            "The best routes between the same cities, without the failed link; + is what the detour adds",
            failed=failure.link,
            source=source,
            routes=routes["after"],
        ),
    ]


class Page:
    """A page that is drawn from top to bottom."""

    def __init__(self, title: str) -> None:
        self._svg = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img"})
        self._right, self._bottom = 0.0, MARGIN / 2
        add(self._svg, "title", text=title)
        add(self._svg, "style", text=SHAPES + colours(LIGHT))
        add(self._svg, "style", text=f"@media (prefers-color-scheme: dark) {{{colours(DARK)}}}")
        add(self._svg, "rect", "paper", width="100%", height="100%")
        self.write(title, "title", TITLE_SIZE)

    def write(self, text: str, kind: str, size: float) -> None:
        """Write a line of text."""
        write(self._svg, kind, text, Point(MARGIN, self._bottom), size)
        self._grow(text_width(text, size, bold=kind in ("title", "heading")), LINE_HEIGHT * size)

    def draw_map(
        self, network: Network, points: Mapping[str, Point], labels: Mapping[str, Label], panel: Panel
    ) -> None:
        """Draw a map below its heading."""
        self._bottom += MARGIN / 2
        self.write(panel.heading, "heading", HEADING_SIZE)
        self.write(panel.explanation, "faint", TEXT_SIZE)
        boxes = [*map(around, points.values()), *(label.box for label in labels.values())]
        left, top = (min(box[side] for box in boxes) - MARGIN for side in (0, 1))
        right, bottom = (max(box[side] for box in boxes) + MARGIN for side in (2, 3))
        self._bottom += MARGIN / 4
        place = f"translate({MARGIN - left:.1f} {self._bottom - top:.1f})"
        group = add(self._svg, "g", id=panel.name, transform=place)
        add(group, "rect", "map", x=left, y=top, width=right - left, height=bottom - top, rx=8)
        for link in network.links:
            if link != panel.failed:
                draw_link(group, link, points[link.a], points[link.b])
        for route in panel.routes.values():
            if route.path:
                add(add(group, "path", "route", d=line(points[city] for city in route.path)), "title", text=route.title)
        if panel.failed:
            draw_failed_link(group, panel.failed, points[panel.failed.a], points[panel.failed.b])
        for city, point in points.items():
            add(draw_city(group, panel.kind(city), point), "title", text=city)
        for city, label in labels.items():
            draw_label(group, city, label, points[city], panel.routes.get(city))
        self._grow(right - left, bottom - top)

    def draw_legend(self, kinds: Iterable[str]) -> None:
        """Explain the marks, in as many rows as it takes."""
        self._bottom += MARGIN / 2
        legend = add(self._svg, "g", id="legend")
        left, top = MARGIN, self._bottom
        for kind in kinds:
            text = LEGEND[kind]
            width = SAMPLE + text_width(text, TEXT_SIZE) + MARGIN
            if left > MARGIN and left + width > self._right:
                left, top = MARGIN, top + 2 * TEXT_SIZE
            a, b = (Point(left + across, top + TEXT_SIZE / 2) for across in (0, SAMPLE - 10))
            if kind in ("link", "failed", "route"):
                add(legend, "path", kind, d=line([a, b]))
            else:
                draw_city(legend, kind, Point((a.x + b.x) / 2, a.y))
            if kind == "failed":
                draw_cross(legend, a, b)
            write(legend, "text", text, Point(left + SAMPLE, top - 2), TEXT_SIZE)
            left += width
            self._right = max(self._right, left)
        self._bottom = top + 2 * TEXT_SIZE

    def finish(self) -> str:
        """Return the picture in the size that it has got."""
        width, height = self._right + MARGIN, self._bottom + MARGIN / 2
        self._svg.attrib |= {
            "width": f"{width:.0f}",
            "height": f"{height:.0f}",
            "viewBox": f"0 0 {width:.0f} {height:.0f}",
        }
        ET.indent(self._svg)
        return ET.tostring(self._svg, encoding="unicode") + "\n"

    def _grow(self, width: float, height: float) -> None:
        self._right = max(self._right, MARGIN + width)
        self._bottom += height


def draw_city(group: ET.Element, kind: str, point: Point) -> ET.Element:
    """Draw the mark of a city; the one where routes begin is larger."""
    return add(group, "circle", kind, cx=point.x, cy=point.y, r=RADIUS + 1 if kind == "source" else RADIUS)


def draw_link(group: ET.Element, link: Link, a: Point, b: Point) -> None:
    """Draw a link that works."""
    title = f"{link.a} to {link.b}: {link.latency_ms:.1f} ms"
    add(add(group, "path", "link", d=line([a, b])), "title", text=title)


def draw_failed_link(group: ET.Element, link: Link, a: Point, b: Point) -> None:
    """Draw the link that failed, with a cross on it."""
    add(add(group, "path", "failed", d=line([a, b])), "title", text=f"{link.a} to {link.b}: failed")
    draw_cross(group, a, b)


def draw_cross(group: ET.Element, a: Point, b: Point) -> None:
    """Draw a cross in the middle of a line."""
    x, y = (a.x + b.x) / 2, (a.y + b.y) / 2
    strokes = [line([Point(x - 7, y - 7 * way), Point(x + 7, y + 7 * way)]) for way in (1, -1)]
    add(group, "path", "cross", d=" ".join(strokes))


def draw_label(group: ET.Element, city: str, label: Label, point: Point, route: DrawnRoute | None) -> None:
    """Write the name of a city, and below it what becomes of the route to it."""
    box = label.box
    if label.distant:
        nearest = Point(min(max(point.x, box.left), box.right), min(max(point.y, box.top), box.bottom))
        add(group, "path", "leader", d=line([point, nearest]))
    write(group, "name", city, Point(label.x, box.top), NAME_SIZE, anchor=label.anchor)
    if route:
        top = box.top + LINE_HEIGHT * NAME_SIZE
        write(group, "detail", route.detail, Point(label.x, top), TEXT_SIZE, anchor=label.anchor)


def write(group: ET.Element, kind: str, text: str, top: Point, size: float, *, anchor: str = "start") -> None:
    """Write a text whose first line begins, ends or is centred below a point."""
    attributes = {"x": top.x, "y": top.y + size, "font-size": size, "text-anchor": anchor}
    add(group, "text", kind, text, **attributes)


def line(points: Iterable[Point]) -> str:
    """Return the straight lines from each point to the next, as a path of SVG."""
    return "M" + " L".join(f"{point.x:.1f},{point.y:.1f}" for point in points)


def add(
    parent: ET.Element, tag: str, kind: str | None = None, text: str | None = None, **attributes: Any
) -> ET.Element:
    """Add an element; numbers are rounded to what the eye can see."""
    values = {name: f"{value:.1f}" if isinstance(value, float) else str(value) for name, value in attributes.items()}
    element = ET.SubElement(parent, tag, ({"class": kind} if kind else {}) | values)
    element.text = text
    return element


def colours(palette: Mapping[str, str]) -> str:
    """Return the style that colours the picture."""
    return """
.paper {{ fill: {paper} }}
.map {{ fill: {map} }}
text {{ fill: {ink} }}
.faint, .detail {{ fill: {faint} }}
.name, .detail {{ stroke: {map} }}
.link {{ stroke: {link} }}
.leader {{ stroke: {faint} }}
.route {{ stroke: {route} }}
.failed, .cross {{ stroke: {failed} }}
.city {{ fill: {link}; stroke: {map} }}
.target {{ fill: {route}; stroke: {map} }}
.source {{ fill: {paper}; stroke: {route} }}
""".format_map(palette)
