"""Versions, expiry, and a log of changes, kept by triggers, so that every writer takes part."""

from __future__ import annotations

from alembic import op

from mesh_storage.schema import changes, migration

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

DOWNGRADE_EXCEPTIONS = {
    "ban-drop-column": "versions and expiry mean nothing to the earlier revision",
    "ban-drop-table": "the log means nothing to the earlier revision",
    "ban-drop-function": "the triggers that call it are dropped before",
    "ban-drop-sequence": "no version is given any more",
}


def upgrade() -> None:
    """Add the columns, whose constant defaults rewrite no row, and the triggers."""
    migration.lock(*changes.WATCHED)
    for table in changes.WATCHED:
        op.execute(f"ALTER TABLE {table} ADD COLUMN version bigint NOT NULL DEFAULT 1")
    for table in changes.EXPIRING:
        op.execute(f"ALTER TABLE {table} ADD COLUMN expires_at timestamptz")
    for statement in changes.install(expiry=False):
        op.execute(statement)


def downgrade() -> None:
    """Drop the triggers and the columns; what has expired but is still there goes first."""
    migration.lock(*changes.WATCHED)
    migration.announce_lost_grants(changes.LOG, changes.EPOCH)
    for statement in changes.remove():
        op.execute(statement)
    for table in changes.EXPIRING:
        op.execute(f"DELETE FROM {table} WHERE expires_at <= clock_timestamp()")  # noqa: S608 - our own names
        op.execute(f"ALTER TABLE {table} DROP COLUMN expires_at")
    for table in changes.WATCHED:
        op.execute(f"ALTER TABLE {table} DROP COLUMN version")
