"""Arrivals of messages."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "service_arrivals",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("message_id", sa.String(64), sa.ForeignKey("mesh_messages.id", ondelete="CASCADE"), nullable=False),
        sa.Column("hops", sa.Integer, nullable=False),
        sa.Column("latency_ms", sa.Float, nullable=False),
        sa.Column("arrived_at", sa.DateTime(timezone=True), server_default=sa.func.now(), nullable=False),
    )
    op.create_index(None, "service_arrivals", ["message_id"])


def downgrade() -> None:
    op.drop_table("service_arrivals")
