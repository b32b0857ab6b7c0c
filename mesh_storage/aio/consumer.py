"""The loop behind `consume`: claims deliveries, and has each one handled and acknowledged in one unit of work."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING
from weakref import WeakMethod

from mesh_storage.aio.postgres.concurrency import AsyncRepeated, apart, to_the_end
from mesh_storage.aio.postgres.pool import AsyncPool
from mesh_storage.aio.unit_of_work import AsyncScope, AsyncUnitOfWork
from mesh_storage.errors import ClosedError, ConflictError, MeshStorageError
from mesh_storage.postgres.characteristics import Characteristics
from mesh_storage.postgres.outage import ConsumingOutage
from mesh_storage.repositories.consuming import Terms, delay_after, reason_of
from mesh_storage.repositories.deliveries import Delivery

if TYPE_CHECKING:  # OpenTelemetry is an extra
    from mesh_storage.telemetry.observed import Observed

logger = logging.getLogger("mesh_storage")

_NOTICE_S = 0.05
"""How soon the end of the loop is noticed while it waits."""
_LONGEST_ATTEMPT_S = 5.0
_HANDLING = Characteristics()
# A claim may be lost in a crash of the server: then the acknowledgement finds its token gone, and another claims anew.
_CLAIMING = Characteristics(durability="relaxed")


class AsyncConsumer:
    """One worker that consumes the deliveries of a receiver; see `MeshStorage.consume`."""

    def __init__(
        self,
        storage: object,
        pool: AsyncPool,
        handle: Callable[[AsyncUnitOfWork, Delivery], Awaitable[object]],
        terms: Terms,
        *,
        scope: type[AsyncScope],
        observed: Observed | None,
        slow: float,
    ) -> None:
        self._storage = storage  # keeps the bundled server running
        self._pool = pool
        self._scope = scope
        self._observed = observed
        self._handle = handle
        self._terms = terms
        self._slow = slow
        self._ended = False
        self._outage = ConsumingOutage(terms.receiver)
        self._held: tuple[Delivery, ...] = ()
        """Those in hand, whose leases are extended; replaced as a whole, since a thread reads it."""

    async def run(self) -> None:
        """Consume until it is stopped, cancelled, or the storage is closed, and then give back what is not begun."""
        renewal = AsyncRepeated(WeakMethod(self._extend), self._share)
        try:
            await to_the_end(self._consume, self._end)
        finally:
            await renewal.stop()

    def _end(self) -> None:
        self._ended = True

    @property
    def _over(self) -> bool:
        return self._ended or self._terms.stopped or self._pool.closed

    async def _consume(self) -> None:
        while not self._over:
            try:
                claimed = await self._claim()
            except ClosedError:
                return
            except MeshStorageError as error:
                await self._sleep(self._outage.pause(error))
                continue
            self._outage.over()
            if claimed:
                await self._handle_all(claimed)
            else:
                await self._sleep(self._terms.poll)

    async def _claim(self) -> list[Delivery]:
        terms = self._terms
        async with self._unit_of_work(_CLAIMING) as uow:
            return await uow.messages.claim(
                terms.receiver, limit=terms.batch, lease=terms.lease, max_attempts=terms.max_attempts
            )

    async def _handle_all(self, claimed: list[Delivery]) -> None:
        self._held = tuple(claimed)
        try:
            for number, delivery in enumerate(claimed):
                if self._over:
                    break
                await self._handle_one(delivery)
                self._held = tuple(claimed[number + 1 :])
        finally:
            left, self._held = self._held, ()
            if left:
                with suppress(MeshStorageError):  # then the leases lapse
                    await self._return(left)

    async def _return(self, left: tuple[Delivery, ...]) -> None:
        async with self._unit_of_work(_CLAIMING) as uow:
            await uow.messages.nack(left, delay=timedelta(0))

    async def _handle_one(self, delivery: Delivery) -> None:
        try:
            async with self._unit_of_work(_HANDLING) as uow:
                await apart(self._handle, uow, delivery)
                await uow.messages.ack([delivery])
        except ConflictError as error:
            # Of the handler's effects, or since the lease was lost: then it cannot be given back.
            if await self._give_back(delivery, error):
                self._log(delivery, error)
            else:
                self._log_lost(delivery, error)
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is its failure
            self._log(delivery, error)
            await self._give_back(delivery, error)

    async def _give_back(self, delivery: Delivery, failure: Exception) -> bool:
        """Have a failed delivery tried again later, or set aside, as soon as the server is there within its lease.

        Return whether its lease was still held, as far as is known.
        """
        end = time.monotonic() + self._terms.lease.total_seconds()
        while time.monotonic() < end and not self._pool.closed:
            try:
                async with self._unit_of_work(_HANDLING) as uow:
                    if self._terms.is_last(delivery.attempts):
                        await uow.messages.bury([delivery], reason_of(failure))
                    else:
                        await uow.messages.nack([delivery], delay=delay_after(failure))
            except ConflictError:
                return False  # it was acknowledged, although that was not known, or another has it
            except ClosedError:
                break
            except MeshStorageError as error:
                await self._sleep(self._outage.pause(error))
                if self._over:
                    break
            else:
                self._outage.over()
                break
        return True

    async def _extend(self) -> float | None:
        """Extend the leases of those in hand, and return the seconds until the next time."""
        try:
            await self._extend_all(self._held)
        except MeshStorageError as error:
            logger.debug("extension failed", exc_info=error)
            return self._share / 4
        return self._share

    async def _extend_all(self, held: tuple[Delivery, ...]) -> None:
        if not held or not self._held:
            return
        timeout = min(self._share, _LONGEST_ATTEMPT_S)
        try:
            async with self._unit_of_work(Characteristics(timeout=timeout), beside=True) as uow:
                await uow.messages.extend(held, self._terms.lease)
        except ConflictError:  # one of them is done by now, or lost
            middle = len(held) // 2
            if middle:
                await self._extend_all(held[:middle])
                await self._extend_all(held[middle:])

    def _log_lost(self, delivery: Delivery, error: Exception) -> None:
        logger.warning(
            "delivery of %r to %r lost, so its effects were rolled back: its lease was over before the end",
            delivery.message.id,
            delivery.receiver,
            extra={
                "event": "consume",
                "receiver": delivery.receiver,
                "message_id": delivery.message.id,
                "attempts": delivery.attempts,
            },
        )
        self._count(error, "lost")

    def _log(self, delivery: Delivery, error: Exception) -> None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raised_at = f"{frame.filename}:{frame.lineno}"
        logger.warning(
            "delivery of %r to %r failed, attempt %d: %s, raised at %s",
            delivery.message.id,
            delivery.receiver,
            delivery.attempts,
            type(error).__name__,
            raised_at,
            extra={
                "event": "consume",
                "receiver": delivery.receiver,
                "message_id": delivery.message.id,
                "attempts": delivery.attempts,
                "dead": self._terms.is_last(delivery.attempts),
                "error": type(error).__name__,
                "raised_at": raised_at,
            },
        )
        logger.debug("delivery failed", exc_info=error)
        self._count(error, "dead" if self._terms.is_last(delivery.attempts) else "retried")

    def _count(self, error: Exception, outcome: str) -> None:
        if self._observed is not None:
            self._observed.count_delivery_failure(error, outcome)

    async def _sleep(self, seconds: float) -> None:
        due = time.monotonic() + seconds
        while (left := due - time.monotonic()) > 0:
            await asyncio.sleep(min(left, _NOTICE_S))
            if self._over:
                return

    @property
    def _share(self) -> float:
        """The seconds between two extensions: a third of the lease, so that another can still follow a failed one."""
        return self._terms.lease.total_seconds() / 3

    def _unit_of_work(self, characteristics: Characteristics, *, beside: bool = False) -> AsyncScope:
        if beside:  # in the background, as the renewal of a lease
            return AsyncScope(self._storage, self._pool, characteristics, 0.0, commits=True, beside=True)
        return self._scope(self._storage, self._pool, characteristics, self._slow, commits=True)
