"""A lower fillfactor for tables that are often updated as a whole, so that the updates are HOT.

A HOT update needs free space on the page of the row (PostgreSQL manual, 66.7). A statement that updates all rows of a
page needs as much space as they occupy, since no old version can be pruned before its commit.
"""

from __future__ import annotations

from alembic import op

from mesh_storage.schema import migration

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

TABLES = ("mesh_node_state", "mesh_routing_table")


def upgrade() -> None:
    """Leave half of each new page free; future updates move rows off the full pages."""
    migration.wait_longer()
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} SET (fillfactor = 50)")


def downgrade() -> None:
    """Reset the fillfactor to its default of 100."""
    migration.wait_longer()
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} RESET (fillfactor)")
