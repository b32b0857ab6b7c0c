"""The repository of the shared state: bytes by key, the same for all nodes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from sqlalchemy import text

from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.repositories.runtime.expiring import AsyncExpiringRepository
from mesh_storage.models import StateEntry
from mesh_storage.postgres.statement import Statement
from mesh_storage.repositories import checks
from mesh_storage.repositories.expiring import ExpiringEntries

_STATE = ExpiringEntries(StateEntry)
_IDLE = "idle_in_transaction_session_timeout"
# Once the row is locked, nobody can take the lease over, so the transaction must not pause for longer than it lives.
_CHECK = Statement(
    lambda: text(
        f"""
        WITH held AS MATERIALIZED (
            SELECT expires_at FROM mesh_state
            WHERE key = :key AND version = :version AND (expires_at IS NULL OR expires_at > clock_timestamp())
            FOR SHARE
        )
        SELECT CASE WHEN expires_at IS NOT NULL THEN set_config('{_IDLE}', ceil(greatest(1, 1000 * extract(epoch FROM
            least(expires_at - clock_timestamp(), nullif(current_setting('{_IDLE}')::interval, '0'))
        )))::text, true) END
        FROM held
        """  # noqa: S608 - our own name
    ),
    writes=True,
)


class AsyncStateRepository(AsyncExpiringRepository[StateEntry]):
    """The repository of the shared state."""

    def __init__(self, connection: AsyncUnitOfWorkConnection) -> None:
        super().__init__(connection, _STATE)

    async def put(
        self, key: str, value: bytes, *, if_version: int | None = None, ttl: timedelta | None = None
    ) -> StateEntry:
        """Store a value by key (1 to 255 characters), replacing any existing one.

        Args:
            key: The key.
            value: The value, of up to 256 MiB.
            if_version: Store it only in place of the entry with this version; 0 if there must be none.
            ttl: The time from now after which the entry expires; never if None.

        Raises:
            ConflictError: There is an entry of another version, or none; see `actual`.
        """
        return await self._put_if(key, value, if_version, ttl)

    async def put_many(self, entries: Mapping[str, bytes], *, ttl: timedelta | None = None) -> list[StateEntry]:
        """Store many values in one statement, all of which expire after `ttl` from now, or never if None."""
        return await self._put_many_until(entries, ttl)

    async def check(self, key: str, *, version: int) -> None:
        """Raise unless the entry has this version, and keep it so until the unit of work ends.

        This fences what the holder of a lease does (see `MeshStorage.lease`). Until the end, others that write the
        entry wait, and so does its renewal. If the unit of work then pauses for longer than the entry has to live, the
        server ends it, so that nobody waits for a process that stands still.

        Raises:
            ConflictError: The entry has another version, or there is none; see `actual`.
        """
        checks.integer("version", version, 1)
        parameters = {"key": self._aggregate.check_key(key), "version": version}
        if await self._connection.fetch_one(_CHECK, parameters) is None:
            raise await self._conflict(key, version)
