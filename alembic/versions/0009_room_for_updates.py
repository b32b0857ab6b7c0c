"""Room in the pages of the tables that are stored again and again as a whole, so that it happens in place (HOT).

PostgreSQL stores a new version of a row in place only into free room of the same page (manual, 66.7). A statement that
stores all the rows of a page needs as much room as they take, as none of the old versions can go before its commit.
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
    """Leave half of each new page free; the full ones are left behind by the updates to come."""
    migration.wait_longer()
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} SET (fillfactor = 50)")


def downgrade() -> None:
    """Fill pages whole again."""
    migration.wait_longer()
    for table in TABLES:
        op.execute(f"ALTER TABLE {table} RESET (fillfactor)")
