"""What the migrations need: one migrator at a time, patience with locks, indexes that are built beside the traffic."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import psycopg
import sqlalchemy
from alembic import op
from sqlalchemy.pool import NullPool

from mesh_storage import engine
from mesh_storage.errors import StorageTimeoutError

LOCK_TIMEOUT_S = 3
"""Seconds that a migration waits for a lock, and lets others wait behind it."""
LOCK_ATTEMPTS = 40
"""How often a migration that got no lock is tried again."""
TURN_TIMEOUT_S = 900.0
"""Seconds to wait for another process that migrates the same database."""

# "mesh_sto" as a number: the advisory lock of all migrators of a database.
_ADVISORY_LOCK = int.from_bytes(b"mesh_sto")
_OPTIONS = f"-c lock_timeout={LOCK_TIMEOUT_S}s -c statement_timeout=0 -c idle_in_transaction_session_timeout=0"


def create_engine(connect: dict[str, Any]) -> sqlalchemy.Engine:
    """Make the engine for migrations; its limits come with the connection, so nothing runs before Alembic begins."""
    arguments = {**connect, "options": f"{connect.get('options', '')} {_OPTIONS}".strip()}
    return sqlalchemy.create_engine(
        "postgresql+psycopg://", connect_args=arguments, poolclass=NullPool, hide_parameters=True
    )


@contextmanager
def turn(connect: dict[str, Any]) -> Generator[None]:
    """Wait until no other process migrates this database, and keep others waiting meanwhile.

    The lock belongs to a connection of its own that is in no transaction, so that it neither ends with one nor keeps a
    concurrent index waiting; the server frees it when this process dies.

    Raises:
        StorageTimeoutError: Another process migrates for longer than `TURN_TIMEOUT_S`.
    """
    arguments = {
        **connect,
        "options": f"{connect.get('options', '')} {_OPTIONS} -c client_connection_check_interval=5s",
    }
    with engine.connect(arguments) as connection:
        deadline = time.monotonic() + TURN_TIMEOUT_S
        while not _try_lock(connection):
            if time.monotonic() > deadline:
                raise StorageTimeoutError(f"another process migrates this database for over {TURN_TIMEOUT_S:.0f} s")
            time.sleep(0.2)
        yield


def _try_lock(connection: psycopg.Connection[tuple[Any, ...]]) -> bool:
    row = connection.execute("SELECT pg_try_advisory_lock(%s)", [_ADVISORY_LOCK]).fetchone()
    return row is not None and bool(row[0])


def create_index(name: str, table: str, columns: str, *, unique: bool = False) -> None:
    """Create an index beside the traffic; one that a killed migrator left half built is built anew.

    Must run in `op.get_context().autocommit_block()`.
    """
    if not op.get_context().as_sql:
        valid = op.get_bind().exec_driver_sql(
            f"SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('{name}')"  # noqa: S608
        )
        if valid.scalar():
            return
    drop_index(name)
    op.execute(f"CREATE {'UNIQUE ' if unique else ''}INDEX CONCURRENTLY {name} ON {table} ({columns})")


def drop_index(name: str) -> None:
    """Drop an index beside the traffic; must run in `op.get_context().autocommit_block()`."""
    op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
