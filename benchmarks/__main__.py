"""The command line: runs the benchmarks, prints the tables, and optionally writes them and the chart to files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import bulk, caching, delivery, growth, picture, single, startup, telemetry, threads, versions, watching
from benchmarks.contest import Workload, compare
from benchmarks.database import durable_database
from benchmarks.limits import FACTS
from benchmarks.report import Report

ROWS = 200_000
QUICK_ROWS = 2_000


def main(arguments: list[str] | None = None) -> None:
    """Run the benchmarks selected by the arguments."""
    given = _parser().parse_args(arguments)
    rounds = given.rounds or (1 if given.quick else 7)
    workloads = [one for one in _workloads() if given.only in one.name]
    parts = {**FACTS, **watching.FACTS, **telemetry.FACTS, **caching.FACTS, **delivery.FACTS}
    facts = [fact for name, fact in parts.items() if given.only in name]
    report = Report()
    with durable_database() as database:
        if workloads or facts:
            database.fill(QUICK_ROWS if given.quick else ROWS)
            for workload in workloads:
                _progress(workload.name)
                report.comparisons += compare(workload, database, rounds, quick=given.quick)
            report.facts = [fact(database) for fact in facts]
            print(report.comparison_text(), flush=True)
        if given.only in "growth" and _sizes(given):
            report.growth = growth.measure(database, _sizes(given), rounds, quick=given.quick, progress=_progress)
            print(f"\n{report.growth_text()}")
    if given.json is not None:
        given.json.write_text(report.json())
    if given.picture is not None and report.growth:
        given.picture.write_text(picture.draw(report.growth))


def _sizes(given: argparse.Namespace) -> list[int]:
    sizes = [int(size) for size in given.rows.split(",") if size]
    if given.quick:
        sizes = [1_000, QUICK_ROWS]
    return [*sizes, 10_000_000] if given.large else sizes


def _workloads() -> list[Workload]:
    found = [*single.WORKLOADS, *bulk.WORKLOADS, *threads.WORKLOADS, *versions.WORKLOADS, *startup.WORKLOADS]
    try:
        from benchmarks import aio
    except ImportError as error:
        print(f"skipping asyncio: {error}")
    else:
        found += aio.WORKLOADS
    return [*found, *delivery.WORKLOADS]  # the last, since they empty the messages


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure mesh_storage against plain psycopg."
    )
    parser.add_argument(
        "--only", default="", metavar="NAME", help="run only benchmarks whose name contains this, such as 'growth'"
    )
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds per workload (default: 7)")
    parser.add_argument(
        "--rows",
        default="10000,100000,1000000",
        metavar="N,N",
        help="table sizes for the growth benchmark; '' to skip it",
    )
    parser.add_argument("--large", action="store_true", help="also measure with 10,000,000 messages")
    parser.add_argument(
        "--quick", action="store_true", help="run everything in a minute or two; the results are not meaningful"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write a chart of the growth as SVG")
    return parser


def _progress(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
