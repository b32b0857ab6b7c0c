"""The distribution of a database over the workers of Citus, carried out in steps that may be taken up again."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import psycopg

from mesh_storage.errors import ConfigurationError, ConflictError, MeshStorageError, SchemaMismatchError, translate
from mesh_storage.postgres.server import Server, open_server
from mesh_storage.schema import deploy, migration, tables
from mesh_storage.schema.distribution.catalog import COLUMNS, LOCAL, SEQUENTIAL, Catalog, literal, methods_of
from mesh_storage.schema.distribution.obstacles import obstacles_of
from mesh_storage.schema.distribution.steps import holds_up_nobody, steps_of, swaps_key
from mesh_storage.settings import settings_of

__all__ = ["CHANGES", "COLUMNS", "LOCAL", "SEQUENTIAL", "Distribution", "check_on_one_server", "distribute", "examine"]

logger = logging.getLogger("mesh_storage")

CHANGES = (
    "the id of a message becomes unique for each receiver, and no longer among all messages",
    "a message can be sent to its to_node only, not to other receivers",
    "purge, enqueue and the removal of old messages wait for whoever has locked one of these, rather than pass it over",
    "the earlier Go service cannot write any more",
    "backups and restores are refused",
    "a snapshot and serializability hold on each worker, not over several",
    "there is no way back but to copy the rows into a new database, with the services stopped",
)
"""What is different afterwards; see Citus in docs/scaling.md."""

LOCK_TIMEOUT_S = 3
"""Seconds for which others may be held up by a step that waits for its locks."""
# "mesh_dis" as a number. It is tried, since a session that waits for it would hold up CREATE INDEX CONCURRENTLY.
_LOCK = f"SELECT pg_try_advisory_lock({int.from_bytes(b'mesh_dis')})"


@dataclass(frozen=True, slots=True)
class Distribution:
    """What there is to do to distribute a database."""

    steps: tuple[tuple[str, ...], ...]
    """The statements, in order; those of one step are one transaction. Empty if nothing is left to do."""
    lacking: tuple[str, ...]
    """What stands against them: what the servers lack, and what is in the database."""
    changes: tuple[str, ...]
    """What is different for a service once they are done."""

    @property
    def statements(self) -> tuple[str, ...]:
        """The statements of all steps."""
        return tuple(statement for step in self.steps for statement in step)


def distribute(url: str | None = None, *, apply: bool = True) -> Distribution:
    """Distribute what grows over the workers of Citus: the messages with their deliveries, and the node states.

    It goes step by step, beside other sessions, and does what is left to do: after a failure, call it again. Connect to
    the coordinator as the owner of the tables. Without a URL, the settings come from the environment; their timeouts
    are those of services, and do not apply. A step waits for at most 3 s for a lock that others then wait for, and is
    tried again for up to five minutes.

    Args:
        url: The URL of the database.
        apply: Whether to do it, rather than only to say what there is to do.

    Returns:
        What there was to do.

    Raises:
        ConfigurationError: The server lacks something, or the database holds what cannot be distributed; the message
            says all of it. Nothing was changed, except for a new index if somebody has sent to others meanwhile.
        ConflictError: Another process is distributing it.
        SchemaMismatchError: The schema is older or newer than this code requires, or missing, or one of its tables is.
        StorageTimeoutError: A step could not get its locks.
        UnavailableError: The database cannot be reached.
        MeshStorageError: A step failed, in one of these ways or another; the message has the statement and what
            PostgreSQL says. What was done before stays done.
    """
    server = open_server(settings_of(url))
    try:
        return distribute_server(server, apply=apply)
    finally:
        server.close()


def distribute_server(server: Server, *, apply: bool) -> Distribution:
    """Distribute the database of a server that is already open."""
    server.require_session()
    try:
        with migration.connect(server.connect) as connection:
            return _apply(connection) if apply else examine(connection)
    except psycopg.Error as error:
        raise translate(error) from error


def examine(connection: psycopg.Connection[Any]) -> Distribution:
    """Return what there is to do."""
    fetch = tables.by_psycopg(connection)
    location = tables.locate_during_upgrade(fetch)
    deploy.check(location.revision)
    if location.missing:
        raise SchemaMismatchError(f"tables of the schema are missing: {', '.join(location.missing)}")
    found = Catalog.of(fetch, location)
    if not (left := tuple(steps_of(found))):
        return Distribution((), (), ())
    return Distribution(left, tuple(obstacles_of(found)), CHANGES)


def check_on_one_server(fetch: tables.Fetch) -> None:
    """Raise if a backup or restore would not have all rows of one moment, or would not restore.

    Raises:
        ConfigurationError: Tables of the database are distributed, or are about to be.
    """
    oids = ", ".join(str(oid) for oid, method in (methods_of(fetch) or {}).items() if method == "h") or "NULL"
    names = ", ".join(map(literal, COLUMNS))
    spread = fetch(
        f"SELECT oid::regclass::text FROM pg_class WHERE oid IN ({oids}) AND relname IN ({names}) ORDER BY 1"  # noqa: S608 - our own names
    )
    if listed := ", ".join(name for (name,) in spread):
        raise ConfigurationError(
            f"{listed}: distributed by Citus, so no snapshot covers all rows; back up and restore the servers "
            "themselves, at a common restore point (citus_create_restore_point)"
        )
    if fetch("SELECT FROM pg_index WHERE indrelid = to_regclass('mesh_messages') AND indisprimary AND indnkeyatts > 1"):
        raise ConfigurationError(
            "mesh_messages: it is being distributed, and by now an id may stand for several messages; run: "
            "mesh-storage distribute, which does what is left"
        )


def _apply(connection: psycopg.Connection[Any]) -> Distribution:
    if connection.execute(_LOCK.encode()).fetchone() != (True,):
        raise ConflictError("another process is distributing this database", retryable=True)
    made = _checked(examine(connection))
    for step in made.steps:
        logger.info("distributing", extra={"event": "distribute", "statement": step[-1]})
        _carry_out(connection, step)
    return made


def _checked(made: Distribution) -> Distribution:
    if made.lacking:
        raise ConfigurationError(f"this database cannot be distributed: {'; '.join(made.lacking)}")
    return made


def _carry_out(connection: psycopg.Connection[Any], step: tuple[str, ...]) -> None:
    statement = step[0]

    def attempt() -> None:
        nonlocal statement
        lock_timeout = 0 if holds_up_nobody(step) else LOCK_TIMEOUT_S
        connection.execute(f"SET lock_timeout = '{lock_timeout}s'".encode())
        with connection.transaction() if len(step) > 1 else nullcontext():
            for statement in step:
                connection.execute(statement.encode())
            if swaps_key(step):  # until it had its lock, somebody may have sent to others, whom purge would overlook
                _checked(examine(connection))

    try:
        migration.patiently(attempt)
    except psycopg.Error as error:
        raise _failed(statement, error) from error


def _failed(statement: str, error: psycopg.Error) -> MeshStorageError:
    """Return what to raise for a statement that failed."""
    made = translate(error)
    detail = f" ({error.diag.message_detail})" if error.diag.message_detail else ""
    return type(made)(
        f"{statement}: {made}{detail}. Remove the cause, and distribute it again, which does what is left",
        sqlstate=made.sqlstate,
    )
