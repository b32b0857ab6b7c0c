"""The service's own table, in the same database: the nodes that fell silent, and until when."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import DateTime, ForeignKey, Index, func, select, text
from sqlalchemy.orm import Mapped, mapped_column

from mesh_storage import Node
from mesh_storage.aio import AsyncUnitOfWork
from mesh_storage.models import Base


class Alert(Base):
    """A node that has not reported its state for too long, until it does again."""

    __tablename__ = "service_alerts"
    # Not more than one open alert for each node.
    __table_args__ = (Index(None, "node_id", unique=True, postgresql_where=text("ended_at IS NULL")),)

    id: Mapped[int] = mapped_column(primary_key=True)
    node_id: Mapped[str] = mapped_column(ForeignKey("nodes.node_id", ondelete="CASCADE"))
    started_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())
    ended_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


async def open_alerts(uow: AsyncUnitOfWork) -> dict[str, Alert]:
    """Return the alerts that have not ended, by node."""
    found = await uow.session.scalars(select(Alert).where(Alert.ended_at.is_(None)))
    return {alert.node_id: alert for alert in found}


async def update_alerts(uow: AsyncUnitOfWork, silent: set[str]) -> None:
    """Open an alert for each silent node that has none, and end those of all others."""
    there = await open_alerts(uow)
    for node_id, alert in there.items():
        if node_id not in silent:
            alert.ended_at = func.now()
    # A state may outlive its node.
    nodes = await uow.session.scalars(select(Node.id).where(Node.id.in_(silent - there.keys())))
    uow.session.add_all([Alert(node_id=node_id) for node_id in nodes])
