"""The databases of mesh_storage.testing: no monitor is in their way, and a killed run leaves none behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

import psycopg
import pytest

from mesh_storage import MeshStorage, UnavailableError, schema, testing
from mesh_storage.postgres.server import Server
from mesh_storage.testing import Databases
from tests.processes import eventually

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def connect(mesh_storage_databases: Databases) -> dict[str, Any]:
    """Return the connect arguments of the server."""
    return mesh_storage_databases._connect


@pytest.fixture
def admin(connect: dict[str, Any]) -> Iterator[psycopg.Connection[Any]]:
    """Yield a connection to none of the databases."""
    with psycopg.connect(**connect, autocommit=True) as connection:
        yield connection


@pytest.fixture
def monitor(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[psycopg.Connection[Any]]]:
    """Let a monitor connect to each template as soon as it is there, and stay."""
    upgrade = schema.upgrade_server
    with ExitStack() as sessions:
        made: list[psycopg.Connection[Any]] = []

        def upgrade_and_look(server: Server) -> None:
            upgrade(server)
            made.append(sessions.enter_context(psycopg.connect(**{**server.connect, "application_name": "monitor"})))

        monkeypatch.setattr(schema, "upgrade_server", upgrade_and_look)
        yield made


def names(admin: psycopg.Connection[Any]) -> set[str]:
    return {name for (name,) in admin.execute("SELECT datname FROM pg_database")}


def test_a_monitor_keeps_nobody_from_a_fresh_database(
    connect: dict[str, Any], monitor: list[psycopg.Connection[Any]]
) -> None:
    made = Databases(connect)
    with made.fresh() as url, MeshStorage.open(url) as storage:
        assert storage.health().ok
    with pytest.raises(psycopg.OperationalError, match="not currently accepting connections"):
        psycopg.connect(**{**connect, "dbname": made._template})
    made.close()
    (session,) = monitor
    with pytest.raises(psycopg.OperationalError):
        session.execute("SELECT 1")


def test_a_monitor_that_may_not_be_disconnected_is_named(
    connect: dict[str, Any],
    admin: psycopg.Connection[Any],
    monitor: list[psycopg.Connection[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That of a superuser, where the tests are run by a role that may create databases and nothing else."""
    monkeypatch.setattr(testing, "_VACATING_TIMEOUT_S", 0.2)
    role = f"tester_{os.getpid()}"
    admin.execute(f"CREATE ROLE {role} LOGIN CREATEDB".encode())
    upgrade = schema.upgrade_server
    monkeypatch.setattr(schema, "upgrade_server", lambda server: upgrade(Server({**server.connect, "options": ""})))
    try:
        with pytest.raises(UnavailableError, match=r"stays in use by 'monitor' of "):
            Databases({**connect, "options": f"-crole={role}"})
    finally:
        monitor[0].close()
        admin.execute(f"REASSIGN OWNED BY {role} TO CURRENT_USER; DROP OWNED BY {role}; DROP ROLE {role}".encode())
        Databases(connect).close()  # drops what this one could not


def be_killed(connect: dict[str, Any], ready: Connection) -> None:
    made = Databases(connect)
    with made.fresh():
        ready.send(made._prefix)
        signal.pause()


def test_what_a_killed_run_has_left_is_dropped_by_the_next(
    connect: dict[str, Any], admin: psycopg.Connection[Any], mesh_storage_url: str
) -> None:
    receiving, sending = FORK.Pipe(duplex=False)
    process = FORK.Process(target=be_killed, args=[connect, sending])
    process.start()
    assert receiving.poll(60)
    prefix = receiving.recv()

    def left() -> list[str]:
        return sorted(name for name in names(admin) if name.startswith(prefix))

    def dropped() -> bool:
        Databases(connect).close()
        return not left()

    assert left() == [f"{prefix}_1", f"{prefix}_template"]
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert eventually(dropped)
    with MeshStorage.open(mesh_storage_url) as storage:
        assert storage.health().ok
