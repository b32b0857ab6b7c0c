"""The replicas of a storage, and how a unit of work gets a connection to one that is good enough, or to the primary."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Iterator

from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.postgres.movable import AsyncMovableConnection
from mesh_storage.aio.postgres.pool import AsyncPool
from mesh_storage.errors import ClosedError, ConfigurationError, MeshStorageError, UnavailableError
from mesh_storage.postgres.characteristics import Characteristics
from mesh_storage.postgres.reading import FRESH_S, Fallbacks, Reason, Retreat, Samples, Wanted
from mesh_storage.postgres.server import Server, replica_settings
from mesh_storage.postgres.tenure import now
from mesh_storage.postgres.wal import REPLAYED, STANDING, Standing, replayed, standing
from mesh_storage.settings import Settings

_FIRST_PAUSE_S = 0.001
_LONGEST_PAUSE_S = 0.025
_LOOK_S = 0.01
"""What a look takes at most, usually: there is none so late that it would have to be cancelled."""


class AsyncReplica:
    """One host of `replica_url`, and its pool."""

    def __init__(self, pool: AsyncPool, server: Server) -> None:
        self.pool = pool
        self.pool.lends = AsyncMovableConnection
        self.address = server.address
        self.retreat = Retreat()

    @property
    def is_busy(self) -> bool:
        """Whether all connections are in use."""
        return self.pool.in_use >= self.pool.size

    async def check(self, timeout: float) -> Standing | MeshStorageError:
        """Return where it stands, or why it does not answer within a time limit in seconds."""
        try:
            connection = await self.pool.acquire(Characteristics(read_only=True, timeout=timeout), beside=True)
            try:
                return standing(await connection.ask(STANDING), now())
            finally:
                await self.pool.release(connection)
        except MeshStorageError as error:
            return error

    async def look(self, connection: AsyncUnitOfWorkConnection, needed: int, until: float) -> Standing:
        """Ask where it stands; asks for its timeline if that may have changed, or may not be as new as needed."""
        driver, asked = connection.driver, now()
        known = driver.standing
        if known is None or known.position.timeline < needed or asked - known.at >= FRESH_S:
            found = standing(await connection.ask(STANDING, until), asked)
            driver.standing = found if known is None else found.on_timeline(known.position.timeline)
        else:
            driver.standing = replayed(known, await connection.ask(REPLAYED, until))
        return driver.standing


class AsyncReplicas:
    """All replicas, and the primary that answers in their place."""

    def __init__(self, primary: AsyncPool, settings: Settings, server: Server) -> None:
        self.primary = primary
        self.patience = settings.replica_timeout
        self.samples = Samples()
        self._in_order = server.replicas_in_order
        self._all = [AsyncReplica(self._open(replica_settings(settings), each), each) for each in server.replicas]
        self._fallbacks = Fallbacks()
        self._asking_until = 0.0

    def __iter__(self) -> Iterator[AsyncReplica]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    async def close(self) -> None:
        """Close their pools."""
        for each in self._all:
            await each.pool.close()

    def candidates(self) -> list[AsyncReplica]:
        """Return those to try, those with a free connection first: from a random one on, unless in order."""
        found = [each for each in self._all if not each.retreat.rests]
        if len(found) > 1:
            if not self._in_order:
                first = int(random.random() * len(found))  # noqa: S311 - not used for security
                found = [*found[first:], *found[:first]]
            found.sort(key=lambda each: each.is_busy)
        return found

    def fall_back(self, reason: Reason) -> None:
        """Note that the primary answers a unit of work, and why."""
        self._fallbacks.note(reason)

    async def sample(self, oldest: float, until: float) -> None:
        """Ask the primary where it stands, unless that is known from no more than `oldest` seconds ago.

        One asks at a time, until a moment at most. If the primary cannot be asked, what is known stays.
        """
        newest, moment = self.samples.newest, time.monotonic()
        if newest is not None and (now() - newest.at <= oldest or moment < self._asking_until):
            return
        self._asking_until = until
        try:
            await self._ask_primary(Characteristics(read_only=True, timeout=max(0.001, until - moment)))
        except ClosedError:
            raise
        except MeshStorageError:
            return
        finally:
            self._asking_until = 0.0

    async def position(self) -> str:
        """Return where the primary stands.

        Raises:
            ConfigurationError: The server is a standby.
        """
        return str((await self._ask_primary(Characteristics(read_only=True))).position)

    async def _ask_primary(self, characteristics: Characteristics) -> Standing:
        asked = now()
        connection = await self.primary.acquire(characteristics, beside=True)
        try:
            found = standing(await connection.ask(STANDING), asked)
        finally:
            await self.primary.release(connection)
        if found.standby:
            raise ConfigurationError(
                "the server is a standby, whose log is not its own; add target_session_attrs=read-write to the URL if "
                "it names several hosts"
            )
        self.samples.add(found)
        return found

    def _open(self, settings: Settings, server: Server) -> AsyncPool:
        return AsyncPool(settings, server)


class AsyncReading:
    """The pool of one unit of work that reads from a replica."""

    def __init__(self, replicas: AsyncReplicas, wanted: Wanted, *, failed_before: bool = False) -> None:
        """Initialize with what is wanted; after a failure in another unit of work, the primary answers."""
        self._replicas = replicas
        self._wanted = wanted
        self._failed_before = failed_before
        self._replica: AsyncReplica | None = None
        self._characteristics = Characteristics()
        self._deadline: float | None = None
        self._limit = replicas.patience

    async def acquire(self, characteristics: Characteristics, *, beside: bool = False) -> AsyncUnitOfWorkConnection:
        """Acquire a connection to a replica that is good enough, or else to the primary.

        Raises:
            InvalidInputError: An argument is invalid, or the position is of another cluster.
            ConflictError: What was committed at the position is lost.
            UnavailableError: No replica is good enough, and the primary cannot be reached either.
            StorageTimeoutError: The timeout of the unit of work expired.
            ClosedError: The storage is closed.
        """
        del beside
        characteristics.check()
        self._wanted.check(characteristics)
        self._characteristics, self._deadline = characteristics, characteristics.deadline()
        self._replica = None
        if len(self._replicas) == 0:
            return await self._from_primary()
        reason: Reason = "failed"
        if not self._failed_before:
            found = await self._from_replica()
            if isinstance(found, AsyncMovableConnection):
                return found
            reason = found
        self._replicas.fall_back(reason)
        return await self._from_primary()

    async def release(self, connection: AsyncUnitOfWorkConnection) -> None:
        """Release a connection, and that to the primary if it has moved there."""
        if self._replica is None:
            await self._replicas.primary.release(connection)
            return
        try:
            if isinstance(connection, AsyncMovableConnection) and connection.primary is not None:
                await self._replicas.primary.release(connection.primary)
        finally:
            await self._replica.pool.release(connection)

    async def _from_replica(self) -> AsyncMovableConnection | Reason:
        """Return a connection to the first replica that is good enough, or why there is none."""
        patience, timeout = self._replicas.patience, self._characteristics.timeout
        # The other half of the timeout is the primary's.
        self._limit = patience if timeout is None else min(patience, timeout / 2)
        end = time.monotonic() + self._limit
        pause = _FIRST_PAUSE_S
        while True:
            reason: Reason = "unreachable"
            waiting: list[AsyncReplica] = []
            # A primary that does not answer leaves time for the replicas.
            await self._replicas.sample(self._wanted.max_age / 2, _share(end, 2))
            if await self._is_of_another_cluster(end):
                return "foreign"
            candidates = self._replicas.candidates()
            for number, replica in enumerate(candidates):
                if replica.retreat.silent.covers(self._limit) or not replica.retreat.admits():
                    continue
                # One that does not answer leaves time for the others.
                found = await self._try(replica, _share(end, len(candidates) - number))
                if isinstance(found, AsyncMovableConnection):
                    return found
                if found in ("behind", "lagging"):
                    waiting.append(replica)
                reason = found if found != "unreachable" else reason
            if time.monotonic() + pause + _LOOK_S >= end:
                for replica in waiting:
                    replica.retreat.behind.note(self._limit)
                return reason
            if all(replica.retreat.behind.covers(self._limit) for replica in waiting):
                return reason
            await asyncio.sleep(pause)
            pause = min(_LONGEST_PAUSE_S, pause * 1.5)

    async def _is_of_another_cluster(self, end: float) -> bool:
        """Return whether the position is of another cluster than the primary, which may be a new one by now."""
        if not self._wanted.is_of_another_cluster(self._replicas.samples):
            return False
        await self._replicas.sample(FRESH_S, _share(end, 2))
        return self._wanted.is_of_another_cluster(self._replicas.samples)

    async def _try(self, replica: AsyncReplica, end: float) -> AsyncMovableConnection | Reason:
        begun = time.monotonic()
        try:
            connection = await replica.pool.acquire(self._left(), until=end)
        except ClosedError:
            raise
        except MeshStorageError:
            if replica.is_busy:
                return "busy"
            self._fail(replica, begun, end)
            return "unreachable"
        assert isinstance(connection, AsyncMovableConnection), "the pool lends no others"
        reason: Reason | None = "unreachable"
        try:
            reason = await self._judge(replica, connection, end)
        except ClosedError:
            raise
        except MeshStorageError:
            pass
        finally:
            if reason is not None:
                await replica.pool.release(connection)
        if reason in ("unreachable", "promoted", "foreign"):
            self._fail(replica, begun, end)
        else:
            replica.retreat.succeed()
        if reason is None:
            if self._wanted.is_demanding:
                replica.retreat.behind.forget()
            self._replica, connection.move = replica, self._move
        return reason or connection

    def _fail(self, replica: AsyncReplica, begun: float, end: float) -> None:
        """Leave a replica alone, or let those do so whose timeouts are as short as the one that it was too slow for."""
        moment = time.monotonic()
        if moment < end or self._limit == self._replicas.patience:
            replica.retreat.fail(moment - begun)
        else:
            replica.retreat.silent.note(self._limit)

    async def _judge(self, replica: AsyncReplica, connection: AsyncMovableConnection, end: float) -> Reason | None:
        """Return why a replica is not good enough; it is asked unless what is known of it says that it is."""
        wanted, samples = self._wanted, self._replicas.samples
        known = connection.driver.standing
        if known is not None and now() - known.at < FRESH_S and wanted.judge(known, samples) is None:
            return None
        needed = 0 if wanted.after is None else wanted.after.timeline
        if samples.newest is not None and wanted.max_age < math.inf:
            needed = max(needed, samples.newest.position.timeline)
        known = await replica.look(connection, needed, end)
        reason = wanted.judge(known, samples)
        if reason == "foreign":  # or the primary has been replaced
            await self._replicas.sample(FRESH_S, end)
            reason = wanted.judge(known, samples)
        if reason is None and connection.driver.connection.cancelled:  # which a later statement may feel
            return "unreachable"
        return reason

    async def _move(self, failed: AsyncUnitOfWorkConnection) -> AsyncUnitOfWorkConnection:
        """Acquire a connection to the primary, since a statement has failed on the replica."""
        if failed.is_lost and self._replica is not None:
            self._replica.retreat.fail(0.0)
        self._replicas.fall_back("failed")
        return await self._from_primary()

    async def _from_primary(self) -> AsyncUnitOfWorkConnection:
        """Acquire a connection to the primary, which must be one and have the position; if not, it is left at once."""
        connection = await self._from_server() or await self._from_server()
        if connection is None:
            raise UnavailableError("the server that the URL leads to is a standby, or a demoted primary")
        return connection

    async def _from_server(self) -> AsyncUnitOfWorkConnection | None:
        primary, wanted = self._replicas.primary, self._wanted
        connection = await primary.acquire(self._left())
        if not wanted.is_demanding:
            return connection
        driver, fit = connection.driver, False
        try:
            asked = now()
            if driver.standing is None or asked - driver.standing.at > FRESH_S or not wanted.is_met(driver.standing):
                driver.standing = standing(await connection.ask(STANDING), asked)
            fit = wanted.may_ask(driver.standing)
            if not fit:
                connection.is_lost = True  # as are all those that are as old
                await driver.cut()
        finally:
            if not fit:
                await primary.release(connection)
        return connection if fit else None

    def _left(self) -> Characteristics:
        """Return the characteristics with what is left of the timeout."""
        if self._deadline is None:
            return self._characteristics
        return self._characteristics._replace(timeout=max(0.001, self._deadline - time.monotonic()))


def _share(end: float, number: int) -> float:
    """Return when the first of a number of tries must end, so that each has the same time."""
    begun = time.monotonic()
    return begun + max(0.0, end - begun) / number
