"""Positions that go from process to process: what is read after one is never from before it.

REPLICAS_PROCESSES=200 REPLICAS_TRIES=100000 python -m pytest --capture=no tests/replicas/test_positions.py
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.replicas.conftest import deployed, pause, ports, resume

pytestmark = pytest.mark.slow

PROCESSES = int(os.environ.get("REPLICAS_PROCESSES") or 8)
TRIES = int(os.environ.get("REPLICAS_TRIES") or 600)
SECONDS = float(os.environ.get("REPLICAS_SECONDS") or 0.5)


def wait(running: subprocess.Popen[str], seconds: float) -> None:
    """Wait for a time, or until the process ends."""
    with suppress(subprocess.TimeoutExpired):
        running.wait(seconds)


@pytest.mark.timeout(3600)
def test_what_is_read_after_a_position_is_never_stale(programs: Path) -> None:
    with deployed(programs, "-c", "max_connections=500") as servers:
        script = [sys.executable, "-m", "tests.replicas.tries", servers.url(), servers.url(*servers.standbys)]
        arguments = [str(PROCESSES), str(TRIES), str(SECONDS)]
        running = subprocess.Popen(
            [*script, *arguments], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
        )
        chosen = random.Random(1)
        while running.poll() is None:  # each lags now and then, and sometimes longer than anybody waits
            standby = chosen.choice(servers.standbys)
            pause(standby)
            wait(running, chosen.choice([0.05, 0.2, 0.5, 2.5]))
            resume(standby)
            wait(running, chosen.choice([0.1, 0.5]))
        output, _ = running.communicate()
        assert running.returncode == 0
        report = json.loads(output)
        print(report)
        tries = {name: number for name, number in report["tries"].items() if not name.startswith("port")}
        assert tries == {"fresh": TRIES // PROCESSES * PROCESSES}
        answered = {int(name.split()[1]) for name in report["tries"] if name.startswith("port")}
        assert answered & ports(*servers.standbys)  # each process stays at the one that it has chosen
        assert set(report["read from primary"]) == {f"port {servers.primary.port}"}
        assert set() < set(report["read from replicas"]) <= {f"port {standby.port}" for standby in servers.standbys}
