"""Servers of several versions, and databases on them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from backup_help import SYSTEM_15, server_of, system_server

from mesh_storage.embedded.server import EmbeddedServer
from mesh_storage.postgres.server import Server
from mesh_storage.testing import Databases


@pytest.fixture(scope="session")
def databases_of(mesh_storage_databases: Databases) -> Iterator[Callable[[str], Databases]]:
    """Yield what makes databases on a server of a version; skip where that is not there."""
    made: dict[str, Databases] = {}
    with ExitStack() as stack:

        def give(version: str) -> Databases:
            if version not in made:
                made[version] = start(version)
            return made[version]

        def start(version: str) -> Databases:
            if version == "15":
                if not SYSTEM_15.exists():
                    pytest.skip("PostgreSQL 15 is not there")
                databases = Databases(stack.enter_context(system_server(SYSTEM_15, "-c listen_addresses=''")))
            elif version == "18" and not os.environ.get("MESH_STORAGE_TEST_URL"):
                return mesh_storage_databases
            else:
                server = EmbeddedServer.throw_away(version=version)
                stack.callback(server.close)
                databases = Databases({**server.connect_arguments, "dbname": "postgres"})
            stack.callback(databases.close)
            return databases

        yield give


@pytest.fixture
def server(mesh_storage_url: str) -> Server:
    """Return the server of the database that `storage` is on."""
    return server_of(mesh_storage_url)


@pytest.fixture
def bare(mesh_storage_databases: Databases) -> Iterator[Server]:
    """Yield another database, one without the schema."""
    with mesh_storage_databases.fresh(with_schema=False) as url:
        yield server_of(url)
