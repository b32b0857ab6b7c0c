"""Shows that every workload of the benchmarks runs; how fast is not for a test to say, as machines differ."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bulk, caching, delivery, growth, limits, single, startup, telemetry, threads, versions, watching

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory in which a quick run left its results."""
    made = tmp_path_factory.mktemp("benchmarks")
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "--quick",
        "--json",
        made / "figures.json",
        "--picture",
        made / "it.svg",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=made, env=environment, check=True, stdout=subprocess.DEVNULL)
    return made


@pytest.fixture(scope="module")
def figures(quick_run: Path) -> dict[str, Any]:
    """Return the figures of the quick run."""
    found: dict[str, Any] = json.loads((quick_run / "figures.json").read_text())
    return found


def test_every_workload_runs_and_gives_positive_numbers(figures: dict[str, Any]) -> None:
    aio = pytest.importorskip("benchmarks.aio")
    parts = [single, bulk, threads, versions, startup, delivery, aio]
    workloads = [workload for part in parts for workload in part.WORKLOADS]
    assert {one["workload"] for one in figures["comparisons"]} == {workload.name for workload in workloads}
    for one in figures["comparisons"]:
        numbers = [value for value in one.values() if isinstance(value, float)]
        assert len(numbers) == 6
        assert all(0 < number < math.inf for number in numbers), one


def test_every_limit_is_measured(figures: dict[str, Any]) -> None:
    parts = [limits, watching, telemetry, caching, delivery]
    assert len(figures["facts"]) == sum(len(part.FACTS) for part in parts)
    assert all(0 < fact["value"] < math.inf for fact in figures["facts"])


def test_the_growth_is_measured_and_drawn(figures: dict[str, Any], quick_run: Path) -> None:
    measured = {(point["workload"], point["rows"]) for point in figures["growth"]}
    assert measured == {(workload.name, rows) for workload in growth.WORKLOADS for rows in (1000, 2000)}
    assert all(point["ratio"] > 0 for point in figures["growth"])
    picture = (quick_run / "it.svg").read_text()
    assert picture.startswith("<svg")
    assert all(workload.name in picture for workload in growth.WORKLOADS)
