"""A table for stale entries of the consensus log: of two entries with one index, the one of the lower term.

A leader of a higher term overwrites what an earlier one left at the same index (Raft, section 5.3). The table of the Go
service kept both. The next revision moves stale entries here, so that they are not lost.
"""

from __future__ import annotations

from alembic import op

from mesh_storage.schema import migration

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

DOWNGRADE_EXCEPTIONS = {"ban-drop-table": "its rows were moved back first"}


def upgrade() -> None:
    """Create the table; set_aside_at is in its key, since an entry may become stale more than once."""
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
    """Move the entries back; of several with the same term and index, only the latest, since the key allows one."""
    migration.lock("mesh_consensus_log_stale")
    op.execute(
        "INSERT INTO mesh_consensus_log (term, index, entry, created_at) "
        "SELECT DISTINCT ON (term, index) term, index, entry, created_at FROM mesh_consensus_log_stale "
        "ORDER BY term, index, set_aside_at DESC ON CONFLICT DO NOTHING"
    )
    migration.announce_lost_grants("mesh_consensus_log_stale")
    op.execute("DROP TABLE mesh_consensus_log_stale")
