"""Many replicas that migrate at once, and migrators that are killed: the database always ends at head."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import sqlalchemy
from sqlalchemy import event

from mesh_storage import schema
from mesh_storage.postgres.engine import connect_arguments
from mesh_storage.schema import migration
from mesh_storage.settings import Settings
from mesh_storage.testing import Databases
from tests.backup.backup_help import SYSTEM_15, system_server
from tests.schema import legacy
from tests.schema.conftest import Alembic

pytestmark = pytest.mark.slow

FORK = multiprocessing.get_context("fork")
EVERY = 3
"""A run is killed at each third of its statements, a different third for each way to be killed."""


def until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def at_head(connection: legacy.Connection) -> None:
    assert connection.execute("SELECT version_num FROM mesh_alembic_version").fetchone() == (schema.head(),)
    assert not [row for row in legacy.structure(connection) if row[-1] is False and row[0] != "column"]


def test_five_at_once_all_succeed_and_one_does_the_work(
    legacy_url: str, connection: legacy.Connection, alembic: Alembic
) -> None:
    before = legacy.rows(connection)
    processes = [alembic(legacy_url, "upgrade", "head") for _ in range(5)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 5, errors
    assert sorted(error.count("Running upgrade") for error in errors) == [0] * 4 + [len(schema.revisions())]
    at_head(connection)
    assert legacy.rows(connection) == before


def test_who_waits_for_its_turn_gives_up_in_time(legacy_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mesh_storage.errors import StorageTimeoutError

    monkeypatch.setattr(migration, "TURN_TIMEOUT_S", 0.5)
    with (
        migration.turn(connect_arguments(Settings(url=legacy_url))),
        pytest.raises(StorageTimeoutError, match="another process has been migrating"),
    ):
        schema.upgrade(legacy_url)


def test_who_gets_no_lock_gives_up_in_time_and_has_changed_nothing(
    legacy_url: str, connection: legacy.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mesh_storage.errors import StorageTimeoutError

    schema.upgrade(legacy_url, "0001")
    before = legacy.structure(connection)
    monkeypatch.setattr(migration, "LOCK_PATIENCE_S", 1.0)
    with psycopg.connect(legacy_url, application_name="holder") as holder:
        holder.execute("SELECT FROM mesh_messages LIMIT 1")
        with pytest.raises(
            StorageTimeoutError,
            match=r"transactions that use mesh, mesh_messages .*: server process \d+ \('holder'\)",
        ):
            schema.upgrade(legacy_url)
    assert legacy.structure(connection) == before
    schema.upgrade(legacy_url)
    at_head(connection)


def test_the_limits_come_with_the_connection(legacy_url: str) -> None:
    engine = migration.create_engine(connect_arguments(Settings(url=legacy_url)))
    with engine.connect() as connection:
        found = {
            name: connection.exec_driver_sql(f"SHOW {name}").scalar()
            for name in (
                "lock_timeout",
                "statement_timeout",
                "client_connection_check_interval",
                "idle_session_timeout",
            )
        }
    assert found == {
        "lock_timeout": f"{migration.HOLD_UP_MS}ms",
        "statement_timeout": "0",
        "client_connection_check_interval": "1s",
        "idle_session_timeout": "0",
    }


def test_a_turn_that_was_lost_is_noticed_before_the_next_revision_counts(
    legacy_url: str, connection: legacy.Connection
) -> None:
    with migration.turn(connect_arguments(Settings(url=legacy_url))) as check:
        check()
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' "
            "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        with pytest.raises(psycopg.OperationalError):
            check()


def run_until(url: str, statement: int, when: str, seen: Any) -> None:
    """Migrate, and be killed at a statement; in a child process, which shares a number."""

    def count(*_: Any) -> None:
        seen.value += 1
        if seen.value == statement:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(sqlalchemy.Engine, f"{when}_cursor_execute", count)
    schema.upgrade(url)


def run(url: str, statement: int, when: str) -> tuple[int, int | None]:
    """Return how many statements a child process executed, and how it ended."""
    seen = FORK.Value("i", 0)
    process = FORK.Process(target=run_until, args=[url, statement, when, seen])
    process.start()
    process.join(60)
    return seen.value, process.exitcode


@pytest.fixture(scope="module")
def template(mesh_storage_databases: Databases) -> Iterator[str]:
    with mesh_storage_databases.fresh(with_schema=False) as url:
        with psycopg.connect(url) as connection:
            legacy.create(connection)
            legacy.fill(connection)
        yield url


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("when", "first"), [("before", 1), ("after", 2)])
def test_a_migrator_that_is_killed_at_any_point_leaves_what_the_next_one_completes(
    template: str, mesh_storage_databases: Databases, when: str, first: int
) -> None:
    """Before a statement: also between a commit and the next revision. After one: also before its commit."""
    with psycopg.connect(template) as connection:
        before = legacy.rows(connection)
        name = connection.info.dbname
    with mesh_storage_databases.fresh(with_schema=False) as url:
        copy(name, url)
        statements, status = run(url, 0, when)
    assert status == 0
    assert statements > 60
    stopped_at = set()
    for statement in range(first, statements + 1, EVERY):
        with mesh_storage_databases.fresh(with_schema=False) as url:
            copy(name, url)
            assert run(url, statement, when) == (statement, -signal.SIGKILL)
            with psycopg.connect(url, autocommit=True) as connection:
                if legacy.exists(connection, "mesh_alembic_version"):
                    stopped_at.add(connection.execute("SELECT max(version_num) FROM mesh_alembic_version").fetchone())
                schema.upgrade(url)
                at_head(connection)
                assert legacy.rows(connection) == before
    assert len(stopped_at) >= len(schema.revisions()) - 1


def copy(template: str, url: str) -> None:
    """Replace the database of a URL by a copy of another."""
    with psycopg.connect(url, autocommit=True, dbname="postgres") as admin:
        name = psycopg.conninfo.conninfo_to_dict(url)["dbname"]
        admin.execute(f'DROP DATABASE "{name}"'.encode())
        admin.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"'.encode())


def test_a_migrator_that_is_killed_within_a_concurrent_index_leaves_what_the_next_one_repairs(
    legacy_url: str, connection: legacy.Connection, alembic: Alembic
) -> None:
    before = legacy.rows(connection)
    schema.upgrade(legacy_url, "0006")
    with psycopg.connect(legacy_url) as holder:
        holder.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        holder.execute("SELECT FROM regions")  # its snapshot keeps every concurrent index of the database from its end
        killed = alembic(legacy_url, "upgrade", "head")
        until(
            lambda: connection.execute(
                "SELECT 1 FROM pg_stat_progress_create_index WHERE phase = 'waiting for old snapshots' "
                "AND datname = current_database()"
            ).fetchone(),
            "no index in the making",
        )
        killed.send_signal(signal.SIGKILL)
        killed.wait(10)
        began = time.monotonic()
        until(
            lambda: (
                not connection.execute(
                    "SELECT 1 FROM pg_locks WHERE locktype = 'advisory' "
                    "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
                ).fetchone()
            ),
            "the lock of the dead migrator stays",
            seconds=5,
        )
        until(
            lambda: (
                not connection.execute(
                    "SELECT 1 FROM pg_stat_progress_create_index WHERE datname = current_database()"
                ).fetchone()
            ),
            "the statement of the dead migrator goes on",
            seconds=10,
        )
        assert time.monotonic() - began < 10
        invalid = [row for row in legacy.structure(connection) if row[0] == "index" and row[-1] is False]
        assert len(invalid) == 1
        holder.rollback()
    repaired = alembic(legacy_url, "upgrade", "head")
    assert repaired.wait(60) == 0, repaired.communicate()
    at_head(connection)
    assert legacy.rows(connection) == before


@pytest.mark.parametrize("role", ["superuser", "migrator"])
def test_an_old_transaction_keeps_no_index_from_being_built_for_nothing(
    legacy_url: str, connection: legacy.Connection, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    """Also for a migrator that is not shown since when the transactions of others go on."""
    from mesh_storage.errors import StorageTimeoutError

    schema.upgrade(legacy_url, "0006")
    monkeypatch.setattr(migration, "_OLD_TRANSACTION_S", 1)
    monkeypatch.setattr(migration, "LOCK_PATIENCE_S", 0.5)
    with psycopg.connect(legacy_url, application_name="nightly report") as holder, owner(connection, role) as options:
        holder.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        holder.execute("SELECT FROM regions")
        time.sleep(1.1)
        url = f"{legacy_url}&{options}"
        with pytest.raises(StorageTimeoutError, match="'nightly report'"):
            schema.upgrade(url)
        assert not [row for row in legacy.structure(connection) if row[-1] is False and row[0] == "index"]
        holder.rollback()
        schema.upgrade(url)
    at_head(connection)


@contextmanager
def owner(connection: legacy.Connection, role: str) -> Iterator[str]:
    """Give the tables to a role without any rights of a superuser; yield the options by which sessions become it."""
    if role == "superuser":
        yield "options="
        return
    name = f"migrator_{os.getpid()}"
    connection.execute(f"CREATE ROLE {name}; GRANT CREATE ON SCHEMA public TO {name}".encode())
    for table in (*legacy.TABLES, *legacy.OTHER_TABLES, "mesh_consensus_log_stale", "mesh_alembic_version"):
        connection.execute(f"ALTER TABLE {table} OWNER TO {name}".encode())
    try:
        yield f"options=-crole%3D{name}"
    finally:
        connection.execute(f"REASSIGN OWNED BY {name} TO CURRENT_USER; DROP OWNED BY {name}; DROP ROLE {name}".encode())


def test_a_young_transaction_is_waited_for(legacy_url: str, connection: legacy.Connection) -> None:
    schema.upgrade(legacy_url, "0006")
    with psycopg.connect(legacy_url) as holder, owner(connection, "migrator") as options:
        holder.execute("INSERT INTO mesh_state (key, value) VALUES ('young', '')")
        threading.Timer(1.5, holder.rollback).start()
        schema.upgrade(f"{legacy_url}&{options}")
    at_head(connection)


@pytest.mark.skipif(not SYSTEM_15.exists(), reason="PostgreSQL 15 is not there")
@pytest.mark.parametrize(
    ("revision", "statement"),
    [
        ("base", "UPDATE mesh SET allow_join = true"),
        ("0006", "INSERT INTO mesh_state (key, value) VALUES ('held', '')"),
    ],
)
def test_a_prepared_transaction_is_named_soon(revision: str, statement: str) -> None:
    from mesh_storage.errors import StorageTimeoutError
    from mesh_storage.postgres.server import Server

    with system_server(SYSTEM_15, "-c listen_addresses='' -c max_prepared_transactions=2") as connect:
        server = Server({**connect, "options": ""})
        with psycopg.connect(**connect, autocommit=True) as session:
            legacy.create(session)
            if revision != "base":
                schema.upgrade_server(server, revision)
            session.execute(f"BEGIN; {statement}; PREPARE TRANSACTION 'of some coordinator'".encode())
            # Others are not in the way.
            session.execute("CREATE TABLE other (); BEGIN; LOCK TABLE other; PREPARE TRANSACTION 'harmless'")
            began = time.monotonic()
            with pytest.raises(
                StorageTimeoutError, match=r"'of some coordinator' of postgres since .*ROLLBACK PREPARED"
            ):
                schema.upgrade_server(server)
            assert time.monotonic() - began < 30
            session.execute("ROLLBACK PREPARED 'of some coordinator'")
            schema.upgrade_server(server)
            at_head(session)
            session.execute("ROLLBACK PREPARED 'harmless'")
