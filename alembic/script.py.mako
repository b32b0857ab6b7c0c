"""${message}.

Every revision runs on live databases of every size, beside services of this version and the one before:
- no lock for longer than a moment: a constraint is added NOT VALID and validated in a revision of its own, an index is
  made by migration.create_index() in an autocommit_block() in a revision of its own;
- no row is lost, and the statements of the version before go on working;
- the downgrade is written and tested.
"""

from __future__ import annotations

from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Do it."""
    ${upgrades if upgrades else "raise NotImplementedError"}


def downgrade() -> None:
    """Undo it."""
    ${downgrades if downgrades else "raise NotImplementedError"}
