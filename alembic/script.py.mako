"""${message}.

Every revision runs on live databases of every size, beside services of this version and the one before:
- nobody waits for longer than a moment: what locks a table against its use begins with migration.lock(), names all its
  tables there, and then changes the catalog only; a constraint is added NOT VALID and validated in a revision of its
  own, after migration.wait_longer(); an index is made by migration.create_index() in migration.beside_traffic(), in a
  revision of its own that may be done twice;
- no row is lost, and the statements of the version before go on working;
- the downgrade is written and tested;
- what squawk warns of is not done, or stands in EXCEPTIONS with the reason why it is safe here.
"""

from __future__ import annotations

from alembic import op

from mesh_storage.schema import migration

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Do it."""
    migration.lock("table")
    ${upgrades if upgrades else "raise NotImplementedError"}


def downgrade() -> None:
    """Undo it."""
    migration.lock("table")
    ${downgrades if downgrades else "raise NotImplementedError"}
