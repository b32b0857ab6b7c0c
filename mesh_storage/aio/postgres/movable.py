"""The connection of a unit of work that reads from a replica, and goes on at the primary if the replica fails."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import sqlalchemy

from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.errors import InvalidInputError, MeshStorageError, StorageTimeoutError, UnavailableError
from mesh_storage.postgres.statement import Parameters, Row, Statement

_LOCK_NOT_AVAILABLE = "55P03"


class AsyncMovableConnection(AsyncUnitOfWorkConnection):
    """Executes statements on a replica, until one fails; that one and all after it are executed on the primary.

    At READ COMMITTED this is invisible: every statement has a snapshot of its own, and the primary's is the newest.
    With a snapshot for all, only the first statement moves. What a session executes does not move.
    """

    move: Callable[[AsyncUnitOfWorkConnection], Awaitable[AsyncUnitOfWorkConnection]] | None = None
    """How to go on at the primary; None before the replica has been found good enough."""
    primary: AsyncUnitOfWorkConnection | None = None
    """The connection to go on with, once it has moved."""
    _has_answered = False

    @property
    def has_failed(self) -> bool:
        """Whether a statement failed, so that only a rollback is possible."""
        return super().has_failed if self.primary is None else self.primary.has_failed

    async def failed(self, error: BaseException) -> BaseException:
        """Record why the transaction failed, and return the error to raise."""
        return await (super().failed(error) if self.primary is None else self.primary.failed(error))

    async def join(self) -> sqlalchemy.Connection:
        """Begin the transaction for an ORM session, and return its connection."""
        return await (super().join() if self.primary is None else self.primary.join())

    async def commit(self) -> None:
        """End the transaction."""
        await (super().commit() if self.primary is None else self.primary.commit())

    async def rollback(self) -> None:
        """Roll back the transaction."""
        await (super().rollback() if self.primary is None else self.primary.rollback())

    async def hurry(self) -> None:
        """Limit what is left to do to the grace period, since the caller has been interrupted."""
        await super().hurry()
        if self.primary is not None:
            await self.primary.hurry()

    async def _run(self, statement: Statement, parameters: Parameters | None) -> tuple[list[Row], int]:
        if self.primary is None:
            try:
                answer = await super()._run(statement, parameters)
            except MeshStorageError as error:
                if not self._moves_after(error) or self.move is None:
                    raise
                self.primary = await self.move(self)
                self.primary.joined = self.joined
            else:
                self._has_answered = True
                return answer
        return await self.primary._run(statement, parameters)  # noqa: SLF001 - of the same kind

    def _moves_after(self, error: MeshStorageError) -> bool:
        """Return whether the primary may have an answer, and before the timeout."""
        if self.joined.is_used or self.owner.closed or self.owner.inherited or self._deadline.has_passed:
            return False
        if self.has_snapshot and self._has_answered:
            return False
        if isinstance(error, StorageTimeoutError):
            return error.sqlstate == _LOCK_NOT_AVAILABLE
        of_server = error.sqlstate is not None or isinstance(error, UnavailableError)
        return of_server and not isinstance(error, InvalidInputError)
