"""Shows that the day of the example is the same for asyncio: the same report, and the same rows in the database."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg

from mesh_storage import testing

EXAMPLES = Path(__file__).parents[2] / "examples"
TABLES = (
    "mesh",
    "nodes",
    "routes",
    "mesh_messages",
    "mesh_state",
    "mesh_node_state",
    "mesh_consensus_log",
    "mesh_routing_table",
    "mesh_runtime_config",
)


def live(program: str, url: str | None = None) -> str:
    """Run an example and give its report without what differs from run to run: times and ids."""
    environment = {**os.environ, **({"MESH_STORAGE_URL": url} if url else {})}
    ran = subprocess.run(
        [sys.executable, str(EXAMPLES / program)], capture_output=True, text=True, check=False, env=environment
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    return re.sub(r"mesh_[0-9A-Z]{26}|in [0-9.]+ s$", "...", ran.stdout, flags=re.MULTILINE)


def counts(url: str) -> dict[str, Any]:
    with psycopg.connect(url) as connection:
        return {table: connection.execute(f"SELECT count(*) FROM {table}").fetchone() for table in TABLES}


def test_a_day_on_a_throw_away_database_is_that_of_the_sync_side() -> None:
    report = live("mesh_day_async.py")
    assert report == live("mesh_day.py")
    assert "the join key admits True, a wrong one False" in report
    assert "left nothing behind" in report
    assert "healthy: True" in report


def test_days_of_both_sides_follow_each_other_on_one_database(mesh_storage_databases: testing.Databases) -> None:
    with mesh_storage_databases.fresh(with_schema=False) as url:
        live("mesh_day_async.py", url)
        first = counts(url)
        assert first["nodes"] == (11,)
        assert first["mesh_messages"] == (110,)
        assert first["mesh_state"] == (0,)
        live("mesh_day.py", url)
        report = live("mesh_day_async.py", url)
        assert "indexes 1 to 36, term 3" in report
        third = counts(url)
        assert {table for table in TABLES if third[table] != first[table]} == {"mesh_messages", "mesh_consensus_log"}
        assert third["mesh_messages"] == (330,)
