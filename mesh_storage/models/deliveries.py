"""The tables of deliveries, which lie beside the messages: they have no model, since only statements use them."""

from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, Column, DateTime, Identity, Index, Table, Text, text

from mesh_storage.models.base import Base
from mesh_storage.models.columns import not_empty

_CLAIMABLE = "state IN ('queued', 'leased')"

DELIVERIES: Table[Any] = Table(
    "mesh_deliveries",
    Base.metadata,
    Column("message_id", Text, primary_key=True),
    Column("receiver", Text, primary_key=True),
    Column("seq", BigInteger, Identity(), nullable=False),
    Column("state", Text, nullable=False, server_default="queued"),  # "waiting" is behind another of its key
    Column("available_at", DateTime(timezone=True), nullable=False),
    Column("attempts", BigInteger, nullable=False, server_default=text("0")),
    Column("token", BigInteger, nullable=False, server_default=text("0")),
    Column("key", Text),
    Column("dead_at", DateTime(timezone=True)),
    Column("reason", Text),
    CheckConstraint("state IN ('queued', 'leased', 'waiting', 'dead')", name="state"),
    not_empty("receiver"),
    Index(None, "receiver", "available_at", "seq", postgresql_where=text(_CLAIMABLE)),
    Index(None, "receiver", "key", "seq", postgresql_where=text("key IS NOT NULL")),
    Index(None, "receiver", "seq", postgresql_where=text("state = 'dead'")),
)
LANES: Table[Any] = Table(
    "mesh_delivery_lanes",
    Base.metadata,
    Column("receiver", Text, primary_key=True),
    Column("key", Text, primary_key=True),
)
