"""The steps that distribute a database, as far as they are left to do."""

from __future__ import annotations

from collections.abc import Iterable

from psycopg import sql

from mesh_storage.schema.distribution.catalog import (
    COLUMNS,
    DELIVERIES,
    LANES,
    LOCAL,
    MESSAGES,
    NODE_STATES,
    SEQUENTIAL,
    Catalog,
    literal,
)

_KEY = "mesh_messages_pkey"
_NEW_KEY = "mesh_messages_to_node_id_key"
_ID_INDEX = "mesh_messages_id_idx"
_INDEXES = """
    SELECT relname, indisvalid FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid WHERE indrelid = {}::oid
"""


def steps_of(found: Catalog) -> Iterable[tuple[str, ...]]:
    """Yield the statements, in order; those of one step are one transaction."""
    yield from _keys(found)
    database, is_set, _, _ = found.mode
    if not is_set:
        yield (f"ALTER DATABASE {sql.Identifier(database).as_string()} {SEQUENTIAL}",)
    for table in LOCAL:
        if table in found.oids and found.oids[table] not in (found.methods or {}):
            yield (_add_local(found.name(table)),)
    yield from _spread(found)
    for table in COLUMNS:
        # What a distributed table has on the coordinator itself is what it had before.
        if table in found.left or found.fetch(f"SELECT pg_relation_size({found.oids[table]}::oid)") != [(0,)]:
            yield (f"SELECT truncate_local_data_after_distributing_table({literal(found.name(table))})",)


def swaps_key(step: tuple[str, ...]) -> bool:
    """Return whether a step swaps the primary key, from which on nobody sends to others than the `to_node`."""
    return any(statement.endswith(_swapped_in()) for statement in step)


def holds_up_nobody(step: tuple[str, ...]) -> bool:
    """Return whether nobody waits for a step, however long it waits for others."""
    return " INDEX CONCURRENTLY " in step[0]


def _swapped_in() -> str:
    return f" ADD CONSTRAINT {_KEY} PRIMARY KEY USING INDEX {_NEW_KEY}"


def _keys(found: Catalog) -> Iterable[tuple[str, ...]]:
    """Yield the steps to a primary key that contains the receiver; the old one serves until it is swapped."""
    messages = found.name(MESSAGES)
    valid = dict(found.fetch(_INDEXES.format(found.oids[MESSAGES])))
    for name in (_NEW_KEY, _ID_INDEX):
        if valid.get(name) is False:  # what a CREATE INDEX CONCURRENTLY that failed has left
            yield (f"DROP INDEX CONCURRENTLY {found.name(name)}",)
    if (old := found.old_key) is not None:
        if not valid.get(_NEW_KEY):
            yield (f"CREATE UNIQUE INDEX CONCURRENTLY {_NEW_KEY} ON {messages} (to_node, id)",)
        yield (
            f"ALTER TABLE {messages} DROP CONSTRAINT {sql.Identifier(old).as_string()}",
            f"ALTER TABLE {messages}{_swapped_in()}",
        )
    if not valid.get(_ID_INDEX):
        yield (f"CREATE INDEX CONCURRENTLY {_ID_INDEX} ON {messages} (id)",)


def _spread(found: Catalog) -> Iterable[tuple[str, ...]]:
    """Yield the steps that distribute the tables that are left."""
    name, types = found.name, found.types
    for table in (DELIVERIES, LANES):
        if types[table] != types[MESSAGES]:  # it rewrites no row
            yield (f"ALTER TABLE {name(table)} ALTER COLUMN receiver TYPE {types[MESSAGES]}",)
    # The deliveries come first: Citus updates them beside messages on the coordinator, but not the other way round.
    beside = "none" if MESSAGES in found.left else name(MESSAGES)
    if made := [
        _create("create_distributed_table", name(table), "receiver", others)
        for table, others in ((DELIVERIES, beside), (LANES, name(DELIVERIES)))
        if table in found.left
    ]:
        yield tuple(made)
    if NODE_STATES in found.left:
        yield (_create("create_distributed_table", name(NODE_STATES), "node_id", "none"),)
    if MESSAGES in found.left:
        yield (_create("create_distributed_table_concurrently", name(MESSAGES), "to_node", name(DELIVERIES)),)


def _create(function: str, table: str, column: str, colocated: str) -> str:
    return f"SELECT {function}({literal(table)}, '{column}', colocate_with => {literal(colocated)})"


def _add_local(table: str) -> str:
    # With those that it has foreign keys to or from; one of them may have been added by now.
    return (
        f"SELECT citus_add_local_table_to_metadata({literal(table)}, cascade_via_foreign_keys => true) "  # noqa: S608 - a quoted name
        f"WHERE NOT EXISTS (SELECT FROM pg_catalog.pg_dist_partition WHERE logicalrelid = {literal(table)}::regclass)"
    )
