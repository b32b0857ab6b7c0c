"""Times with a zone in the infrastructure tables; those without one are read as UTC.

In a session whose zone is UTC the two types have the same values, and PostgreSQL changes the type without rewriting the
table (release notes of PostgreSQL 12).
"""

from __future__ import annotations

from alembic import op

from mesh_storage.schema import migration

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

EXCEPTIONS = {"changing-column-type": "in UTC nothing is rewritten, which a test holds it to"}
DOWNGRADE_EXCEPTIONS = {
    **EXCEPTIONS,
    "prefer-timestamp-tz": "the type that the Go service chose, as a downgrade is asked to",
}

TABLES = ("mesh", "nodes", "routes")


def upgrade() -> None:
    """Change the type of `created` and `updated`."""
    _change("timestamptz")


def downgrade() -> None:
    """Change it back."""
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
