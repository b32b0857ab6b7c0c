"""The models of the runtime layer: the current, constantly changing state of the mesh."""

from sqlalchemy import BigInteger, CheckConstraint, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from mesh_storage.models.base import Entity, Versioned
from mesh_storage.models.columns import (
    NOT_REFLECTED,
    Content,
    CreatedAt,
    ExpiresAt,
    Id64,
    JsonValue,
    Key,
    NodeName,
    UpdatedAt,
    Version,
    not_empty,
)

# With half of each page free, updating every row in one statement still allows HOT updates.
HALF_FULL = {"postgresql_with": {"fillfactor": 50}}


class Message(Entity):
    """A message from one node to another."""

    __tablename__ = "mesh_messages"
    __table_args__ = (
        not_empty("id"),
        not_empty("from_node"),
        not_empty("to_node"),
        Index(None, "timestamp", "id"),
        Index(None, "to_node", "timestamp", "id"),
        Index(None, "from_node", "timestamp", "id"),
        Index(None, "from_node", "to_node", "timestamp", "id"),
    )

    id: Mapped[Id64]
    """Chosen by the sender; each id is stored once."""
    from_node: Mapped[NodeName]
    """The sender; any text, not a reference to a node."""
    to_node: Mapped[NodeName]
    """The receiver; any text, not a reference to a node."""
    content: Mapped[Content]
    """The message itself, in bytes."""
    timestamp: Mapped[int] = mapped_column(
        BigInteger, default=None, server_default=text("EXTRACT(epoch FROM now())::bigint")
    )
    """Unix time in seconds; the database's clock at `store` if not given."""
    created_at: Mapped[CreatedAt] = mapped_column(default=None)
    queued: Mapped[bool] = mapped_column(
        default=None, server_default=text("false"), deferred=True, deferred_raiseload=True
    )
    """Whether it was ever queued for a receiver, by `messages.send` or `enqueue`. Deferred: loaded only by a session
    with `undefer(Message.queued)`."""


class StateEntry(Versioned):
    """A value shared by all nodes, as bytes."""

    __tablename__ = "mesh_state"
    __table_args__ = (
        not_empty("key"),
        Index("mesh_state_key_c_idx", text('key COLLATE "C"'), info=NOT_REFLECTED),
        Index(None, "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
    )

    key: Mapped[Key]
    """The name of the value; keys can be listed by prefix."""
    value: Mapped[Content]
    """The value, in bytes that only the nodes need to understand."""
    created_at: Mapped[CreatedAt] = mapped_column(default=None)
    updated_at: Mapped[UpdatedAt] = mapped_column(default=None)
    version: Mapped[Version] = mapped_column(default=None)
    expires_at: Mapped[ExpiresAt] = mapped_column(default=None)


class NodeState(Entity):
    """The state last reported by a node."""

    __tablename__ = "mesh_node_state"
    __table_args__ = (not_empty("node_id"), HALF_FULL)

    node_id: Mapped[Id64]
    """Whose state it is; any text, not a reference to a node."""
    state: Mapped[JsonValue]
    """The state, as JSON; `node_states.merge` needs an object."""
    created_at: Mapped[CreatedAt] = mapped_column(default=None)
    updated_at: Mapped[UpdatedAt] = mapped_column(default=None)


class LogEntry(Entity):
    """An entry of the consensus log (Raft: Ongaro and Ousterhout, "In Search of ...", section 5.3)."""

    __tablename__ = "mesh_consensus_log"
    __table_args__ = (
        CheckConstraint("term >= 0", name="term"),
        CheckConstraint("index >= 1", name="index"),
        Index("mesh_consensus_log_index_key", "index", unique=True),
    )

    term: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    """The term of the leader that made the entry; terms never fall along the log."""
    index: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    """The position in the log, which has no gaps."""
    entry: Mapped[JsonValue]
    """The command for the state machine, as JSON."""
    created_at: Mapped[CreatedAt] = mapped_column(default=None)


class RoutingEntry(Versioned):
    """The current best route to a destination."""

    __tablename__ = "mesh_routing_table"
    __table_args__ = (not_empty("destination"), HALF_FULL)

    destination: Mapped[Key]
    """Where the route leads; any text, not a reference to a node."""
    route: Mapped[JsonValue]
    """How to get there, as JSON."""
    created_at: Mapped[CreatedAt] = mapped_column(default=None)
    updated_at: Mapped[UpdatedAt] = mapped_column(default=None)
    version: Mapped[Version] = mapped_column(default=None)


class ConfigEntry(Versioned):
    """An operational setting that may change while the mesh runs."""

    __tablename__ = "mesh_runtime_config"
    __table_args__ = (
        not_empty("key"),
        Index("mesh_runtime_config_key_c_idx", text('key COLLATE "C"'), info=NOT_REFLECTED),
        Index(None, "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
    )

    key: Mapped[Key]
    """The name of the setting; keys can be listed by prefix."""
    value: Mapped[JsonValue]
    """The value of the setting, as JSON."""
    created_at: Mapped[CreatedAt] = mapped_column(default=None)
    updated_at: Mapped[UpdatedAt] = mapped_column(default=None)
    version: Mapped[Version] = mapped_column(default=None)
    expires_at: Mapped[ExpiresAt] = mapped_column(default=None)
