"""Where the cities of a network are on a map, and where their labels have room."""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from network import Link, Network

MAP_WIDTH, MAP_HEIGHT = 820.0, 420.0
"""What the cities of a map may take, without their labels."""
RADIUS = 6.0
"""Of the mark of a city."""
NAME_SIZE, TEXT_SIZE = 14.0, 13.0
LINE_HEIGHT = 1.35
"""Of a line of text, in units of its size."""
RINGS = 4
"""Within how many rings around its city the best place of a label is looked for."""


class Point(NamedTuple):
    """A place in the picture; y grows downwards."""

    x: float
    y: float


class Box(NamedTuple):
    """A rectangle of the picture."""

    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        """Return whether two boxes have more than an edge in common."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def contains(self, point: Point) -> bool:
        """Return whether a point is inside."""
        return self.left < point.x < self.right and self.top < point.y < self.bottom


class Label(NamedTuple):
    """Where the label of a city is."""

    box: Box
    anchor: str
    """Which part of a line of its text is at `x`, in the words of SVG."""
    distant: bool
    """Whether it is so far from its city that a line must connect them."""

    @property
    def x(self) -> float:
        """Where its text is aligned."""
        middle = (self.box.left + self.box.right) / 2
        return {"start": self.box.left, "middle": middle, "end": self.box.right}[self.anchor]


def project(network: Network) -> dict[str, Point]:
    """Return where the cities are on a map: north is up, and east is as wide as it is in the middle of them."""
    latitudes = [latitude for latitude, _ in network.positions.values()] or [0.0]
    shrink = math.cos(math.radians((min(latitudes) + max(latitudes)) / 2))
    places = {city: Point(east * shrink, -north) for city, (north, east) in network.positions.items()}
    known = list(places.values()) or [Point(0, 0)]
    (left, right), (top, bottom) = ((min(values), max(values)) for values in zip(*known, strict=True))
    # Where a city is may be unknown: it is drawn on an oval around the others.
    unknown = [city for city in network.cities if city not in places]
    for i, city in enumerate(unknown):
        angle = 2 * math.pi * i / len(unknown)
        across, down = 0.8 * (right - left) or 1.0, 0.8 * (bottom - top) or 0.5
        places[city] = Point((left + right) / 2 + across * math.cos(angle), (top + bottom) / 2 + down * math.sin(angle))
    (left, right), (top, bottom) = ((min(values), max(values)) for values in zip(*places.values(), strict=True))
    scale = min(MAP_WIDTH / (right - left or 1), MAP_HEIGHT / (bottom - top or 1))
    return {city: Point(scale * (places[city].x - left), scale * (places[city].y - top)) for city in network.cities}


def place_labels(
    points: Mapping[str, Point], links: Iterable[Link], details: Mapping[str, list[str]]
) -> dict[str, Label]:
    """Find a place for the label of each city, where it overlaps no other and hides as little of the links as it can.

    A label is the city's name, and below it room for any one of the city's details.
    """
    taken = [around(point) for point in points.values()]
    ink = [dot for link in links for dot in dots(points[link.a], points[link.b])]
    labels: dict[str, Label] = {}
    for city, point in points.items():
        widths = [text_width(city, NAME_SIZE, bold=True), *(text_width(text, TEXT_SIZE) for text in details[city])]
        width, height = max(widths), LINE_HEIGHT * (NAME_SIZE + (TEXT_SIZE if details[city] else 0))
        rings = (candidates(point, width, height, ring) for ring in itertools.count())
        near = itertools.chain.from_iterable(itertools.islice(rings, RINGS))
        far = itertools.chain.from_iterable(rings)
        free = [label for label in near if not any(map(label.box.overlaps, taken))]
        if not free:
            free = [next(label for label in far if not any(map(label.box.overlaps, taken)))]
        labels[city] = min(free, key=lambda label: sum(map(label.box.contains, ink)))
        taken.append(labels[city].box)
    return labels


def candidates(point: Point, width: float, height: float, ring: int) -> Iterator[Label]:
    """Yield places for a label around a city, the better ones first; each ring is farther away than the one before."""
    for right, down in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)):
        distance = (RADIUS + 7 + 10 * ring) / math.hypot(right, down)
        left = point.x + right * distance - width * (1 - right) / 2
        top = point.y + down * distance - height * (1 - down) / 2
        anchor = {1: "start", 0: "middle", -1: "end"}[right]
        yield Label(Box(left, top, left + width, top + height), anchor, distant=ring > 1)


def around(point: Point) -> Box:
    """Return the box of a city's mark."""
    size = RADIUS + 3
    return Box(point.x - size, point.y - size, point.x + size, point.y + size)


def dots(a: Point, b: Point) -> Iterator[Point]:
    """Yield points of a line that are 4 units apart."""
    number = int(math.dist(a, b) / 4) + 1
    return (Point(a.x + (b.x - a.x) * i / number, a.y + (b.y - a.y) * i / number) for i in range(number + 1))


def text_width(text: str, size: float, *, bold: bool = False) -> float:
    """Return about how wide a text is, rather too wide than too narrow."""
    wide = sum(
        0.4 if c in " .,:;()'|fijlt-" else 0.98 if c in "mwMW%@" else 0.78 if c.isupper() else 0.66 for c in text
    )
    wide += sum(0.4 for c in text if unicodedata.east_asian_width(c) in "WF")
    return size * wide * (1.14 if bold else 1.0)
