"""What a health check finds."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import func, literal_column, or_, select

from mesh_storage import schema
from mesh_storage.errors import MeshStorageError
from mesh_storage.postgres.statement import Row, Statement

TIMEOUT_S = 1.5
"""Seconds of a health check's own; with what a server that stands still is given on top, it takes 2 at most."""

READ_ONLY = Statement(
    lambda: select(
        or_(
            func.pg_is_in_recovery(),
            func.current_setting(literal_column("'default_transaction_read_only'")) == literal_column("'on'"),
        )
    )
)


@dataclass(frozen=True, slots=True)
class Health:
    """What a health check found."""

    connected: bool
    """Whether a connection was got and a query answered."""
    writable: bool
    """Whether the server takes writes: it is no standby and not read-only."""
    round_trip_ms: float | None
    """Milliseconds that the query took; None when not connected."""
    revision: str | None
    """The schema revision of the database; None where it is not known or there is no schema."""
    head: str
    """The schema revision that this version of mesh_storage works with."""
    pool_size: int
    """Connections at most."""
    pool_in_use: int
    """Connections that units of work had when the check began; when that is all of them, others must wait."""
    error: MeshStorageError | None = None
    """Why it is not connected, or why the revision is not known."""

    @property
    def ok(self) -> bool:
        """Whether all is well: connected, writable, and the schema is the right one."""
        return self.connected and self.writable and self.revision == self.head


def answered(
    row: Row | None,
    revision: str | None,
    unclear: MeshStorageError | None,
    *,
    round_trip_ms: float,
    pool_size: int,
    pool_in_use: int,
) -> Health:
    """Return what was found of a database that answered `READ_ONLY` with this row, and which schema it has."""
    return Health(
        connected=True,
        writable=row is not None and not row[0],
        round_trip_ms=round_trip_ms,
        revision=revision,
        head=schema.head(),
        pool_size=pool_size,
        pool_in_use=pool_in_use,
        error=unclear,
    )


def unreachable(error: MeshStorageError, *, pool_size: int, pool_in_use: int) -> Health:
    """Return what was found of a database that did not answer."""
    return Health(
        connected=False,
        writable=False,
        round_trip_ms=None,
        revision=None,
        head=schema.head(),
        pool_size=pool_size,
        pool_in_use=pool_in_use,
        error=error,
    )
