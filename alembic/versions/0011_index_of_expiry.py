"""Indexes of the entries that expire, by which `maintain` finds those that have."""

from __future__ import annotations

from mesh_storage.schema import migration

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

INDEXES = {f"{table}_expires_at_idx": table for table in ("mesh_state", "mesh_runtime_config")}


def upgrade() -> None:
    """Create the indexes concurrently; they contain only the entries that expire."""
    with migration.beside_traffic():
        for name, table in INDEXES.items():
            migration.create_index(name, table, "expires_at", where="expires_at IS NOT NULL")


def downgrade() -> None:
    """Drop the indexes concurrently."""
    with migration.beside_traffic():
        for name in reversed(INDEXES):
            migration.drop_index(name)
