"""The fixtures for databases of the Go service, and the commands that take them over."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator

import psycopg
import pytest

from mesh_storage.testing import Databases
from tests.processes import start_alembic
from tests.schema import legacy


@pytest.fixture
def legacy_url(mesh_storage_databases: Databases) -> Iterator[str]:
    """Yield the URL of a database of the Go service with awkward rows."""
    with mesh_storage_databases.fresh(with_schema=False) as url:
        with psycopg.connect(url) as connection:
            legacy.create(connection)
            legacy.fill(connection)
        yield url


@pytest.fixture
def connection(legacy_url: str) -> Iterator[legacy.Connection]:
    """Yield a connection to that database in autocommit."""
    with psycopg.connect(legacy_url, autocommit=True) as made:
        yield made


Alembic = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def alembic() -> Iterator[Alembic]:
    """Yield what starts `alembic` in a process of its own, with nothing but MESH_STORAGE_URL."""
    started: list[subprocess.Popen[str]] = []

    def start(url: str, *arguments: str) -> subprocess.Popen[str]:
        process = start_alembic(url, *arguments)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
