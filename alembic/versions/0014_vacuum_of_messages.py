"""Earlier vacuum of the messages, since a listing from the beginning reads over all that were removed there.

The parameters that the owner of the table has set stay.
"""

from __future__ import annotations

from alembic import op

from mesh_storage.schema import migration

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

STORAGE = {"autovacuum_vacuum_scale_factor": "0.02", "autovacuum_vacuum_threshold": "1000"}


def upgrade() -> None:
    """Let autovacuum come after 1,000 dead rows and 2 % of the table, instead of 20 %."""
    migration.wait_longer()
    for name, value in STORAGE.items():
        _alter(f"SET ({name} = {value})", unless=f"split_part(option, '=', 1) = '{name}'")


def downgrade() -> None:
    """Reset the parameters that have these values."""
    migration.wait_longer()
    for name, value in STORAGE.items():
        _alter(f"RESET ({name})", unless=f"split_part(option, '=', 1) = '{name}' AND option <> '{name}={value}'")


def _alter(change: str, *, unless: str) -> None:
    op.execute(
        f"""
        DO $$ BEGIN
            IF NOT EXISTS (
                SELECT FROM pg_class, unnest(reloptions) AS option WHERE oid = 'mesh_messages'::regclass AND {unless}
            ) THEN
                ALTER TABLE mesh_messages {change};
            END IF;
        END $$
        """
    )
