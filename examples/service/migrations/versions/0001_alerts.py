"""Alerts of nodes that fell silent."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "service_alerts",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("node_id", sa.Text, sa.ForeignKey("nodes.node_id", ondelete="CASCADE"), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
    )
    op.create_index(None, "service_alerts", ["node_id"], unique=True, postgresql_where=sa.text("ended_at IS NULL"))


def downgrade() -> None:
    op.drop_table("service_alerts")
