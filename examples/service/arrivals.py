"""Messages on their way: the queue, what its workers do, and the service's own table of those that have arrived."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import DateTime, ForeignKey, func, select
from sqlalchemy.orm import Mapped, mapped_column

from mesh_storage import Delivery, Message
from mesh_storage.aio import AsyncUnitOfWork
from mesh_storage.models import Base
from service.routing import table_key

QUEUE = "service.messages"
"""All processes of the service work it off together."""


class Arrival(Base):
    """A message that was carried to its node, along the best route of that moment."""

    __tablename__ = "service_arrivals"

    id: Mapped[int] = mapped_column(primary_key=True)
    # Not unique: that a message arrives once is what its delivery promises.
    message_id: Mapped[str] = mapped_column(ForeignKey("mesh_messages.id", ondelete="CASCADE"), index=True)
    hops: Mapped[int]
    latency_ms: Mapped[float]
    arrived_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())


class NoRouteError(Exception):
    """No route leads from the sender of a message to its receiver, for now."""


async def send(uow: AsyncUnitOfWork, message: Message) -> None:
    """Queue a message; those from one node to another arrive in the order of sending."""
    key = table_key(message.from_node, message.to_node)
    await uow.messages.send(message, key=key, receivers=[QUEUE])


async def carry(uow: AsyncUnitOfWork, delivery: Delivery) -> None:
    """Let a message arrive, in the unit of work that acknowledges its delivery."""
    message = delivery.message
    found = await uow.routing_table.find(table_key(message.from_node, message.to_node))
    if found is None:
        raise NoRouteError("no route leads there")
    route: Any = found.route
    uow.session.add(Arrival(message_id=message.id, hops=route["hops"], latency_ms=route["latency_ms"]))


async def last_arrivals(uow: AsyncUnitOfWork, limit: int) -> list[tuple[Message, Arrival]]:
    """Return the messages that arrived last, the latest first."""
    query = select(Message, Arrival).join(Arrival, Arrival.message_id == Message.id)
    found = await uow.session.execute(query.order_by(Arrival.id.desc()).limit(limit))
    return [(message, arrival) for message, arrival in found]


async def count_arrivals(uow: AsyncUnitOfWork) -> int:
    """Return how many messages have arrived."""
    return await uow.session.scalar(select(func.count()).select_from(Arrival)) or 0


def dead_as_json(delivery: Delivery) -> dict[str, Any]:
    """Return what an operator wants to know of a message that was set aside."""
    return {
        "id": delivery.message.id,
        "from": delivery.message.from_node,
        "to": delivery.message.to_node,
        "attempts": delivery.attempts,
        "reason": delivery.reason,
        "since": delivery.dead_at and delivery.dead_at.isoformat(),
    }
