"""The entries in Redis, which may be away, slow, full or wrong: nothing that it does is an error for a reader."""

from __future__ import annotations

import logging
import time

from mesh_storage.cache.client import connect_async, failures, is_answer
from mesh_storage.cache.sparing import Sparing

logger = logging.getLogger("mesh_storage")

_PAUSE_S = 1.0
"""How long Redis is left alone after a failure, so that few reads wait for one that is away."""
_LARGEST = 2**20
"""The bytes of an entry at most: Redis serves one client at a time, and a large value would make all others wait."""
_DIGITS = 20

# Numbers of the same width are ordered like strings; as numbers, Lua would round them.
_REPLACE = f"""
if redis.call('GETRANGE', KEYS[1], 0, {_DIGITS - 1}) < ARGV[1] then
    redis.call('SET', KEYS[1], ARGV[1] .. ARGV[2], 'PX', ARGV[3])
end
"""


class AsyncEntries:
    """Texts by name, each with the number of the position at which it was read."""

    def __init__(self, url: str) -> None:
        """Prepare a client, which connects when it is first used.

        Raises:
            ConfigurationError: redis-py is not installed, or the URL is invalid; it is not repeated.
        """
        self._client = connect_async(url)
        self._failures = failures()
        self._records = Sparing()
        self._next = float("-inf")

    @property
    def available(self) -> bool:
        """Whether Redis has not just failed."""
        return time.monotonic() >= self._next

    async def get(self, name: str) -> tuple[int, str | bytes] | None:
        """Return the position and the text of an entry, or None."""
        if not self.available:
            return None
        try:
            found = await self._client.get(name)
            return None if found is None else (int(found[:_DIGITS]), found[_DIGITS:])
        except self._failures as error:
            self._failed(error)
        except ValueError:  # not an entry of ours
            pass
        return None

    async def put(self, name: str, number: int, text: str, seconds: float) -> None:
        """Store an entry for some seconds, in place of one from an earlier position or none."""
        milliseconds = int(seconds * 1000)
        if milliseconds < 1 or len(text) > _LARGEST or len(text.encode()) > _LARGEST or not self.available:
            return
        try:
            await self._client.eval(_REPLACE, 1, name, f"{number:0{_DIGITS}}", text, milliseconds)
        except self._failures as error:
            self._failed(error)

    async def close(self) -> None:
        """Close the connections to Redis."""
        try:
            await self._client.connection_pool.disconnect()
        except self._failures as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        if not is_answer(error):
            self._next = time.monotonic() + _PAUSE_S
        if self._records.due():
            # Not its text, which may contain the address.
            logger.warning(
                "Redis fails, so the database answers", extra={"event": "cache", "error": type(error).__name__}
            )
