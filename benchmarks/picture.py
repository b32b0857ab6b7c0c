"""A chart of the cost by table size: an SVG with a small plot per workload."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from html import escape

from benchmarks.growth import Point

WIDTH, HEIGHT, MARGIN, COLUMNS = 280, 180, 36, 3
_OURS, _PLAIN = "#0b62c4", "#8a8a8a"


def draw(points: Sequence[Point]) -> str:
    """Return the SVG that plots the growth of each workload for the library and plain psycopg."""
    by_workload: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        by_workload[point.workload].append(point)
    top = max(2.0, *(value for point in points for value in (point.ours, point.plain)))
    charts = [
        _chart(name, series, top, x=index % COLUMNS * WIDTH, y=40 + index // COLUMNS * HEIGHT)
        for index, (name, series) in enumerate(by_workload.items())
    ]
    width, height = COLUMNS * WIDTH, 40 + math.ceil(len(charts) / COLUMNS) * HEIGHT
    legend = "".join(
        f'<text x="{12 + 110 * number}" y="34" fill="{colour}">■ {name}</text>'
        for number, (name, colour) in enumerate((("mesh_storage", _OURS), ("plain psycopg", _PLAIN)))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
        '<text x="12" y="18" font-size="14">Time of a call by table size, as a multiple of that on the smallest</text>'
        f"{legend}{''.join(charts)}</svg>\n"
    )


def _chart(name: str, series: list[Point], top: float, *, x: int, y: int) -> str:
    right, bottom = WIDTH - MARGIN / 2, HEIGHT - MARGIN
    decades = math.log10(series[-1].rows / series[0].rows) or 1

    def across(rows: int) -> float:
        return round(MARGIN + math.log10(rows / series[0].rows) / decades * (right - MARGIN), 1)

    def up(value: float) -> float:
        return round(bottom - value / top * (bottom - MARGIN), 1)

    def line(colour: str, values: Sequence[float]) -> str:
        places = " ".join(f"{across(point.rows)},{up(value)}" for point, value in zip(series, values, strict=True))
        return f'<polyline fill="none" stroke="{colour}" stroke-width="2" points="{places}"/>'

    lines = line(_OURS, [point.ours for point in series]) + line(_PLAIN, [point.plain for point in series])
    labels = "".join(
        f'<text x="{across(point.rows)}" y="{bottom + 14}" text-anchor="middle">{_short(point.rows)}</text>'
        for point in series
    )
    ticks = "".join(
        f'<text x="{MARGIN - 6}" y="{up(tick) + 4}" text-anchor="end">{tick}</text>'
        for tick in range(0, math.floor(top) + 1, max(1, math.floor(top / 4)))
    )
    axes = f'<path d="M{MARGIN} {MARGIN} V{bottom} H{right}" fill="none" stroke="#ccc"/>'
    return (
        f'<g transform="translate({x} {y})"><text x="{MARGIN}" y="{MARGIN - 12}">{escape(name)}</text>'
        f"{axes}{ticks}{labels}{lines}</g>"
    )


def _short(rows: int) -> str:
    if rows >= 1_000_000:
        return f"{rows / 1_000_000:g}M"
    return f"{rows / 1000:g}k" if rows >= 1000 else str(rows)
