"""The results as tables and as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from benchmarks.contest import Comparison
from benchmarks.growth import LIMIT, Point
from benchmarks.limits import Fact


@dataclass
class Report:
    """The results of one run."""

    comparisons: list[Comparison] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)
    growth: list[Point] = field(default_factory=list)

    def comparison_text(self) -> str:
        """Return the comparisons and the values with limits as tables."""
        parts = [", ".join(f"{name} {value}" for name, value in _machine().items())]
        if self.comparisons:
            parts.append(_table(_COMPARISON_HEAD, [_comparison_row(one) for one in self.comparisons]))
        if self.facts:
            parts.append(_table(_FACT_HEAD, [_fact_row(one) for one in self.facts]))
        return "\n\n".join(parts)

    def growth_text(self) -> str:
        """Return the growth as a table, without the smallest size, which is the baseline."""
        smallest = min(one.rows for one in self.growth)
        return _table(_GROWTH_HEAD, [_growth_row(one) for one in self.growth if one.rows > smallest])

    def json(self) -> str:
        """Return the results as JSON."""
        document: dict[str, Any] = {
            "machine": _machine(),
            "comparisons": [
                asdict(one) | {"target": one.target._asdict(), "meets_target": one.meets_target}
                for one in self.comparisons
            ],
            "facts": [asdict(one) for one in self.facts],
            "growth": [asdict(one) | {"limit": LIMIT} for one in self.growth],
        }
        return json.dumps(document, indent=2) + "\n"


_COMPARISON_HEAD = (
    "workload", "against", "CPU µs", "its CPU µs", "CPU x", "items/s", "its items/s", "throughput x", "target", "",
)  # fmt: skip
_FACT_HEAD = ("", "measured", "target", "")
_GROWTH_HEAD = ("workload", "rows", "ours x", "plain x", "ours / plain", "target", "")


def _comparison_row(one: Comparison) -> tuple[str, ...]:
    return (
        one.workload,
        one.rival,
        f"{one.cpu_ours:.1f}",
        f"{one.cpu_rival:.1f}",
        f"{one.cpu_ratio:.2f}",
        f"{1e6 / one.wall_ours:,.0f}",
        f"{1e6 / one.wall_rival:,.0f}",
        f"{one.throughput_ratio:.2f}",
        str(one.target),
        _verdict(one.meets_target) if any(one.target) else "",
    )


def _fact_row(one: Fact) -> tuple[str, ...]:
    return one.name, f"{one.value:.2f} {one.unit}", f"≤ {one.limit:g} {one.unit}", _verdict(one.value <= one.limit)


def _growth_row(one: Point) -> tuple[str, ...]:
    return (
        one.workload,
        f"{one.rows:,}",
        f"{one.ours:.2f}",
        f"{one.plain:.2f}",
        f"{one.ratio:.2f}",
        f"≤ {LIMIT:g}",
        _verdict(one.ratio <= LIMIT),
    )


def _verdict(met: bool) -> str:
    return "ok" if met else "missed"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = []
    for row in (head, tuple("-" * width for width in widths), *rows):
        cells = (
            cell.rjust(width) if _is_number(cell) else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "").isdigit()


def _machine() -> dict[str, str]:
    return {
        "Python": platform.python_version(),
        "CPUs": str(os.cpu_count()),
        **{name: version(name) for name in ("sqlalchemy", "psycopg", "mesh-storage")},
    }
