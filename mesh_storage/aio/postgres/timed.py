"""A psycopg connection with a deadline for every wait, even if the server is suspended or unreachable.

Deadlines are enforced by the client, so that a statement with a timeout costs no more than one without. This relies on
psycopg's undocumented `Connection.wait`; `tests/postgres/test_timed.py` pins what is used of it.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import TypeVar

import psycopg
from psycopg import capabilities, waiting
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus

from mesh_storage.postgres.environment import AsyncConnection
from mesh_storage.postgres.liveness import GRACE_S

T = TypeVar("T")

_POLL_S = 0.1
"""Interval in seconds at which psycopg checks for signals, such as SIGINT."""


class AsyncTimedConnection(AsyncConnection):
    """A connection that waits for the server until a deadline at most, with a limit for each response."""

    deadline: float | None = None
    """The time, by `time.monotonic()`, at which every wait ends."""
    response_timeout: float | None = None
    """Maximum duration of one wait in seconds."""
    tidying = False
    """Whether a deadline that passes closes the connection at once, since there is no statement worth cancelling."""
    cancelled = False
    """Whether a cancel request was sent, which may arrive late and cancel a later statement of this connection."""
    silent = False
    """Whether the server did not respond even to a cancel request, so that the connection was closed."""

    async def wait(self, gen: PQGen[T], interval: float = _POLL_S, timeout: float | None = None) -> T:
        """Wait for the server; once the deadline has passed or the wait is interrupted, cancel the statement.

        Raises:
            psycopg.errors.QueryCanceled: The deadline passed, and the server cancelled the statement.
            psycopg.OperationalError: The deadline passed without a response, or the connection is lost.
        """
        begun = time.monotonic()
        limit = self._limit(begun, timeout)
        interrupt: BaseException | None = None
        try:
            return await waiting.wait_async(gen, self.pgconn.socket, interval=interval, timeout=limit)
        except psycopg.OperationalError as error:
            expired = limit is not None and limit != timeout and time.monotonic() - begun >= limit
            if not expired or self.pgconn.transaction_status != TransactionStatus.ACTIVE:
                raise
            if self.tidying:
                raise self._given_up() from error
        except Exception:
            raise
        except BaseException as error:
            if self.pgconn.transaction_status != TransactionStatus.ACTIVE:
                raise
            interrupt = error
        return await self._cancel_and_wait(gen, interval, interrupt)

    async def hurry(self) -> None:
        """Send a cancel request, and limit all further waiting to the grace period."""
        self.cancelled = True
        self.response_timeout = GRACE_S
        if capabilities.has_cancel_safe():
            with suppress(psycopg.Error):  # no response: the connection will be closed
                await self.cancel_safe(timeout=GRACE_S)
        else:  # before libpq 17, the request blocks until the server responds
            request = self.pgconn.get_cancel()
            threading.Thread(target=request.cancel, name="mesh_storage cancel", daemon=True).start()

    def _given_up(self) -> psycopg.OperationalError:
        self.pgconn.finish()
        self.silent = True
        return psycopg.OperationalError("the server did not respond in time")

    def _limit(self, now: float, timeout: float | None) -> float | None:
        limit = self.response_timeout
        if timeout is not None and (limit is None or timeout < limit):
            limit = timeout
        if self.deadline is not None:
            remaining = max(0.0, self.deadline - now)
            if limit is None or remaining < limit:
                limit = remaining
        return limit

    async def _cancel_and_wait(self, gen: PQGen[T], interval: float, interrupt: BaseException | None) -> T:
        end = time.monotonic() + GRACE_S
        try:
            await self.hurry()
            left = max(0.0, end - time.monotonic())
            result = await waiting.wait_async(gen, self.pgconn.socket, interval=interval, timeout=left)
        except psycopg.errors.QueryCanceled:
            if interrupt is None:
                raise
        except psycopg.OperationalError as error:
            if interrupt is None:
                raise self._given_up() from error
            self.pgconn.finish()
        except psycopg.Error:
            if interrupt is None:
                raise
        except BaseException:  # interrupted again
            self.pgconn.finish()
            raise
        else:
            if interrupt is None:
                return result
        assert interrupt is not None, "all other paths return or raise"
        raise interrupt
