"""The ORM session that has joined a unit of work's transaction, if there is one, and what it must be told."""

from __future__ import annotations

from mesh_storage.aio.postgres.concurrency import in_greenlet
from mesh_storage.postgres.session import UnitOfWorkSession


class AsyncJoinedSession:
    """Tells the session, if one was used, how the transaction ends."""

    def __init__(self) -> None:
        self.session: UnitOfWorkSession | None = None
        self.exposed = False
        """Whether the session was handed to the caller, who may have changed session-level state."""

    @property
    def is_used(self) -> bool:
        """Whether a session was used."""
        return self.session is not None

    async def settle(self) -> None:
        """Tell it that the transaction was committed."""
        if self.session is not None:
            await in_greenlet(self.session.settle)

    async def undo(self) -> None:
        """Tell it that the transaction is being rolled back."""
        if self.session is not None:
            await in_greenlet(self.session.undo)

    async def leave(self) -> None:
        """Make it expunge what was only read."""
        if self.session is not None:
            await in_greenlet(self.session.leave)

    async def close(self) -> None:
        """Close it."""
        if self.session is not None:
            await in_greenlet(self.session.close)
