"""Databases that are restored, copied, crash or share one Redis: what was read from one is never served for another."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import psycopg
import pytest

from mesh_storage import Cached, ConfigurationError, MeshStorage, UnitOfWork, schema
from mesh_storage.embedded.server import programs
from mesh_storage.testing import Databases
from tests.cache.conftest import LATEST, NEVER, POLL
from tests.contract.conftest import Open
from tests.processes import eventually
from tests.servers import new_server, unused_port


def put(storage: MeshStorage, value: Any) -> None:
    with storage.begin() as uow:
        uow.runtime_config.put("a", value)


def test_databases_share_a_redis_without_a_word(
    open_storage: Open, mesh_storage_databases: Databases, redis_url: str
) -> None:
    """Their logs have the same epoch, since both are copies of one database."""
    with (
        mesh_storage_databases.fresh() as one_url,
        mesh_storage_databases.fresh() as two_url,
        open_storage(one_url) as one,
        open_storage(two_url) as two,
    ):
        caches: list[Cached] = [each.cached(redis_url, poll=NEVER) for each in (one, two)]
        put(one, "one")
        assert [cached.runtime_config.value("a", None) for cached in caches] == ["one", None]
        put(two, "two")
        for _ in range(2):
            assert [cached.runtime_config.value("a", None) for cached in caches] == ["one", "two"]


def test_a_restore_is_seen_at_once_by_its_process_and_in_time_by_others(
    storage: MeshStorage, other: MeshStorage, redis_url: str, tmp_path: Path
) -> None:
    mine, theirs = storage.cached(redis_url, poll=NEVER), other.cached(redis_url, poll=POLL)
    put(storage, "old")
    storage.backup(tmp_path / "backup")
    assert mine.runtime_config.value("a") == "old"
    put(storage, "new")
    assert mine.runtime_config.value("a") == theirs.runtime_config.value("a") == "new"
    storage.restore(tmp_path / "backup", overwrite=True)
    assert mine.runtime_config.value("a") == "old"
    time.sleep(LATEST)
    assert theirs.runtime_config.value("a") == "old"
    put(storage, "newer")
    assert mine.runtime_config.value("a") == "newer"


def kill_the_server(home: Path, _: psycopg.Connection[Any]) -> None:
    os.kill(int((home / "data" / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)


def kill_a_session(_: Path, connection: psycopg.Connection[Any]) -> None:
    """Make the server recover, without a new postmaster."""
    os.kill(connection.info.backend_pid, signal.SIGKILL)


@pytest.mark.parametrize("kill", [kill_the_server, kill_a_session])
def test_ids_that_are_used_anew_after_a_crash_do_not_make_an_entry_look_newer_than_it_is(
    tmp_path: Path, redis_url: str, kill: Callable[[Path, psycopg.Connection[Any]], None]
) -> None:
    """A cached read is from a position that the server forgets, and at which it is again after a commit."""
    home = tmp_path / "mesh"
    with MeshStorage.open(f"embedded:{home}") as storage:
        put(storage, 1)
        cached = storage.cached(redis_url, poll=NEVER)
        with psycopg.connect(**storage._server.connect, autocommit=True) as connection:
            connection.execute("CHECKPOINT")
            for _ in range(20):  # nothing of which needs to be on disk
                with connection.transaction(force_rollback=True):
                    connection.execute("SELECT pg_current_xact_id()")
            assert cached.runtime_config.value("a") == 1
            begun = begin_time(connection)
            kill(home, connection)

        def is_back() -> bool:
            try:
                with psycopg.connect(**storage._server.connect) as connection:
                    return begin_time(connection) != begun
            except psycopg.OperationalError:
                return False

        assert eventually(is_back, 60)
        with psycopg.connect(**storage._server.connect, autocommit=True) as connection:
            connection.execute("UPDATE mesh_runtime_config SET value = '2'")

        def touch(uow: UnitOfWork) -> None:
            uow.state.put("so that it looks", b"")

        storage.run(touch, within=30)
        assert cached.runtime_config.value("a") == 2


def begin_time(connection: psycopg.Connection[Any]) -> Any:
    """Return what is new once the server has recovered."""
    query = "SELECT pg_postmaster_start_time(), pg_last_wal_replay_lsn()"
    return connection.execute(query).fetchone()


def test_a_standby_cannot_tell_and_says_so(open_storage: Open, redis_url: str) -> None:
    with (
        new_server(programs(), "-c", "wal_level=replica", port=unused_port()) as primary,
        new_server(programs(), port=unused_port()) as standby,
    ):
        primary.create()
        primary.start()
        url = conninfo(primary.connect)
        schema.upgrade(url)
        standby.copy(primary, "standby")
        standby.start()
        with open_storage(conninfo(standby.connect)) as storage:
            cached = storage.cached(redis_url)
            with pytest.raises(ConfigurationError, match="target_session_attrs=read-write"):
                cached.state.find("a")


def conninfo(connect: dict[str, Any]) -> str:
    where = urlencode({"host": connect["host"], "port": connect["port"]})
    return f"postgresql://{connect['user']}:{quote(connect['password'], '')}@/{connect['dbname']}?{where}"
