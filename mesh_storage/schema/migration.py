"""Helpers for migrations: one migrator at a time, short locks, and concurrent index builds.

Three rules keep services running while their database is migrated:

- A lock that blocks others is acquired by `lock`, which times out after `HOLD_UP_MS`; then the whole revision is rolled
  back and, after a pause, retried by `patiently`.
- Statements that need only locks that do not conflict with reads and writes follow `wait_longer`.
- Statements that cannot run in a transaction run in `beside_traffic`, and are idempotent.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import psycopg
import sqlalchemy
import sqlalchemy.event
import sqlalchemy.exc
from alembic import op
from sqlalchemy.pool import NullPool

from mesh_storage.errors import StorageTimeoutError
from mesh_storage.postgres import engine, environment
from mesh_storage.schema import tables
from mesh_storage.schema.tables import Location

logger = logging.getLogger("mesh_storage")

HOLD_UP_MS = 300
"""Milliseconds for which others may be blocked by a migration that waits for its locks.

Less than PostgreSQL's `deadlock_timeout` of 1 s, so that in a deadlock with a service the migration gives way, before
the server chooses a victim.
"""
LOCK_TIMEOUT_S = 5
"""Seconds that a migration waits for a lock that blocks no one else while it waits.

More than `deadlock_timeout`, after which the server cancels an autovacuum that holds a conflicting lock.
"""
LOCK_PATIENCE_S = 300.0
"""Seconds for which a migration that could not acquire its locks is retried."""
TURN_TIMEOUT_S = 900.0
"""Seconds to wait for another process that is migrating the same database."""
_OLD_TRANSACTION_S = 5
_REPAIRS = 100

# "mesh_sto" as a number: the advisory lock of all migrators of a database.
_ADVISORY_LOCK = int.from_bytes(b"mesh_sto")
# The server detects within half a minute that the migrator's machine is gone, however idle the connection is, and
# within a second that its process is, however busy the connection is; no other limit ends either session.
_OPTIONS = (
    f"-c lock_timeout={HOLD_UP_MS} -c statement_timeout=0 -c idle_in_transaction_session_timeout=0 "
    "-c idle_session_timeout=0 -c client_connection_check_interval=1s "
    "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3"
)
# Only known from PostgreSQL 17 on, and a server rejects unknown options.
_LIFT = "SELECT set_config(name, '0', false) FROM pg_settings WHERE name = 'transaction_timeout'"
_VERSION_KEY = f"{tables.VERSION_TABLE}_pkc"
_COPY_GRANTS = """
    DO $$
    DECLARE granted record;
    BEGIN
        FOR granted IN SELECT privilege_type, is_grantable, grantee
                       FROM pg_class, aclexplode(relacl) WHERE pg_class.oid = {former} LOOP
            EXECUTE format(
                'GRANT %%s ON {ours} TO %%s%%s', granted.privilege_type,
                CASE granted.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(granted.grantee)) END,
                CASE WHEN granted.is_grantable THEN ' WITH GRANT OPTION' ELSE '' END
            );
        END LOOP;
    END $$
"""
_GRANTS = """
    SELECT concat('GRANT ', string_agg(privilege_type, ', ' ORDER BY privilege_type), ' ON ', pg_class.oid::regclass,
                  ' TO ', CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END,
                  CASE WHEN is_grantable THEN ' WITH GRANT OPTION' END)
    FROM pg_class, aclexplode(relacl)
    WHERE pg_class.oid IN ({tables}) AND grantee <> relowner
    GROUP BY pg_class.oid, grantee, is_grantable ORDER BY 1
"""
_OTHER_TRANSACTIONS = """
    SELECT pid, virtualtransaction, application_name, xact_start IS NOT NULL AS is_old
    FROM pg_stat_activity JOIN pg_locks USING (pid)
    WHERE datname = current_database() AND pid <> pg_backend_pid()
    AND locktype = 'virtualxid' AND mode = 'ExclusiveLock'
    AND usesysid IS NOT NULL AND coalesce(backend_type, 'client backend') = 'client backend'
    AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL)
    AND coalesce(xact_start < now() - interval '{seconds} s', true)
    ORDER BY xact_start, pid
"""
_PREPARED_TRANSACTIONS = """
    SELECT DISTINCT gid, owner::text, prepared
    FROM pg_prepared_xacts JOIN pg_locks AS own ON own.transactionid = transaction
    JOIN pg_locks AS held ON held.virtualtransaction = own.virtualtransaction AND held.pid IS NULL
    WHERE pg_prepared_xacts.database = current_database() AND held.relation IN ({oids})
    AND held.database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND own.pid IS NULL AND own.granted AND prepared < now() - interval '{seconds} s'
    ORDER BY gid
"""


class InUseError(StorageTimeoutError):
    """The tables are in use; the migration was rolled back and may be retried."""


def create_engine(connect: dict[str, Any]) -> sqlalchemy.Engine:
    """Create the engine for migrations; its limits are connection options, so they apply from the first statement."""
    made = sqlalchemy.create_engine(
        "postgresql+psycopg://", connect_args=_with_options(connect), poolclass=NullPool, hide_parameters=True
    )
    environment.keep_out(made)

    @sqlalchemy.event.listens_for(made, "connect")
    def lift(connection: Any, _record: Any) -> None:
        connection.execute(_LIFT)
        connection.commit()

    return made


def connect(arguments: Mapping[str, Any]) -> psycopg.Connection[tuple[Any, ...]]:
    """Open a connection in autocommit mode with the limits of migrations.

    Raises:
        UnavailableError: The server cannot be reached, or rejects the connection.
    """
    made = engine.connect(_with_options(arguments))
    made.execute(_LIFT)
    return made


def _with_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {**arguments, "options": f"{arguments.get('options', '')} {_OPTIONS}".strip()}


def settle(connection: sqlalchemy.Connection, *, changes: bool) -> Location:
    """Locate the tables, and set the `search_path` to their schema for the rest of the session.

    Args:
        connection: A connection without a transaction.
        changes: Whether a revision is to be applied or reverted, before which the version table is renamed.

    Raises:
        ConfigurationError: It is ambiguous which tables are ours.
        StorageTimeoutError: A prepared transaction holds a conflicting lock.
    """
    location = tables.locate(tables.by_sqlalchemy(connection))
    if changes and location.version_table == tables.FORMER_VERSION_TABLE:
        take_over(connection, location)
        connection.commit()
        location = tables.locate(tables.by_sqlalchemy(connection))
    if changes:
        _refuse_prepared_transactions(connection, location)
    path: list[str] = connection.exec_driver_sql("SELECT current_schemas(false)").scalar_one()
    connection.exec_driver_sql(f"SET search_path TO {tables.leading_to(location.namespace, path)}")
    connection.commit()
    return location


def take_over(connection: sqlalchemy.Connection, location: Location) -> None:
    """Rename the version table; if it also has rows of others, move our row to a new table.

    Services keep their access: privileges and the owner are preserved.
    """
    former = tables.qualified(location.namespace, tables.FORMER_VERSION_TABLE)
    ours = tables.qualified(location.namespace, tables.VERSION_TABLE)
    connection.exec_driver_sql(f"LOCK TABLE {former} IN ACCESS EXCLUSIVE MODE")
    if location.shared:
        connection.exec_driver_sql(f"CREATE TABLE {ours} (LIKE {former})")
        connection.exec_driver_sql(f"ALTER TABLE {ours} ADD CONSTRAINT {_VERSION_KEY} PRIMARY KEY (version_num)")
        row = f"'{location.revision}'"
        connection.exec_driver_sql(f"DELETE FROM {former} WHERE version_num = {row}")  # noqa: S608 - our own names
        connection.exec_driver_sql(f"INSERT INTO {ours} VALUES ({row})")  # noqa: S608 - our own names
        connection.exec_driver_sql(
            _COPY_GRANTS.format(former=location.tables[tables.FORMER_VERSION_TABLE], ours=ours.replace("'", "''"))
        )
    else:
        connection.exec_driver_sql(f"ALTER TABLE {former} RENAME TO {tables.VERSION_TABLE}")
        connection.exec_driver_sql(
            f"ALTER TABLE {ours} RENAME CONSTRAINT {tables.FORMER_VERSION_TABLE}_pkc TO {_VERSION_KEY}"
        )
    logger.info(
        "the version table is now %s",
        ours,
        extra={"event": "deploy", "version_table": tables.VERSION_TABLE, "revision": location.revision},
    )


@contextmanager
def turn(arguments: dict[str, Any]) -> Generator[Callable[[], None]]:
    """Hold the migration lock of this database during the block, waiting for other processes that hold it.

    The advisory lock is held by a separate connection without a transaction, so that it neither ends with one nor
    blocks a concurrent index build; the server releases it if this process dies. Yields a function that raises if that
    connection, and so the lock, was lost.

    Raises:
        StorageTimeoutError: Another process held the lock for longer than `TURN_TIMEOUT_S`.
    """
    with connect(arguments) as connection:
        deadline = time.monotonic() + TURN_TIMEOUT_S
        while not _try_lock(connection):
            if time.monotonic() > deadline:
                raise StorageTimeoutError(
                    f"another process has been migrating this database for over {TURN_TIMEOUT_S:.0f} s"
                )
            time.sleep(0.2)

        def check() -> None:
            connection.execute("SELECT")

        yield check


def _try_lock(connection: psycopg.Connection[tuple[Any, ...]]) -> bool:
    row = connection.execute("SELECT pg_try_advisory_lock(%s)", [_ADVISORY_LOCK]).fetchone()
    return row is not None and bool(row[0])


def patiently(work: Callable[[], None]) -> None:
    """Retry work until it acquires its locks, with pauses in which blocked transactions can proceed.

    Raises:
        InUseError: It acquired none within `LOCK_PATIENCE_S`.
        sqlalchemy.exc.DBAPIError, psycopg.Error: The same, or another failure.
    """
    deadline = time.monotonic() + LOCK_PATIENCE_S
    pause = 0.2
    while True:
        try:
            return work()
        except (InUseError, sqlalchemy.exc.DBAPIError, psycopg.Error) as error:
            if not _is_in_use(error) or time.monotonic() > deadline:
                raise
        logger.info("waiting to retry: the tables are locked", extra={"event": "retry", "pause": pause})
        time.sleep(random.uniform(0.5, 1.0) * pause)  # noqa: S311 - not used for security
        pause = min(5.0, pause * 1.5)


def what_ended(error: sqlalchemy.exc.PendingRollbackError) -> BaseException:
    """Return the original error of a failed transaction, which SQLAlchemy's own message about its state hides."""
    found: BaseException = error
    while isinstance(found, sqlalchemy.exc.PendingRollbackError) and found.__context__ is not None:
        found = found.__context__
    return found


def _is_in_use(error: Exception) -> bool:
    original = error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) else error
    return isinstance(original, (InUseError, psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected))


def lock(*names: str) -> None:
    """Lock tables exclusively for the rest of a short revision; must be its first statement.

    They are first locked only against other migrations and vacuum, which may take a while and blocks no service. Then
    only transactions of services can conflict, and all of these together get `HOLD_UP_MS` to end.

    Raises:
        InUseError: They did not end in time.
    """
    listed = ", ".join(names)
    wait_longer()
    op.execute(f"LOCK TABLE {listed} IN SHARE UPDATE EXCLUSIVE MODE")
    # statement_timeout covers the statement as a whole: lock_timeout applies per table, with the previous ones locked.
    op.execute(f"SET LOCAL statement_timeout TO '{HOLD_UP_MS}ms'")
    savepoint = nullcontext() if op.get_context().as_sql else op.get_bind().begin_nested()
    try:
        with savepoint:
            op.execute(f"LOCK TABLE {listed} IN ACCESS EXCLUSIVE MODE")
    except sqlalchemy.exc.DBAPIError as error:
        if isinstance(error.orig, psycopg.errors.QueryCanceled):
            raise InUseError(
                f"transactions that use {listed} did not end within {LOCK_PATIENCE_S:.0f} s: {_holders(names)}"
            ) from error
        raise
    op.execute("SET LOCAL statement_timeout TO 0")
    op.execute(f"SET LOCAL lock_timeout TO '{HOLD_UP_MS}ms'")


def _holders(names: Sequence[str]) -> str:
    """Return a description of the sessions that hold locks on the tables."""
    listed = ", ".join(f"'{name}'::regclass" for name in names)
    query = (
        "SELECT DISTINCT pid, application_name FROM pg_locks JOIN pg_stat_activity USING (pid) "  # noqa: S608 - our own names
        f"WHERE relation IN ({listed}) AND granted AND pid <> pg_backend_pid() ORDER BY pid"
    )
    holders = op.get_bind().exec_driver_sql(query)
    return ", ".join(_process(*holder) for holder in holders) or "different ones each time"


def hold_nobody_up() -> None:
    """Set for SQL in offline mode the limits that connections of migrations have; for any statement."""
    op.execute(f"SET LOCAL lock_timeout TO '{HOLD_UP_MS}ms'")
    op.execute("SET LOCAL statement_timeout TO 0")


def wait_longer() -> None:
    """Allow the statements of a revision a longer wait for locks that block no one: at most SHARE UPDATE EXCLUSIVE."""
    op.execute(f"SET LOCAL lock_timeout TO '{LOCK_TIMEOUT_S}s'")
    op.execute("SET LOCAL statement_timeout TO 0")


@contextmanager
def beside_traffic() -> Generator[None]:
    """Run statements outside a transaction, with a longer wait for other transactions, since no one waits for them."""
    if _in_callers_transaction():
        yield
        return
    with op.get_context().autocommit_block():
        op.execute(f"SET lock_timeout TO '{LOCK_TIMEOUT_S}s'")
        op.execute("SET statement_timeout TO 0")
        yield
        op.execute("RESET statement_timeout")
        op.execute("RESET lock_timeout")


def create_index(
    name: str, table: str, columns: str, *, where: str = "", unique: bool = False, repair: str = ""
) -> None:
    """Create an index concurrently; an invalid one left by an interrupted migration is rebuilt.

    Must run in `beside_traffic()`. For a unique index, `repair` is a statement that removes duplicates; it is repeated
    if a service has inserted another one in the meantime.

    Raises:
        InUseError: A long-running transaction of a service would keep the index from being completed.
    """
    online = not op.get_context().as_sql
    if online and _is_valid(name):
        return
    concurrently = "" if _in_callers_transaction() else "CONCURRENTLY "
    if online and concurrently:
        _await_old_transactions()
    statement = f"CREATE {'UNIQUE ' if unique else ''}INDEX {concurrently}IF NOT EXISTS {name} ON {table} ({columns})"
    if where:
        statement += f" WHERE {where}"
    for repairs_left in reversed(range(_REPAIRS if online and repair else 1)):
        drop_index(name)
        if repair:
            op.execute(repair)
        try:
            op.execute(statement)
        except sqlalchemy.exc.IntegrityError:
            if not repairs_left:
                raise
        else:
            return


def announce_lost_grants(*names: str) -> None:
    """Log the privileges on tables that a downgrade drops, except those that ALTER DEFAULT PRIVILEGES restores."""
    if op.get_context().as_sql:
        return
    listed = ", ".join(f"to_regclass('{name}')" for name in names)
    lost = [grant for (grant,) in op.get_bind().exec_driver_sql(_GRANTS.format(tables=listed))]
    if lost:
        logger.warning(
            "the downgrade drops tables with their privileges; after the next upgrade, run: %s",
            "; ".join(lost),
            extra={"event": "downgrade", "grants": lost},
        )


def drop_index(name: str) -> None:
    """Drop an index concurrently; must run in `beside_traffic()`."""
    op.execute(f"DROP INDEX {'' if _in_callers_transaction() else 'CONCURRENTLY '}IF EXISTS {name}")


def _in_callers_transaction() -> bool:
    return bool(op.get_context().opts.get("in_callers_transaction"))


def _is_valid(name: str) -> bool:
    valid = f"SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('{name}')"  # noqa: S608 - our own name
    return bool(op.get_bind().exec_driver_sql(valid).scalar())


def _await_old_transactions() -> None:
    """Raise if a long-running transaction would make a concurrent build time out at its end.

    Roles without pg_monitor see the transactions of others but not their start time. Those still open after the same
    time are considered long-running.
    """
    deadline = time.monotonic() + _OLD_TRANSACTION_S
    young: set[Any] | None = None
    while True:
        found = op.get_bind().exec_driver_sql(_OTHER_TRANSACTIONS.format(seconds=_OLD_TRANSACTION_S)).fetchall()
        old = next((each for each in found if each.is_old), None)
        unknown = {each for each in found if not each.is_old}
        young = unknown if young is None else young & unknown
        if old is None and time.monotonic() > deadline:
            old = min(young, default=None)
        if old is not None:
            raise InUseError(f"a transaction does not end: {_process(old.pid, old.application_name)}")
        if not young:
            return
        time.sleep(0.2)


def _process(pid: int, application_name: str) -> str:
    return f"server process {pid} ({application_name!r})"


def _refuse_prepared_transactions(connection: sqlalchemy.Connection, location: Location) -> None:
    """Raise if a prepared transaction holds a conflicting lock, since it ends only by an explicit statement.

    Raises:
        StorageTimeoutError: There is one, older than a two-phase commit takes.
    """
    oids = ", ".join(str(oid) for oid in location.tables.values())
    query = _PREPARED_TRANSACTIONS.format(oids=oids, seconds=_OLD_TRANSACTION_S)
    prepared: Sequence[Any] = connection.exec_driver_sql(query).fetchall() if oids else ()
    connection.rollback()
    if prepared:
        listed = ", ".join(f"{gid!r} of {owner} since {since:%Y-%m-%d %H:%M:%S %Z}" for gid, owner, since in prepared)
        raise StorageTimeoutError(
            f"prepared transactions hold locks on the tables: {listed}; end them with COMMIT PREPARED or ROLLBACK "
            "PREPARED, and run the upgrade again"
        )
