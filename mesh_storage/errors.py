"""The exceptions of mesh_storage, and the translation of database errors into them.

Errors are classified by SQLSTATE and constraint name (PostgreSQL manual, appendix A), never by message text.
"""

from __future__ import annotations

import copy
import inspect
import re
import traceback
from typing import Literal

import psycopg
import sqlalchemy.exc
import sqlalchemy.orm.exc

Committed = Literal["no", "unknown", "locally"]


class MeshStorageError(Exception):
    """A storage operation failed."""

    sqlstate: str | None = None
    """The SQLSTATE reported by the server, if any."""
    constraint: str | None = None
    """The name of the violated constraint, if any."""
    retryable: bool = False
    """Whether the same work may succeed if retried in a new unit of work."""
    committed: Committed = "no"
    """`no`; `unknown` if the connection was lost during COMMIT; `locally` if the wait for a synchronous standby was cut
    short."""

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
    """No aggregate has this key."""

    def __init__(self, entity: str, key: object) -> None:
        super().__init__(entity, key)
        self.entity = entity
        """The class name of the aggregate."""
        self.key = key
        """The key that was looked up."""

    def __str__(self) -> str:
        if self.entity == "Backup":
            return f"no backup found at {self.key!r}"
        return f"no {self.entity} with key {self.key!r}"


class AlreadyExistsError(MeshStorageError):
    """A row with the same unique key already exists."""


class ConflictError(MeshStorageError):
    """The stored data is not what the caller expected."""

    def __init__(
        self,
        *args: object,
        actual: int | None = None,
        holder: bytes | None = None,
        sqlstate: str | None = None,
        constraint: str | None = None,
        retryable: bool | None = None,
    ) -> None:
        super().__init__(*args, sqlstate=sqlstate, constraint=constraint, retryable=retryable)
        self.actual = actual
        """The stored version, 0 if there is no entry; None if no version was compared."""
        self.holder = holder
        """The holder of the lease that was not obtained, if that is the conflict."""


class InvalidInputError(MeshStorageError, ValueError):
    """A value cannot be stored as given."""

    def __init__(
        self,
        *args: object,
        field: str | None = None,
        sqlstate: str | None = None,
        constraint: str | None = None,
    ) -> None:
        super().__init__(*args, sqlstate=sqlstate, constraint=constraint)
        self.field = field
        """The name of the rejected field or parameter, if known."""


class MissingReferenceError(MeshStorageError):
    """A foreign key refers to a row that does not exist, or still refers to a row that would be deleted."""


class UnavailableError(MeshStorageError):
    """The database cannot be reached, or the connection to it was lost."""

    retryable = True
    """True: the database may be back by then."""


class SerializationError(MeshStorageError):
    """A serialization failure or deadlock with a concurrent transaction; retry the unit of work."""

    retryable = True
    """True: the others may be done by then."""


class StorageTimeoutError(MeshStorageError):
    """The operation exceeded its timeout."""


class CompactedError(MeshStorageError):
    """The changes behind this cursor are no longer kept, or it belongs to another database; begin anew without one."""


class SchemaMismatchError(MeshStorageError):
    """The database schema is not the one that this version of mesh_storage requires."""


class ConfigurationError(MeshStorageError):
    """A setting is missing or invalid."""


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


_MISSING = (
    "A table or column is missing: if it is one of mesh_storage's, run: mesh-storage upgrade; if it is your own, run "
    "your service's migrations."
)
_ADVICE = {
    "0A000": "The server cannot do this; if the database is distributed, docs/scaling.md says what it refuses.",
    "42501": "The database role lacks a privilege; mesh-storage roles grants it, as docs/operations.md describes.",
    "42703": _MISSING,
    "42P01": _MISSING,
    "25P03": "The unit of work did nothing for longer than idle_in_transaction_timeout, so the server ended it.",
    "55P03": "A lock was not available within lock_timeout.",
}
"""What to do, where the class of an error does not say it."""

# A pooler ran the statement in another session than the one that prepared it.
_PREPARED_ELSEWHERE = ("26000", "42P05")
# 0A000 (feature_not_supported) has many causes; raised by this server function, it means a changed result type.
_RESULT_TYPE_CHANGED = ("0A000", "RevalidateCachedQuery")
# XX000 (internal_error) likewise; raised by these functions of Citus, it means that a table or shard that the statement
# was planned for has been distributed, moved or split meanwhile.
_SHARDS_CHANGED = {("XX000", "GetCitusTableCacheEntry"), ("XX000", "LookupShardRelationFromCatalog")}


def prepared_in_vain(error: MeshStorageError) -> bool:
    """Return whether an error means that a prepared statement is missing on the server or no longer matches it."""
    return error.sqlstate in _PREPARED_ELSEWHERE or (
        isinstance(error, UnavailableError) and error.sqlstate == _RESULT_TYPE_CHANGED[0]
    )


def translate(error: Exception) -> MeshStorageError:
    """Return the mesh_storage exception for an error of psycopg or SQLAlchemy.

    Raise the result `from` that error, so that the original message remains available as the cause.
    """
    if isinstance(error, MeshStorageError):
        return error
    if isinstance(error, sqlalchemy.exc.DBAPIError) and isinstance(error.orig, Exception):
        return translate(error.orig)
    if isinstance(error, psycopg.Error):
        return _translate_psycopg(error)
    if isinstance(error, sqlalchemy.exc.StatementError) and isinstance(error.orig, (TypeError, ValueError)):
        return InvalidInputError("a parameter of the statement has the wrong type or value")
    if isinstance(error, sqlalchemy.orm.exc.StaleDataError):
        return ConflictError("a row that the session changed or deleted has another version by now, or is gone")
    if isinstance(error, (UnicodeError, OverflowError)):
        return InvalidInputError("a string is not valid Unicode, or a number is out of range")
    return MeshStorageError(f"{type(error).__name__} during a database operation; see the cause")


def connection_refused(error: Exception) -> tuple[MeshStorageError, Exception | None]:
    """Return the mesh_storage exception for a failed connection attempt, and the cause to chain to it.

    psycopg's error references the half-open connection, and through it the password; a copy, made as for pickling, does
    not. Raise the result outside the `except` block, so that the original error does not become its context.
    """
    original = error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) else error
    for each in (error, original):
        # The frames hold the half-open connection in a reference cycle, which would keep its socket open until a
        # collection.
        traceback.clear_frames(each.__traceback__ if each else None)
    return translate(error), copy.copy(original) if isinstance(original, psycopg.Error) else None


def _translate_psycopg(error: psycopg.Error) -> MeshStorageError:
    sqlstate, (_, constraint) = error.sqlstate, _named(error)
    if sqlstate is None:
        if isinstance(error, psycopg.OperationalError):
            return UnavailableError(_unavailable(error))
        if isinstance(error, psycopg.DataError):
            return InvalidInputError("a value cannot be sent to the database")
        return MeshStorageError(f"{type(error).__name__} from psycopg; see the cause")
    if (sqlstate, error.diag.source_function) == _RESULT_TYPE_CHANGED:
        return UnavailableError(
            "the type of a column changed after this connection prepared its statements; retry on a new connection",
            sqlstate=sqlstate,
        )
    if (sqlstate, error.diag.source_function) in _SHARDS_CHANGED:
        return SerializationError(
            "a table was distributed, or a part of it moved to another server, while a statement ran; retry the unit "
            f"of work. PostgreSQL reports {error.diag.message_primary!r} (SQLSTATE {sqlstate})",
            sqlstate=sqlstate,
        )
    kind = _BY_SQLSTATE.get(sqlstate) or _BY_CLASS.get(sqlstate[:2], MeshStorageError)
    advice = _ADVICE.get(sqlstate) or inspect.getdoc(kind)
    message = f"{advice} PostgreSQL reports {error.diag.message_primary!r} (SQLSTATE {sqlstate}"
    message += f", constraint {constraint})" if constraint else ")"
    if sqlstate in _PREPARED_ELSEWHERE:
        message += "; if a pooler in transaction mode is in use, set transaction_pooling"
    if kind is InvalidInputError:
        field = _field(error)
        message = f"{field}: {message}" if field else message
        return InvalidInputError(message, field=field, sqlstate=sqlstate, constraint=constraint)
    return kind(message, sqlstate=sqlstate, constraint=constraint)


def _field(error: psycopg.Error) -> str | None:
    """Return the rejected attribute, by column name or check constraint name (`{table}_{column}_check`)."""
    from mesh_storage.models.base import attribute_of

    (table, constraint), column = _named(error), error.diag.column_name
    column = column or (constraint and constraint.removeprefix(f"{table}_").removesuffix("_check"))
    return table and column and (attribute_of(table, column) or column)


def _named(error: psycopg.Error) -> tuple[str | None, str | None]:
    """Return the table and the constraint, without the number of the shard in which Citus has a table of ours."""
    from mesh_storage.models.base import Base

    table, constraint = error.diag.table_name, error.diag.constraint_name
    shard = re.fullmatch(r"(\w+)(_\d{6,})", table or "")
    if shard is None or shard[1] not in Base.metadata.tables:
        return table, constraint
    return shard[1], constraint and constraint.removesuffix(shard[2])


def _unavailable(error: psycopg.OperationalError) -> str:
    if isinstance(error, psycopg.errors.ConnectionTimeout):
        return (
            "could not connect to the database within connect_timeout; check that the server is running and the "
            "address is right"
        )
    return f"{inspect.getdoc(UnavailableError)} psycopg reports: {str(error).strip()}"
