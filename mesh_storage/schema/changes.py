"""The triggers that give each row its version and log each change, whoever writes.

A version is drawn in a BEFORE trigger: for an update with the row locked, so it only grows for one key; for an insert
before the key is looked up, so another that writes and deletes it meanwhile may have a larger one. The log has the
transaction id of each change: a reader takes what its snapshot sees and the snapshot of its cursor did not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mesh_storage.schema.tables import EPOCH, LOG

WATCHED: Mapping[str, tuple[str, str]] = {
    "mesh": ("meshes", "mesh_id"),
    "nodes": ("nodes", "node_id"),
    "routes": ("routes", "route_id"),
    "mesh_state": ("state", "key"),
    "mesh_runtime_config": ("runtime_config", "key"),
    "mesh_routing_table": ("routing_table", "destination"),
}
"""The tables whose changes are logged, with the name of the repository and the key column."""
EXPIRING = ("mesh_state", "mesh_runtime_config")
"""The tables whose rows may expire."""
EXPIRY = {table: f"{WATCHED[table][0]}.expiry" for table in EXPIRING}
"""What the log calls a new expiry alone: no change to those who watch, but what a cache holds is no longer true."""
SEQUENCE = "mesh_version_seq"
SINCE = "0010"
"""The revision that creates the log and the triggers."""

_EQUALS = "OPERATOR(pg_catalog.=)"

RENEW_VERSIONS = f"""
    SELECT setval('{SEQUENCE}', greatest(last_value, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint))
    FROM {SEQUENCE}
"""  # noqa: S608 - our own name
"""Advances the sequence past every version that this database or the one of a backup ever had.

As etcd's `--bump-revision`: a restored database must not give out versions that clients have already seen. The Unix
time in microseconds is ahead of them, since each takes longer than a microsecond to be drawn.
"""
_KINDS = ("version", "log", "truncate")
TRIGGERS = frozenset(f"{table}_{kind}" for table in WATCHED for kind in _KINDS)
"""The names of all triggers."""
FORGET = (
    f"DELETE FROM {LOG}",  # noqa: S608 - our own name
    f"UPDATE {EPOCH} SET epoch = gen_random_uuid()",  # noqa: S608 - our own name
)
"""Empties the log and invalidates all cursors."""


def install(*, expiry: bool = True) -> Iterator[str]:
    """Yield the statements that create the log and the triggers, in the current schema; `expiry` as in `log`."""
    yield f"CREATE SEQUENCE {SEQUENCE} AS bigint"
    yield RENEW_VERSIONS
    yield f"""
        CREATE TABLE {LOG} (
            xid bigint NOT NULL DEFAULT pg_current_xact_id()::text::bigint,
            number bigint NOT NULL,
            aggregate text NOT NULL,
            key text NOT NULL,
            changed_at timestamptz NOT NULL DEFAULT now(),
            CONSTRAINT {LOG}_pkey PRIMARY KEY (xid, number)
        )
    """
    yield f"""
        CREATE TABLE {EPOCH} (
            id boolean NOT NULL DEFAULT true,
            epoch uuid NOT NULL DEFAULT gen_random_uuid(),
            compacted bigint NOT NULL DEFAULT 0,
            CONSTRAINT {EPOCH}_pkey PRIMARY KEY (id),
            CONSTRAINT {EPOCH}_id_check CHECK (id)
        )
    """
    yield f"INSERT INTO {EPOCH} DEFAULT VALUES"
    draw = f"NEW.version := pg_catalog.nextval('{{schema}}.{SEQUENCE}'); RETURN NEW;"
    yield _function("mesh_version", draw)
    # A new expiry alone is not a change: the renewal of a lease keeps its version.
    yield _function(
        "mesh_entry_version",
        f"""
            IF TG_OP {_EQUALS} 'UPDATE'
                AND NOT coalesce(NEW.expires_at, '-infinity') {_EQUALS} coalesce(OLD.expires_at, '-infinity')
                AND coalesce(NEW.updated_at, '-infinity') {_EQUALS} coalesce(OLD.updated_at, '-infinity')
                AND NEW.key {_EQUALS} OLD.key AND NEW.value {_EQUALS} OLD.value
            THEN
                NEW.version := OLD.version; RETURN NEW;
            END IF;
            {draw}
        """,
    )
    yield _function(
        "mesh_changes_lost",
        f"UPDATE {{schema}}.{EPOCH} SET epoch = pg_catalog.gen_random_uuid(); RETURN NULL;",  # noqa: S608 - our own name
    )
    for table in WATCHED:
        yield from watch(table, expiry=expiry)


def watch(table: str, *, expiry: bool = True) -> Iterator[str]:
    """Yield the statements that create the triggers of one table; `expiry` as in `log`."""
    yield log(table, expiry=expiry)
    version = "mesh_entry_version" if table in EXPIRING else "mesh_version"
    yield _trigger(f"{table}_version", f"BEFORE INSERT OR UPDATE ON {table}", "ROW", version)
    yield _trigger(f"{table}_log", f"AFTER INSERT OR DELETE OR UPDATE ON {table}", "ROW", f"{table}_log")
    yield _trigger(f"{table}_truncate", f"AFTER TRUNCATE ON {table}", "STATEMENT", "mesh_changes_lost")


def log(table: str, *, expiry: bool = True) -> str:
    """Return the statement that creates or replaces the function that logs the changes of one table.

    With `expiry`, as from revision 0012 on, it logs a new expiry alone as well, under another name.
    """
    aggregate, key = WATCHED[table]
    insert = f"INSERT INTO {{schema}}.{LOG} (number, aggregate, key) VALUES"
    touched = ""
    if expiry and table in EXPIRING:
        touched = f"""
            IF TG_OP {_EQUALS} 'UPDATE' AND OLD.version {_EQUALS} NEW.version
                AND NOT coalesce(NEW.expires_at, '-infinity') {_EQUALS} coalesce(OLD.expires_at, '-infinity')
            THEN
                {insert} (pg_catalog.nextval('{{schema}}.{SEQUENCE}'), '{EXPIRY[table]}', NEW.{key});
            END IF;
        """
    return _function(
        f"{table}_log",
        f"""
            IF TG_OP {_EQUALS} 'DELETE' OR TG_OP {_EQUALS} 'UPDATE' AND NOT OLD.{key} {_EQUALS} NEW.{key} THEN
                {insert} (pg_catalog.nextval('{{schema}}.{SEQUENCE}'), '{aggregate}', OLD.{key});
            END IF;
            IF TG_OP {_EQUALS} 'INSERT' OR TG_OP {_EQUALS} 'UPDATE' AND NOT OLD.version {_EQUALS} NEW.version THEN
                {insert} (NEW.version, '{aggregate}', NEW.{key});
            END IF;
            {touched}
            RETURN NULL;
        """,
    )


def remove() -> Iterator[str]:
    """Yield the statements that drop all of it."""
    for table in WATCHED:
        for kind in _KINDS:
            yield f"DROP TRIGGER IF EXISTS {table}_{kind} ON {table}"
        yield f"DROP FUNCTION {table}_log()"
    yield "DROP FUNCTION mesh_version()"
    yield "DROP FUNCTION mesh_entry_version()"
    yield "DROP FUNCTION mesh_changes_lost()"
    yield f"DROP TABLE {LOG}"
    yield f"DROP TABLE {EPOCH}"
    yield f"DROP SEQUENCE {SEQUENCE}"


def _function(name: str, body: str) -> str:
    """Return the statement that creates a trigger function in the current schema.

    It runs with the privileges of its owner, so that whoever may write a table needs no privilege on the log. All names
    in it are qualified, those of operators too, so that no `search_path` leads them elsewhere (PostgreSQL manual,
    CREATE FUNCTION, "Writing SECURITY DEFINER Functions Safely"). Setting one would cost as much as a whole trigger.
    """
    create = (
        f"CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER "
        f"AS $function$BEGIN {body} END$function$"
    )
    return f"DO $do$ BEGIN EXECUTE replace($sql${create}$sql$, '{{schema}}', quote_ident(current_schema())); END $do$"


def _trigger(name: str, event: str, level: str, function: str) -> str:
    return f"CREATE TRIGGER {name} {event} FOR EACH {level} EXECUTE FUNCTION {function}()"
