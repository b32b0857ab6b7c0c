"""Draws tables as an entity-relationship diagram: SVG, with crow's feet where a table refers to another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from sqlalchemy import Column, Table, UniqueConstraint, make_url

IN_A_ROW = 3
WIDTH, GAP, MARGIN = 270, 60, 20
LINE, HEADING, PADDING = 18, 26, 6
STYLE = """
text { font: 12px sans-serif; fill: #1f2328 }
.name { font-weight: bold }
.mark, .type { fill: #57606a }
.mark { font-size: 10px }
.type { text-anchor: end }
.paper { fill: #ffffff }
.table { fill: #ffffff; stroke: #7d8590 }
.heading { fill: #eaeef2; stroke: #7d8590 }
.reference { fill: none; stroke: #0b62c4; stroke-width: 1.5px }
.many { fill: #ffffff; stroke: #0b62c4; stroke-width: 1.5px }
"""
_DIALECT = make_url("postgresql+psycopg://").get_dialect()()
LEGEND = "PK primary key · FK foreign key · U unique · ? may be null"


@dataclass(frozen=True)
class Box:
    """A table, and where its upper left corner is."""

    table: Table[Any]
    x: int
    y: int

    @property
    def height(self) -> int:
        """How high it is."""
        return height(self.table)

    def line(self, column: Column[Any]) -> int:
        """Return the middle of a column's line."""
        return self.y + HEADING + PADDING + LINE * list(self.table.columns).index(column) + LINE // 2


def height(table: Table[Any]) -> int:
    """Return how high a table is drawn."""
    return HEADING + LINE * len(table.columns) + 2 * PADDING


def draw(tables: Sequence[Table[Any]]) -> str:
    """Draw tables, so many in a row; one that refers to another must come after it in the same row."""
    boxes: dict[str, Box] = {}
    y = MARGIN
    for first in range(0, len(tables), IN_A_ROW):
        row = tables[first : first + IN_A_ROW]
        for number, table in enumerate(row):
            boxes[table.name] = Box(table, MARGIN + number * (WIDTH + GAP), y)
        y += max(map(height, row)) + GAP // 2
    width = 2 * MARGIN + IN_A_ROW * WIDTH + (IN_A_ROW - 1) * GAP
    parts = [_box(box) for box in boxes.values()]
    parts += [
        _reference(boxes[key.column.table.name], key.column, box, column)
        for box in boxes.values()
        for column in box.table.columns
        for key in column.foreign_keys
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + LINE}" role="img">',
            f"<title>{len(tables)} tables: {', '.join(boxes)}</title>",
            f"<style>{STYLE}</style>",
            '<rect class="paper" width="100%" height="100%"/>',
            *parts,
            f'<text class="mark" x="{MARGIN}" y="{y}">{LEGEND}</text>',
            "</svg>\n",
        ]
    )


def type_of(column: Column[Any]) -> str:
    """Return the type of a column as PostgreSQL writes it."""
    return column.type.compile(dialect=_DIALECT).lower()


def is_unique(column: Column[Any]) -> bool:
    """Whether a constraint or an index keeps the column by itself unique, apart from the primary key."""
    constraints = [each.columns for each in column.table.constraints if isinstance(each, UniqueConstraint)]
    indexes = [each.columns for each in column.table.indexes if each.unique]
    return any(list(columns) == [column] for columns in (*constraints, *indexes))


def _box(box: Box) -> str:
    x, y = box.x, box.y
    parts = [
        f'<rect class="table" x="{x}" y="{y}" width="{WIDTH}" height="{box.height}"/>',
        f'<rect class="heading" x="{x}" y="{y}" width="{WIDTH}" height="{HEADING}"/>',
        f'<text class="name" x="{x + 8}" y="{y + 17}">{escape(box.table.name)}</text>',
    ]
    for column in box.table.columns:
        base = box.line(column) + 4
        kind = type_of(column).replace("timestamp with time zone", "timestamptz")
        parts += [
            f'<text class="mark" x="{x + 8}" y="{base}">{_mark(column)}</text>',
            f'<text x="{x + 40}" y="{base}">{escape(column.name)}</text>',
            f'<text class="type" x="{x + WIDTH - 8}" y="{base}">{escape(kind)}{" ?" if column.nullable else ""}</text>',
        ]
    return "\n".join(parts)


def _mark(column: Column[Any]) -> str:
    marks = {"PK": column.primary_key, "FK": column.foreign_keys, "U": is_unique(column)}
    return " ".join(mark for mark, holds in marks.items() if holds)


def _reference(parent: Box, key: Column[Any], child: Box, column: Column[Any]) -> str:
    """Draw a reference from a column to the key of a table on its left: many rows to one."""
    if child.y != parent.y or child.x <= parent.x:
        raise SystemExit(f"{child.table.name} refers to {parent.table.name}, which must be on its left")
    start, end = parent.x + WIDTH, child.x
    top, bottom = parent.line(key), child.line(column)
    middle = (start + end) // 2
    foot = "".join(f"M{end - 10} {bottom} L{end} {bottom + spread}" for spread in (-5, 0, 5))
    bars = "".join(f"M{start + distance} {top - 5} v10" for distance in (6, 10))
    return (
        f'<path class="reference" d="M{start} {top} H{middle} V{bottom} H{end} {foot} {bars}"/>\n'
        f'<circle class="many" cx="{end - 13}" cy="{bottom}" r="3"/>'
    )
