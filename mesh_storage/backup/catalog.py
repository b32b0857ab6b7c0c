"""Queries of the system catalogs about this library's tables."""

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
    """Connect for long-running work, with no limit except lock_timeout."""
    try:
        with engine.connect(server.connect) as connection:
            set_up(connection)
            yield connection
    except psycopg.Error as error:
        raise translate(error) from error


@contextmanager
def transaction(server: Server) -> Generator[tuple[sqlalchemy.Connection, Connection]]:
    """Run the block in a transaction for long-running work, in which migrations can take part."""
    made = engine.create_engine(server.connect).execution_options(isolation_level="READ COMMITTED")
    try:
        with _connected(made) as session, session.begin():
            connection: Connection | None = session.connection.driver_connection
            assert connection is not None, "connected above"
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
    """Set the session parameters that work on the tables relies on."""
    connection.execute(
        "SELECT set_config(name, %s::jsonb ->> name, false) FROM pg_settings WHERE name = ANY(%s)",
        [json.dumps(_SETTINGS), list(_SETTINGS)],
    )


def with_namespace(server: Server, namespace: str) -> Server:
    """Create a PostgreSQL schema, and return the server with connections that use it."""
    name = sql.Identifier(namespace)
    with connected(server) as connection:
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(name))
    # In libpq's options, a backslash escapes spaces and backslashes.
    path = name.as_string().replace("\\", "\\\\").replace(" ", "\\ ")
    return Server({**server.connect, "options": f"{server.connect['options']} -c search_path={path}"}, server.embedded)


def rows(connection: Connection, query: LiteralString | sql.Composed, *parameters: object) -> list[tuple[Any, ...]]:
    """Return all rows of a query."""
    return connection.execute(query, parameters or None).fetchall()


def value(connection: Connection, query: LiteralString | sql.Composed, *parameters: object) -> Any:
    """Return the first column of a query's first row, or None if there is none."""
    row = connection.execute(query, parameters or None).fetchone()
    return None if row is None else row[0]


def locate(connection: Connection) -> Location:
    """Locate the tables; raise if a backup of them would be ambiguous.

    Raises:
        ConfigurationError: It is ambiguous which tables are ours.
        ConflictError: Others keep their revision in our version table.
    """
    location = tables.locate(tables.by_psycopg(connection))
    if location.shared:
        raise ConflictError(
            f"{location.namespace}.{location.version_table} also contains revisions of others; run: mesh-storage "
            "upgrade, which gives mesh_storage a version table of its own"
        )
    return location


def names(namespace: str, listed: Iterable[str]) -> sql.Composed:
    """Return a list of qualified table names as SQL."""
    return sql.SQL(", ").join(sql.Identifier(namespace, table) for table in listed)


def only(namespace: str, listed: Iterable[str]) -> sql.Composed:
    """Return a list of qualified table names as SQL, each with ONLY, to exclude inheriting tables."""
    return sql.SQL(", ").join(sql.SQL("ONLY {}").format(sql.Identifier(namespace, table)) for table in listed)


def written(connection: Connection, namespace: str, listed: Iterable[str]) -> dict[str, str]:
    """Return qualified table names, quoted where needed, as pg_dump writes them."""
    query = "SELECT name, format('%%I.%%I', %s::text, name) FROM unnest(%s::text[]) AS name"
    return dict(rows(connection, query, namespace, list(listed)))


def count(connection: Connection, namespace: str, table: str) -> int:
    """Return the number of rows of a table."""
    number: int = value(connection, sql.SQL("SELECT count(*) FROM ONLY {}").format(sql.Identifier(namespace, table)))
    return number


def revision(connection: Connection, namespace: str, table: str = tables.VERSION_TABLE) -> str | None:
    """Return the revision in a version table, or None if it is empty."""
    query = sql.SQL("SELECT version_num FROM {}").format(sql.Identifier(namespace, table))
    found: str | None = value(connection, query)
    return found


def definitions(connection: Connection, there: Mapping[str, int]) -> dict[str, str]:
    """Return the definitions of the domains and functions that the columns of the tables need."""
    oids = list(there.values())
    return {name: definition for name, definition, _ in rows(connection, _DEFINITIONS, oids, oids)}


def references(connection: Connection, there: Mapping[str, int]) -> dict[str, str]:
    """Return the foreign keys from the tables to other systems' tables, with those tables."""
    oids = list(there.values())
    return dict(rows(connection, _REFERENCES, oids, oids))


def missing(connection: Connection, referenced: Mapping[str, str]) -> list[str]:
    """Return those foreign keys whose referenced tables do not exist."""
    return [key for key, table in referenced.items() if value(connection, "SELECT to_regclass(%s)", table) is None]


def size(connection: Connection, there: Mapping[str, int]) -> int:
    """Return the total size of the tables and their indexes in bytes."""
    query = "SELECT sum(pg_total_relation_size(oid))::bigint FROM unnest(%s::oid[]) AS oid"
    number: int = value(connection, query, list(there.values()))
    return number


def define(connection: Connection, wanted: Mapping[str, str]) -> None:
    """Create the missing ones of these domains and functions; function bodies are not checked."""
    connection.execute("SET LOCAL check_function_bodies = off")
    for name, definition in wanted.items():
        lookup: LiteralString = "SELECT to_regprocedure(%s)" if name.endswith(")") else "SELECT to_regtype(%s)"
        if value(connection, lookup, name) is None:
            connection.execute(definition.encode())


def sequences(connection: Connection, there: Mapping[str, int]) -> list[str]:
    """Return the qualified names of the sequences that belong to identity columns of the tables."""
    return [name for (name,) in rows(connection, _IDENTITIES, list(there.values()))]


def copied(connection: Connection, there: Mapping[str, int], expected: Mapping[str, int]) -> Callable[[], int]:
    """Return a function that asks the server how many rows other connections have copied out of the tables."""
    known, done = {oid: table for table, oid in there.items()}, dict[str, int]()

    def ask() -> int:
        connection.execute("SELECT pg_stat_clear_snapshot()")
        copying = {known[oid]: copied for oid, copied in rows(connection, _COPYING, list(known))}
        # A table no longer being copied is done.
        done.update({table: expected[table] for table in done if table not in copying})
        done.update(copying)
        return min(sum(done.values()), sum(expected.values()))

    return ask


def check_kinds(connection: Connection, there: Mapping[str, int]) -> None:
    """Raise if a relation with the name of one of our tables is not an ordinary table, which pg_dump would dump.

    Raises:
        SchemaMismatchError: There is one; the message names it.
    """
    odd = [f"{name} ({kind})" for name, kind in rows(connection, _KINDS, list(there.values()))]
    if odd:
        raise SchemaMismatchError(
            f"these are not ordinary tables, as mesh_storage creates them: {', '.join(odd)}; they can be neither "
            "backed up nor restored"
        )


def check_heirs(connection: Connection, there: Mapping[str, int]) -> None:
    """Raise if tables of others that inherit from ours contain rows.

    Raises:
        ConflictError: There are such rows; the message names the tables.
    """
    heirs = [name for (name,) in rows(connection, _HEIRS, list(there.values()))]
    exists = sql.SQL("SELECT EXISTS (SELECT FROM {})")
    full = [name for name in heirs if value(connection, exists.format(sql.SQL(name)))]
    if full:
        raise ConflictError(
            f"tables that inherit from those of mesh_storage contain rows, which a backup would not include: "
            f"{', '.join(full)}; end the inheritance, or empty them"
        )


def check_sizes(connection: Connection, namespace: str, there: Mapping[str, int]) -> None:
    """Raise if a row is longer than the server can output as text: 1 GB, where a bytea value takes twice its size.

    Raises:
        InvalidInputError: There is one; the message identifies it.
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
                    f"the row of {table} with the key {said} cannot be backed up: PostgreSQL outputs at most 1 GB as "
                    "text, where bytea values take twice their size; delete it, or store it in parts",
                    field=table,
                    sqlstate=error.sqlstate,
                ) from error


# With row_security off, the server raises an error where a policy would hide rows. The output format of definitions is
# fixed.
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
# Domains first, since functions may use them.
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
_IDENTITIES = """
    SELECT format('%%I.%%I', nspname, relname)
    FROM pg_depend JOIN pg_class AS s ON s.oid = objid AND relkind = 'S' JOIN pg_namespace AS n ON n.oid = relnamespace
    WHERE classid = 'pg_class'::regclass AND refclassid = 'pg_class'::regclass AND deptype = 'i'
    AND refobjid = ANY(%s::oid[]) ORDER BY 1
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
"""Bytes of a row in text format that the server can certainly output."""
_LONGEST_STORED = 1 << 20
"""Stored size below which no value can be that long as text, however well it is compressed."""
# For each table with large values, its key and an upper bound of a row's size as text.
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
