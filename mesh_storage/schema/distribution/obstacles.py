"""What stands against the distribution of a database: what its servers lack, and what is in it."""

from __future__ import annotations

from collections.abc import Iterable

from psycopg import sql

from mesh_storage.schema.distribution.catalog import COLUMNS, DELIVERIES, LANES, MESSAGES, SEQUENTIAL, Catalog, literal

_PLUGIN = "citus"
# A role that may not read a parameter does not see it here.
_PARAMETERS = "SELECT name, setting FROM pg_settings WHERE name IN ('wal_level', 'output_plugin_libraries')"
_OWNERS = """
    SELECT pg_get_userbyid(relowner), string_agg(oid::regclass::text, ', ' ORDER BY relname) FROM pg_class
    WHERE oid IN ({}) AND NOT pg_has_role(relowner, 'USAGE') GROUP BY relowner ORDER BY 1
"""
_MAY_CREATE = "SELECT current_user, has_schema_privilege(oid, 'CREATE') FROM pg_namespace WHERE nspname = {}"
_HIDDEN = "SELECT oid::regclass::text FROM pg_class WHERE oid IN ({}) AND row_security_active(oid) ORDER BY 1"
_ACROSS = """
    SELECT conrelid::regclass::text, conname FROM pg_constraint
    WHERE contype = 'f' AND (conrelid IN ({0}) OR confrelid IN ({0}))
    UNION ALL
    SELECT tgrelid::regclass::text, tgname FROM pg_trigger
    WHERE NOT tgisinternal AND tgrelid IN ({0}) AND NOT starts_with(tgname, 'truncate_trigger') ORDER BY 1, 2
"""
_INHERITED = """
    SELECT inhrelid::regclass::text, inhparent::regclass::text FROM pg_inherits
    WHERE inhrelid IN ({0}) OR inhparent IN ({0}) ORDER BY 1, 2
"""
_UNIQUE = """
    SELECT indrelid::regclass::text, relname, attname
    FROM pg_index JOIN pg_attribute ON attrelid = indrelid AND (attrelid, attname) IN ({columns})
    JOIN pg_class ON pg_class.oid = indexrelid
    WHERE (indisunique OR indisexclusion) AND NOT attnum = ANY ((indkey::int2[])[0:indnkeyatts - 1])
    AND NOT (indisprimary AND indrelid = {messages}::oid) ORDER BY 1, 2
"""
_POLICIES = """
    SELECT polrelid::regclass::text, polname FROM pg_policy
    JOIN pg_attribute ON attrelid = polrelid AND (attrelid, attname) IN ({})
    WHERE concat(polqual, polwithcheck) LIKE '%{{SUBLINK%' ORDER BY 1, 2
"""
_COLLATIONS = """
    SELECT attrelid::regclass::text, attname FROM pg_attribute JOIN pg_collation ON pg_collation.oid = attcollation
    WHERE NOT collisdeterministic AND (attrelid, attname) IN ({}) ORDER BY 1
"""
_IDENTITY = "SELECT FROM pg_class WHERE oid = {}::oid AND relreplident IN ('n', 'i')"
_ON_KEY = """
    SELECT DISTINCT pg_describe_object(classid, objid, objsubid)
    FROM pg_depend JOIN pg_constraint ON pg_constraint.oid = refobjid AND refclassid = 'pg_constraint'::regclass
    WHERE conrelid = {}::oid AND contype = 'p' AND deptype = 'n' ORDER BY 1
"""
_ON_TYPE = """
    SELECT DISTINCT attrelid::regclass::text, pg_describe_object(classid, objid, objsubid)
    FROM pg_depend JOIN pg_attribute
        ON attrelid = refobjid AND refclassid = 'pg_class'::regclass AND attnum = refobjsubid
    WHERE attrelid IN ({}) AND attname = 'receiver' AND (
        classid IN ('pg_rewrite'::regclass, 'pg_policy'::regclass, 'pg_trigger'::regclass, 'pg_proc'::regclass,
                    'pg_publication_rel'::regclass)
        OR classid = 'pg_attrdef'::regclass
            AND objid IN (SELECT oid FROM pg_attrdef WHERE adrelid = attrelid AND adnum <> attnum)
    )
    ORDER BY 1, 2
"""
_TO_OTHERS = """
    SELECT EXISTS (
        SELECT FROM {deliveries} AS d WHERE EXISTS (SELECT FROM {messages} AS m WHERE m.id = d.message_id)
        AND NOT EXISTS (SELECT FROM {messages} AS m WHERE m.to_node = d.receiver AND m.id = d.message_id)
    )
"""


def obstacles_of(found: Catalog) -> Iterable[str]:
    """Yield what stands against the distribution, each with what to do."""
    yield from _of_servers(found)
    of_role = tuple(_of_role(found))
    yield from of_role
    yield from _of_others(found)
    if DELIVERIES in found.left and MESSAGES in found.left and not of_role:  # who may not read all rows cannot tell
        query = _TO_OTHERS.format(deliveries=found.name(DELIVERIES), messages=found.name(MESSAGES))
        if found.fetch(query) == [(True,)]:
            yield (
                "there are deliveries to others than the to_node of their message: let the open ones be consumed "
                "first, and delete the dead ones"
            )


def _of_servers(found: Catalog) -> Iterable[str]:
    """Yield what the servers lack."""
    if found.methods is None:
        yield (
            "the extension citus is not there: preload it (shared_preload_libraries) and CREATE EXTENSION citus, on "
            "all servers"
        )
    else:
        nodes = found.fetch("SELECT groupid, shouldhaveshards FROM pg_catalog.pg_dist_node WHERE isactive")
        if not any(groupid == 0 for groupid, _ in nodes):
            yield "Citus does not know the coordinator's address: SELECT citus_set_coordinator_host(...)"
        if not any(takes_shards for _, takes_shards in nodes):
            yield "there is no worker: SELECT citus_add_node(...)"
    parameters = dict(found.fetch(_PARAMETERS))
    if MESSAGES in found.left:
        if (level := parameters["wal_level"]) != "logical":
            yield f"wal_level must be logical on the coordinator, not {level}"
        plugins = parameters.get("output_plugin_libraries")
        if plugins is not None and _PLUGIN not in [each.strip(" '\"") for each in plugins.split(",")]:
            yield f"output_plugin_libraries must contain citus on the coordinator, not {plugins!r} alone"
    database, is_set, owner, may_set = found.mode
    if not is_set and not may_set:
        yield f"{owner}, who owns the database, must run: ALTER DATABASE {_quoted(database)} {SEQUENTIAL}"


def _of_role(found: Catalog) -> Iterable[str]:
    """Yield what this role may not do or see."""
    oids = ", ".join(map(str, found.oids.values()))
    for owner, owned in found.fetch(_OWNERS.format(oids)):
        yield f"{owner} owns {owned}: run it as {owner}"
    for role, may_create in found.fetch(_MAY_CREATE.format(literal(found.namespace))):
        if not may_create:
            namespace = _quoted(found.namespace)
            yield f"{role} may not create an index: GRANT CREATE ON SCHEMA {namespace} TO {_quoted(role)}"
    for (table,) in found.fetch(_HIDDEN.format(oids)):
        yield f"row level security hides rows of {table}: ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY"


def _of_others(found: Catalog) -> Iterable[str]:
    """Yield the objects that others have added to the tables, and that cannot go with them."""
    messages, columns = found.oids[MESSAGES], found.columns
    oids = ", ".join(str(found.oids[table]) for table in COLUMNS)
    for table, constraint in found.fetch(_ACROSS.format(oids)):
        yield f"{table} has the foreign key or trigger {constraint}, which cannot be distributed: drop it"
    for child, parent in found.fetch(_INHERITED.format(oids)):
        yield f"{child} inherits from {parent}, which cannot be distributed: ALTER TABLE {child} NO INHERIT {parent}"
    for table, index, column in found.fetch(_UNIQUE.format(columns=columns, messages=messages)):
        yield f"{table} has the unique index or exclusion constraint {index} without {column}: drop it, or add {column}"
    for table, policy in found.fetch(_POLICIES.format(columns)):
        yield f"{table} has the policy {policy} with a subquery, which Citus does not take: drop it"
    for table, column in found.fetch(_COLLATIONS.format(columns)):
        yield f"{table}.{column} has a nondeterministic collation, by which nothing can be distributed: change it"
    if MESSAGES in found.left and found.fetch(_IDENTITY.format(messages)):
        yield f"{found.name(MESSAGES)} needs its primary key to be copied: ALTER TABLE ... REPLICA IDENTITY DEFAULT"
    if found.old_key is not None:
        for (dependent,) in found.fetch(_ON_KEY.format(messages)):
            yield f"{dependent} depends on the primary key of mesh_messages, which changes: drop it, and make it again"
    types = found.types
    changed = ", ".join(str(found.oids[table]) for table in (DELIVERIES, LANES) if types[table] != types[MESSAGES])
    for table, dependent in found.fetch(_ON_TYPE.format(changed or "NULL")):
        yield f"{dependent} depends on {table}.receiver, whose type changes: drop it, and make it again afterwards"


def _quoted(name: str) -> str:
    return sql.Identifier(name).as_string()
