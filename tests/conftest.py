"""The fixtures of all tests: those that services use, and a second storage on the same database."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mesh_storage import MeshStorage, UnitOfWork
from tests import roles
from tests.redis_server import RedisServer, redis_server

if TYPE_CHECKING:  # imported as a plugin below, so that its assertions are rewritten
    from mesh_storage.testing import Databases

FROZEN_S = 6.0
KEPT = ("MESH_STORAGE_TEST_URL", "MESH_STORAGE_TEST_DISTRIBUTE")

pytest_plugins = ["mesh_storage.testing"]


def pytest_configure() -> None:
    """Let Ctrl-C end what the tests start: in the background, a shell lets its commands ignore it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what a distributed database refuses, if the databases of the tests are distributed."""
    if os.environ.get("MESH_STORAGE_TEST_DISTRIBUTE") == "1":
        for item in items:
            if item.get_closest_marker("one_server"):
                item.add_marker(pytest.mark.skip(reason="refused by a distributed database: docs/scaling.md"))


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the environment and the .env of whoever runs the tests out of them."""
    for name in list(os.environ):
        if name.startswith("MESH_STORAGE_") and name not in KEPT:
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start processes without coverage, whose tracer loses what a signal handler raises.

    At every call it looks a greenlet up in a WeakKeyDictionary, in Python, and clears whatever that raises.
    """
    monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Yield a directory outside of pytest's own, which every new run of pytest closes to other accounts.

    Root's servers run under another account, and some start anew in the middle of a test.
    """
    with tempfile.TemporaryDirectory(prefix="mesh_storage-test-", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def service(mesh_storage_databases: Databases) -> Iterator[roles.Service]:
    """Yield the role of a service."""
    with roles.service_role(mesh_storage_databases) as role:
        yield role


@pytest.fixture
def mesh_storage(mesh_storage_url: str, service: roles.Service) -> Iterator[MeshStorage]:
    """Yield a storage opened on a new database."""
    with MeshStorage.open(service.url(mesh_storage_url) if roles.AS_SERVICE else mesh_storage_url) as opened:
        yield opened


@pytest.fixture
def storage(mesh_storage: MeshStorage) -> MeshStorage:
    """Return the storage by a shorter name."""
    return mesh_storage


@pytest.fixture
def uow(mesh_storage: MeshStorage) -> Iterator[UnitOfWork]:
    """Yield an open unit of work that nobody commits."""
    with mesh_storage.unit_of_work() as unit:
        yield unit


@contextmanager
def frozen(pid: int) -> Generator[None]:
    """Let a process of the server stand still for a block, as one on a stalled disk or a paused machine does."""
    thaw = threading.Timer(FROZEN_S, os.kill, (pid, signal.SIGCONT))
    os.kill(pid, signal.SIGSTOP)
    thaw.start()
    try:
        yield
    finally:
        thaw.cancel()
        os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="session")
def a_redis() -> Iterator[RedisServer]:
    """Yield a Redis for tests that leave it running."""
    with redis_server() as server:
        yield server


@pytest.fixture
def redis_url(a_redis: RedisServer) -> str:
    """Return the URL of a Redis that is running."""
    return a_redis.url
