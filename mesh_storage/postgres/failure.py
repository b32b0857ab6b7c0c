"""The consequences of a database error for its unit of work and for other connections."""

from __future__ import annotations

from typing import NamedTuple

import psycopg
import sqlalchemy.exc

from mesh_storage.errors import (
    InvalidInputError,
    MeshStorageError,
    StorageTimeoutError,
    UnavailableError,
    prepared_in_vain,
    translate,
)

DRIVER_ERRORS = (sqlalchemy.exc.StatementError, psycopg.Error)

_READ_ONLY_SQL_TRANSACTION = "25006"
_QUERY_CANCELED = "57014"


class Failure(NamedTuple):
    """A translated error, and whether the connection is lost."""

    error: MeshStorageError
    is_lost: bool
    """Whether the connection is lost; connections of the same age or older may be lost too."""


def judge(error: Exception, *, read_only: bool, connected: bool, silent: bool, timed_out: bool) -> Failure:
    """Translate an error raised in a unit of work, and determine whether the connection is lost.

    Args:
        error: The error raised by the driver, SQLAlchemy or a check.
        read_only: Whether the unit of work is read-only, so that the server's refusal to write is expected.
        connected: Whether psycopg still considers the connection open.
        silent: Whether the connection was closed because the server did not respond.
        timed_out: Whether the timeout of the unit of work has expired.
    """
    translated = translate(error)
    if translated.sqlstate == _READ_ONLY_SQL_TRANSACTION and not read_only:
        message = "the server is read-only: a standby, or a demoted primary"
        return Failure(UnavailableError(message, sqlstate=translated.sqlstate), is_lost=True)
    if translated.sqlstate == _READ_ONLY_SQL_TRANSACTION:
        refused = InvalidInputError("this unit of work is read-only", field="read_only", sqlstate=translated.sqlstate)
        return Failure(refused, is_lost=False)
    if translated.sqlstate == _QUERY_CANCELED and timed_out:
        translated = StorageTimeoutError("the unit of work exceeded its timeout", sqlstate=translated.sqlstate)
    if prepared_in_vain(translated):
        return Failure(translated, is_lost=True)
    if connected:
        return Failure(translated, is_lost=False)
    if silent and timed_out and not isinstance(translated, StorageTimeoutError):
        message = "the server did not respond within the timeout of the unit of work"
        return Failure(StorageTimeoutError(message, retryable=True), is_lost=True)
    if not isinstance(translated, (UnavailableError, StorageTimeoutError)):
        translated = UnavailableError(sqlstate=translated.sqlstate)
    return Failure(translated, is_lost=True)


def failed_before(failure: MeshStorageError) -> MeshStorageError:
    """Return the error for a call after a failed one; raise it from `failure`."""
    return MeshStorageError(
        "an earlier call in this unit of work failed, so its transaction is aborted; roll back, or use "
        "a savepoint() around calls that may fail",
        retryable=failure.retryable,
    )


def not_committed(failure: MeshStorageError) -> MeshStorageError:
    """Return the error for a commit after a failed call; raise it from `failure`."""
    return MeshStorageError(
        "rolled back, not committed: an earlier call in this unit of work failed; let its error leave the unit of "
        "work, or catch it outside a savepoint()",
        sqlstate=failure.sqlstate,
        constraint=failure.constraint,
        retryable=failure.retryable,
    )


def committed_locally(error: MeshStorageError | None) -> MeshStorageError:
    """Return the error for a commit that did not wait for a synchronous standby, with its cause, if any."""
    kind = StorageTimeoutError if error is None else type(error)
    return kind(
        "committed on this server, but perhaps not on the synchronous standby: the wait was cancelled; do not "
        "retry, but check for the data after a failover",
        sqlstate=None if error is None else error.sqlstate,
        retryable=False,
        committed="locally",
    )
