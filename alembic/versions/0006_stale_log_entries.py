"""A place for entries of the consensus log that Raft calls stale: of two with one index, that of the lower term.

A leader of a higher term overwrites what an earlier one left at the same index (Raft, section 5.3). The table of the Go
service kept both. The stale one is set aside, not lost.
"""

from __future__ import annotations

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

SET_ASIDE = """
    WITH stale AS (
        DELETE FROM mesh_consensus_log AS entry
        USING (SELECT index, max(term) AS term FROM mesh_consensus_log GROUP BY index HAVING count(*) > 1) AS newest
        WHERE entry.index = newest.index AND entry.term < newest.term
        RETURNING entry.term, entry.index, entry.entry, entry.created_at
    )
    INSERT INTO mesh_consensus_log_stale (term, index, entry, created_at) SELECT * FROM stale
"""


def upgrade() -> None:
    """Create the table and move the stale entries."""
    op.execute(
        """
        CREATE TABLE mesh_consensus_log_stale (
            term bigint NOT NULL,
            index bigint NOT NULL,
            entry jsonb NOT NULL,
            created_at timestamptz,
            set_aside_at timestamptz NOT NULL DEFAULT CURRENT_TIMESTAMP,
            CONSTRAINT mesh_consensus_log_stale_pkey PRIMARY KEY (term, index)
        )
        """
    )
    op.execute(SET_ASIDE)


def downgrade() -> None:
    """Move them back."""
    op.execute(
        "INSERT INTO mesh_consensus_log (term, index, entry, created_at) "
        "SELECT term, index, entry, created_at FROM mesh_consensus_log_stale"
    )
    op.execute("DROP TABLE mesh_consensus_log_stale")
