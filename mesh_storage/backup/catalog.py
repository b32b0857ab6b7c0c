"""What the catalog of a database says about this library's tables, and what must be kept when they are replaced."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, LiteralString, TypeAlias

import psycopg
from psycopg import sql

from mesh_storage import schema
from mesh_storage.errors import ConflictError, translate
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
            connection.execute(
                "SELECT set_config(name, '0', false) FROM pg_settings WHERE name IN ('statement_timeout',"
                " 'idle_in_transaction_session_timeout', 'transaction_timeout', 'idle_session_timeout')"
            )
            yield connection
    except psycopg.Error as error:
        raise translate(error) from error


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


def count(connection: Connection, namespace: str, table: str) -> int:
    """Count the rows of a table."""
    number: int = value(connection, sql.SQL("SELECT count(*) FROM {}").format(sql.Identifier(namespace, table)))
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


def make_room(connection: Connection, location: Location, *, overwrite: bool) -> list[tuple[str, str]]:
    """Drop the tables that are there, and give each one's statements that restore its owner and grants.

    Raises:
        ConflictError: They hold rows and `overwrite` was not given, or other systems depend on them.
        SchemaMismatchError: Their schema is newer than this code, which may not know all tables.
    """
    there = location.tables
    if not there:
        return []
    listed, oids = names(location.namespace, there), list(there.values())
    connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(listed))
    if location.revision is not None and location.revision not in schema.revisions():
        schema.check(location.revision)
    if not overwrite:
        exists = sql.SQL("SELECT EXISTS (SELECT FROM {})")
        for table in there.keys() - {location.version_table}:
            if value(connection, exists.format(sql.Identifier(location.namespace, table))):
                raise ConflictError(f"the database has rows in {table}; restore with overwrite to replace them all")
    attached = [name for (name,) in rows(connection, _ATTACHED, oids, oids, oids, oids)]
    if attached:
        raise ConflictError(
            f"other systems have put onto the tables: {', '.join(attached)}; drop that first and create it anew"
        )
    keep = [(table, statement) for table, statement in rows(connection, _OWNERS_AND_GRANTS, oids, oids)]
    try:
        connection.execute(sql.SQL("DROP TABLE {}").format(listed))
    except psycopg.errors.DependentObjectsStillExist as error:
        raise ConflictError(
            f"other systems depend on the tables: {error.diag.message_detail}; drop that first and create it anew",
            sqlstate=error.sqlstate,
        ) from error
    return keep


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
_ATTACHED = """
    SELECT format('trigger %%I on %%s', tgname, tgrelid::regclass) FROM pg_trigger
    WHERE NOT tgisinternal AND tgrelid = ANY(%s::oid[])
    UNION ALL
    SELECT format('rule %%I on %%s', rulename, ev_class::regclass) FROM pg_rewrite WHERE ev_class = ANY(%s::oid[])
    UNION ALL
    SELECT format('policy %%I on %%s', polname, polrelid::regclass) FROM pg_policy WHERE polrelid = ANY(%s::oid[])
    UNION ALL
    SELECT format('publication %%I of %%s', pubname, prrelid::regclass)
    FROM pg_publication_rel JOIN pg_publication AS p ON p.oid = prpubid WHERE prrelid = ANY(%s::oid[])
"""
_OWNERS_AND_GRANTS = """
    SELECT relname, format('ALTER TABLE %%I.%%I OWNER TO %%I', nspname, relname, pg_get_userbyid(relowner))
    FROM pg_class JOIN pg_namespace AS n ON n.oid = relnamespace
    WHERE pg_class.oid = ANY(%s::oid[]) AND pg_get_userbyid(relowner) <> current_user
    UNION ALL
    SELECT relname, format(
        'GRANT %%s ON %%I.%%I TO %%s%%s', privilege_type, nspname, relname,
        CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END,
        CASE WHEN is_grantable THEN ' WITH GRANT OPTION' END
    )
    FROM pg_class JOIN pg_namespace AS n ON n.oid = relnamespace, aclexplode(relacl)
    WHERE pg_class.oid = ANY(%s::oid[])
"""
