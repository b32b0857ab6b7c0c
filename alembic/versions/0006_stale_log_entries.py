"""A place for entries of the consensus log that Raft calls stale: of two with one index, that of the lower term.

A leader of a higher term overwrites what an earlier one left at the same index (Raft, section 5.3). The table of the Go
service kept both. The next revision sets the stale one aside here, and it is not lost.
"""

from __future__ import annotations

from alembic import op

from mesh_storage.schema import migration

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

DOWNGRADE_EXCEPTIONS = {"ban-drop-table": "its rows have gone back to where they came from"}


def upgrade() -> None:
    """Create the table; an entry may come, be set aside and come again."""
    migration.hold_nobody_up()
    op.execute(
        """
        CREATE TABLE mesh_consensus_log_stale (
            term bigint NOT NULL,
            index bigint NOT NULL,
            entry jsonb NOT NULL,
            created_at timestamptz,
            set_aside_at timestamptz NOT NULL DEFAULT CURRENT_TIMESTAMP,
            CONSTRAINT mesh_consensus_log_stale_pkey PRIMARY KEY (term, index, set_aside_at)
        )
        """
    )


def downgrade() -> None:
    """Move the entries back; of those with one term and one index, which have room for one, that which came last."""
    migration.lock("mesh_consensus_log_stale")
    op.execute(
        "INSERT INTO mesh_consensus_log (term, index, entry, created_at) "
        "SELECT DISTINCT ON (term, index) term, index, entry, created_at FROM mesh_consensus_log_stale "
        "ORDER BY term, index, set_aside_at DESC ON CONFLICT DO NOTHING"
    )
    migration.announce_lost_grants("mesh_consensus_log_stale")
    op.execute("DROP TABLE mesh_consensus_log_stale")
