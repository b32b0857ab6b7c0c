"""The distribution of a database over the workers of Citus: what it changes, what the server lacks, and the steps."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from mesh_storage.errors import ConfigurationError, ConflictError, translate
from mesh_storage.postgres import engine
from mesh_storage.postgres.server import Server, open_server
from mesh_storage.schema import deploy, tables
from mesh_storage.settings import settings_of

logger = logging.getLogger("mesh_storage")

COLUMNS: Mapping[str, str] = {
    "mesh_messages": "to_node",
    "mesh_deliveries": "receiver",
    "mesh_delivery_lanes": "receiver",
    "mesh_node_state": "node_id",
}
"""The tables that are distributed, each by this column; all others stay on the coordinator."""
LOCAL = tuple(name for name in tables.TABLES if name not in COLUMNS)
"""The tables that stay on the coordinator, and are known to Citus, so that a commit is atomic over all."""
CHANGES = (
    "the id of a message becomes unique for each receiver, and no longer among all messages",
    "a message can be sent to its to_node only, not to other receivers",
    "backups and restores are refused",
    "a snapshot and serializability hold on each worker, not over several",
)
"""What is different afterwards; see Citus in docs/scaling.md."""

_MESSAGES, _DELIVERIES, _LANES = "mesh_messages", "mesh_deliveries", "mesh_delivery_lanes"
_NEW_KEY = "mesh_messages_to_node_id_key"
_ID_INDEX = "mesh_messages_id_idx"
_PLUGIN = "citus"
# Whoever waits for an exclusive lock holds up all others that come after.
_BRIEFLY = "SET LOCAL lock_timeout = '3s'"
# "mesh_dis" as a number. It is tried, since a session that waits for it would hold up CREATE INDEX CONCURRENTLY.
_LOCK = f"SELECT pg_try_advisory_lock({int.from_bytes(b'mesh_dis')})"
_INDEXES = """
    SELECT c.relname, i.indisvalid, i.indisprimary, ARRAY(
        SELECT attname::text FROM unnest(i.indkey::int2[]) WITH ORDINALITY AS key (number, place)
        JOIN pg_attribute ON attrelid = i.indrelid AND attnum = key.number ORDER BY place
    )
    FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid WHERE i.indrelid = {}
"""
_TYPES = """
    SELECT attrelid::bigint, format_type(atttypid, NULL) FROM pg_attribute
    WHERE attrelid IN ({}) AND attname = 'receiver'
"""
_ACROSS = """
    SELECT conrelid::regclass::text, conname FROM pg_constraint
    WHERE contype = 'f' AND (conrelid IN ({0}) OR confrelid IN ({0}))
    UNION ALL
    SELECT tgrelid::regclass::text, tgname FROM pg_trigger
    WHERE NOT tgisinternal AND tgrelid IN ({0}) AND NOT starts_with(tgname, 'truncate_trigger') ORDER BY 1, 2
"""
_TO_OTHERS = """
    SELECT EXISTS (
        SELECT FROM {deliveries} AS d JOIN {messages} AS m ON m.id = d.message_id
        WHERE m.to_node <> d.receiver
    )
"""


# By default, Citus refuses to write what a foreign key leads to, after a call of all shards in the same unit of work.
SEQUENTIAL = "SET citus.multi_shard_modify_mode = 'sequential'"
_MODE = """
    SELECT datname, current_setting('citus.multi_shard_modify_mode', true) = 'sequential', pg_has_role(datdba, 'USAGE')
    FROM pg_database WHERE datname = current_database()
"""


@dataclass(frozen=True, slots=True)
class Distribution:
    """What there is to do to distribute a database."""

    steps: tuple[tuple[str, ...], ...]
    """The statements, in order; those of one step are one transaction."""
    lacking: tuple[str, ...]
    """What stands against it: what the server lacks, and what is in the database."""
    changes: tuple[str, ...] = CHANGES
    """What is different afterwards for a service."""

    @property
    def statements(self) -> tuple[str, ...]:
        """The statements of all steps."""
        return tuple(statement for step in self.steps for statement in step)


def distribute(url: str | None = None, *, apply: bool = True) -> Distribution:
    """Distribute what grows over the workers of Citus: the messages with their deliveries, and the node states.

    It goes step by step, beside other sessions, and does what is left to do: after a failure, call it again. Connect to
    the coordinator as the owner of the tables. Without a URL, the settings come from the environment.

    Args:
        url: The URL of the database.
        apply: Whether to do it, rather than only to say what there is to do.

    Returns:
        What there was to do.

    Raises:
        ConfigurationError: The server lacks something, or the database holds what cannot be distributed; nothing was
            changed, and the message says all of it.
        ConflictError: Another process is distributing it.
        SchemaMismatchError: The schema is older or newer than this code requires, or missing.
        UnavailableError: The database cannot be reached.
    """
    server = open_server(settings_of(url))
    try:
        return distribute_server(server, apply=apply)
    finally:
        server.close()


def distribute_server(server: Server, *, apply: bool) -> Distribution:
    """Distribute the database of a server that is already open."""
    server.require_session()
    try:
        with engine.connect(server.connect) as connection:
            made = examine(connection)
            if apply:
                _apply(connection, made)
    except psycopg.Error as error:
        raise translate(error) from error
    return made


def examine(connection: psycopg.Connection[Any]) -> Distribution:
    """Return what there is to do."""
    fetch = tables.by_psycopg(connection)
    location = tables.locate_during_upgrade(fetch)
    deploy.check(location.revision)
    there = {**_oids(fetch, location), **location.tables}
    methods = methods_of(fetch)
    return Distribution(
        steps=tuple(_steps(fetch, location.namespace, there, methods)),
        lacking=tuple(_lacking(fetch, location.namespace, there, methods)),
    )


def methods_of(fetch: tables.Fetch) -> dict[int, str] | None:
    """Return how each table known to Citus is spread, by OID: `h` by hash, `n` not; None where there is no Citus."""
    if not fetch("SELECT FROM pg_extension WHERE extname = 'citus'"):
        return None
    return dict(fetch("SELECT logicalrelid::oid::bigint, partmethod::text FROM pg_catalog.pg_dist_partition"))


def check_on_one_server(fetch: tables.Fetch) -> None:
    """Raise if a backup or restore would not have all rows of one moment.

    Raises:
        ConfigurationError: Tables of the database are distributed.
    """
    if methods := methods_of(fetch):
        oids = ", ".join(str(oid) for oid, method in methods.items() if method == "h") or "NULL"
        names = ", ".join(map(_literal, COLUMNS))
        spread = fetch(
            f"SELECT oid::regclass::text FROM pg_class WHERE oid IN ({oids}) AND relname IN ({names}) ORDER BY 1"  # noqa: S608 - our own names
        )
        if listed := ", ".join(name for (name,) in spread):
            raise ConfigurationError(
                f"{listed}: distributed by Citus, so no snapshot covers all rows; back up and restore the servers "
                "themselves, at a common restore point (citus_create_restore_point)"
            )


def _apply(connection: psycopg.Connection[Any], made: Distribution) -> None:
    if made.lacking:
        raise ConfigurationError(f"this database cannot be distributed: {'; '.join(made.lacking)}")
    if connection.execute(_LOCK.encode()).fetchone() != (True,):
        raise ConflictError("another process is distributing this database", retryable=True)
    for step in made.steps:
        logger.info("distributing", extra={"event": "distribute", "statement": step[-1]})
        if len(step) == 1:
            connection.execute(step[0].encode())
            continue
        with connection.transaction():
            for statement in step:
                connection.execute(statement.encode())


def _oids(fetch: tables.Fetch, location: tables.Location) -> dict[str, int]:
    names = ", ".join(f"'{name}'" for name in tables.TABLES)
    namespace = _literal(location.namespace)
    query = f"""
        SELECT relname, pg_class.oid::bigint FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
        WHERE nspname = {namespace} AND relname IN ({names}) AND relkind = 'r'
    """  # noqa: S608 - our own names
    return dict(fetch(query))


def _steps(
    fetch: tables.Fetch, namespace: str, there: Mapping[str, int], methods: Mapping[int, str] | None
) -> Iterable[tuple[str, ...]]:
    """Yield the steps that are left to do."""
    known = methods or {}
    left = [table for table in COLUMNS if known.get(there[table]) != "h"]
    yield from _keys(fetch, namespace, there)
    ((database, is_sequential, _),) = fetch(_MODE)
    if not is_sequential:
        yield (f"ALTER DATABASE {sql.Identifier(database).as_string()} {SEQUENTIAL}",)
    for table in LOCAL:
        if table in there and there[table] not in known:
            yield (_BRIEFLY, _add_local(tables.qualified(namespace, table)))
    yield from _spread(fetch, namespace, there, left)
    for table in COLUMNS:
        # What a distributed table has on the coordinator itself is what it had before.
        if table in left or fetch(f"SELECT pg_relation_size({there[table]}::oid)") != [(0,)]:
            name = _literal(tables.qualified(namespace, table))
            yield (f"SELECT truncate_local_data_after_distributing_table({name})",)


def _spread(
    fetch: tables.Fetch, namespace: str, there: Mapping[str, int], left: Collection[str]
) -> Iterable[tuple[str, ...]]:
    """Yield the steps that distribute those tables that are left."""

    def name(table: str) -> str:
        return tables.qualified(namespace, table)

    types = dict(fetch(_TYPES.format(", ".join(str(there[table]) for table in (_DELIVERIES, _LANES)))))
    for table in (_DELIVERIES, _LANES):
        if types[there[table]] != "character varying":
            # The type of mesh_messages.to_node, which co-location requires; it rewrites no row.
            yield (_BRIEFLY, f"ALTER TABLE {name(table)} ALTER COLUMN receiver TYPE varchar")
    # The deliveries come first: Citus updates them beside messages on the coordinator, but not the other way round.
    beside = "none" if _MESSAGES in left else name(_MESSAGES)
    if made := [
        _create("create_distributed_table", name(table), "receiver", others)
        for table, others in ((_DELIVERIES, beside), (_LANES, name(_DELIVERIES)))
        if table in left
    ]:
        yield (_BRIEFLY, *made)
    if "mesh_node_state" in left:
        yield (_create("create_distributed_table", name("mesh_node_state"), "node_id", "none"),)
    if _MESSAGES in left:
        yield (_create("create_distributed_table_concurrently", name(_MESSAGES), "to_node", name(_DELIVERIES)),)


def _keys(fetch: tables.Fetch, namespace: str, there: Mapping[str, int]) -> Iterable[tuple[str, ...]]:
    """Yield the steps to a primary key that contains the receiver; the old one serves until it is swapped."""
    messages = tables.qualified(namespace, _MESSAGES)
    found = fetch(_INDEXES.format(there[_MESSAGES]))
    valid = {name: is_valid for name, is_valid, _, _ in found}
    for name in (_NEW_KEY, _ID_INDEX):
        if valid.get(name) is False:  # what a CREATE INDEX CONCURRENTLY that failed has left
            yield (f"DROP INDEX CONCURRENTLY {tables.qualified(namespace, name)}",)
    if ["to_node", "id"] not in [columns for _, _, is_primary, columns in found if is_primary]:
        if not valid.get(_NEW_KEY):
            yield (f"CREATE UNIQUE INDEX CONCURRENTLY {_NEW_KEY} ON {messages} (to_node, id)",)
        yield (
            _BRIEFLY,
            f"ALTER TABLE {messages} DROP CONSTRAINT mesh_messages_pkey",
            f"ALTER TABLE {messages} ADD CONSTRAINT mesh_messages_pkey PRIMARY KEY USING INDEX {_NEW_KEY}",
        )
    if not valid.get(_ID_INDEX):
        yield (f"CREATE INDEX CONCURRENTLY {_ID_INDEX} ON {messages} (id)",)


def _create(function: str, table: str, column: str, colocated: str) -> str:
    return f"SELECT {function}({_literal(table)}, '{column}', colocate_with => {_literal(colocated)})"


def _add_local(table: str) -> str:
    # With those that it has foreign keys to or from; one of them may have been added by now.
    return (
        f"SELECT citus_add_local_table_to_metadata({_literal(table)}, cascade_via_foreign_keys => true) "  # noqa: S608 - a quoted name
        f"WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_dist_partition WHERE logicalrelid = {_literal(table)}::regclass)"
    )


def _lacking(
    fetch: tables.Fetch, namespace: str, there: Mapping[str, int], methods: Mapping[int, str] | None
) -> Iterable[str]:
    """Yield what stands against the distribution."""
    yield from _lacking_of_servers(fetch, methods)
    ((level, plugins),) = fetch("SELECT current_setting('wal_level'), current_setting('output_plugin_libraries', true)")
    if methods is None or methods.get(there[_MESSAGES]) != "h":
        if level != "logical":
            yield f"wal_level must be logical on all servers, not {level}"
        if plugins is not None and _PLUGIN not in [each.strip(" '\"") for each in plugins.split(",")]:
            yield f"output_plugin_libraries must contain citus on all servers, not {plugins!r} alone"
    oids = ", ".join(str(there[table]) for table in COLUMNS)
    for table, constraint in fetch(_ACROSS.format(oids)):
        yield f"{table} has the foreign key or trigger {constraint}, which cannot be distributed"
    if methods is None or methods.get(there[_DELIVERIES]) != "h":
        query = _TO_OTHERS.format(
            deliveries=tables.qualified(namespace, _DELIVERIES), messages=tables.qualified(namespace, _MESSAGES)
        )
        ((to_others,),) = [(False,)] if methods is not None and methods.get(there[_MESSAGES]) == "h" else fetch(query)
        if to_others:
            yield "there are open deliveries to others than the to_node of their message: let these be consumed first"


def _lacking_of_servers(fetch: tables.Fetch, methods: Mapping[int, str] | None) -> Iterable[str]:
    """Yield what the cluster and the database lack."""
    if methods is None:
        yield (
            "the extension citus is not there: preload it (shared_preload_libraries) and CREATE EXTENSION citus, on "
            "all servers"
        )
    else:
        nodes = fetch("SELECT groupid, shouldhaveshards FROM pg_catalog.pg_dist_node WHERE isactive")
        if not any(groupid == 0 for groupid, _ in nodes):
            yield "Citus does not know the coordinator's address: SELECT citus_set_coordinator_host(...)"
        if not any(takes_shards for _, takes_shards in nodes):
            yield "there is no worker: SELECT citus_add_node(...)"
    ((database, is_sequential, is_owner),) = fetch(_MODE)
    if not is_sequential and not is_owner:
        yield f"its owner must ALTER DATABASE {sql.Identifier(database).as_string()} {SEQUENTIAL}"


def _literal(text: str) -> str:
    return sql.Literal(text).as_string()
