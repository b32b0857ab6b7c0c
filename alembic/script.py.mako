"""${message}.

Every revision runs on live databases of any size, next to services of this version and the previous one:
- Nothing is blocked for more than a moment: a revision that takes a lock conflicting with reads or writes starts with
  migration.lock() on all its tables, and then changes only the catalog; a constraint is added NOT VALID and validated
  in a separate revision, after migration.wait_longer(); an index is created by migration.create_index() in
  migration.beside_traffic(), in a separate, idempotent revision.
- No row is lost, and the statements of the previous version keep working.
- The downgrade is implemented and tested.
- What squawk warns about is avoided, or listed in EXCEPTIONS with the reason why it is safe here.
"""

from __future__ import annotations

from alembic import op

from mesh_storage.schema import migration

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the revision."""
    migration.lock("table")
    ${upgrades if upgrades else "raise NotImplementedError"}


def downgrade() -> None:
    """Revert the revision."""
    migration.lock("table")
    ${downgrades if downgrades else "raise NotImplementedError"}
