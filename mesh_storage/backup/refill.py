"""Refilling of existing tables during a restore, keeping the objects that others have added to them.

Whatever would interfere or be slow is removed and recreated in the same transaction: foreign keys, check constraints
that are not validated, and indexes without dependents; triggers are disabled meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg
import sqlalchemy
import sqlalchemy.exc
from psycopg import sql

from mesh_storage import schema
from mesh_storage.backup import catalog
from mesh_storage.backup.catalog import Connection
from mesh_storage.errors import ConflictError, MissingReferenceError
from mesh_storage.schema import changes, migration, tables
from mesh_storage.schema.deploy import migrate
from mesh_storage.schema.tables import Location

logger = logging.getLogger("mesh_storage")

_UNCHANGED = "nothing was changed"
# Another object depends on what is to change (2B), or does not allow it (0A, 42).
_IN_THE_WAY = ("2B", "0A", "42")


@dataclass(frozen=True, slots=True)
class Taken:
    """A dropped object, and the statements that recreate it."""

    name: str
    restore: str
    """The statements."""


def check(connection: Connection, location: Location, *, overwrite: bool) -> None:
    """Lock the existing tables, and raise if they may not be emptied.

    Raises:
        ConflictError: They contain rows and `overwrite` was not given.
        SchemaMismatchError: Their schema is unknown, or newer than this code, which may not know all tables; or they
            are not ordinary tables.
    """
    if not location.tables:
        return
    listed = catalog.only(location.namespace, location.tables)
    connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(listed))
    catalog.check_kinds(connection, location.tables)
    if location.revision is not None and location.revision not in schema.revisions():
        schema.check(location.revision)
    if not overwrite:
        exists = sql.SQL("SELECT EXISTS (SELECT FROM ONLY {})")
        for table in location.tables.keys() - {location.version_table}:
            if catalog.value(connection, exists.format(sql.Identifier(location.namespace, table))):
                raise ConflictError(
                    f"the table {table} contains rows; restore with overwrite (--overwrite) to replace those of all"
                )


def empty(connection: Connection, location: Location) -> list[Taken]:
    """Empty the tables, and return the foreign keys of others to them, to be recreated afterwards."""
    oids = list(location.tables.values())
    taken = _take_off(connection, _FOREIGN_KEYS_OF_OTHERS, oids, oids)
    full = location.tables.keys() - {location.version_table}
    if full:
        with _triggers_off(connection, oids):
            connection.execute(sql.SQL("TRUNCATE {}").format(catalog.only(location.namespace, full)))
    return taken


def bring_to(session: sqlalchemy.Connection, connection: Connection, location: Location, revision: str) -> Location:
    """Migrate the emptied tables to the revision of a backup, by the ordinary migrations, and return their location.

    Raises:
        ConflictError: Objects of others on the tables would be lost, or some of our tables are missing; the message
            names them.
    """
    if location.tables.keys() <= {tables.VERSION_TABLE}:
        return location
    if (location.revision, location.version_table) == (revision, tables.VERSION_TABLE):
        return location
    lacking = tables.missing(location.revision or "0001", location.tables)
    if lacking:
        raise ConflictError(
            f"the tables {', '.join(sorted(location.tables))} exist at revision {location.revision or 'none'}, but "
            f"not {', '.join(lacking)}, so they cannot be migrated to {revision}, as in the backup; {_UNCHANGED}. "
            "Restore a backup of the same revision, or drop or rename the existing tables"
        )
    kept = connection.execute("SELECT current_setting('lock_timeout'), current_setting('search_path')").fetchone()
    path = sql.Identifier(location.namespace).as_string()
    connection.execute("SELECT set_config('search_path', %s, true)", [path])
    if location.version_table == tables.FORMER_VERSION_TABLE:
        migration.take_over(session, location)
    oids = list(location.tables.values())
    before = _given(connection, oids)
    try:
        migrate(session, revision)
    except sqlalchemy.exc.DBAPIError as error:
        said = error.orig
        if not isinstance(said, psycopg.Error) or (said.sqlstate or "")[:2] not in _IN_THE_WAY:
            raise
        raise ConflictError(
            f"the tables cannot be migrated to revision {revision}, that of the backup, with what others have added "
            f"to them: {said.diag.message_primary}: {said.diag.message_detail}; {_UNCHANGED}. Drop it and recreate "
            "it after the restore",
            sqlstate=said.sqlstate,
        ) from error
    lost = sorted(before - _given(connection, oids))
    if lost:
        raise ConflictError(
            f"the backup is of revision {revision}, which would not keep what others have added to the tables: "
            f"{', '.join(lost)}; {_UNCHANGED}. Remove it and add it again after the restore"
        )
    # The migrations set their own values for the rest of the transaction.
    connection.execute(
        "SELECT set_config('lock_timeout', %s, true), set_config('search_path', %s, true),"
        " set_config('statement_timeout', '0', true)",
        kept,
    )
    return catalog.locate(connection)


@contextmanager
def filling(
    connection: Connection, location: Location, taken: Sequence[Taken], report: Callable[[int, int], None]
) -> Generator[None]:
    """Prepare the emptied tables for their rows, and recreate everything after the block.

    Args:
        connection: A connection in the transaction.
        location: The tables.
        taken: The foreign keys of others that were dropped before.
        report: Called after each index and foreign key with their number and the total.

    Raises:
        ConflictError: The rows violate a constraint that others added to the tables; the message names it.
        MissingReferenceError: Rows of others refer to rows that are not in the backup, or vice versa.
    """
    oids = list(location.tables.values())
    with _triggers_off(connection, oids):
        if location.tables:
            version_table = sql.Identifier(location.namespace, tables.VERSION_TABLE)
            connection.execute(sql.SQL("DELETE FROM {}").format(version_table))
        connection.execute("SET LOCAL default_tablespace = ''")
        keys = [*_take_off(connection, _FOREIGN_KEYS_AND_LATER_CHECKS, oids), *taken]
        indexes = _take_off(connection, _INDEXES, oids)
        try:
            yield
            # The archive sets the parameters of its original server.
            catalog.set_up(connection)
            for number, index in enumerate(indexes, 1):
                connection.execute(index.restore.encode())
                report(number, len(indexes) + len(keys))
        except psycopg.IntegrityError as error:
            if not location.tables or isinstance(error, psycopg.errors.ForeignKeyViolation):
                raise
            raise _does_not_fit(error) from error
    refused: dict[str, psycopg.Error] = {}
    for number, key in enumerate(keys, len(indexes) + 1):
        try:
            with connection.transaction():
                connection.execute(key.restore.encode())
        except psycopg.errors.ForeignKeyViolation as error:
            refused[key.name] = error
        except (psycopg.errors.UndefinedColumn, psycopg.errors.InvalidForeignKey) as error:
            raise ConflictError(
                f"{key.name} refers to what the revision of the backup has not, PostgreSQL says "
                f"{error.diag.message_primary!r}; {_UNCHANGED}. Drop that and create it anew after the restore",
                sqlstate=error.sqlstate,
            ) from error
        report(number, len(indexes) + len(keys))
    if refused:
        first = next(iter(refused.values()))
        raise MissingReferenceError(
            f"the rows of the backup would violate these foreign keys: {', '.join(refused)}; {_UNCHANGED}. "
            "Delete or change the referencing rows, or drop the foreign keys",
            sqlstate=first.sqlstate,
            constraint=first.diag.constraint_name,
        ) from first


def begin_log(connection: Connection, namespace: str, made: Iterable[str]) -> None:
    """Begin the log of changes anew, so that no cursor from before leads into it, and no version is given twice.

    Args:
        connection: A connection in the transaction of the restore.
        namespace: The PostgreSQL schema of the tables.
        made: The tables that were created, which lack their triggers.
    """
    path: str = catalog.value(connection, "SELECT current_setting('search_path')")
    connection.execute("SELECT set_config('search_path', %s, true)", [sql.Identifier(namespace).as_string()])
    if catalog.value(connection, "SELECT to_regclass(%s)", tables.LOG) is None:
        statements = [*changes.install()]
    else:
        statements = [statement for table in made if table in changes.WATCHED for statement in changes.watch(table)]
    for statement in (*statements, *changes.FORGET, changes.RENEW_VERSIONS):
        connection.execute(statement.encode())
    connection.execute("SELECT set_config('search_path', %s, true)", [path])


def check_columns(connection: Connection, table: str, backed_up: Sequence[str]) -> None:
    """Raise if a table lacks columns that the backup contains.

    Raises:
        ConflictError: The table lacks some.
    """
    there = [name for (name,) in catalog.rows(connection, _COLUMNS, table)]
    gone = [f"{table}.{name}" for name in backed_up if name not in there]
    if gone:
        raise ConflictError(
            f"the backup has columns that the tables lack: {', '.join(gone)}; {_UNCHANGED}. Add them, or restore "
            "into another database"
        )
    new = [f"{table}.{name}" for name in there if name not in backed_up]
    if new:
        logger.warning(
            "columns that are not in the backup were set to their defaults: %s",
            ", ".join(new),
            extra={"event": "restore", "columns": new},
        )


@contextmanager
def fitting(table: str) -> Generator[None]:
    """Say by name that values of the backup do not go into the columns of a table that is there.

    Raises:
        ConflictError: In place of the server's error, whose words may have values in them.
    """
    try:
        yield
    except psycopg.DataError as error:
        raise ConflictError(
            f"the rows of the backup do not go into the columns of {table} as they are here (SQLSTATE "
            f"{error.sqlstate}); {_UNCHANGED}. Give the columns the types and lengths that they had, or restore into "
            "another database",
            sqlstate=error.sqlstate,
        ) from error


def _does_not_fit(error: psycopg.Error) -> ConflictError:
    said = error.diag
    place = f" of {said.schema_name}.{said.table_name}" if said.table_name else ""
    what = said.constraint_name or (said.column_name and f"column {said.column_name}") or "a constraint"
    return ConflictError(
        f"the rows of the backup violate {what}{place}, PostgreSQL reports {said.message_primary!r}; "
        f"{_UNCHANGED}. Drop it, or restore into another database",
        sqlstate=error.sqlstate,
        constraint=said.constraint_name,
    )


def _take_off(connection: Connection, query: LiteralString, *oids: list[int]) -> list[Taken]:
    found = _written(connection, query, *oids)
    for _, drop, _ in found:
        connection.execute(drop.encode())
    return [Taken(name, restore) for name, _, restore in found]


@contextmanager
def _triggers_off(connection: Connection, oids: list[int]) -> Generator[None]:
    """Disable the triggers of others during the block, so that the rows are restored unchanged."""
    found = _written(connection, _TRIGGERS, oids)
    for disable, _ in found:
        connection.execute(disable.encode())
    yield
    for _, enable in found:
        connection.execute(enable.encode())


def _written(connection: Connection, query: LiteralString, *parameters: object) -> list[tuple[Any, ...]]:
    """Query definitions with all names qualified."""
    path: str = catalog.value(connection, "SELECT current_setting('search_path')")
    connection.execute("SET LOCAL search_path = ''")
    found = catalog.rows(connection, query, *parameters)
    connection.execute("SELECT set_config('search_path', %s, true)", [path])
    return found


def _given(connection: Connection, oids: list[int]) -> set[str]:
    return {name for (name,) in catalog.rows(connection, _GIVEN, *[oids] * 6)}


def advance_sequences(connection: Connection, namespace: str, listed: Iterable[str]) -> None:
    """Advance the sequences of columns past the restored values; setval is not undone if the transaction fails."""
    names = [sql.Identifier(namespace, table).as_string() for table in listed]
    for (statement,) in _written(connection, _SEQUENCES, names):
        connection.execute(statement.encode())


# The constraints of partitions follow those of their parent tables.
_CONSTRAINTS: LiteralString = """
    SELECT format('%%I of %%s', conname, conrelid::regclass),
        format('ALTER TABLE %%s DROP CONSTRAINT %%I', conrelid::regclass, conname),
        format('ALTER TABLE %%s ADD CONSTRAINT %%I %%s;', conrelid::regclass, conname, pg_get_constraintdef(oid))
        || coalesce(format('COMMENT ON CONSTRAINT %%I ON %%s IS %%L', conname, conrelid::regclass,
                           obj_description(oid, 'pg_constraint')), '')
    FROM pg_constraint WHERE conparentid = 0 AND coninhcount = 0
"""
_FOREIGN_KEYS_OF_OTHERS = f"""
    {_CONSTRAINTS} AND contype = 'f' AND confrelid = ANY(%s::oid[]) AND conrelid <> ALL(%s::oid[]) ORDER BY 1
"""
# A check constraint that is not validated may be violated by existing rows, which may be those of the backup.
_FOREIGN_KEYS_AND_LATER_CHECKS = f"""
    {_CONSTRAINTS} AND (contype = 'f' OR contype = 'c' AND NOT convalidated) AND conrelid = ANY(%s::oid[]) ORDER BY 1
"""
# Only indexes that are fully described by their definition and have no dependents.
_INDEXES = """
    SELECT indexrelid::regclass::text, format('DROP INDEX %%s', indexrelid::regclass),
        pg_get_indexdef(indexrelid) || ';' || coalesce(format('COMMENT ON INDEX %%s IS %%L', indexrelid::regclass,
                                                              obj_description(indexrelid, 'pg_class')), '')
    FROM pg_index JOIN pg_class AS i ON i.oid = indexrelid
    WHERE indrelid = ANY(%s::oid[]) AND indisvalid AND indisready AND NOT indisclustered AND NOT indisreplident
    AND reltablespace = 0 AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)
    AND NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = indexrelid AND coalesce(attstattarget, -1) >= 0)
    AND NOT EXISTS (
        SELECT FROM pg_depend
        WHERE refclassid = 'pg_class'::regclass AND refobjid = indexrelid
        OR classid = 'pg_class'::regclass AND objid = indexrelid AND deptype IN ('e', 'x', 'P', 'S')
    )
    ORDER BY 1
"""
_TRIGGERS = """
    SELECT format('ALTER TABLE %%s DISABLE TRIGGER %%I', tgrelid::regclass, tgname),
        format('ALTER TABLE %%s ENABLE %%s TRIGGER %%I', tgrelid::regclass,
               CASE tgenabled WHEN 'R' THEN 'REPLICA' WHEN 'A' THEN 'ALWAYS' END, tgname)
    FROM pg_trigger WHERE NOT tgisinternal AND tgenabled <> 'D' AND tgrelid = ANY(%s::oid[])
"""
# What others have granted on or attached to a table or column, and is lost with it. An owner's own privileges are not
# included.
_GIVEN = """
    SELECT format('%%s on %%s', privilege_type, relname) FROM pg_class, aclexplode(relacl)
    WHERE pg_class.oid = ANY(%s::oid[]) AND grantee <> relowner
    UNION ALL
    SELECT format('%%s on %%s.%%s', privilege_type, relname, attname)
    FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid AND NOT attisdropped, aclexplode(attacl)
    WHERE pg_class.oid = ANY(%s::oid[])
    UNION ALL
    SELECT format('policy %%s on %%s', polname, polrelid::regclass) FROM pg_policy WHERE polrelid = ANY(%s::oid[])
    UNION ALL
    SELECT format('publication %%s of %%s', pubname, prrelid::regclass)
    FROM pg_publication_rel JOIN pg_publication AS p ON p.oid = prpubid WHERE prrelid = ANY(%s::oid[])
    UNION ALL
    SELECT format('statistics object %%s on %%s', stxname, stxrelid::regclass) FROM pg_statistic_ext
    WHERE stxrelid = ANY(%s::oid[])
    UNION ALL
    SELECT format('the rights on %%s, which default privileges would change', relname) FROM pg_class
    WHERE oid = ANY(%s::oid[])
    AND EXISTS (SELECT FROM pg_default_acl WHERE defaclobjtype = 'r' AND defaclnamespace IN (0, relnamespace))
"""
_COLUMNS = """
    SELECT attname FROM pg_attribute
    WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped AND attgenerated = ''
"""
_SEQUENCES = """
    SELECT format(
        'SELECT setval(%%L, newest) FROM (SELECT max(%%I) AS newest FROM ONLY %%s) AS loaded'
        ' WHERE newest >= (SELECT last_value FROM %%s)',
        objid::regclass, attname, attrelid::regclass, objid::regclass
    )
    FROM pg_depend
    JOIN pg_class AS s ON s.oid = objid AND relkind = 'S'
    JOIN pg_attribute ON attrelid = refobjid AND attnum = refobjsubid
    WHERE classid = 'pg_class'::regclass AND refclassid = 'pg_class'::regclass AND deptype IN ('a', 'i')
    AND refobjid = ANY(%s::text[]::regclass[]) AND atttypid = ANY('{int2, int4, int8}'::regtype[])
"""
