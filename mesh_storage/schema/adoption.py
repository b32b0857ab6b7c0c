"""Pre-flight checks of the migrations on a database of the earlier Go service, before anything is changed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import psycopg
import sqlalchemy
import sqlalchemy.exc

from mesh_storage.errors import ConflictError

Tables: TypeAlias = Mapping[str, Mapping[str, str]]
"""The columns of each table with their definitions, as in `CREATE TABLE`; `PRIMARY KEY` may be among them."""
Checks: TypeAlias = Mapping[str, Mapping[str, str]]
"""The check constraints of each table: column name and condition."""
Indexes: TypeAlias = Mapping[str, tuple[str, str, bool]]
"""The table of each index, its columns, and whether it is unique."""

LISTED = 10
"""Maximum number of rows listed per violated rule; the count includes all."""

_TYPES = {
    "timestamp": "timestamp without time zone",
    "timestamptz": "timestamp with time zone",
    "decimal": "numeric",
}
_TEXT = ("text", "character varying", "character")

# The kinds of relations are those of pg_class.relkind.
_UNSUITABLE = """
    SELECT name, reason FROM unnest(CAST(:names AS text[])) AS name JOIN pg_class ON pg_class.oid = to_regclass(name),
    LATERAL (VALUES
        (relkind = 'p', 'it is partitioned, and no index can be built on it concurrently'),
        (relkind = 'v', 'it is a view, not a table'),
        (relkind = 'm', 'it is a materialized view, not a table'),
        (relkind = 'f', 'it is a foreign table'),
        (relispartition, 'it is a partition of another table'),
        (EXISTS (SELECT FROM pg_inherits WHERE inhparent = pg_class.oid) AND relkind = 'r',
         'other tables inherit from it: ' || (SELECT string_agg(inhrelid::regclass::text, ', ' ORDER BY 1)
                                              FROM pg_inherits WHERE inhparent = pg_class.oid)),
        (EXISTS (SELECT FROM pg_inherits WHERE inhrelid = pg_class.oid) AND NOT relispartition,
         'it inherits from another table'),
        (EXISTS (SELECT FROM pg_attribute WHERE attrelid = pg_class.oid AND attgenerated <> ''
                 AND attname IN ('created', 'updated', 'timestamp')), 'a column that gets a default is generated'),
        (NOT pg_has_role(relowner, 'USAGE'),
         concat('it is owned by ', pg_get_userbyid(relowner), ', and ', current_user, ' may not alter it')),
        (row_security_active(pg_class.oid) AND relkind IN ('r', 'p'),
         concat('its row level security hides rows from ', current_user))
    ) AS found (holds, reason)
    WHERE holds ORDER BY name, reason
"""
_RIGHTS = """
    SELECT current_schema(), current_user, has_schema_privilege(current_schema(), 'CREATE')
    WHERE CAST(:names AS text[]) IS NOT NULL
"""
# One statement per command tag, which event triggers filter by; each requires the previous one.
_TRIALS = {
    "CREATE TABLE": "CREATE TABLE mesh_storage_trial (trial integer)",
    "ALTER TABLE": "ALTER TABLE mesh_storage_trial ALTER COLUMN trial SET DEFAULT 1",
    "CREATE INDEX": "CREATE INDEX mesh_storage_trial_idx ON mesh_storage_trial (trial)",
    "DROP INDEX": "DROP INDEX IF EXISTS mesh_storage_trial_idx",
}


@dataclass(frozen=True)
class _Column:
    type: str
    kind: str
    not_null: bool
    filled: bool


def check(
    connection: sqlalchemy.Connection,
    tables: Tables,
    checks: Checks,
    indexes: Indexes,
    *,
    new_tables: Sequence[str],
    shape: bool,
    times: bool,
) -> None:
    """Find everything that would make the migrations fail, without changing anything.

    Args:
        connection: A connection to the database.
        tables: The expected tables of the first revision.
        checks: The check constraints that later revisions add.
        indexes: The indexes to be created; an existing one must be identical, but may be invalid.
        new_tables: The tables to be created.
        shape: Whether the tables were never migrated, and so must match `tables`.
        times: Whether the types of `created` and `updated` are yet to be changed.

    Raises:
        ConflictError: There are problems; the message lists them by table, key and reason.
    """
    problems: list[str] = _surroundings(connection, [*tables])
    for table, definitions in tables.items():
        found = _columns(connection, table)
        if found:
            if shape:
                problems += _shape(connection, table, definitions, found)
            problems += _rows(connection, table, _rules(table, definitions, checks.get(table, {}), found), definitions)
    if new_tables:
        problems += _deletes(connection)
    if times:
        problems += _dependents(connection, [name for name in tables if "created" in tables[name]])
    problems += _indexes(connection, indexes)
    problems += [f"table {name}: it already exists" for name in new_tables if _columns(connection, name)]
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise ConflictError(
            "the database violates the schema of mesh_storage; nothing was changed. "
            f"Fix the following and run the upgrade again:\n{listed}"
        )


def _surroundings(connection: sqlalchemy.Connection, tables: list[str]) -> list[str]:
    """Return what the migrations cannot be applied to, and the privileges that this role lacks."""
    problems = [f"table {table}: {reason}" for table, reason in _facts(connection, _UNSUITABLE, tables)]
    namespace, role, may_create = _facts(connection, _RIGHTS, tables)[0]
    if not may_create:
        problems.append(f"schema {namespace}: {role} may not create tables there (GRANT CREATE ON SCHEMA)")
        return problems
    return problems + _event_triggers(connection)


def _facts(connection: sqlalchemy.Connection, query: str, tables: list[str]) -> Sequence[Any]:
    return connection.execute(sqlalchemy.text(query), {"names": tables}).fetchall()


def _event_triggers(connection: sqlalchemy.Connection) -> list[str]:
    """Run the kinds of statements used by the migrations on a scratch table, as event triggers may reject them."""
    triggers = connection.execute(
        sqlalchemy.text(
            "SELECT evtname FROM pg_event_trigger WHERE evtenabled IN ('O', 'A') AND evtevent <> 'login' ORDER BY 1"
        )
    ).scalars()
    listed = ", ".join(triggers)
    problems: list[str] = []
    for tag, statement in _TRIALS.items() if listed else ():
        trial = connection.begin_nested()
        try:
            connection.exec_driver_sql(statement)
            trial.commit()
        except sqlalchemy.exc.DBAPIError as error:
            trial.rollback()
            reason = error.orig.diag.message_primary if isinstance(error.orig, psycopg.Error) else error
            problems.append(f"{tag} is rejected ({reason}); event triggers: {listed}")
            if tag == "CREATE TABLE":
                break
    connection.rollback()
    return problems


def _deletes(connection: sqlalchemy.Connection) -> list[str]:
    """Return what may interfere with moving stale log entries: row-level only if any exist, statement-level always."""
    if not _columns(connection, "mesh_consensus_log").keys() >= {"term", "index"}:
        return []
    rows = connection.execute(
        sqlalchemy.text(
            """
            SELECT concat('trigger ', tgname) AS name FROM pg_trigger
            WHERE tgrelid = to_regclass('mesh_consensus_log') AND NOT tgisinternal AND tgenabled IN ('O', 'A')
            AND tgtype & 8 <> 0
            AND (tgtype & 1 = 0 OR EXISTS (SELECT FROM mesh_consensus_log GROUP BY index HAVING count(*) > 1))
            UNION ALL
            SELECT concat('rule ', rulename) FROM pg_rewrite
            WHERE ev_class = to_regclass('mesh_consensus_log') AND ev_type = '4' AND ev_enabled IN ('O', 'A')
            ORDER BY name
            """
        )
    ).scalars()
    return [
        f"table mesh_consensus_log: {name} fires on DELETE, which moves stale entries; disable it for the upgrade"
        for name in rows
    ]


def _columns(connection: sqlalchemy.Connection, table: str) -> dict[str, _Column]:
    # For a domain, compare its base type.
    rows = connection.execute(
        sqlalchemy.text(
            """
            SELECT attname, CASE typtype WHEN 'd' THEN format_type(typbasetype, typtypmod)
                                         ELSE format_type(atttypid, atttypmod) END,
                   attnotnull OR typnotnull, atthasdef OR attidentity <> '' OR typdefault IS NOT NULL
            FROM pg_attribute JOIN pg_type ON pg_type.oid = atttypid
            WHERE attrelid = to_regclass(:name) AND attnum > 0 AND NOT attisdropped
            """
        ),
        {"name": table},
    )
    return {name: _Column(kind, kind.split("(")[0], not_null, filled) for name, kind, not_null, filled in rows}


def _type(definition: str) -> str:
    """Return the type in a column definition under PostgreSQL's canonical name."""
    word = definition.split(maxsplit=1)[0]
    return _TYPES.get(word, word.replace("varchar", "character varying"))


def _is_comparable(kind: str, expected: str) -> bool:
    expected = expected.split("(", maxsplit=1)[0]
    return kind == expected or {kind, expected} <= {*_TEXT}


def _is_not_null(definition: str) -> bool:
    return "NOT NULL" in definition or "PRIMARY KEY" in definition


def _key(definitions: Mapping[str, str]) -> list[str]:
    if "PRIMARY KEY" in definitions:
        return [name.strip() for name in definitions["PRIMARY KEY"].strip("()").split(",")]
    return [name for name, definition in definitions.items() if "PRIMARY KEY" in definition]


def _shape(
    connection: sqlalchemy.Connection, table: str, definitions: Mapping[str, str], found: Mapping[str, _Column]
) -> list[str]:
    """Compare a table with its definition, as far as the migrations will not change it."""
    problems: list[str] = []
    for name, definition in definitions.items():
        if name == "PRIMARY KEY":
            continue
        expected = _type(definition)
        if name not in found:
            problems.append(f"table {table}: column {name} ({expected}) is missing")
        elif found[name].type != expected:
            problems.append(f"table {table}: column {name} is of type {found[name].type}, not {expected}")
        elif found[name].not_null != (_is_not_null(definition) or name in _key(definitions)):
            problems.append(f"table {table}: column {name} is {'' if found[name].not_null else 'not '}NOT NULL")
    problems += [
        f"table {table}: column {name} is NOT NULL without a default, so no row could be inserted"
        for name, column in found.items()
        if name not in definitions and column.not_null and not column.filled
    ]
    constraints = connection.execute(
        sqlalchemy.text("SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = to_regclass(:name)"),
        {"name": table},
    )
    there = {definition for (definition,) in constraints}
    wanted = [f"PRIMARY KEY ({', '.join(_key(definitions))})"]
    wanted += [f"UNIQUE ({name})" for name, definition in definitions.items() if "UNIQUE" in definition]
    wanted += [
        f"FOREIGN KEY ({name}) REFERENCES nodes(node_id) ON UPDATE CASCADE ON DELETE CASCADE"
        for name, definition in definitions.items()
        if "REFERENCES nodes" in definition
    ]
    problems += [f"table {table}: constraint {each} is missing" for each in wanted if each not in there]
    return problems


def _rules(
    table: str, definitions: Mapping[str, str], checks: Mapping[str, str], found: Mapping[str, _Column]
) -> dict[str, str]:
    """Return the rules that each row must satisfy, except those that PostgreSQL enforces or cannot evaluate."""
    rules = {f"breaks {table}_{name}_check, {rule}": rule for name, rule in checks.items()}
    for name, definition in definitions.items():
        if name not in found:
            continue
        expected = _type(definition)
        if _is_not_null(definition) and not found[name].not_null:
            rules[f"{name} is null"] = f"{name} IS NOT NULL"
        if expected.startswith("character varying(") and found[name].type != expected and found[name].kind in _TEXT:
            length = expected.removeprefix("character varying(").removesuffix(")")
            rules[f"{name} is longer than {length} characters"] = f"char_length({name}) <= {length}"
    unusable = [
        name
        for name, definition in definitions.items()
        if name != "PRIMARY KEY" and not (name in found and _is_comparable(found[name].kind, _type(definition)))
    ]
    return {
        reason: rule for reason, rule in rules.items() if not any(re.search(rf"\b{name}\b", rule) for name in unusable)
    }


def _rows(
    connection: sqlalchemy.Connection, table: str, rules: Mapping[str, str], definitions: Mapping[str, str]
) -> list[str]:
    """Return the rows that violate a rule, in one pass over the table."""
    if not rules:
        return []
    key = " || ', ' || ".join(f"'{name}=' || quote_nullable({name})" for name in _key(definitions))
    cases = ", ".join(f"CASE WHEN NOT ({rule}) THEN {number} END" for number, rule in enumerate(rules.values()))
    any_broken = " OR ".join(f"NOT ({rule})" for rule in rules.values())
    # The names and rules are our own.
    query = f"""
        WITH refused AS MATERIALIZED (
            SELECT {key} AS key, array_remove(ARRAY[{cases}], NULL) AS rules FROM {table} WHERE {any_broken}
        ), numbered AS (
            SELECT rule, key, count(*) OVER (PARTITION BY rule) AS total,
                   row_number() OVER (PARTITION BY rule ORDER BY key) AS position
            FROM refused, unnest(rules) AS rule
        )
        SELECT rule, total, key FROM numbered WHERE position <= {LISTED} ORDER BY rule, position
    """  # noqa: S608
    listed: dict[int, tuple[int, list[str]]] = {}
    rows: Sequence[Any] = connection.execute(sqlalchemy.text(query.replace(":", r"\:"))).fetchall()
    for rule, total, row in rows:
        listed.setdefault(rule, (total, []))[1].append(row)
    problems: list[str] = []
    for rule, (total, keys) in listed.items():
        problems += [f"table {table}, row {row}: {list(rules)[rule]}" for row in keys]
        if total > len(keys):
            problems.append(f"table {table}: {total - len(keys)} more rows, {total} in total: {list(rules)[rule]}")
    return problems


def _dependents(connection: sqlalchemy.Connection, tables: list[str]) -> list[str]:
    """Return the objects that prevent changing the type of a time column: views, rules, policies, triggers, functions.

    Also generated columns and indexes on expressions of it, whose results would depend on the session's time zone.
    """
    rows = connection.execute(
        sqlalchemy.text(
            r"""
            SELECT DISTINCT relname, attname, pg_describe_object(depend.classid, depend.objid, depend.objsubid)
            FROM pg_depend AS depend
            JOIN pg_class ON pg_class.oid = depend.refobjid AND depend.refclassid = 'pg_class'::regclass
            JOIN pg_attribute ON attrelid = pg_class.oid AND attnum = depend.refobjsubid
            WHERE pg_class.oid IN (SELECT to_regclass(name) FROM unnest(CAST(:names AS text[])) AS name)
            AND attname IN ('created', 'updated')
            AND (
                depend.classid IN ('pg_rewrite'::regclass, 'pg_policy'::regclass, 'pg_trigger'::regclass,
                                   'pg_proc'::regclass, 'pg_publication_rel'::regclass)
                OR depend.classid = 'pg_attrdef'::regclass AND depend.objid IN (
                    SELECT oid FROM pg_attrdef WHERE adrelid = attrelid AND adnum <> attnum
                )
                OR depend.classid = 'pg_class'::regclass AND depend.objid IN (
                    SELECT indexrelid FROM pg_index WHERE indrelid = attrelid
                    AND concat(pg_get_expr(indexprs, indrelid), ' ', pg_get_expr(indpred, indrelid))
                        ~ concat('\m', attname, '\M')
                )
            )
            ORDER BY 1, 2, 3
            """
        ),
        {"names": tables},
    )
    return [
        f"table {table}: the type of column {column} cannot be changed because of {dependent}"
        for table, column, dependent in rows
    ]


def _indexes(connection: sqlalchemy.Connection, indexes: Indexes) -> list[str]:
    """Return objects that the migrations would take for one of our indexes, with its name but another definition."""
    rows = connection.execute(
        sqlalchemy.text(
            """
            SELECT name, CASE WHEN indexrelid IS NULL THEN 'another kind of relation' ELSE concat(
                CASE WHEN indisunique THEN 'UNIQUE ' END, 'INDEX ON ', CAST(CAST(indrelid AS regclass) AS text),
                regexp_replace(pg_get_indexdef(indexrelid), '^.*? USING', ' USING'),
                CASE WHEN NOT indimmediate THEN ' DEFERRABLE' END
            ) END
            FROM unnest(CAST(:names AS text[])) AS name JOIN pg_class ON pg_class.oid = to_regclass(name)
            LEFT JOIN pg_index ON indexrelid = pg_class.oid
            ORDER BY name
            """
        ),
        {"names": list(indexes)},
    )
    problems: list[str] = []
    for name, found in rows:
        table, columns, unique = indexes[name]
        ours = f"{'UNIQUE ' if unique else ''}INDEX ON {table} USING btree ({columns})"
        # PostgreSQL quotes some names.
        if found.replace('"', "") != ours.replace('"', ""):
            problems.append(f"table {table}: {name} already exists as {found}, not as {ours}")
    return problems
