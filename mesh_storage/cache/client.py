"""The clients of redis-py, for either side."""

from __future__ import annotations

import asyncio
from importlib.util import find_spec
from typing import Any

from mesh_storage.errors import ConfigurationError, InvalidInputError

_TIMEOUT_S = 0.1
"""How long Redis may take to answer, and in a thread, to connect, unless the URL says otherwise."""
_CONNECTIONS = 1000


def connect(url: str) -> Any:
    """Return a client, which connects when it is first used.

    Raises:
        ConfigurationError: redis-py is not installed, or the URL is invalid; it is not repeated.
    """
    _check(url)
    from redis import Redis

    return _made(Redis, url)


def connect_async(url: str) -> Any:
    """Return a client for asyncio; raises as `connect`."""
    _check(url)
    from redis.asyncio import Redis

    return _Timed(_made(Redis, url))


class _Timed:
    """A client for asyncio with one timeout for a whole command; redis-py makes a task for each step, up to 3.11."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.connection_pool = client.connection_pool
        self._timeout: float | None = client.connection_pool.connection_kwargs["socket_timeout"]
        client.connection_pool.connection_kwargs.update(socket_timeout=None, socket_connect_timeout=None)

    async def get(self, name: str) -> Any:
        async with asyncio.timeout(self._timeout):
            return await self._client.get(name)

    async def eval(self, script: str, *arguments: Any) -> Any:
        async with asyncio.timeout(self._timeout):
            return await self._client.eval(script, *arguments)


def failures() -> tuple[type[Exception], ...]:
    """Return what a client raises if Redis does not do what it was asked for."""
    from redis.exceptions import RedisError

    return RedisError, OSError


def is_answer(error: Exception) -> bool:
    """Return whether Redis answered, if only to refuse, as one does that is full or a replica."""
    from redis.exceptions import ResponseError

    return isinstance(error, ResponseError)


def _check(url: object) -> None:
    if find_spec("redis") is None:
        raise ConfigurationError("a cache needs the extra redis: pip install 'mesh-storage[redis]'")
    if not isinstance(url, str):
        raise InvalidInputError(f"redis_url must be a str, not {type(url).__name__}", field="redis_url")


def _made(kind: Any, url: str) -> Any:
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    try:
        return kind.from_url(
            url,
            max_connections=_CONNECTIONS,
            retry=Retry(NoBackoff(), 0),  # the default waits for seconds between its attempts
            socket_timeout=_TIMEOUT_S,
            socket_connect_timeout=_TIMEOUT_S,
        )
    except (ValueError, TypeError):
        raise ConfigurationError(
            "redis_url is not a URL that redis-py accepts, such as redis://user:password@host:6379/0"
        ) from None
