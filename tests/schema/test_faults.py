"""Migrations that meet rows they cannot keep, a kill half-way or a lock: nothing is lost, and the next run finishes."""

from __future__ import annotations

import functools
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from mesh_storage import MeshStorage, MeshStorageError, schema
from mesh_storage.testing import Databases
from tests.processes import start_alembic

STALE_ENTRIES = """
    INSERT INTO mesh_consensus_log (term, index, entry, created_at) VALUES
        (0, 1, '{"stale": "twice"}', '2024-01-01 00:00+00'), (1, 1, '{"stale": "once"}', NULL), (2, 1, '{}', now())
"""


@pytest.fixture
def url(mesh_storage_databases: Databases) -> Iterator[str]:
    """Yield the URL of an empty database."""
    with mesh_storage_databases.fresh(with_schema=False) as made:
        yield made


@pytest.fixture
def other(url: str) -> Iterator[psycopg.Connection[Any]]:
    """Yield a connection that is none of the library's."""
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection


start = functools.partial(start_alembic, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[str]) -> str:
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def invalid_indexes(connection: psycopg.Connection[Any]) -> list[str]:
    found = connection.execute("SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid")
    return [name for (name,) in found]


def test_stale_entries_of_the_log_are_set_aside_and_brought_back(url: str, other: psycopg.Connection[Any]) -> None:
    schema.upgrade(url, "0001")
    other.execute(STALE_ENTRIES)
    everything = "SELECT term, index, entry, created_at FROM mesh_consensus_log ORDER BY 1, 2"
    before = other.execute(everything).fetchall()
    schema.upgrade(url)
    with MeshStorage.open(url) as storage, storage.begin() as uow:
        assert [(entry.term, entry.index) for entry in uow.consensus_log.range(1, 9)] == [(2, 1)]
    aside = other.execute("SELECT term, index, entry FROM mesh_consensus_log_stale ORDER BY 1, 2").fetchall()
    assert aside == [(0, 1, {"stale": "twice"}), (1, 1, {"stale": "once"})]
    finish(start(url, "downgrade", "0001"))
    assert other.execute(everything).fetchall() == before


def test_stale_entries_that_come_while_others_are_set_aside_do_not_stop_it(
    url: str, other: psycopg.Connection[Any]
) -> None:
    schema.upgrade(url, "0006")
    other.execute(STALE_ENTRIES)
    schema.upgrade(url)
    with MeshStorage.open(url) as storage, storage.begin() as uow:
        assert [(entry.term, entry.index) for entry in uow.consensus_log.range(1, 9)] == [(2, 1)]
    assert len(other.execute("SELECT FROM mesh_consensus_log_stale").fetchall()) == 2


def test_a_row_that_breaks_a_rule_is_named_and_all_follows_when_it_is_gone(
    url: str, other: psycopg.Connection[Any]
) -> None:
    schema.upgrade(url, "0001")
    other.execute("INSERT INTO mesh_state (key, value) VALUES ('', '')")
    with pytest.raises(MeshStorageError, match="mesh_state_key_check"):
        schema.upgrade(url)
    assert other.execute("DELETE FROM mesh_state WHERE key = ''").rowcount == 1
    schema.upgrade(url)
    assert "No new upgrade operations" in finish(start(url, "check"))


def test_a_migrator_that_is_killed_half_way_is_followed_by_one_that_finishes(
    url: str, other: psycopg.Connection[Any]
) -> None:
    schema.upgrade(url, "0006")
    with psycopg.connect(url) as holder:
        holder.execute("INSERT INTO mesh_state (key, value) VALUES ('held', '')")  # The concurrent index waits for it.
        migrator = start(url, "upgrade", "head")
        wait_until(lambda: "mesh_state_key_c_idx" in invalid_indexes(other))
        migrator.kill()
        migrator.communicate()
        assert migrator.returncode == -signal.SIGKILL
    finish(start(url, "upgrade", "head"))
    assert invalid_indexes(other) == []
    assert "No new upgrade operations" in finish(start(url, "check"))
    assert other.execute("SELECT count(*) FROM mesh_state").fetchone() == (1,)


def test_a_migration_that_waits_for_a_lock_lets_the_traffic_go_on(url: str, other: psycopg.Connection[Any]) -> None:
    schema.upgrade(url, "0002")
    with psycopg.connect(url) as holder, psycopg.connect(url, autocommit=True) as traffic:
        holder.execute("SELECT FROM mesh")
        migrator = start(url, "upgrade", "head")
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'mesh'::regclass"
        wait_until(lambda: other.execute(waiting).fetchone() == (1,))
        begun = time.monotonic()
        traffic.execute("SELECT FROM mesh")  # Queues behind the migration, which gives up and tries again.
        assert time.monotonic() - begun < 10
        holder.commit()
        finish(migrator)


def test_a_revision_that_does_not_exist_is_an_error_of_ours(url: str) -> None:
    with pytest.raises(MeshStorageError):
        schema.upgrade(url, "no such revision")
