"""A relay between a client and its server that can stop passing bytes, without closing anything, like a cut cable."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote, urlencode

from psycopg.conninfo import conninfo_to_dict

PORT = 6543


class Relay:
    """Passes bytes on; `url` is the address of the database behind it."""

    def __init__(self, url: str, directory: Path) -> None:
        self._server = {name: str(value) for name, value in conninfo_to_dict(url).items()}
        user, password = (quote(self._server.get(name, ""), "") for name in ("user", "password"))
        here = urlencode({"host": directory, "port": PORT})
        self.url = f"postgresql://{user}:{password}@/{quote(self._server['dbname'], '')}?{here}"
        self._path = directory / f".s.PGSQL.{PORT}"
        self._passing = threading.Event()
        self._passing.set()
        self._listeners: list[socket.socket] = []
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Listen; clients are refused before."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._path))
        self._listener.listen(100)
        self._listeners.append(self._listener)
        self._run(self._accept, self._listener)

    def stop(self) -> None:
        """Close everything, and refuse clients."""
        self._path.unlink(missing_ok=True)
        for each in (self._listener, *self._open):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self._passing.set()

    def cut(self) -> None:
        """Pass nothing on any more, in either direction."""
        self._passing.clear()

    def mend(self) -> None:
        """Pass on again, also what came meanwhile."""
        self._passing.set()

    def close(self) -> None:
        """Close the sockets, once their threads have ended."""
        for each in self._threads:
            each.join()
        for one in (*self._listeners, *self._open):
            one.close()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # it was closed
            while True:
                client, _ = listener.accept()
                server = self._connect()
                self._open += [client, server]
                for one, other in ((client, server), (server, client)):
                    self._run(self._copy, one, other)

    def _run(self, work: Callable[..., None], *sockets: socket.socket) -> None:
        self._threads.append(threading.Thread(target=work, args=sockets))
        self._threads[-1].start()

    def _connect(self) -> socket.socket:
        host, port = self._server["host"], int(self._server.get("port", 5432))
        if not host.startswith("/"):
            return socket.create_connection((host, port))
        server = socket.socket(socket.AF_UNIX)
        server.connect(f"{host}/.s.PGSQL.{port}")
        return server

    def _copy(self, one: socket.socket, other: socket.socket) -> None:
        with suppress(OSError):
            while some := one.recv(65536):
                self._passing.wait()
                other.sendall(some)
        with suppress(OSError):
            other.shutdown(socket.SHUT_RDWR)


@contextmanager
def relayed(url: str, directory: Path) -> Generator[Relay]:
    """Yield a relay to the database of a URL."""
    relay = Relay(url, directory)
    relay.start()
    try:
        yield relay
    finally:
        relay.stop()
        relay.close()
