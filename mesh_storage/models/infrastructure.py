"""The models of the infrastructure layer: what administrators configure and what rarely changes."""

from decimal import Decimal
from functools import partial

from sqlalchemy import CheckConstraint, ForeignKey, Index, Numeric, String, Text, text
from sqlalchemy.orm import Mapped, foreign, mapped_column, relationship

from mesh_storage.models.base import Versioned, new_id
from mesh_storage.models.columns import (
    NOT_EMPTY,
    PENDING,
    ULID,
    CreatedAt,
    Status,
    ULIDKey,
    UpdatedAt,
    Version,
    not_empty,
    status,
    ulid,
)
from mesh_storage.models.runtime import NodeState


class Mesh(Versioned):
    """A mesh network: its name, who may join it, and its keys."""

    __tablename__ = "mesh"
    __table_args__ = (
        ulid("mesh_id"),
        not_empty("mesh_name"),
        status(),
    )

    id: Mapped[ULIDKey] = mapped_column("mesh_id", default=partial(new_id, "mesh"))
    """A prefixed ULID, such as `mesh_01J9ZQ4E8G3Q1M1V7W2T5K6X8Y`."""
    name: Mapped[str] = mapped_column("mesh_name", String(255), unique=True, info=NOT_EMPTY)
    """Name given by administrators."""
    description: Mapped[str | None] = mapped_column("mesh_description", Text, default="", server_default="")
    """Free text for people; the library does not use it."""
    allow_join: Mapped[bool | None] = mapped_column(default=False, server_default=text("false"))
    """Whether nodes may join; if so, `meshes.admits` checks the join key."""
    status: Mapped[Status] = mapped_column(default=PENDING)
    created: Mapped[CreatedAt] = mapped_column(default=None)
    updated: Mapped[UpdatedAt] = mapped_column(default=None)
    version: Mapped[Version] = mapped_column(default=None)
    public_key: Mapped[str] = mapped_column("mesh_public_key", Text, default="", server_default="")
    """Public key of the mesh, in the format of the mesh services."""
    join_key_hash: Mapped[str | None] = mapped_column(
        "mesh_join_key_hash", Text, default=None, deferred=True, deferred_raiseload=True
    )
    """The salted scrypt hash (RFC 7914) of the join key, as `meshes.set_join_key` stores it. Deferred: loaded only by a
    session with `undefer(Mesh.join_key_hash)`."""


class Node(Versioned):
    """A node that may take part in the mesh, and its address."""

    __tablename__ = "nodes"
    __table_args__ = (
        ulid("node_id"),
        not_empty("node_name"),
        not_empty("ip_address"),
        CheckConstraint("port BETWEEN 1 AND 65535", name="port"),
        status(),
        Index(None, "status", "node_id"),
        Index(None, "region_id", "node_id"),
    )

    id: Mapped[ULIDKey] = mapped_column("node_id", default=partial(new_id, "node"))
    """A prefixed ULID, such as `node_01J9ZQ4E8G3Q1M1V7W2T5K6X8Y`."""
    name: Mapped[str] = mapped_column("node_name", String(255), unique=True, info=NOT_EMPTY)
    """Name given by administrators."""
    description: Mapped[str | None] = mapped_column("node_description", Text, default="", server_default="")
    """Free text for people; the library does not use it."""
    platform: Mapped[str | None] = mapped_column(
        "node_platform", String(255), default="linux-amd64", server_default="linux-amd64"
    )
    """Operating system and architecture; any text."""
    version: Mapped[str | None] = mapped_column("node_version", String(255), default="1.0.0", server_default="1.0.0")
    """The version of the software on the node; any text."""
    region_id: Mapped[str | None] = mapped_column(Text, default=None, info=NOT_EMPTY)
    """The id of a region, which is managed by another system."""
    public_key: Mapped[str | None] = mapped_column("node_public_key", Text, default="", server_default="")
    """Public key of the node, in the format of the mesh services."""
    ip_address: Mapped[str] = mapped_column(String(255), info=NOT_EMPTY)
    """Where the node is reached; any text, so a host name will do."""
    port: Mapped[int | None] = mapped_column(default=8443, server_default=text("8443"))
    """The port at that address."""
    status: Mapped[Status] = mapped_column(default=PENDING)
    created: Mapped[CreatedAt] = mapped_column(default=None)
    updated: Mapped[UpdatedAt] = mapped_column(default=None)
    row_version: Mapped[Version] = mapped_column("version", default=None)
    """The version of the row, which is `version` in other models."""

    # Relationships are loaded only by explicit options such as `selectinload()`; the database cascades deletes.
    routes_out: Mapped[list["Route"]] = relationship(
        foreign_keys="Route.source_node_id", back_populates="source", lazy="raise_on_sql", passive_deletes="all"
    )
    """The routes that start at this node."""
    routes_in: Mapped[list["Route"]] = relationship(
        foreign_keys="Route.target_node_id", back_populates="target", lazy="raise_on_sql", passive_deletes="all"
    )
    """The routes that end at this node."""
    state: Mapped[NodeState | None] = relationship(
        primaryjoin=lambda: Node.id == foreign(NodeState.node_id), lazy="raise_on_sql", viewonly=True
    )
    """The state last reported by this node; read-only, since nodes and their states are stored independently."""


class Route(Versioned):
    """A configured network path between two nodes, with its metrics."""

    __tablename__ = "routes"
    __table_args__ = (
        ulid("route_id"),
        CheckConstraint("source_node_id <> target_node_id", name="target_node_id"),
        CheckConstraint("route_latency >= 0 AND route_latency < 'Infinity'", name="route_latency"),
        CheckConstraint("route_bandwidth >= 0 AND route_bandwidth < 'Infinity'", name="route_bandwidth"),
        CheckConstraint("route_cost >= 0", name="route_cost"),
        status(),
        Index(None, "source_node_id", "route_id"),
        Index(None, "target_node_id", "route_id"),
    )

    id: Mapped[ULIDKey] = mapped_column("route_id", default=partial(new_id, "route"))
    """A prefixed ULID, such as `route_01J9ZQ4E8G3Q1M1V7W2T5K6X8Y`."""
    source_node_id: Mapped[str] = mapped_column(
        ForeignKey("nodes.node_id", ondelete="CASCADE", onupdate="CASCADE"), info=ULID
    )
    """The node where the route begins; when it is deleted, so is the route."""
    target_node_id: Mapped[str] = mapped_column(
        ForeignKey("nodes.node_id", ondelete="CASCADE", onupdate="CASCADE"), info=ULID
    )
    """The node where the route ends; when it is deleted, so is the route."""
    bidirectional: Mapped[bool | None] = mapped_column(
        "route_bidirectional", default=False, server_default=text("false")
    )
    """Whether the route also leads back from the target to the source."""
    latency_ms: Mapped[Decimal | None] = mapped_column("route_latency", Numeric, default=0, server_default=text("0"))
    """One-way latency in milliseconds."""
    bandwidth_mbps: Mapped[Decimal | None] = mapped_column(
        "route_bandwidth", Numeric, default=0, server_default=text("0")
    )
    """Bandwidth in Mbit/s."""
    cost: Mapped[int | None] = mapped_column("route_cost", default=100, server_default=text("100"))
    """Routing metric to minimize; no unit."""
    status: Mapped[Status] = mapped_column(default=PENDING)
    created: Mapped[CreatedAt] = mapped_column(default=None)
    updated: Mapped[UpdatedAt] = mapped_column(default=None)
    version: Mapped[Version] = mapped_column(default=None)

    source: Mapped[Node] = relationship(foreign_keys=source_node_id, back_populates="routes_out", lazy="raise_on_sql")
    """The node at which the route starts."""
    target: Mapped[Node] = relationship(foreign_keys=target_node_id, back_populates="routes_in", lazy="raise_on_sql")
    """The node at which the route ends."""
