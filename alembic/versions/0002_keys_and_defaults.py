"""The authentication keys of a mesh, and a default for the timestamp of messages."""

from __future__ import annotations

from alembic import op

from mesh_storage.schema import migration

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_AS_ASKED = "the downgrade drops what the upgrade added"
DOWNGRADE_EXCEPTIONS = {"ban-drop-column": _AS_ASKED, "ban-drop-default": _AS_ASKED}


def upgrade() -> None:
    """Add the columns; a constant default does not rewrite the table."""
    migration.lock("mesh", "mesh_messages")
    op.execute("ALTER TABLE mesh ADD COLUMN mesh_public_key text NOT NULL DEFAULT ''")
    op.execute("ALTER TABLE mesh ADD COLUMN mesh_join_key_hash text")
    op.execute("ALTER TABLE mesh_messages ALTER COLUMN timestamp SET DEFAULT EXTRACT(epoch FROM now())::bigint")


def downgrade() -> None:
    """Drop the columns and the default."""
    migration.lock("mesh", "mesh_messages")
    op.execute("ALTER TABLE mesh_messages ALTER COLUMN timestamp DROP DEFAULT")
    op.execute("ALTER TABLE mesh DROP COLUMN mesh_join_key_hash")
    op.execute("ALTER TABLE mesh DROP COLUMN mesh_public_key")
