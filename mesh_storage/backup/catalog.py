"""What the catalog of a database says about this library's tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, LiteralString, TypeAlias

import psycopg
import sqlalchemy
import sqlalchemy.exc
from psycopg import sql

from mesh_storage.errors import (
    ConflictError,
    InvalidInputError,
    SchemaMismatchError,
    connection_refused,
    translate,
)
from mesh_storage.postgres import engine
from mesh_storage.postgres.server import Server
from mesh_storage.schema import tables
from mesh_storage.schema.tables import Location

Connection: TypeAlias = psycopg.Connection[tuple[Any, ...]]


@contextmanager
def connected(server: Server) -> Generator[Connection]:
    """Connect for work that takes long, with no limit but the one for locks."""
    try:
        with engine.connect(server.connect) as connection:
            set_up(connection)
            yield connection
    except psycopg.Error as error:
        raise translate(error) from error


@contextmanager
def transaction(server: Server) -> Generator[tuple[sqlalchemy.Connection, Connection]]:
    """Begin a transaction for work that takes long, and commit it after the block; in it migrations can take part."""
    made = engine.create_engine(server.connect).execution_options(isolation_level="READ COMMITTED")
    try:
        with _connected(made) as session, session.begin():
            connection: Connection | None = session.connection.driver_connection
            assert connection is not None, "it is connected"
            set_up(connection)
            yield session, connection
    except (psycopg.Error, sqlalchemy.exc.DBAPIError) as error:
        raise translate(error) from error


def _connected(made: sqlalchemy.Engine) -> sqlalchemy.Connection:
    try:
        return made.connect()
    except sqlalchemy.exc.DBAPIError as error:
        refused, cause = connection_refused(error)
    raise refused from cause


def set_up(connection: Connection) -> None:
    """Set for a session what work on the tables relies on."""
    connection.execute(
        "SELECT set_config(name, %s::jsonb ->> name, false) FROM pg_settings WHERE name = ANY(%s)",
        [json.dumps(_SETTINGS), list(_SETTINGS)],
    )


def with_namespace(server: Server, namespace: str) -> Server:
    """Create a PostgreSQL schema, and give the same server with connections that lead there."""
    name = sql.Identifier(namespace)
    with connected(server) as connection:
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(name))
    # In libpq's options a backslash goes before a space and a backslash.
    path = name.as_string().replace("\\", "\\\\").replace(" ", "\\ ")
    return Server({**server.connect, "options": f"{server.connect['options']} -c search_path={path}"}, server.embedded)


def rows(connection: Connection, query: LiteralString | sql.Composed, *parameters: object) -> list[tuple[Any, ...]]:
    """Return all rows of a query."""
    return connection.execute(query, parameters or None).fetchall()


def value(connection: Connection, query: LiteralString | sql.Composed, *parameters: object) -> Any:
    """Return the first value of a query's first row, or None where there is none."""
    row = connection.execute(query, parameters or None).fetchone()
    return None if row is None else row[0]


def locate(connection: Connection) -> Location:
    """Find the tables, and refuse what no backup could be told apart from.

    Raises:
        ConfigurationError: It is not clear which tables are ours.
        ConflictError: Others keep their revision in our version table.
    """
    location = tables.locate(tables.by_psycopg(connection))
    if location.shared:
        raise ConflictError(
            f"{location.namespace}.{location.version_table} holds the revisions of others as well; run: mesh-storage "
            "upgrade, which gives mesh_storage a version table of its own"
        )
    return location


def names(namespace: str, listed: Iterable[str]) -> sql.Composed:
    """Write a list of tables as SQL does."""
    return sql.SQL(", ").join(sql.Identifier(namespace, table) for table in listed)


def only(namespace: str, listed: Iterable[str]) -> sql.Composed:
    """Write a list of tables without those that inherit from them."""
    return sql.SQL(", ").join(sql.SQL("ONLY {}").format(sql.Identifier(namespace, table)) for table in listed)


def written(connection: Connection, namespace: str, listed: Iterable[str]) -> dict[str, str]:
    """Write the names of tables with their schema, quoted where that is needed, as pg_dump does."""
    query = "SELECT name, format('%%I.%%I', %s::text, name) FROM unnest(%s::text[]) AS name"
    return dict(rows(connection, query, namespace, list(listed)))


def count(connection: Connection, namespace: str, table: str) -> int:
    """Count the rows of a table."""
    number: int = value(connection, sql.SQL("SELECT count(*) FROM ONLY {}").format(sql.Identifier(namespace, table)))
    return number


def revision(connection: Connection, namespace: str, table: str = tables.VERSION_TABLE) -> str | None:
    """Return the revision in a version table, or None where that is empty."""
    query = sql.SQL("SELECT version_num FROM {}").format(sql.Identifier(namespace, table))
    found: str | None = value(connection, query)
    return found


def definitions(connection: Connection, there: Mapping[str, int]) -> dict[str, str]:
    """Say how to create the domains and functions that the columns of the tables need."""
    oids = list(there.values())
    return {name: definition for name, definition, _ in rows(connection, _DEFINITIONS, oids, oids)}


def references(connection: Connection, there: Mapping[str, int]) -> dict[str, str]:
    """Find the foreign keys from the tables into other systems' tables, and these tables."""
    oids = list(there.values())
    return dict(rows(connection, _REFERENCES, oids, oids))


def missing(connection: Connection, referenced: Mapping[str, str]) -> list[str]:
    """Choose those foreign keys whose tables are not there."""
    return [key for key, table in referenced.items() if value(connection, "SELECT to_regclass(%s)", table) is None]


def size(connection: Connection, there: Mapping[str, int]) -> int:
    """Return the bytes that the tables and their indexes take."""
    query = "SELECT sum(pg_total_relation_size(oid))::bigint FROM unnest(%s::oid[]) AS oid"
    number: int = value(connection, query, list(there.values()))
    return number


def define(connection: Connection, wanted: Mapping[str, str]) -> None:
    """Create those domains and functions that are not there; what the functions use may be missing."""
    connection.execute("SET LOCAL check_function_bodies = off")
    for name, definition in wanted.items():
        lookup: LiteralString = "SELECT to_regprocedure(%s)" if name.endswith(")") else "SELECT to_regtype(%s)"
        if value(connection, lookup, name) is None:
            connection.execute(definition.encode())


def copied(connection: Connection, there: Mapping[str, int], expected: Mapping[str, int]) -> Callable[[], int]:
    """Make the function that asks the server how many rows other connections have copied out of the tables."""
    known, done = {oid: table for table, oid in there.items()}, dict[str, int]()

    def ask() -> int:
        connection.execute("SELECT pg_stat_clear_snapshot()")
        copying = {known[oid]: copied for oid, copied in rows(connection, _COPYING, list(known))}
        # A table that is no longer copied is done.
        done.update({table: expected[table] for table in done if table not in copying})
        done.update(copying)
        return min(sum(done.values()), sum(expected.values()))

    return ask


def check_kinds(connection: Connection, there: Mapping[str, int]) -> None:
    """Refuse what has the name of a table of ours and is none whose rows pg_dump would dump with it.

    Raises:
        SchemaMismatchError: There is such; the message names it.
    """
    odd = [f"{name} ({kind})" for name, kind in rows(connection, _KINDS, list(there.values()))]
    if odd:
        raise SchemaMismatchError(
            f"these are not the ordinary tables that mesh_storage makes: {', '.join(odd)}; they can be neither backed "
            "up nor restored"
        )


def check_heirs(connection: Connection, there: Mapping[str, int]) -> None:
    """Refuse a backup where rows of our tables are in tables of others that inherit from them.

    Raises:
        ConflictError: There are such rows; the message names the tables.
    """
    heirs = [name for (name,) in rows(connection, _HEIRS, list(there.values()))]
    exists = sql.SQL("SELECT EXISTS (SELECT FROM {})")
    full = [name for name in heirs if value(connection, exists.format(sql.SQL(name)))]
    if full:
        raise ConflictError(
            f"tables that inherit from those of mesh_storage hold rows, which a backup would not have: "
            f"{', '.join(full)}; end the inheritance, or empty them"
        )


def check_sizes(connection: Connection, namespace: str, there: Mapping[str, int]) -> None:
    """Refuse a backup where a row is longer than the server can write as text: 1 GB, in which bytes take twice as much.

    Raises:
        InvalidInputError: There is one; the message says which.
    """
    for table, key, bound in rows(connection, _BOUNDS, list(there.values()), _LONGEST_STORED):
        name = sql.Identifier(namespace, table)
        query = sql.SQL("SELECT ctid::text, {} FROM ONLY {} WHERE {} > %s")
        long = rows(connection, query.format(sql.SQL(key), name, sql.SQL(bound)), _LONGEST_LINE)
        for place, said in long:
            try:
                with connection.transaction(), connection.cursor() as cursor:
                    row = sql.SQL("COPY (SELECT * FROM ONLY {} WHERE ctid = {}) TO STDOUT").format(name, place)
                    with cursor.copy(row) as copy:
                        for _ in copy:
                            pass
            except (psycopg.errors.ProgramLimitExceeded, psycopg.errors.InternalError_) as error:
                raise InvalidInputError(
                    f"the row of {table} with the key {said} cannot be backed up: PostgreSQL writes at most 1 GB as "
                    "text, in which bytes take twice as much; delete it, or store it in parts",
                    field=table,
                    sqlstate=error.sqlstate,
                ) from error


# Nor are rows hidden: where a policy would hide some, the server says so. Definitions are written and read in one way.
_SETTINGS = {
    **dict.fromkeys(
        ("statement_timeout", "idle_in_transaction_session_timeout", "transaction_timeout", "idle_session_timeout"), "0"
    ),
    "row_security": "off",
    "standard_conforming_strings": "on",
    "quote_all_identifiers": "off",
}
_COPYING = """
    SELECT relid, tuples_processed FROM pg_stat_progress_copy
    WHERE datname = current_database() AND command = 'COPY TO' AND relid = ANY(%s::oid[])
"""
# Domains first, since a function may use one.
_DEFINITIONS = """
    SELECT DISTINCT t.oid::regtype::text, format(
        'CREATE DOMAIN %%s AS %%s%%s%%s%%s', t.oid::regtype, format_type(t.typbasetype, t.typtypmod),
        ' DEFAULT ' || t.typdefault, CASE WHEN t.typnotnull THEN ' NOT NULL' END,
        (SELECT string_agg(format(' CONSTRAINT %%I %%s', conname, pg_get_constraintdef(c.oid)), '')
         FROM pg_constraint AS c WHERE contypid = t.oid AND contype = 'c')
    ), 1 AS position
    FROM pg_attribute JOIN pg_type AS t ON t.oid = atttypid
    WHERE attrelid = ANY(%s::oid[]) AND NOT attisdropped AND typtype = 'd'
    UNION ALL
    SELECT DISTINCT p.oid::regprocedure::text, pg_get_functiondef(p.oid), 2
    FROM pg_attrdef AS d
    JOIN pg_depend ON classid = 'pg_attrdef'::regclass AND objid = d.oid AND refclassid = 'pg_proc'::regclass
    JOIN pg_proc AS p ON p.oid = refobjid
    WHERE adrelid = ANY(%s::oid[]) AND prokind = 'f'
    ORDER BY position
"""
_REFERENCES = """
    SELECT conname, confrelid::regclass::text FROM pg_constraint
    WHERE contype = 'f' AND conrelid = ANY(%s::oid[]) AND confrelid <> ALL(%s::oid[])
"""
_KINDS = """
    SELECT relname, CASE relkind WHEN 'p' THEN 'partitioned' WHEN 'v' THEN 'a view' WHEN 'm' THEN 'a materialized view'
        WHEN 'f' THEN 'a foreign table' ELSE 'of kind ' || relkind::text END
    FROM pg_class WHERE oid = ANY(%s::oid[]) AND relkind <> 'r' ORDER BY 1
"""
_HEIRS = """
    SELECT format('%%I.%%I', nspname, relname)
    FROM pg_inherits JOIN pg_class AS c ON c.oid = inhrelid JOIN pg_namespace AS n ON n.oid = relnamespace
    WHERE inhparent = ANY(%s::oid[]) ORDER BY 1
"""
_LONGEST_LINE = 1_000_000_000
"""Bytes of a row as text that the server can write for sure."""
_LONGEST_STORED = 1 << 20
"""Bytes of stored values of which none is so long as text, however well they are compressed."""
# Of each table its key and the most that a row may take as text, for those that hold anything large.
_BOUNDS = """
    SELECT relname,
        coalesce((SELECT string_agg(format('%%I::text', attname), $$ || ', ' || $$ ORDER BY attnum)
                  FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND attnum = ANY(indkey)
                  WHERE indrelid = c.oid AND indisprimary), 'ctid::text'),
        string_agg(CASE WHEN coalesce(nullif(typbasetype, 0), t.oid)
                             = ANY('{bytea, text, varchar, bpchar}'::regtype[])
                        THEN format('coalesce(2 * octet_length(%%I)::bigint, 0)', attname)
                        ELSE format('coalesce(1000 * pg_column_size(%%I)::bigint, 0)', attname) END, ' + ')
    FROM pg_class AS c JOIN pg_attribute ON attrelid = c.oid AND attnum > 0 AND NOT attisdropped AND attlen = -1
    JOIN pg_type AS t ON t.oid = atttypid
    WHERE c.oid = ANY(%s::oid[]) AND reltoastrelid <> 0 AND pg_relation_size(reltoastrelid) > %s
    GROUP BY c.oid, relname
"""
