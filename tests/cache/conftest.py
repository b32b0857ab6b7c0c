"""Opens storages of either API, and a Redis that a test may disturb."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from mesh_storage import MeshStorage
from tests.contract.conftest import Open, opener
from tests.redis_server import RedisServer, redis_server

POLL = 0.1
LATEST = POLL + 0.1
"""The seconds after which everybody sees a commit, by the promise."""
NEVER = 60.0


@pytest.fixture(params=["sync", "asyncio"])
def open_storage(request: pytest.FixtureRequest) -> Iterator[Open]:
    """Yield what opens a storage of either API, behind the names of the sync one."""
    with opener(request.param) as opens:
        yield opens


@pytest.fixture
def storage(open_storage: Open, mesh_storage_url: str) -> Iterator[MeshStorage]:
    with open_storage(mesh_storage_url) as opened:
        yield opened


@pytest.fixture
def other(open_storage: Open, mesh_storage_url: str) -> Iterator[MeshStorage]:
    """Yield a second storage on the same database, which stands for another process: the two share nothing."""
    with open_storage(mesh_storage_url) as opened:
        yield opened


@pytest.fixture
def redis() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@pytest.fixture
def raw(mesh_storage_url: str) -> Iterator[psycopg.Connection[Any]]:
    """Yield a connection that is none of the library's."""
    with psycopg.connect(mesh_storage_url, autocommit=True) as connection:
        yield connection
