"""The time to import the library, in separate processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager

from benchmarks.contest import Contest, Rival, Round, Sample, Target, Workload
from benchmarks.database import Database

_TIMED_IMPORT = """
import time
wall, cpu = time.perf_counter(), time.process_time()
import {modules}
print(time.process_time() - cpu, time.perf_counter() - wall)
"""


@contextmanager
def import_library(_database: Database) -> Generator[Contest]:
    """Import the library, compared with its main dependencies; both from bytecode, which the first round writes."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

    def importing(modules: str) -> Round:
        def round_(calls: int) -> Sample:
            samples = [_run(_TIMED_IMPORT.format(modules=modules), environment) for _ in range(calls)]
            return Sample(sum(one.cpu for one in samples), sum(one.wall for one in samples))

        return round_

    parts = importing("sqlalchemy.orm, psycopg, pydantic_settings")
    yield Contest(importing("mesh_storage"), [Rival("importing its parts", parts, Target(cpu=1.15))])


def _run(code: str, environment: dict[str, str]) -> Sample:
    output = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    cpu, wall = map(float, output.split())
    return Sample(cpu, wall)


WORKLOADS = [Workload("import mesh_storage", import_library, calls=3, quick_calls=1)]
