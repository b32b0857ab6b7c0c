"""The errors of mesh_storage, and how a database error becomes one of them.

An error is told apart by SQLSTATE and constraint name (PostgreSQL manual, appendix A), never by its message.
"""

from __future__ import annotations

import copy
import inspect
import traceback
from typing import Literal

import psycopg
import sqlalchemy.exc

Committed = Literal["no", "unknown", "locally"]


class MeshStorageError(Exception):
    """The storage could not do what was asked."""

    sqlstate: str | None = None
    """The SQLSTATE that the database gave, where it spoke."""
    constraint: str | None = None
    """The name of the violated constraint, where there is one."""
    retryable: bool = False
    """Whether the same work may succeed when it is done again in a fresh unit of work."""
    committed: Committed = "no"
    """`no`; `unknown` when the connection was lost in COMMIT; `locally` when it did not wait for a standby."""

    def __init__(
        self,
        *args: object,
        sqlstate: str | None = None,
        constraint: str | None = None,
        retryable: bool | None = None,
        committed: Committed = "no",
    ) -> None:
        super().__init__(*(args or (inspect.getdoc(type(self)),)))
        self.sqlstate = sqlstate
        self.constraint = constraint
        if retryable is not None:
            self.retryable = retryable
        if committed != "no":
            self.committed = committed


class NotFoundError(MeshStorageError):
    """There is nothing under this key."""

    def __init__(self, entity: str, key: object) -> None:
        super().__init__(entity, key)
        self.entity = entity
        """The class name of the aggregate that was looked for."""
        self.key = key
        """The key it was looked for by."""

    def __str__(self) -> str:
        return f"there is no {self.entity} under {self.key!r}"


class AlreadyExistsError(MeshStorageError):
    """A unique key is taken."""


class ConflictError(MeshStorageError):
    """What is stored is not what the caller expected."""


class InvalidInputError(MeshStorageError, ValueError):
    """A value cannot be stored as it is."""

    def __init__(
        self,
        *args: object,
        field: str | None = None,
        sqlstate: str | None = None,
        constraint: str | None = None,
    ) -> None:
        super().__init__(*args, sqlstate=sqlstate, constraint=constraint)
        self.field = field
        """The name of the field or parameter that was refused, where it is known."""


class MissingReferenceError(MeshStorageError):
    """A reference points to something that does not exist."""


class UnavailableError(MeshStorageError):
    """The database cannot be reached, or the connection to it was lost."""

    retryable = True
    """True: the database may be back by then."""


class SerializationError(MeshStorageError):
    """Concurrent transactions got in each other's way; do the work again."""

    retryable = True
    """True: the others may be done by then."""


class StorageTimeoutError(MeshStorageError):
    """The work took longer than its time limit."""


class SchemaMismatchError(MeshStorageError):
    """The schema of the database is not the one that this version of mesh_storage works with."""


class ConfigurationError(MeshStorageError):
    """A setting is missing or wrong."""


class ClosedError(MeshStorageError):
    """This storage or unit of work is closed."""


_BY_SQLSTATE: dict[str, type[MeshStorageError]] = {
    "23505": AlreadyExistsError,  # unique_violation
    "23503": MissingReferenceError,  # foreign_key_violation
    "25006": InvalidInputError,  # read_only_sql_transaction
    "25P03": StorageTimeoutError,  # idle_in_transaction_session_timeout
    "25P04": StorageTimeoutError,  # transaction_timeout
    "26000": ConfigurationError,  # invalid_sql_statement_name, see _PREPARED_ELSEWHERE
    "3D000": ConfigurationError,  # invalid_catalog_name
    "3F000": SchemaMismatchError,  # invalid_schema_name
    "42501": ConfigurationError,  # insufficient_privilege
    "42703": SchemaMismatchError,  # undefined_column
    "42P05": ConfigurationError,  # duplicate_prepared_statement, see _PREPARED_ELSEWHERE
    "42P01": SchemaMismatchError,  # undefined_table
    "55P03": StorageTimeoutError,  # lock_not_available
    "57014": StorageTimeoutError,  # query_canceled
    "54000": InvalidInputError,  # program_limit_exceeded
    "40002": InvalidInputError,  # transaction_integrity_constraint_violation
    "40003": UnavailableError,  # statement_completion_unknown
}
_BY_CLASS: dict[str, type[MeshStorageError]] = {
    "08": UnavailableError,  # connection exception
    "22": InvalidInputError,  # data exception
    "23": InvalidInputError,  # integrity constraint violation: not null, check, exclusion
    "28": ConfigurationError,  # invalid authorization specification
    "40": SerializationError,  # transaction rollback: serialization failure, deadlock
    "53": UnavailableError,  # insufficient resources: disk full, too many connections
    "57": UnavailableError,  # operator intervention: shutdown, crash, cannot connect now
    "58": UnavailableError,  # system error: I/O
}


# A pooler sent the statement to another session than the one that prepared it.
_PREPARED_ELSEWHERE = ("26000", "42P05")
# 0A000 (feature_not_supported) says many things; from this function of the server it says that one.
_RESULT_TYPE_CHANGED = ("0A000", "RevalidateCachedQuery")


def prepared_in_vain(error: MeshStorageError) -> bool:
    """Whether an error says that what a connection has prepared is not what the server has."""
    return error.sqlstate in _PREPARED_ELSEWHERE or (
        isinstance(error, UnavailableError) and error.sqlstate == _RESULT_TYPE_CHANGED[0]
    )


def translate(error: Exception) -> MeshStorageError:
    """Make the error of this package that says what a psycopg or SQLAlchemy error means.

    Raise the result `from` the error given, which keeps the database's own words as its cause.
    """
    if isinstance(error, MeshStorageError):
        return error
    if isinstance(error, sqlalchemy.exc.DBAPIError) and isinstance(error.orig, Exception):
        return translate(error.orig)
    if isinstance(error, psycopg.Error):
        return _translate_psycopg(error)
    if isinstance(error, sqlalchemy.exc.StatementError) and isinstance(error.orig, (TypeError, ValueError)):
        return InvalidInputError("a parameter of the statement has the wrong type or value")
    if isinstance(error, (UnicodeError, OverflowError)):
        return InvalidInputError("a text is not valid Unicode, or a number is too large")
    return MeshStorageError(f"{type(error).__name__} while working with the database; see the cause")


def connection_refused(error: Exception) -> tuple[MeshStorageError, Exception | None]:
    """Make the error of this package for a connection that could not be made, and what to chain to it as its cause.

    psycopg's error keeps the half-made connection, and that the password. A copy of it, as for pickling, does not.
    Raise outside of the `except` block, so that the error given is not chained as the context.
    """
    original = error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) else error
    for each in (error, original):
        # Its frames hold the half-made connection in a cycle, and so the socket open until the collector comes by.
        traceback.clear_frames(each.__traceback__ if each else None)
    return translate(error), copy.copy(original) if isinstance(original, psycopg.Error) else None


def _translate_psycopg(error: psycopg.Error) -> MeshStorageError:
    sqlstate, constraint = error.sqlstate, error.diag.constraint_name
    if sqlstate is None:
        if isinstance(error, psycopg.OperationalError):
            return UnavailableError(_unavailable(error))
        if isinstance(error, psycopg.DataError):
            return InvalidInputError("a value cannot be sent to the database")
        return MeshStorageError(f"{type(error).__name__} from psycopg; see the cause")
    if (sqlstate, error.diag.source_function) == _RESULT_TYPE_CHANGED:
        return UnavailableError(
            "a column has another type than when this connection prepared its statements; do it again on a new one",
            sqlstate=sqlstate,
        )
    kind = _BY_SQLSTATE.get(sqlstate) or _BY_CLASS.get(sqlstate[:2], MeshStorageError)
    message = f"{inspect.getdoc(kind)} PostgreSQL says {error.diag.message_primary!r} (SQLSTATE {sqlstate}"
    message += f", constraint {constraint})" if constraint else ")"
    if sqlstate in _PREPARED_ELSEWHERE:
        message += "; behind a pooler that gives each transaction another session, set transaction_pooling"
    if kind is InvalidInputError:
        return InvalidInputError(message, field=_field(error), sqlstate=sqlstate, constraint=constraint)
    return kind(message, sqlstate=sqlstate, constraint=constraint)


def _field(error: psycopg.Error) -> str | None:
    """Find the attribute that was refused, by its column; the name of a check constraint has table and column in it."""
    from mesh_storage.models.base import attribute_of

    table, column, constraint = error.diag.table_name, error.diag.column_name, error.diag.constraint_name
    column = column or (constraint and constraint.removeprefix(f"{table}_").removesuffix("_check"))
    return table and column and (attribute_of(table, column) or column)


def _unavailable(error: psycopg.OperationalError) -> str:
    if isinstance(error, psycopg.errors.ConnectionTimeout):
        return "no connection to the database within connect_timeout; is the server up and the address right?"
    return f"{inspect.getdoc(UnavailableError)} psycopg says: {str(error).strip()}"
