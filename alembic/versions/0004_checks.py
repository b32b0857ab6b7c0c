"""Check constraints, NOT VALID at first; the next revision validates the existing rows.

Existing keys get our constraint names, by which errors are classified.
"""

from __future__ import annotations

from alembic import op

from mesh_storage.schema import migration

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

EXCEPTIONS = {"ban-drop-constraint": "the same statement adds it again, or it never existed"}
DOWNGRADE_EXCEPTIONS = {"ban-drop-constraint": "the downgrade drops what the upgrade added"}

_ULID = "~ '^[a-z]{2,10}_[0-9A-HJKMNP-TV-Z]{26}$'"
_STATUS = "status ~ '^STATUS_[A-Z_]+$'"

CHECKS = {
    "mesh": {"mesh_id": f"mesh_id {_ULID}", "mesh_name": "mesh_name <> ''", "status": _STATUS},
    "nodes": {
        "node_id": f"node_id {_ULID}",
        "node_name": "node_name <> ''",
        "ip_address": "ip_address <> ''",
        "port": "port BETWEEN 1 AND 65535",
        "status": _STATUS,
    },
    "routes": {
        "route_id": f"route_id {_ULID}",
        "target_node_id": "source_node_id <> target_node_id",
        "route_latency": "route_latency >= 0 AND route_latency < 'Infinity'",
        "route_bandwidth": "route_bandwidth >= 0 AND route_bandwidth < 'Infinity'",
        "route_cost": "route_cost >= 0",
        "status": _STATUS,
    },
    "mesh_messages": {"id": "id <> ''", "from_node": "from_node <> ''", "to_node": "to_node <> ''"},
    "mesh_state": {"key": "key <> ''"},
    "mesh_node_state": {"node_id": "node_id <> ''"},
    "mesh_consensus_log": {"term": "term >= 0", "index": "index >= 1"},
    "mesh_routing_table": {"destination": "destination <> ''"},
    "mesh_runtime_config": {"key": "key <> ''"},
}

# The keys of the first revision exist under some name. Ours are PostgreSQL's default names, so on most databases there
# is nothing to do. Renaming a constraint renames its index too.
RENAME_KEYS = """
    DO $$
    DECLARE key record;
    BEGIN
        FOR key IN
            SELECT relname, conname, relname || CASE contype WHEN 'p' THEN '' ELSE '_' || columns END || ending AS name
            FROM pg_constraint JOIN pg_class ON pg_class.oid = conrelid,
                LATERAL (SELECT string_agg(attname, '_' ORDER BY position) AS columns
                         FROM unnest(conkey) WITH ORDINALITY AS part (number, position)
                         JOIN pg_attribute ON attrelid = conrelid AND attnum = number) AS columns,
                (VALUES ('p', '_pkey'), ('u', '_key'), ('f', '_fkey')) AS endings (kind, ending)
            WHERE kind = contype::text AND conrelid IN ({tables})
            AND (contype = 'p' OR (relname, columns) IN (('mesh', 'mesh_name'), ('nodes', 'node_name'))
                 OR (relname, columns) IN (('routes', 'source_node_id'), ('routes', 'target_node_id'))
                 AND confrelid = 'nodes'::regclass)
        LOOP
            IF key.conname <> key.name AND NOT EXISTS (
                SELECT FROM pg_constraint WHERE conrelid = key.relname::regclass AND conname = key.name
            ) THEN
                EXECUTE format('ALTER TABLE %I RENAME CONSTRAINT %I TO %I', key.relname, key.conname, key.name);
            END IF;
        END LOOP;
    END $$
"""


def upgrade() -> None:
    """Add the check constraints; that of an id may exist since the first revision."""
    migration.lock(*CHECKS)
    for table, checks in CHECKS.items():
        changes = [f"DROP CONSTRAINT IF EXISTS {table}_{name}_check" for name in checks]
        changes += [f"ADD CONSTRAINT {table}_{name}_check CHECK ({rule}) NOT VALID" for name, rule in checks.items()]
        op.execute(f"ALTER TABLE {table} {', '.join(changes)}")
    op.execute(RENAME_KEYS.format(tables=", ".join(f"'{table}'::regclass" for table in CHECKS)))


def downgrade() -> None:
    """Drop the check constraints, except those of ids that the first revision created, without the domain for ids.

    Former names of keys are not restored: nothing depends on them.
    """
    migration.lock(*CHECKS)
    for table, checks in CHECKS.items():
        ids = [name for name, rule in checks.items() if rule.endswith(_ULID)]
        drops = [f"DROP CONSTRAINT {table}_{name}_check" for name in checks if name not in ids]
        op.execute(f"ALTER TABLE {table} {', '.join(drops)}")
        for name in ids:
            drop = f"ALTER TABLE {table} DROP CONSTRAINT {table}_{name}_check"
            op.execute(f"DO $$ BEGIN IF to_regtype('ulid') IS NOT NULL THEN {drop}; END IF; END $$")
