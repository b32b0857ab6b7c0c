"""What the migrations need: one migrator at a time, locks that hold nobody up, indexes built beside the traffic.

Three rules keep the services that use the database going while it is migrated:

- A lock that keeps others waiting is taken by `lock`, which gives up after `HOLD_UP_MS`; then the whole revision is
  undone, and tried again after a pause by `patiently`.
- What only needs a lock that nobody else's reading and writing conflicts with is done after `wait_longer`.
- What cannot be done in a transaction is done in `beside_traffic`, by statements that may be done twice.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Generator, Sequence
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
"""Milliseconds that others may wait behind a migration that waits for its locks.

Less than PostgreSQL's `deadlock_timeout` of a second, so that in a deadlock with a service it is the migration that
gives way, before the server chooses.
"""
LOCK_TIMEOUT_S = 5
"""Seconds that a migration waits for a lock where nobody waits behind it.

More than `deadlock_timeout`, after which the server ends an autovacuum that is in the way.
"""
LOCK_PATIENCE_S = 300.0
"""Seconds for which a migration that got no lock is tried again."""
TURN_TIMEOUT_S = 900.0
"""Seconds to wait for another process that migrates the same database."""
_OLD_TRANSACTION_S = 5
_REPAIRS = 100

# "mesh_sto" as a number: the advisory lock of all migrators of a database.
_ADVISORY_LOCK = int.from_bytes(b"mesh_sto")
# The server learns within half a minute that the machine of a migrator is gone, however idle the connection is, and
# within a second that its process is, however busy the connection is; it ends neither session for any other reason.
_OPTIONS = (
    f"-c lock_timeout={HOLD_UP_MS} -c statement_timeout=0 -c idle_in_transaction_session_timeout=0 "
    "-c idle_session_timeout=0 -c client_connection_check_interval=1s "
    "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3"
)
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
    """The tables are in use; the migration was undone and may be tried again."""


def create_engine(connect: dict[str, Any]) -> sqlalchemy.Engine:
    """Make the engine for migrations; its limits come with the connection, so nothing runs before Alembic begins."""
    arguments = {**connect, "options": f"{connect.get('options', '')} {_OPTIONS}".strip()}
    made = sqlalchemy.create_engine(
        "postgresql+psycopg://", connect_args=arguments, poolclass=NullPool, hide_parameters=True
    )
    environment.keep_out(made)

    @sqlalchemy.event.listens_for(made, "connect")
    def lift(connection: Any, _record: Any) -> None:
        # Only PostgreSQL 17 and later knows it, and an option that a server does not know is refused.
        connection.execute("SELECT set_config(name, '0', false) FROM pg_settings WHERE name = 'transaction_timeout'")
        connection.commit()

    return made


def settle(connection: sqlalchemy.Connection, *, changes: bool) -> Location:
    """Find the tables, and let unqualified names lead to their schema for the rest of the session.

    Args:
        connection: In no transaction.
        changes: Whether a revision is to be done or undone, for which the version table gets its own name first.

    Raises:
        ConfigurationError: It is not clear which tables are ours.
        StorageTimeoutError: A prepared transaction is in the way.
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
    """Give the version table its own name; where it has rows of others, give our row a table of its own.

    A service that may read the one may read the other: grants and the owner stay.
    """
    former = tables.qualified(location.namespace, tables.FORMER_VERSION_TABLE)
    ours = tables.qualified(location.namespace, tables.VERSION_TABLE)
    connection.exec_driver_sql(f"LOCK TABLE {former} IN ACCESS EXCLUSIVE MODE")
    if location.shared:
        connection.exec_driver_sql(f"CREATE TABLE {ours} (LIKE {former})")
        connection.exec_driver_sql(f"ALTER TABLE {ours} ADD CONSTRAINT {_VERSION_KEY} PRIMARY KEY (version_num)")
        row = f"'{location.revision}'"
        connection.exec_driver_sql(f"DELETE FROM {former} WHERE version_num = {row}")  # noqa: S608 - names of ours
        connection.exec_driver_sql(f"INSERT INTO {ours} VALUES ({row})")  # noqa: S608 - names of ours
        connection.exec_driver_sql(
            _COPY_GRANTS.format(former=location.tables[tables.FORMER_VERSION_TABLE], ours=ours.replace("'", "''"))
        )
    else:
        connection.exec_driver_sql(f"ALTER TABLE {former} RENAME TO {tables.VERSION_TABLE}")
        connection.exec_driver_sql(
            f"ALTER TABLE {ours} RENAME CONSTRAINT {tables.FORMER_VERSION_TABLE}_pkc TO {_VERSION_KEY}"
        )
    logger.info(
        "the version table is %s from now on",
        ours,
        extra={"event": "deploy", "version_table": tables.VERSION_TABLE, "revision": location.revision},
    )


@contextmanager
def turn(connect: dict[str, Any]) -> Generator[Callable[[], None]]:
    """Wait until no other process migrates this database, and keep others waiting meanwhile.

    The lock belongs to a connection of its own that is in no transaction, so that it neither ends with one nor keeps a
    concurrent index waiting; the server frees it when this process dies. Gives a function that fails when the
    connection, and so the turn, was lost.

    Raises:
        StorageTimeoutError: Another process migrates for longer than `TURN_TIMEOUT_S`.
    """
    arguments = {**connect, "options": f"{connect.get('options', '')} {_OPTIONS}".strip()}
    with engine.connect(arguments) as connection:
        deadline = time.monotonic() + TURN_TIMEOUT_S
        while not _try_lock(connection):
            if time.monotonic() > deadline:
                raise StorageTimeoutError(f"another process migrates this database for over {TURN_TIMEOUT_S:.0f} s")
            time.sleep(0.2)

        def check() -> None:
            connection.execute("SELECT")

        yield check


def _try_lock(connection: psycopg.Connection[tuple[Any, ...]]) -> bool:
    row = connection.execute("SELECT pg_try_advisory_lock(%s)", [_ADVISORY_LOCK]).fetchone()
    return row is not None and bool(row[0])


def patiently(work: Callable[[], None]) -> None:
    """Do work until it gets its locks; in between, those who had to wait for it have their turn.

    Raises:
        InUseError: It got none for `LOCK_PATIENCE_S`.
        sqlalchemy.exc.DBAPIError: The same, or another failure.
    """
    deadline = time.monotonic() + LOCK_PATIENCE_S
    pause = 0.2
    while True:
        try:
            return work()
        except (InUseError, sqlalchemy.exc.DBAPIError) as error:
            if not _is_in_use(error) or time.monotonic() > deadline:
                raise
        logger.info("the migration waits for locks", extra={"event": "retry", "pause": pause})
        time.sleep(random.uniform(0.5, 1.0) * pause)  # noqa: S311 - no secret
        pause = min(5.0, pause * 1.5)


def what_ended(error: sqlalchemy.exc.PendingRollbackError) -> BaseException:
    """Return what broke a transaction off, which SQLAlchemy's words about the transaction itself hide."""
    found: BaseException = error
    while isinstance(found, sqlalchemy.exc.PendingRollbackError) and found.__context__ is not None:
        found = found.__context__
    return found


def _is_in_use(error: Exception) -> bool:
    if isinstance(error, sqlalchemy.exc.DBAPIError):
        return isinstance(error.orig, (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected))
    return isinstance(error, InUseError)


def lock(*names: str) -> None:
    """Lock tables against all use, for the rest of a revision that has little left to do; must be its first act.

    First they are locked against other migrations and vacuuming only, which may take a while and holds nobody up. Then
    only transactions of services are in the way, and these all together get `HOLD_UP_MS` to end.

    Raises:
        InUseError: They did not.
    """
    listed = ", ".join(names)
    wait_longer()
    op.execute(f"LOCK TABLE {listed} IN SHARE UPDATE EXCLUSIVE MODE")
    # For the statement as a whole: lock_timeout is for each of the tables, and those before it are locked already.
    op.execute(f"SET LOCAL statement_timeout TO '{HOLD_UP_MS}ms'")
    savepoint = nullcontext() if op.get_context().as_sql else op.get_bind().begin_nested()
    try:
        with savepoint:
            op.execute(f"LOCK TABLE {listed} IN ACCESS EXCLUSIVE MODE")
    except sqlalchemy.exc.DBAPIError as error:
        if isinstance(error.orig, psycopg.errors.QueryCanceled):
            raise InUseError(
                f"transactions that use {listed} did not end for {LOCK_PATIENCE_S:.0f} s: {_holders(names)}"
            ) from error
        raise
    op.execute("SET LOCAL statement_timeout TO 0")
    op.execute(f"SET LOCAL lock_timeout TO '{HOLD_UP_MS}ms'")


def _holders(names: Sequence[str]) -> str:
    """Say whose transactions use the tables now."""
    listed = ", ".join(f"'{name}'::regclass" for name in names)
    query = (
        "SELECT DISTINCT pid, application_name FROM pg_locks JOIN pg_stat_activity USING (pid) "  # noqa: S608 - names of ours
        f"WHERE relation IN ({listed}) AND granted AND pid <> pg_backend_pid() ORDER BY pid"
    )
    holders = op.get_bind().exec_driver_sql(query)
    return ", ".join(_process(*holder) for holder in holders) or "they come and go"


def hold_nobody_up() -> None:
    """Say for the SQL that is written instead of run what comes with the connection otherwise; for any statement."""
    op.execute(f"SET LOCAL lock_timeout TO '{HOLD_UP_MS}ms'")
    op.execute("SET LOCAL statement_timeout TO 0")


def wait_longer() -> None:
    """Let the statements of a revision wait for locks that nobody queues up behind: no stronger than SHARE UPDATE."""
    op.execute(f"SET LOCAL lock_timeout TO '{LOCK_TIMEOUT_S}s'")
    op.execute("SET LOCAL statement_timeout TO 0")


@contextmanager
def beside_traffic() -> Generator[None]:
    """Run statements outside of transactions, with time to wait for those of others: nobody queues up behind them."""
    if _in_callers_transaction():
        yield
        return
    with op.get_context().autocommit_block():
        op.execute(f"SET lock_timeout TO '{LOCK_TIMEOUT_S}s'")
        op.execute("SET statement_timeout TO 0")
        yield
        op.execute("RESET statement_timeout")
        op.execute("RESET lock_timeout")


def create_index(name: str, table: str, columns: str, *, unique: bool = False, repair: str = "") -> None:
    """Create an index beside the traffic; one that a killed migrator left half built is built anew.

    Must run in `beside_traffic()`. For a unique index, `repair` is a statement that takes doubles away; it is done
    again when a service has added another meanwhile.

    Raises:
        InUseError: A transaction of a service goes on for so long that the index would not be finished.
    """
    online = not op.get_context().as_sql
    if online and _is_valid(name):
        return
    concurrently = "" if _in_callers_transaction() else "CONCURRENTLY "
    if online and concurrently:
        _await_old_transactions()
    statement = f"CREATE {'UNIQUE ' if unique else ''}INDEX {concurrently}IF NOT EXISTS {name} ON {table} ({columns})"
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
    """Log the grants on tables that a downgrade drops; those of ALTER DEFAULT PRIVILEGES come back by themselves."""
    if op.get_context().as_sql:
        return
    listed = ", ".join(f"to_regclass('{name}')" for name in names)
    lost = [grant for (grant,) in op.get_bind().exec_driver_sql(_GRANTS.format(tables=listed))]
    if lost:
        logger.warning(
            "the downgrade drops tables and the grants on them; after the next upgrade do: %s",
            "; ".join(lost),
            extra={"event": "downgrade", "grants": lost},
        )


def drop_index(name: str) -> None:
    """Drop an index beside the traffic; must run in `beside_traffic()`."""
    op.execute(f"DROP INDEX {'' if _in_callers_transaction() else 'CONCURRENTLY '}IF EXISTS {name}")


def _in_callers_transaction() -> bool:
    return bool(op.get_context().opts.get("in_callers_transaction"))


def _is_valid(name: str) -> bool:
    valid = f"SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('{name}')"  # noqa: S608 - a name of ours
    return bool(op.get_bind().exec_driver_sql(valid).scalar())


def _await_old_transactions() -> None:
    """Refuse to begin what must wait for a long transaction in the end: it would run into the timeout, for nothing.

    Who is not a member of pg_monitor is not shown since when the transactions of others go on; which ones are there, it
    is. Those that are still there after the same time are long ones.
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
            raise InUseError(f"a transaction does not end: that of {_process(old.pid, old.application_name)}")
        if not young:
            return
        time.sleep(0.2)


def _process(pid: int, application_name: str) -> str:
    return f"process {pid} of the server ({application_name!r})"


def _refuse_prepared_transactions(connection: sqlalchemy.Connection, location: Location) -> None:
    """Refuse to wait for a prepared transaction, which ends only when somebody says so.

    Raises:
        StorageTimeoutError: There is one, for longer than it takes to commit in two phases.
    """
    oids = ", ".join(str(oid) for oid in location.tables.values())
    query = _PREPARED_TRANSACTIONS.format(oids=oids, seconds=_OLD_TRANSACTION_S)
    prepared: Sequence[Any] = connection.exec_driver_sql(query).fetchall() if oids else ()
    connection.rollback()
    if prepared:
        listed = ", ".join(f"{gid!r} of {owner} since {since:%Y-%m-%d %H:%M:%S %Z}" for gid, owner, since in prepared)
        raise StorageTimeoutError(
            f"prepared transactions hold locks on the tables: {listed}; end them by COMMIT PREPARED or ROLLBACK "
            "PREPARED, and run the upgrade again"
        )
