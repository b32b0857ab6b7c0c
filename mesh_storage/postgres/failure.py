"""What an error of the driver means for the unit of work that met it, and for the connections beside it."""

from __future__ import annotations

from typing import NamedTuple

import psycopg
import sqlalchemy.exc

from mesh_storage.errors import (
    MeshStorageError,
    StorageTimeoutError,
    UnavailableError,
    prepared_in_vain,
    translate,
)

DRIVER_ERRORS = (sqlalchemy.exc.DBAPIError, psycopg.Error)

_READ_ONLY_SQL_TRANSACTION = "25006"


class Failure(NamedTuple):
    """A translated error, and what it says of the connection."""

    error: MeshStorageError
    is_lost: bool
    """Whether the connection is of no use any more; those that are as old may not be either."""


def judge(error: Exception, *, read_only: bool, connected: bool, silent: bool, timed_out: bool) -> Failure:
    """Translate an error of a unit of work, and tell whether its connection is lost with it.

    Args:
        error: What the driver, SQLAlchemy or a check raised.
        read_only: Whether the unit of work is to be read-only; then the server rightly refuses to write.
        connected: Whether psycopg still has the connection.
        silent: Whether it was given up because the server did not answer.
        timed_out: Whether the timeout of the unit of work is over.
    """
    translated = translate(error)
    if translated.sqlstate == _READ_ONLY_SQL_TRANSACTION and not read_only:
        message = "the server is read-only: a standby, or a primary that was demoted"
        return Failure(UnavailableError(message, sqlstate=translated.sqlstate), is_lost=True)
    if prepared_in_vain(translated):
        return Failure(translated, is_lost=True)
    if connected:
        return Failure(translated, is_lost=False)
    if silent and timed_out and not isinstance(translated, StorageTimeoutError):
        message = "the server did not answer within the timeout of the unit of work"
        return Failure(StorageTimeoutError(message, retryable=True), is_lost=True)
    if not isinstance(translated, (UnavailableError, StorageTimeoutError)):
        translated = UnavailableError(sqlstate=translated.sqlstate)
    return Failure(translated, is_lost=True)


def failed_before(failure: MeshStorageError) -> MeshStorageError:
    """Return the error for a call after one that failed; raise it from `failure`."""
    return MeshStorageError(
        "a call in this unit of work failed before, so PostgreSQL takes no more statements; roll back, or use "
        "a savepoint() around what may fail",
        retryable=failure.retryable,
    )


def not_committed(failure: MeshStorageError) -> MeshStorageError:
    """Return the error for a commit after a call that failed; raise it from `failure`."""
    return MeshStorageError(
        "rolled back, not committed: a call in this unit of work failed before; let its error leave the unit of "
        "work, or catch it outside of a savepoint()",
        sqlstate=failure.sqlstate,
        constraint=failure.constraint,
        retryable=failure.retryable,
    )


def committed_locally(error: MeshStorageError | None) -> MeshStorageError:
    """Return the error for a commit that did not wait for a synchronous standby, whatever it was raised by."""
    kind = StorageTimeoutError if error is None else type(error)
    return kind(
        "committed on this server, but perhaps not on the synchronous standby: the wait for it was cancelled; do not "
        "do the work again, but check that it is there if this server fails",
        sqlstate=None if error is None else error.sqlstate,
        retryable=False,
        committed="locally",
    )
