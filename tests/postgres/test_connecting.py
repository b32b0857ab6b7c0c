"""Connecting ends within one limit, however many hosts there are and whatever they do."""

from __future__ import annotations

import asyncio
import gc
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from pydantic import SecretStr

from mesh_storage import MeshStorage, MeshStorageError, Settings, StorageTimeoutError, UnavailableError
from mesh_storage.aio import AsyncMeshStorage
from mesh_storage.postgres.server import open_server
from mesh_storage.postgres.timed import TimedConnection
from tests.processes import eventually, sockets
from tests.servers import unused_port


class Doors:
    """Several TCP ports that lead to one server, until they accept connections and never answer."""

    def __init__(self, url: str, number: int) -> None:
        self._to = conninfo_to_dict(url)
        self._deaf = threading.Event()
        self._closed = threading.Event()
        self._listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
        self._threads = [threading.Thread(target=self._accept, args=[each]) for each in self._listening]
        for each in self._threads:
            each.start()

    @property
    def url(self) -> str:
        """The URL that has all of them."""
        hosts = ",".join(f"127.0.0.1:{each.getsockname()[1]}" for each in self._listening)
        return f"postgresql://{self._to['user']}@{hosts}/{self._to['dbname']}?sslmode=disable&gssencmode=disable"

    def turn_deaf(self) -> None:
        """Answer nothing from now on, and end what is open."""
        self._deaf.set()

    def close(self) -> None:
        """Close all."""
        self._closed.set()
        for each in self._threads:
            each.join()
        for each in self._listening:
            each.close()

    def _accept(self, listening: socket.socket) -> None:
        serving: list[threading.Thread] = []
        while not self._closed.is_set():
            if select.select([listening], [], [], 0.02)[0]:
                serving.append(threading.Thread(target=self._serve, args=[listening.accept()[0]]))
                serving[-1].start()
        for each in serving:
            each.join()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server, suppress(OSError):
            if self._deaf.is_set():
                self._closed.wait()
                return
            server.connect(f"{self._to['host']}/.s.PGSQL.{self._to['port']}")
            other = {client: server, server: client}
            while not self._deaf.is_set() and not self._closed.is_set():
                for source in select.select([client, server], [], [], 0.02)[0]:
                    data = source.recv(65_536)
                    if not data:
                        return
                    other[source].sendall(data)


@pytest.fixture
def doors(mesh_storage_url: str) -> Iterator[Doors]:
    made = Doors(mesh_storage_url, 3)
    yield made
    made.close()


def settings(doors: Doors, **more: Any) -> Settings:
    return Settings(url=SecretStr(doors.url), **more)


def test_three_deaf_hosts_are_given_up_within_one_limit(doors: Doors) -> None:
    with MeshStorage.open(settings=settings(doors, connect_timeout=3)) as storage:
        with storage.begin() as uow:
            uow.state.put("k", b"v")
        doors.turn_deaf()
        begun = time.monotonic()
        health = storage.health()
        assert time.monotonic() - begun < 2
        assert (health.ok, health.connected) == (False, False)
        begun = time.monotonic()
        with pytest.raises(StorageTimeoutError) as late, storage.begin(timeout=1):
            pass
        assert time.monotonic() - begun < 1.5
        assert late.value.retryable
        begun = time.monotonic()
        with pytest.raises(UnavailableError), storage.begin():
            pass
        assert time.monotonic() - begun < 4
    assert not [each for each in threading.enumerate() if each.name == "mesh_storage connect" and not each.daemon]


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Keep the collector from tidying up."""
    gc.disable()
    yield
    gc.enable()


def refusing_and_deaf(url: str) -> tuple[Doors, Settings]:
    """Return a door that is deaf, and the settings to try it after a host that refuses."""
    doors = Doors(url, 1)
    doors.turn_deaf()
    return doors, Settings(url=SecretStr(doors.url.replace("127.0.0.1:", f"127.0.0.1:{unused_port()},127.0.0.1:", 1)))


@pytest.mark.usefixtures("uncollected")
def test_an_attempt_that_nobody_waits_for_any_more_leaves_no_socket(mesh_storage_url: str) -> None:
    before = sockets()
    doors, where = refusing_and_deaf(mesh_storage_url)
    with MeshStorage(where, open_server(where)) as storage:
        with suppress(StorageTimeoutError), storage.begin(timeout=0.2):
            pass
        assert eventually(lambda: not [each for each in threading.enumerate() if each.name == "mesh_storage connect"])
    doors.close()
    assert sockets() == before


@pytest.mark.usefixtures("uncollected")
def test_an_attempt_that_nobody_waits_for_any_more_leaves_no_socket_on_the_asyncio_side(mesh_storage_url: str) -> None:
    async def main() -> None:
        async with AsyncMeshStorage(where, open_server(where)) as storage:
            with suppress(StorageTimeoutError):
                async with storage.begin(timeout=0.2):
                    pass

    before = sockets()
    doors, where = refusing_and_deaf(mesh_storage_url)
    asyncio.run(main())
    doors.close()
    assert sockets() == before


def test_the_same_for_asyncio(doors: Doors) -> None:
    async def main() -> None:
        async with AsyncMeshStorage.open(settings=settings(doors, connect_timeout=3)) as storage:
            async with storage.begin() as uow:
                await uow.state.put("k", b"v")
            doors.turn_deaf()
            begun = time.monotonic()
            health = await storage.health()
            assert time.monotonic() - begun < 2
            assert (health.ok, health.connected) == (False, False)
            begun = time.monotonic()
            with pytest.raises(UnavailableError):
                async with storage.begin():
                    pass
            assert time.monotonic() - begun < 4

    asyncio.run(main())


def test_opening_is_limited_as_well(doors: Doors) -> None:
    doors.turn_deaf()
    begun = time.monotonic()
    with pytest.raises(UnavailableError):
        MeshStorage.open(settings=settings(doors, connect_timeout=3))
    assert time.monotonic() - begun < 4


def test_the_next_host_is_tried_in_time(mesh_storage_url: str) -> None:
    deaf, answering = Doors(mesh_storage_url, 1), Doors(mesh_storage_url, 1)
    deaf.turn_deaf()
    first, second = (each.url.partition("@")[2].partition("/")[0] for each in (deaf, answering))
    url = answering.url.replace(second, f"{first},{second}")
    try:
        with MeshStorage.open(settings=Settings(url=SecretStr(url), connect_timeout=6)) as storage:
            begun = time.monotonic()
            with storage.begin() as uow:
                uow.state.put("k", b"v")
            assert time.monotonic() - begun < 6
    finally:
        deaf.close()
        answering.close()


def test_what_is_slow_before_the_connection_is_in_the_limit(
    storage: MeshStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resolver of names, say, which libpq calls and nobody can interrupt."""
    resolved = threading.Event()
    made: list[psycopg.Connection[Any]] = []
    connect = TimedConnection.connect

    def slow(**parameters: Any) -> TimedConnection:
        resolved.wait(10)
        made.append(connect(**parameters))
        return made[-1]

    monkeypatch.setattr(TimedConnection, "connect", slow)
    begun = time.monotonic()
    with pytest.raises(MeshStorageError), storage.begin(timeout=0.5):
        pass
    assert time.monotonic() - begun < 2
    resolved.set()
    deadline = time.monotonic() + 10
    while not (made and made[-1].closed):  # The late one, which nobody waits for any more, is closed.
        assert time.monotonic() < deadline
        time.sleep(0.01)
