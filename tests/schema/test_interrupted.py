"""An upgrade that is ended from outside says what ended it, and the next one finishes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from mesh_storage import MeshStorageError, SchemaMismatchError, UnavailableError, schema
from tests.processes import eventually
from tests.schema import legacy

TERMINATED = "terminating connection due to administrator command"


@contextmanager
def held(url: str, statement: str) -> Iterator[None]:
    """Hold locks in a transaction, so that an upgrade has to wait."""
    with psycopg.connect(url) as holder:
        holder.execute(statement.encode())
        yield
        holder.rollback()


WAITS = {
    "in a transaction": ("0008", "ALTER TABLE mesh_routing_table SET (fillfactor = 90)", "ALTER TABLE"),
    "beside the traffic": ("0006", "INSERT INTO mesh_state (key, value) VALUES ('held', '')", "CREATE INDEX"),
}


def waiting(connection: legacy.Connection, statement: str) -> bool:
    row = connection.execute(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        " AND query ~ %s",
        [f"^{statement}.* mesh_"],
    ).fetchone()
    return row is not None


def ended(connection: legacy.Connection, statement: str) -> bool:
    """Terminate the backend that waits, unless it has just given up and will try again."""
    terminated = connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock' AND query ~ %s",
        [f"^{statement}.* mesh_"],
    )
    return terminated.fetchone() is not None


@pytest.mark.parametrize("where", WAITS)
def test_a_backend_that_was_terminated_is_said_to_be(
    legacy_url: str, connection: legacy.Connection, where: str
) -> None:
    revision, hold, statement = WAITS[where]
    schema.upgrade(legacy_url, revision)
    failures: list[BaseException] = []

    def upgrade() -> None:
        try:
            schema.upgrade(legacy_url)
        except MeshStorageError as error:
            failures.append(error)

    with held(legacy_url, hold):
        migrating = threading.Thread(target=upgrade, daemon=True)
        migrating.start()
        assert eventually(lambda: ended(connection, statement))
        migrating.join(120)
        assert not migrating.is_alive()
    (failure,) = failures
    assert isinstance(failure, UnavailableError)
    assert TERMINATED in str(failure)
    schema.upgrade(legacy_url)


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("where", WAITS)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_was_ended_ends_as_others_do(
    legacy_url: str, connection: legacy.Connection, where: str, number: int, status: int
) -> None:
    revision, hold, statement = WAITS[where]
    schema.upgrade(legacy_url, revision)
    with held(legacy_url, hold):
        command = subprocess.Popen(
            [sys.executable, "-m", "mesh_storage", "upgrade", "--url", legacy_url],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert eventually(lambda: waiting(connection, statement))
        command.send_signal(number)
        said, _ = command.communicate(timeout=30)
    assert command.returncode == status, said
    assert "see the cause" not in said
    schema.upgrade(legacy_url)


def test_no_timeout_of_transactions_ends_it(legacy_url: str, connection: legacy.Connection) -> None:
    known: Any = connection.execute("SELECT count(*) FROM pg_settings WHERE name = 'transaction_timeout'").fetchone()
    if not known[0]:
        pytest.skip("this PostgreSQL has no transaction_timeout")
    connection.execute(f"ALTER DATABASE {connection.info.dbname} SET transaction_timeout = '700ms'".encode())
    failed: list[Exception] = []
    schema.upgrade(legacy_url, "0006")
    with psycopg.connect(legacy_url) as holder:
        holder.execute("SET transaction_timeout = 0")
        holder.execute("INSERT INTO mesh_state (key, value) VALUES ('held', '')")

        def upgrade() -> None:
            try:
                schema.upgrade(legacy_url)
            except MeshStorageError as error:
                failed.append(error)

        migrating = threading.Thread(target=upgrade, daemon=True)
        migrating.start()
        assert eventually(lambda: waiting(connection, "CREATE INDEX"))
        assert not eventually(lambda: not migrating.is_alive(), 1.5)
        holder.rollback()
    migrating.join(60)
    assert failed == []
    assert connection.execute("SELECT version_num FROM mesh_alembic_version").fetchone() == (schema.head(),)


def test_a_revision_that_nobody_knows_is_named(mesh_storage_url: str) -> None:
    with pytest.raises(MeshStorageError, match="Can't locate revision identified by '4711'"):
        schema.upgrade(mesh_storage_url, "4711")


def test_a_newer_database_is_said_to_be(mesh_storage_url: str) -> None:
    with psycopg.connect(mesh_storage_url) as connection:
        connection.execute("UPDATE mesh_alembic_version SET version_num = '9999'")
    with pytest.raises(SchemaMismatchError, match=r"too new.*9999.*newer mesh_storage"):
        schema.upgrade(mesh_storage_url)
