"""Which tables are this library's, and in which schema of PostgreSQL they are: whatever needs to know asks here."""

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
}
"""The tables by name, with the revision that makes each; a service's own models on our `Base` are not among them."""
VERSION_TABLE = "mesh_alembic_version"
"""Where Alembic keeps the revision; not under the name that a service's own environment takes by default."""
FORMER_VERSION_TABLE = "alembic_version"
"""Where it was kept up to revision 0009."""
TABLES = (*SINCE, VERSION_TABLE)

_FIRST = tuple(name for name, revision in SINCE.items() if revision == "0001")
_FORMER_REVISIONS = tuple(f"{number:04}" for number in range(1, 10))

Fetch: TypeAlias = Callable[[str], Sequence[Any]]
"""Runs a query and returns its rows; see `by_psycopg` and `by_sqlalchemy`."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where the tables of a database are, and what is there."""

    namespace: str
    """The schema of PostgreSQL."""
    tables: Mapping[str, int]
    """Those that are there, with their object ids, the version table among them."""
    version_table: str | None
    """The table with the revision: None before the first deployment."""
    revision: str | None
    shared: bool = False
    """Whether the version table, still under its former name, holds revisions of others as well."""

    @property
    def missing(self) -> list[str]:
        """The tables that belong to the revision and are not there."""
        return missing(self.revision, self.tables)


def missing(revision: str | None, there: Iterable[str]) -> list[str]:
    """Return the tables that belong to a revision and are not among those given."""
    found = {*there}
    return [name for name, since in SINCE.items() if revision is not None and since <= revision and name not in found]


def by_psycopg(connection: psycopg.Connection[tuple[Any, ...]]) -> Fetch:
    """Make what runs a query on a connection of psycopg."""
    return lambda query: connection.execute(query.encode()).fetchall()


def by_sqlalchemy(connection: sqlalchemy.Connection) -> Fetch:
    """Make what runs a query on a connection of SQLAlchemy."""
    return lambda query: connection.exec_driver_sql(query).fetchall()


def locate(fetch: Fetch) -> Location:
    """Find the tables in the schemas of the `search_path`, as unqualified names find them.

    They are in the schema that has the version table. In a database that has none they are where the tables of the
    first revision are: in the current schema, or all of them in another one. Otherwise they are to be made in the
    current schema, which is the first one of the `search_path` that exists.

    Raises:
        ConfigurationError: The `search_path` leads to no schema, or to tables in several.
        SchemaMismatchError: The version table holds several revisions.
    """
    path = _search_path(fetch)
    if not path:
        raise ConfigurationError(
            "the search_path of the connection leads to no schema that exists and may be used; create it, or grant "
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
    """Return the revision of a database, or None where the schema was never deployed."""
    try:
        return locate(fetch).revision
    except (psycopg.errors.UndefinedTable, sqlalchemy.exc.ProgrammingError) as error:
        original = error.orig if isinstance(error, sqlalchemy.exc.ProgrammingError) else error
        if not isinstance(original, psycopg.errors.UndefinedTable):
            raise
    # An upgrade has given the version table its name meanwhile.
    return locate(fetch).revision


def qualified(namespace: str, table: str) -> str:
    """Write the name of a table with its schema, as SQL does."""
    return sql.Identifier(namespace, table).as_string()


def leading_to(namespace: str, path: Iterable[str]) -> str:
    """Write the `search_path` that begins with a schema and goes on as before."""
    rest = (name for name in path if name != namespace)
    return ", ".join(sql.Identifier(name).as_string() for name in (namespace, *rest))


def include_object(item: Any, name: str | None, kind: str, reflected: bool, compare_to: Any) -> bool:  # noqa: FBT001 - Alembic's signature
    """Return whether an object is a service's own, not one of mesh_storage's tables, for its Alembic environment.

    It goes into `context.configure(include_object=...)`, with a function of the service's own by `and`. Alembic looks
    at no column, index or constraint of a table that is left out, be it in the metadata or in the database. A table of
    the service's that has the name of one of ours is included where its metadata gives it a schema.
    """
    del compare_to
    return kind != "table" or name not in TABLES or (not reflected and item.schema is not None)


def _search_path(fetch: Fetch) -> dict[str, dict[str, int]]:
    """Return the schemas of the `search_path`, each with what is there under the names of our tables."""
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
        """  # noqa: S608 - names of ours
    ):
        found = path.setdefault(namespace, {})
        if name is not None:
            found[name] = oid
    return path


def _ours(found: Mapping[str, int]) -> dict[str, int]:
    return {name: oid for name, oid in found.items() if name in TABLES}


def _first_found(path: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """Return the schema in which each unqualified name is found."""
    return {
        name: next(namespace for namespace, found in path.items() if name in found)
        for name in TABLES
        if any(name in found for found in path.values())
    }


def _check_marked(path: Mapping[str, Mapping[str, int]], location: Location) -> None:
    """Refuse to go on where a name leads to another schema than the version table is in."""
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
            f"mesh_storage is deployed in the schema {location.namespace} (its {VERSION_TABLE} is there), but the "
            f"search_path ({', '.join(path)}) leads to {listed}; {_say_which(location.namespace)}"
        )


def _unmarked(path: Mapping[str, Mapping[str, int]]) -> str:
    """Find the schema where no version table says it."""
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
        f"the tables of mesh_storage must be in one schema, but the search_path ({', '.join(path)}) leads to {listed}, "
        f"and what is not there would be made in {current}; {_say_which(current)}, or move the tables together with "
        "ALTER TABLE ... SET SCHEMA"
    )


def _say_which(namespace: str) -> str:
    return f"say which schema is meant by the URL's parameter options=-csearch_path={namespace}, or another one"


def _former(fetch: Fetch, path: Mapping[str, Mapping[str, int]], namespace: str, there: Mapping[str, int]) -> Location:
    """Look for our revision where it was kept up to 0009: in a table whose name others use for theirs too."""
    revisions = _plausible(fetch, there)
    for other, found in path.items():
        if FORMER_VERSION_TABLE not in found:
            continue
        rows = fetch(f"SELECT version_num FROM {qualified(other, FORMER_VERSION_TABLE)}")  # noqa: S608 - a quoted name
        ours = [revision for (revision,) in rows if revision in revisions]
        if len(ours) > 1:
            raise _ambiguous(f"{other}.{FORMER_VERSION_TABLE}", rows)
        if ours and other != namespace:
            raise ConfigurationError(
                f"the tables of mesh_storage are in the schema {namespace}, but their {FORMER_VERSION_TABLE} is in "
                f"{other}; bring them together: ALTER TABLE {qualified(other, FORMER_VERSION_TABLE)} SET SCHEMA "
                f"{sql.Identifier(namespace).as_string()}"
            )
        if ours:
            tables = {**there, FORMER_VERSION_TABLE: found[FORMER_VERSION_TABLE]}
            return Location(namespace, tables, FORMER_VERSION_TABLE, ours[0], shared=len(rows) > 1)
    return Location(namespace, there, None, None)


def _plausible(fetch: Fetch, there: Mapping[str, int]) -> list[str]:
    """Return the revisions up to 0009 that tables which look like this can have.

    A service's own revision may be called like one of ours. Tables of the Go service look alike at revision 0001 and
    before it; they count as before, since the first revision changes nothing about them.
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
        f"{table} has several rows that may be the revision of mesh_storage: {listed}; delete those that are not, and "
        "run it again"
    )
