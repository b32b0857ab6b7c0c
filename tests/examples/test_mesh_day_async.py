"""Shows that the day of the example is the same for asyncio: the same report, and the same rows in the database."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import psycopg
import pytest

from mesh_storage import testing
from tests.examples.days import live

pytestmark = pytest.mark.slow

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


def without_times(report: str) -> str:
    """Return a report without what differs from run to run."""
    return re.sub(r"[0-9.]+ s$", "...", report, flags=re.MULTILINE)


def counts(url: str) -> dict[str, Any]:
    with psycopg.connect(url) as connection:
        return {table: connection.execute(f"SELECT count(*) FROM {table}").fetchone() for table in TABLES}


def test_a_day_on_a_throw_away_database_is_that_of_the_sync_side(tmp_path: Path) -> None:
    picture = tmp_path / "day.svg"
    days = []
    for program in ("mesh_day_async.py", "mesh_day.py"):
        report = live(picture=picture, program=program)
        days.append((without_times(report), picture.read_text(encoding="utf-8")))
        picture.unlink()
    assert days[0] == days[1]
    assert "admits a node that shows the join key, and refuses one that guesses" in days[0][0]
    assert "left nothing behind" in days[0][0]
    assert "it is healthy" in days[0][0]


def test_days_of_both_sides_follow_each_other_on_one_database(mesh_storage_databases: testing.Databases) -> None:
    with mesh_storage_databases.fresh(with_schema=False) as url:
        live(url, program="mesh_day_async.py")
        first = counts(url)
        assert first["nodes"] == (11,)
        assert first["mesh_messages"] == (110,)
        assert first["mesh_state"] == (0,)
        live(url)
        report = live(url, program="mesh_day_async.py")
        assert "indexes 1 to 36\n" in report
        assert "the leader of term 3 " in report
        third = counts(url)
        assert {table for table in TABLES if third[table] != first[table]} == {"mesh_messages", "mesh_consensus_log"}
        assert third["mesh_messages"] == (330,)
