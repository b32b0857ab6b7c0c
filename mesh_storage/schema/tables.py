"""The tables of this library, and the PostgreSQL schema they are in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import psycopg
import sqlalchemy
import sqlalchemy.exc
from psycopg import sql

from mesh_storage.errors import ConfigurationError, SchemaMismatchError

SINCE: Mapping[str, str] = {
    "mesh": "0001",
    "nodes": "0001",
    "routes": "0001",
    "mesh_messages": "0001",
    "mesh_state": "0001",
    "mesh_node_state": "0001",
    "mesh_consensus_log": "0001",
    "mesh_routing_table": "0001",
    "mesh_runtime_config": "0001",
    "mesh_consensus_log_stale": "0006",
    "mesh_deliveries": "0013",
    "mesh_delivery_lanes": "0013",
}
"""The tables and the revision that creates each; a service's own models on our `Base` are not included."""
LOG = "mesh_changes"
EPOCH = "mesh_changes_epoch"
VERSION_TABLE = "mesh_alembic_version"
"""Alembic's version table; not its default name, which a service's own environment may use."""
FORMER_VERSION_TABLE = "alembic_version"
"""The version table up to revision 0009."""
LOG_TABLES = (LOG, EPOCH)
"""The log of changes, from revision 0010 on. It is in no backup: a restore begins it anew."""
TABLES = (*SINCE, VERSION_TABLE, *LOG_TABLES)

_FIRST = tuple(name for name, revision in SINCE.items() if revision == "0001")
_FORMER_REVISIONS = tuple(f"{number:04}" for number in range(1, 10))

Fetch: TypeAlias = Callable[[str], Sequence[Any]]
"""Executes a query and returns its rows; see `by_psycopg` and `by_sqlalchemy`."""


@dataclass(frozen=True, slots=True)
class Location:
    """The location of the tables in a database, and which of them exist."""

    namespace: str
    """The PostgreSQL schema."""
    tables: Mapping[str, int]
    """The existing tables with their OIDs, including the version table."""
    version_table: str | None
    """The table that contains the revision; None before the first deployment."""
    revision: str | None
    shared: bool = False
    """Whether the version table, under its former name, also contains revisions of others."""

    @property
    def missing(self) -> list[str]:
        """The tables that belong to the revision but do not exist."""
        return missing(self.revision, self.tables)


def missing(revision: str | None, there: Iterable[str]) -> list[str]:
    """Return the tables that belong to a revision but are not among those given."""
    found = {*there}
    return [name for name, since in SINCE.items() if revision is not None and since <= revision and name not in found]


def by_psycopg(connection: psycopg.Connection[tuple[Any, ...]]) -> Fetch:
    """Return a function that executes a query on a psycopg connection."""
    return lambda query: connection.execute(query.encode()).fetchall()


def by_sqlalchemy(connection: sqlalchemy.Connection) -> Fetch:
    """Return a function that executes a query on a SQLAlchemy connection."""
    return lambda query: connection.exec_driver_sql(query).fetchall()


def locate(fetch: Fetch) -> Location:
    """Locate the tables in the schemas of the `search_path`, as unqualified names resolve.

    They are in the schema of the version table. Without one, they are where the tables of the first revision are: in
    the current schema, or all of them in another one. Otherwise they are to be created in the current schema, that is,
    the first existing one of the `search_path`.

    Raises:
        ConfigurationError: The `search_path` contains no existing schema, or finds tables in several.
        SchemaMismatchError: The version table contains several revisions.
    """
    path = _search_path(fetch)
    if not path:
        raise ConfigurationError(
            "the search_path of the connection contains no existing schema that may be used; create it, or grant "
            "USAGE on it"
        )
    marked = next((namespace for namespace, found in path.items() if VERSION_TABLE in found), None)
    if marked is not None:
        rows = fetch(f"SELECT version_num FROM {qualified(marked, VERSION_TABLE)}")  # noqa: S608 - a quoted name
        if len(rows) > 1:
            raise _ambiguous(f"{marked}.{VERSION_TABLE}", rows)
        location = Location(marked, _ours(path[marked]), VERSION_TABLE, rows[0][0] if rows else None)
        _check_marked(path, location)
        return location
    namespace = _unmarked(path)
    there = _ours(path[namespace])
    if not {*_FIRST} <= there.keys():
        return Location(namespace, there, None, None)
    return _former(fetch, path, namespace, there)


def revision_in(fetch: Fetch) -> str | None:
    """Return the revision of a database, or None if the schema was never deployed."""
    return locate_during_upgrade(fetch).revision


def locate_during_upgrade(fetch: Fetch) -> Location:
    """Locate the tables, even if an upgrade by others renames the version table meanwhile."""
    try:
        return locate(fetch)
    except (psycopg.errors.UndefinedTable, sqlalchemy.exc.ProgrammingError) as error:
        original = error.orig if isinstance(error, sqlalchemy.exc.ProgrammingError) else error
        if not isinstance(original, psycopg.errors.UndefinedTable):
            raise
    return locate(fetch)


def qualified(namespace: str, table: str) -> str:
    """Return the schema-qualified, quoted name of a table."""
    return sql.Identifier(namespace, table).as_string()


def leading_to(namespace: str, path: Iterable[str]) -> str:
    """Return the `search_path` with a schema moved to the front."""
    rest = (name for name in path if name != namespace)
    return ", ".join(sql.Identifier(name).as_string() for name in (namespace, *rest))


def include_object(item: Any, name: str | None, kind: str, reflected: bool, compare_to: Any) -> bool:  # noqa: FBT001 - Alembic's signature
    """Return whether an object is not one of mesh_storage's tables, for a service's own Alembic environment.

    Pass it to `context.configure(include_object=...)`, combined with the service's own function, if any, by `and`.
    Alembic ignores the columns, indexes and constraints of excluded tables, in the metadata and in the database. A
    table of the service with the same name as one of ours is included if its metadata has a schema.
    """
    del compare_to
    return kind != "table" or name not in TABLES or (not reflected and item.schema is not None)


def _search_path(fetch: Fetch) -> dict[str, dict[str, int]]:
    """Return the schemas of the `search_path`, each with its relations that have the names of our tables."""
    names = ", ".join(f"'{name}'" for name in (*TABLES, FORMER_VERSION_TABLE))
    path: dict[str, dict[str, int]] = {}
    for namespace, name, oid in fetch(
        f"""
        SELECT path.name, relname, pg_class.oid
        FROM unnest(current_schemas(false)) WITH ORDINALITY AS path (name, position)
        JOIN pg_namespace ON nspname = path.name
        LEFT JOIN pg_class ON relnamespace = pg_namespace.oid AND relkind NOT IN ('i', 'I', 't', 'c', 'S')
            AND relname IN ({names})
            AND (relname <> '{FORMER_VERSION_TABLE}' OR has_table_privilege(pg_class.oid, 'SELECT'))
        ORDER BY position, relname
        """  # noqa: S608 - our own names
    ):
        found = path.setdefault(namespace, {})
        if name is not None:
            found[name] = oid
    return path


def _ours(found: Mapping[str, int]) -> dict[str, int]:
    return {name: oid for name, oid in found.items() if name in SINCE or name == VERSION_TABLE}


def _first_found(path: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """Return the schema that each unqualified name resolves to."""
    return {
        name: next(namespace for namespace, found in path.items() if name in found)
        for name in TABLES
        if any(name in found for found in path.values())
    }


def _check_marked(path: Mapping[str, Mapping[str, int]], location: Location) -> None:
    """Raise if a name resolves to another schema than that of the version table."""
    order = list(path)
    astray = {
        name: namespace
        for name, namespace in _first_found(path).items()
        if order.index(namespace) < order.index(location.namespace)
        or (namespace != location.namespace and name in location.missing)
    }
    if astray:
        listed = ", ".join(f"{namespace}.{name}" for name, namespace in astray.items())
        raise ConfigurationError(
            f"mesh_storage is deployed in schema {location.namespace}, with its {VERSION_TABLE}, but the "
            f"search_path ({', '.join(path)}) finds {listed}; {_schema_hint(location.namespace)}"
        )


def _unmarked(path: Mapping[str, Mapping[str, int]]) -> str:
    """Return the schema of the tables if there is no version table."""
    current, *_ = path
    found = _first_found(path)
    namespaces = {*found.values()}
    if not namespaces or namespaces == {current}:
        return current
    (first, *others) = sorted(namespaces, key=list(path).index)
    if not others and found.keys() >= {*_FIRST}:
        return first
    listed = ", ".join(f"{namespace}.{name}" for name, namespace in found.items())
    raise ConfigurationError(
        f"the tables of mesh_storage must be in one schema, but the search_path ({', '.join(path)}) finds {listed}, "
        f"and missing ones would be created in {current}; {_schema_hint(current)}, or move the tables together with "
        "ALTER TABLE ... SET SCHEMA"
    )


def _schema_hint(namespace: str) -> str:
    return f"select the schema with the URL parameter options=-csearch_path={namespace}, or another one"


def _former(fetch: Fetch, path: Mapping[str, Mapping[str, int]], namespace: str, there: Mapping[str, int]) -> Location:
    """Locate a version table under the former name, which others may use for their revisions too."""
    revisions = _possible_revisions(fetch, there)
    for other, found in path.items():
        if FORMER_VERSION_TABLE not in found:
            continue
        rows = fetch(f"SELECT version_num FROM {qualified(other, FORMER_VERSION_TABLE)}")  # noqa: S608 - a quoted name
        ours = [revision for (revision,) in rows if revision in revisions]
        if len(ours) > 1:
            raise _ambiguous(f"{other}.{FORMER_VERSION_TABLE}", rows)
        if ours and other != namespace:
            raise ConfigurationError(
                f"the tables of mesh_storage are in schema {namespace}, but their {FORMER_VERSION_TABLE} is in "
                f"{other}; move it to the same schema: ALTER TABLE {qualified(other, FORMER_VERSION_TABLE)} SET SCHEMA "
                f"{sql.Identifier(namespace).as_string()}"
            )
        if ours:
            tables = {**there, FORMER_VERSION_TABLE: found[FORMER_VERSION_TABLE]}
            return Location(namespace, tables, FORMER_VERSION_TABLE, ours[0], shared=len(rows) > 1)
    return Location(namespace, there, None, None)


def _possible_revisions(fetch: Fetch, there: Mapping[str, int]) -> list[str]:
    """Return the revisions up to 0009 that are consistent with the shape of the tables.

    A service's own revision may have the same name as one of ours. The Go service's tables look the same at revision
    0001 and before; they count as before, since the first revision does not change them.
    """
    ((made, keys, zones, checks),) = fetch(
        f"""
        SELECT EXISTS (SELECT FROM pg_constraint WHERE conrelid = {there["mesh"]} AND conname = 'mesh_mesh_id_check'),
            EXISTS (SELECT FROM pg_attribute
                    WHERE attrelid = {there["mesh"]} AND attname = 'mesh_public_key' AND NOT attisdropped),
            EXISTS (SELECT FROM pg_attribute
                    WHERE attrelid = {there["mesh"]} AND attname = 'created' AND atttypid = 'timestamptz'::regtype),
            EXISTS (SELECT FROM pg_constraint
                    WHERE conrelid = {there["mesh_state"]} AND conname = 'mesh_state_key_check')
        """  # noqa: S608 - object ids
    )
    marks = {"0002": keys, "0003": zones, "0004": checks, "0006": "mesh_consensus_log_stale" in there}
    return [
        revision
        for revision in _FORMER_REVISIONS
        if all(holds == (mark <= revision) for mark, holds in marks.items()) and (made or revision != "0001")
    ]


def _ambiguous(table: str, rows: Sequence[Any]) -> SchemaMismatchError:
    listed = ", ".join(sorted(str(revision) for (revision,) in rows))
    return SchemaMismatchError(
        f"{table} has several rows that may be the revision of mesh_storage: {listed}; delete the others, and try again"
    )
