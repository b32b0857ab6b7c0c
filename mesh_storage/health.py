"""The result of a health check."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import column, exists, func, literal_column, or_, select, table, text

from mesh_storage import schema
from mesh_storage.errors import ConfigurationError, MeshStorageError, UnavailableError
from mesh_storage.postgres.statement import Row, Statement
from mesh_storage.postgres.wal import Standing

TIMEOUT_S = 1.5
"""Timeout of a health check in seconds; with the grace period for an unresponsive server, it takes at most 2."""

READ_ONLY = Statement(
    lambda: select(
        or_(
            func.pg_is_in_recovery(),
            func.current_setting(literal_column("'default_transaction_read_only'")) == literal_column("'on'"),
        ),
        exists().select_from(table("pg_extension")).where(column("extname") == literal_column("'citus'")),
    )
)
"""Returns whether the server refuses writes, and whether it has Citus."""
# An argument is evaluated before the call, so the limit for connecting to a worker is set by then.
WORKERS = Statement(
    lambda: text(
        """
        SELECT concat(nodename, ':', nodeport) FROM run_command_on_workers(
            'SELECT ' || length(set_config('citus.node_connection_timeout', '1s', true))
        ) WHERE NOT success ORDER BY 1
        """
    ),
    writes=False,
)
"""Asks each worker of Citus, and returns those that do not answer."""


@dataclass(frozen=True, slots=True)
class ReplicaHealth:
    """How a replica is, and how far it is behind the primary."""

    address: str
    """The host with its port, and the database."""
    connected: bool
    """Whether it answered."""
    lag_bytes: int | None
    """How many bytes of the primary's write-ahead log it has not replayed; None if one of the two did not answer, or it
    is not known to follow the primary since the last failover."""
    lag: timedelta | None
    """How long ago the last transaction that it has replayed was committed, or 0 if nothing is left to replay; None if
    unknown. By the clock of the primary alone."""
    error: MeshStorageError | None = None
    """Why it did not answer, or cannot be used."""


@dataclass(frozen=True, slots=True)
class Health:
    """The result of a health check."""

    connected: bool
    """Whether a connection was acquired and a query succeeded."""
    writable: bool
    """Whether the server accepts writes, that is, is neither a standby nor read-only."""
    round_trip_ms: float | None
    """Duration of the query in milliseconds; None if not connected."""
    revision: str | None
    """The schema revision of the database; None if unknown or if there is no schema."""
    head: str
    """The schema revision that this version of mesh_storage requires."""
    pool_size: int
    """Maximum number of connections."""
    pool_in_use: int
    """Number of connections in use when the check began; if it is the maximum, others must wait."""
    error: MeshStorageError | None = None
    """Why the connection failed, or why the revision is unknown."""
    missing_privileges: tuple[str, ...] = ()
    """The privileges that a service needs on the tables of its units of work and this role lacks, as in
    `INSERT, UPDATE ON nodes`."""
    silent_workers: tuple[str, ...] = ()
    """The workers of a distributed database that do not answer the coordinator, as in `worker-1:5432`."""
    replicas: tuple[ReplicaHealth, ...] = ()
    """The replicas of `replica_url`; the primary answers in their place, so they do not count for `ok`."""

    @property
    def ok(self) -> bool:
        """Whether the database is connected, writable, and has the current schema, and this role may read its tables.

        Of a distributed database, all workers must answer.

        Privileges to write are not required, since a role may be one that only reads: see `missing_privileges`.
        """
        readable = not any(lacking.startswith("SELECT") for lacking in self.missing_privileges)
        current = self.revision == self.head and not self.silent_workers
        return self.connected and self.writable and current and readable


def answered(
    row: Row | None,
    revision: str | None,
    missing_privileges: tuple[str, ...],
    unclear: MeshStorageError | None,
    silent_workers: tuple[str, ...],
    *,
    round_trip_ms: float,
    pool_size: int,
    pool_in_use: int,
) -> Health:
    """Return the health of a database from its answer to `READ_ONLY`, its schema revision and the role's privileges."""
    return Health(
        connected=True,
        writable=row is not None and not row[0],
        round_trip_ms=round_trip_ms,
        revision=revision,
        head=schema.head(),
        pool_size=pool_size,
        pool_in_use=pool_in_use,
        error=unclear,
        missing_privileges=missing_privileges,
        silent_workers=silent_workers,
    )


def unreachable(error: MeshStorageError, *, pool_size: int, pool_in_use: int) -> Health:
    """Return the health of a database that could not be reached."""
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


def of_replica(address: str, answer: Standing | MeshStorageError, primary: Standing | None) -> ReplicaHealth:
    """Return the health of a replica from its answer, and from that of the primary, if there was one."""
    if isinstance(answer, MeshStorageError):
        return ReplicaHealth(address, connected=False, lag_bytes=None, lag=None, error=answer)
    error: MeshStorageError | None = None
    if not answer.standby:
        error = UnavailableError("it is no standby: it was promoted, or is the primary itself")
    elif primary is not None and (answer.position.system, answer.database) != (
        primary.position.system,
        primary.database,
    ):
        error = ConfigurationError("invalid setting 'replica_url': it leads to another database than that of the URL")
    elif primary is not None and answer.position.timeline > primary.position.timeline:
        error = UnavailableError("it follows a timeline that the primary does not have")
    if error is not None or primary is None or primary.flushed is None:
        return ReplicaHealth(address, connected=True, lag_bytes=None, lag=None, error=error)
    if answer.position.timeline < primary.position.timeline:  # the same byte of another timeline says nothing
        return ReplicaHealth(address, connected=True, lag_bytes=None, lag=None)
    missing = max(0, primary.flushed - answer.position.lsn)
    lag = timedelta(0) if not missing else None
    if missing and isinstance(primary.clock, datetime) and isinstance(answer.clock, datetime):
        lag = max(timedelta(0), primary.clock - answer.clock)
    return ReplicaHealth(address, connected=True, lag_bytes=missing, lag=lag)
