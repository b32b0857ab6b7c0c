"""timestamptz for the times of the infrastructure tables; existing values are taken as UTC.

With the session time zone UTC, both types have the same representation, and PostgreSQL changes the type without
rewriting the table (release notes of PostgreSQL 12).
"""

from __future__ import annotations

from alembic import op

from mesh_storage.schema import migration

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

EXCEPTIONS = {"changing-column-type": "no rewrite with time zone UTC, as a test verifies"}
DOWNGRADE_EXCEPTIONS = {
    **EXCEPTIONS,
    "prefer-timestamp-tz": "the downgrade restores the Go service's type",
}

TABLES = ("mesh", "nodes", "routes")


def upgrade() -> None:
    """Change the type of `created` and `updated` to timestamptz."""
    _change("timestamptz")


def downgrade() -> None:
    """Change the type of `created` and `updated` back to timestamp."""
    _change("timestamp")


def _change(kind: str) -> None:
    migration.lock(*TABLES)
    op.execute("SET LOCAL timezone TO 'UTC'")
    for table in TABLES:
        changes = ", ".join(
            f"ALTER COLUMN {column} TYPE {kind}, ALTER COLUMN {column} SET DEFAULT CURRENT_TIMESTAMP"
            for column in ("created", "updated")
        )
        op.execute(f"ALTER TABLE {table} {changes}")
