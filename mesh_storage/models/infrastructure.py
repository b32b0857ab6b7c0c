"""The infrastructure layer: what administrators configured and what rarely changes."""

from decimal import Decimal
from functools import partial

from sqlalchemy import CheckConstraint, ForeignKey, Index, Numeric, String, Text, text
from sqlalchemy.orm import Mapped, foreign, mapped_column, relationship

from mesh_storage.models.base import Entity, new_id
from mesh_storage.models.columns import (
    NOT_EMPTY,
    PENDING,
    ULID,
    CreatedAt,
    Status,
    ULIDKey,
    UpdatedAt,
    not_empty,
    status,
    ulid,
)
from mesh_storage.models.runtime import NodeState


class Mesh(Entity):
    """A mesh network: its name, who may join it, and the keys it is known by."""

    __tablename__ = "mesh"
    __table_args__ = (
        ulid("mesh_id"),
        not_empty("mesh_name"),
        status(),
    )

    id: Mapped[ULIDKey] = mapped_column("mesh_id", default=partial(new_id, "mesh"))
    """A prefixed ULID, such as `mesh_01J9ZQ4E8G3Q1M1V7W2T5K6X8Y`."""
    name: Mapped[str] = mapped_column("mesh_name", String(255), unique=True, info=NOT_EMPTY)
    """What administrators call it."""
    description: Mapped[str | None] = mapped_column("mesh_description", Text, default="", server_default="")
    """For people to read; nothing in the library looks at it."""
    allow_join: Mapped[bool | None] = mapped_column(default=False, server_default=text("false"))
    """Whether nodes may join; if so, `meshes.admits` checks the join key."""
    status: Mapped[Status] = mapped_column(default=PENDING)
    created: Mapped[CreatedAt] = mapped_column(default=None)
    updated: Mapped[UpdatedAt] = mapped_column(default=None)
    public_key: Mapped[str] = mapped_column("mesh_public_key", Text, default="", server_default="")
    """The public key of the mesh, as the mesh services write it."""
    join_key_hash: Mapped[str | None] = mapped_column(
        "mesh_join_key_hash", Text, default=None, deferred=True, deferred_raiseload=True
    )
    """The join key as `meshes.set_join_key` leaves it: a salted scrypt hash (RFC 7914), never the key. It is in what a
    session loads with `undefer(Mesh.join_key_hash)`, and in no other mesh."""


class Node(Entity):
    """A node that may take part in the mesh: where it is and how it is reached."""

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
    """What administrators call it."""
    description: Mapped[str | None] = mapped_column("node_description", Text, default="", server_default="")
    """For people to read; nothing in the library looks at it."""
    platform: Mapped[str | None] = mapped_column(
        "node_platform", String(255), default="linux-amd64", server_default="linux-amd64"
    )
    """Operating system and architecture; any text."""
    version: Mapped[str | None] = mapped_column("node_version", String(255), default="1.0.0", server_default="1.0.0")
    """The version of the software on the node; any text."""
    region_id: Mapped[str | None] = mapped_column(Text, default=None, info=NOT_EMPTY)
    """The id of a region, which another system keeps."""
    public_key: Mapped[str | None] = mapped_column("node_public_key", Text, default="", server_default="")
    """The public key of the node, as the mesh services write it."""
    ip_address: Mapped[str] = mapped_column(String(255), info=NOT_EMPTY)
    """Where the node is reached; any text, so a host name will do."""
    port: Mapped[int | None] = mapped_column(default=8443, server_default=text("8443"))
    """The port at that address."""
    status: Mapped[Status] = mapped_column(default=PENDING)
    created: Mapped[CreatedAt] = mapped_column(default=None)
    updated: Mapped[UpdatedAt] = mapped_column(default=None)

    # Nothing is loaded that was not asked for: an access without `selectinload()` or its like is an error. The rows
    # behind a node that is deleted are the database's to delete.
    routes_out: Mapped[list["Route"]] = relationship(
        foreign_keys="Route.source_node_id", back_populates="source", lazy="raise_on_sql", passive_deletes="all"
    )
    """The routes that begin here."""
    routes_in: Mapped[list["Route"]] = relationship(
        foreign_keys="Route.target_node_id", back_populates="target", lazy="raise_on_sql", passive_deletes="all"
    )
    """The routes that end here."""
    state: Mapped[NodeState | None] = relationship(
        primaryjoin=lambda: Node.id == foreign(NodeState.node_id), lazy="raise_on_sql", viewonly=True
    )
    """What the node last said about itself; to read only, since nodes and their states come and go independently."""


class Route(Entity):
    """A configured network path between two nodes, with what it costs."""

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
    """One-way latency, in milliseconds."""
    bandwidth_mbps: Mapped[Decimal | None] = mapped_column(
        "route_bandwidth", Numeric, default=0, server_default=text("0")
    )
    """Bandwidth, in megabits per second."""
    cost: Mapped[int | None] = mapped_column("route_cost", default=100, server_default=text("100"))
    """What routing tries to keep low; it has no unit."""
    status: Mapped[Status] = mapped_column(default=PENDING)
    created: Mapped[CreatedAt] = mapped_column(default=None)
    updated: Mapped[UpdatedAt] = mapped_column(default=None)

    source: Mapped[Node] = relationship(foreign_keys=source_node_id, back_populates="routes_out", lazy="raise_on_sql")
    """The node where it begins."""
    target: Mapped[Node] = relationship(foreign_keys=target_node_id, back_populates="routes_in", lazy="raise_on_sql")
    """The node where it ends."""
