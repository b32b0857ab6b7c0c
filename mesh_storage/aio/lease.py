"""A lease: an entry of the shared state that one process at a time has, and renews in the background."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Self
from weakref import WeakMethod

from mesh_storage.aio.postgres.concurrency import AsyncRepeated, uninterrupted
from mesh_storage.aio.postgres.pool import AsyncPool
from mesh_storage.aio.unit_of_work import AsyncScope
from mesh_storage.errors import ClosedError, ConflictError, InvalidInputError, MeshStorageError, StorageTimeoutError
from mesh_storage.models import StateEntry
from mesh_storage.postgres.characteristics import Characteristics
from mesh_storage.postgres.ownership import Ownership
from mesh_storage.postgres.tenure import Tenure, now
from mesh_storage.repositories import checks
from mesh_storage.repositories.expiring import check_ttl

logger = logging.getLogger("mesh_storage")

_NAME_LENGTH = 255
_SHORTEST_TTL = timedelta(seconds=0.1)
_LONGEST_WAIT_S = 365 * 86_400
_POLL_S = 0.25
"""Longest time between two attempts, so that it is soon seen that another gave the lease back."""
_LONGEST_ATTEMPT_S = 5.0
_SHORTEST_ATTEMPT_S = 1.0


class AsyncLease:
    """The lease of a name, held by one process at a time; see `MeshStorage.lease`.

    `held` and `token` may be read by any thread or task.
    """

    def __init__(
        self, storage: object, pool: AsyncPool, name: str, holder: bytes, *, ttl: timedelta, wait: float | None
    ) -> None:
        self._storage = storage  # keeps the bundled server running
        self._pool = pool
        self._name = checks.text("name", name, _NAME_LENGTH)
        self._holder = checks.content("holder", holder)
        if not isinstance(ttl, timedelta) or ttl < _SHORTEST_TTL:
            raise InvalidInputError("ttl must be a timedelta from 0.1 s to 100 years", field="ttl")
        check_ttl(ttl)
        self._ttl = ttl
        if wait is not None and (
            isinstance(wait, bool) or not isinstance(wait, (int, float)) or not 0 <= wait <= _LONGEST_WAIT_S
        ):
            raise InvalidInputError(
                f"wait must be None or a number of seconds, 0 to {_LONGEST_WAIT_S} (a year)", field="wait"
            )
        self._wait = wait
        self._tenure: Tenure | None = None
        self._renewal: AsyncRepeated | None = None

    @property
    def held(self) -> bool:
        """Whether it is held for certain; False as soon as it may be lost, and in a forked child."""
        return self._tenure is not None and self._tenure.left > 0

    @property
    def token(self) -> int:
        """The version of the entry, which is larger for each later holder; for `state.check`.

        Raises:
            MeshStorageError: The lease was never acquired.
        """
        if self._tenure is None:
            raise MeshStorageError("this lease was not acquired yet: use it in a `with` block")
        return self._tenure.token

    async def __aenter__(self) -> Self:
        """Acquire the lease, and renew it from now on."""
        if self._renewal is not None:
            raise MeshStorageError("this lease is already acquired; call lease() again for another one")
        try:
            await self._await_turn()
        except BaseException:
            await self.__aexit__(None, None, None)  # it may have been acquired before the interruption
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the lease back; if that fails it is logged, and the lease expires by itself."""
        tenure, renewal = self._tenure, self._renewal
        self._renewal = None
        if tenure is None or renewal is None or tenure.owner.inherited:  # in a forked child, it is the parent's
            return
        await uninterrupted(tenure.owner, self._leave, tenure, renewal)

    async def _await_turn(self) -> None:
        end = None if self._wait is None else time.monotonic() + self._wait
        while True:
            try:
                refusal: MeshStorageError | None = await self._attempt(end)
            except MeshStorageError as error:
                if not error.retryable and not isinstance(error, StorageTimeoutError):
                    raise
                refusal = error
            if refusal is None:
                return
            pause = _POLL_S * (0.5 + random.random() / 2)  # noqa: S311 - not used for security
            if end is not None:
                pause = min(pause, end - time.monotonic())
                if pause <= 0:
                    raise refusal
            await asyncio.sleep(pause)

    async def _attempt(self, end: float | None) -> ConflictError | None:
        """Acquire the lease, or return why not."""
        longest = min(_LONGEST_ATTEMPT_S, self._ttl.total_seconds())
        while True:
            left = longest if end is None else min(longest, end - time.monotonic())
            timeout = max(_SHORTEST_ATTEMPT_S, left)
            # Reading first, since an upsert in vain locks the row and takes a transaction id.
            async with self._unit_of_work(timeout, read_only=True) as uow:
                present = await uow.state.find(self._name)
            if present is not None:
                return self._refused(present)
            with suppress(ConflictError):  # another was faster
                await self._acquire(timeout)
                return None

    def _refused(self, present: StateEntry) -> ConflictError:
        return ConflictError(
            f"another holds the lease {self._name!r}; see `holder`", actual=present.version, holder=present.value
        )

    async def _acquire(self, timeout: float) -> None:
        owner, token = Ownership(), None
        try:
            async with self._unit_of_work(timeout) as uow:
                asked = now()
                entry = await uow.state.put(self._name, self._holder, if_version=0, ttl=self._ttl)
                token = entry.version
                # An insert draws its version before it waits for the key, so a holder of meanwhile may have a larger
                # one. An update draws it with the row locked.
                entry = await uow.state.put(self._name, self._holder, if_version=token, ttl=self._ttl)
                token = entry.version
            assert token is not None, "it is stored"
            self._hold(Tenure(owner, token, self._ttl.total_seconds(), asked))
        except BaseException:
            # Also if the outcome of the commit is unknown: nobody else ever has this version.
            if token is not None and self._renewal is None:
                if self._tenure is not None:
                    self._tenure.end()
                await uninterrupted(owner, self._give_back, token)
            raise

    def _hold(self, tenure: Tenure) -> None:
        if not tenure.left:
            raise StorageTimeoutError("the lease expired before the server responded", retryable=True)
        self._tenure = tenure
        self._renewal = AsyncRepeated(WeakMethod(self._renew), self._pause(tenure))
        logger.info("lease acquired", extra={"event": "lease", "lease": self._name, "token": tenure.token})

    async def _renew(self) -> float | None:
        """Renew the lease; return the seconds until the next attempt, or None if it is lost."""
        tenure = self._tenure
        assert tenure is not None, "only what was acquired is renewed"
        if tenure.over:
            return None
        if not (left := tenure.left):
            tenure.end()
            self._lost(tenure, "expired")
            return None
        try:
            async with self._unit_of_work(min(left, self._share)) as uow:
                asked = now()
                await uow.state.touch(self._name, if_version=tenure.token, ttl=self._ttl)
        except ConflictError:
            tenure.end()
            self._lost(tenure, "taken")
            return None
        except ClosedError:
            self._lost(tenure, "closed")  # nobody else has it before it expires
            return None
        except MeshStorageError as error:
            logger.debug("renewal failed", exc_info=error)
            return min(tenure.left, self._share / 4)
        tenure.renew(asked)
        return self._pause(tenure)

    async def _leave(self, tenure: Tenure, renewal: AsyncRepeated) -> None:
        known = tenure.over
        tenure.end()
        try:
            await renewal.stop()
        finally:
            if not await self._give_back(tenure.token) and not known:
                self._lost(tenure, "taken")

    async def _give_back(self, token: int) -> bool:
        """Delete the entry of this version; return False if there was none."""
        try:
            async with self._unit_of_work(self._share) as uow:
                await uow.state.delete(self._name, if_version=token)
        except ConflictError:
            return False
        except MeshStorageError as error:
            logger.warning(
                "lease not released, so it expires by itself",
                extra={"event": "lease", "lease": self._name, "token": token, "error": type(error).__name__},
            )
        else:
            logger.info("lease released", extra={"event": "lease", "lease": self._name, "token": token})
        return True

    def _lost(self, tenure: Tenure, reason: str) -> None:
        logger.warning(
            "lease lost", extra={"event": "lease", "lease": self._name, "token": tenure.token, "reason": reason}
        )

    @property
    def _share(self) -> float:
        """The seconds for one request: another can still follow, and a frozen one locks the entry for no longer."""
        return min(self._ttl.total_seconds() / 3, _LONGEST_ATTEMPT_S)

    def _pause(self, tenure: Tenure) -> float:
        """Return the seconds until a third of the time is over, counted from the last request."""
        return max(0.0, tenure.left - self._ttl.total_seconds() * 2 / 3)

    def _unit_of_work(self, timeout: float, *, read_only: bool = False) -> AsyncScope:
        characteristics = Characteristics(read_only=read_only, timeout=timeout)
        return AsyncScope(self._storage, self._pool, characteristics, 0, commits=True, beside=True)
