"""What is distributed, and what of it a database has by now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from psycopg import sql

from mesh_storage.schema import tables

MESSAGES, DELIVERIES, LANES, NODE_STATES = "mesh_messages", "mesh_deliveries", "mesh_delivery_lanes", "mesh_node_state"
COLUMNS: Mapping[str, str] = {
    MESSAGES: "to_node",
    DELIVERIES: "receiver",
    LANES: "receiver",
    NODE_STATES: "node_id",
}
"""The tables that are distributed, each by this column; all others stay on the coordinator."""
LOCAL = tuple(name for name in tables.TABLES if name not in COLUMNS)
"""The tables that stay on the coordinator, and are known to Citus, so that a commit is atomic over all."""

# By default, Citus refuses to write what a foreign key leads to, after a call of all shards in the same unit of work.
SEQUENTIAL = "SET citus.multi_shard_modify_mode = 'sequential'"
_MODE = """
    SELECT datname, current_setting('citus.multi_shard_modify_mode', true) = 'sequential', pg_get_userbyid(datdba),
        pg_has_role(datdba, 'USAGE')
    FROM pg_database WHERE datname = current_database()
"""
_PRIMARY_KEY = """
    SELECT relname, indnkeyatts > 1 FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid
    WHERE indrelid = {}::oid AND indisprimary
"""
# Citus keeps two tables in the same places only if these columns have the same type and collation.
_TYPES = """
    SELECT relname, concat(
        format_type(atttypid, NULL),
        CASE WHEN attcollation <> typcollation THEN ' COLLATE ' || attcollation::regcollation END
    )
    FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid JOIN pg_class ON pg_class.oid = attrelid
    WHERE (attrelid, attname) IN ({})
"""


@dataclass(frozen=True, slots=True)
class Catalog:
    """The tables in a database, and how far they are distributed."""

    fetch: tables.Fetch
    """Executes a query."""
    namespace: str
    """The PostgreSQL schema of the tables."""
    oids: Mapping[str, int]
    """The OID of each table."""
    methods: Mapping[int, str] | None
    """How each table known to Citus is spread, by OID; None where there is no Citus."""

    @classmethod
    def of(cls, fetch: tables.Fetch, location: tables.Location) -> Catalog:
        """Return the catalog of a database."""
        names = ", ".join(map(literal, tables.TABLES))
        found = fetch(
            f"""
            SELECT relname, pg_class.oid::bigint FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
            WHERE nspname = {literal(location.namespace)} AND relname IN ({names}) AND relkind = 'r'
            """  # noqa: S608 - quoted names
        )
        return cls(fetch, location.namespace, {**dict(found), **location.tables}, methods_of(fetch))

    @property
    def left(self) -> tuple[str, ...]:
        """The tables that are yet to be distributed."""
        return tuple(table for table in COLUMNS if (self.methods or {}).get(self.oids[table]) != "h")

    @property
    def columns(self) -> str:
        """The OIDs of these tables with the columns they are to be distributed by, as a list of rows."""
        return ", ".join(f"({self.oids[table]}::oid, '{COLUMNS[table]}')" for table in self.left) or "(NULL, NULL)"

    @property
    def old_key(self) -> str | None:
        """The name of the primary key of the messages, if that is not yet one for each receiver."""
        ((name, has_receiver),) = self.fetch(_PRIMARY_KEY.format(self.oids[MESSAGES]))
        return None if has_receiver else str(name)

    @property
    def types(self) -> Mapping[str, str]:
        """The type, with the collation, of each column that tables which go together are distributed by."""
        columns = ", ".join(f"({self.oids[table]}, '{COLUMNS[table]}')" for table in (MESSAGES, DELIVERIES, LANES))
        return dict(self.fetch(_TYPES.format(columns)))

    @property
    def mode(self) -> tuple[str, bool, str, bool]:
        """The database, whether it has the setting that is needed, its owner, and whether this role may set it."""
        ((database, is_set, owner, may_set),) = self.fetch(_MODE)
        return database, bool(is_set), owner, may_set

    def name(self, table: str) -> str:
        """Return the schema-qualified, quoted name of a table or index."""
        return tables.qualified(self.namespace, table)


def methods_of(fetch: tables.Fetch) -> dict[int, str] | None:
    """Return how each table known to Citus is spread, by OID: `h` by hash, `n` not; None where there is no Citus."""
    if not fetch("SELECT FROM pg_extension WHERE extname = 'citus'"):
        return None
    return dict(fetch("SELECT logicalrelid::oid::bigint, partmethod::text FROM pg_catalog.pg_dist_partition"))


def literal(text: str) -> str:
    """Return a text as an SQL literal."""
    return sql.Literal(text).as_string()
