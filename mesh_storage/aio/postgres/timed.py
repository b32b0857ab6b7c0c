"""psycopg's connection with a limit in its own wait, which ends also where the server stands still and answers nothing.

Limits are kept on this side of the connection, so that a statement costs no more with a timeout than without one. This
needs psycopg's `Connection.wait`, which its manual does not describe: `tests/postgres/test_timed.py` pins what is used.
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
"""Seconds after which psycopg looks for signals, such as that of Ctrl-C."""


class AsyncTimedConnection(AsyncConnection):
    """A connection that waits for the server no longer than to a deadline, and for no single answer beyond a limit."""

    deadline: float | None = None
    """The moment of `time.monotonic()` by which every wait ends."""
    response_timeout: float | None = None
    """Seconds that one wait may take."""
    cancelled = False
    """Whether a request to cancel was sent; it may arrive late and hit a later statement of this connection."""
    silent = False
    """Whether the server did not even answer a request to cancel, so that the connection was closed."""

    async def wait(self, gen: PQGen[T], interval: float = _POLL_S, timeout: float | None = None) -> T:
        """Wait for the server; when the time is over or the wait is interrupted, cancel what the server does.

        Raises:
            psycopg.errors.QueryCanceled: The time was over, and the server has cancelled the statement.
            psycopg.OperationalError: The time was over, and the server did not answer; or the connection is lost.
        """
        begun = time.monotonic()
        limit = self._limit(begun, timeout)
        interrupt: BaseException | None = None
        try:
            return await waiting.wait_async(gen, self.pgconn.socket, interval=interval, timeout=limit)
        except psycopg.OperationalError:
            expired = limit is not None and limit != timeout and time.monotonic() - begun >= limit
            if not expired or self.pgconn.transaction_status != TransactionStatus.ACTIVE:
                raise
        except Exception:
            raise
        except BaseException as error:
            if self.pgconn.transaction_status != TransactionStatus.ACTIVE:
                raise
            interrupt = error
        return await self._cancel_and_wait(gen, interval, interrupt)

    async def hurry(self) -> None:
        """Cancel what the server does, and wait for nothing longer than a moment from now on."""
        self.cancelled = True
        self.response_timeout = GRACE_S
        if capabilities.has_cancel_safe():
            with suppress(psycopg.Error):  # It does not answer, and so the connection will be closed.
                await self.cancel_safe(timeout=GRACE_S)
        else:  # libpq before 17 blocks for as long as the server does.
            request = self.pgconn.get_cancel()
            threading.Thread(target=request.cancel, name="mesh_storage cancel", daemon=True).start()

    def _limit(self, now: float, timeout: float | None) -> float | None:
        limits = [each for each in (timeout, self.response_timeout) if each is not None]
        if self.deadline is not None:
            limits.append(max(0.0, self.deadline - now))
        return min(limits, default=None)

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
            self.pgconn.finish()
            if interrupt is None:
                self.silent = True
                raise psycopg.OperationalError("the server did not answer in time") from error
        except psycopg.Error:
            if interrupt is None:
                raise
        except BaseException:  # Interrupted again.
            self.pgconn.finish()
            raise
        else:
            if interrupt is None:
                return result
        assert interrupt is not None, "all else has returned or raised"
        raise interrupt
