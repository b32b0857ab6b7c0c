"""A log of what was given a new expiry and nothing else, which a cache must know."""

from __future__ import annotations

from alembic import op

from mesh_storage.schema import changes

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Replace the functions of the triggers, which locks no table."""
    for table in changes.EXPIRING:
        op.execute(changes.log(table))


def downgrade() -> None:
    """Put the earlier functions back."""
    for table in changes.EXPIRING:
        op.execute(changes.log(table, expiry=False))
