"""What a watch goes through: outages, standbys, many writers at once, and batches of any size."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import random
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from pydantic import SecretStr

from mesh_storage import (
    Batch,
    ConfigurationError,
    MeshStorage,
    MeshStorageError,
    Settings,
    UnavailableError,
    schema,
    watch,
)
from mesh_storage.postgres.spool import Spool
from mesh_storage.testing import Databases
from tests.processes import eventually
from tests.servers import PASSWORD, new_cluster
from tools.test_matrix import find

POLL = 0.02
SECONDS = float(os.environ.get("MESH_STORAGE_TEST_WATCH_SECONDS", "6"))
LARGE = int(os.environ.get("MESH_STORAGE_TEST_WATCH_ROWS", "60000"))


@pytest.fixture
def raw(mesh_storage_url: str) -> Iterator[psycopg.Connection[Any]]:
    """Yield a connection that is none of the library's."""
    with psycopg.connect(mesh_storage_url, autocommit=True) as connection:
        yield connection


def keys(batch: Batch) -> list[str]:
    return [change.key for change in batch.changes]


def put(storage: MeshStorage, key: str) -> None:
    with storage.begin() as uow:
        uow.state.put(key, b"")


# Outages


def test_lost_connections_are_replaced_and_the_outage_is_logged_once(
    storage: MeshStorage, raw: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mesh_storage")
    watching = storage.watch("state", poll=POLL)
    next(watching)
    for n in range(3):
        raw.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        raw.execute("INSERT INTO mesh_state (key, value) VALUES (%s, '')", [f"{n}"])
        assert keys(next(watching)) == [f"{n}"]
    records = [vars(record) for record in caplog.records if vars(record).get("event") == "watch"]
    lost, back = records[::2], records[1::2]
    assert len(lost) == len(back) <= 3
    assert {record["levelname"] for record in lost} <= {"WARNING"}
    assert {record["levelname"] for record in back} <= {"INFO"}


def test_while_the_server_is_away_it_waits_and_says_so_once(
    storage: MeshStorage, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "mesh_storage")
    watching = storage.watch("state", poll=POLL)
    next(watching)
    acquire, attempts = storage._pool.acquire, itertools.count(1)

    def refused(*args: Any, **kwargs: Any) -> Any:
        if next(attempts) <= 5:
            raise UnavailableError("away", sqlstate="57P03")
        return acquire(*args, **kwargs)

    put(storage, "meanwhile")
    monkeypatch.setattr(storage._pool, "acquire", refused)
    assert keys(next(watching)) == ["meanwhile"]
    lost, back = [vars(record) for record in caplog.records if vars(record).get("event") == "watch"]
    assert (lost["error"], lost["sqlstate"]) == ("UnavailableError", "57P03")
    assert back["attempts"] == 5
    assert back["duration_s"] > 0


def test_a_lock_on_a_table_is_waited_out(mesh_storage_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mesh_storage")
    with MeshStorage.open(settings=Settings(url=SecretStr(mesh_storage_url), lock_timeout=0.05)) as storage:
        watching = storage.watch("state", poll=POLL)
        next(watching)
        with psycopg.connect(mesh_storage_url) as other, ThreadPoolExecutor(1) as threads:
            other.execute("LOCK TABLE mesh_state")
            seen = threads.submit(next, watching)
            assert eventually(lambda: seen.done() or "watch interrupted" in caplog.text)
            other.execute("INSERT INTO mesh_state (key, value) VALUES ('k', '')")
            other.commit()
            assert keys(seen.result(30)) == ["k"]
    lost, _ = [vars(record) for record in caplog.records if vars(record).get("event") == "watch"]
    assert (lost["error"], lost["sqlstate"]) == ("StorageTimeoutError", "55P03")


def test_a_session_that_ends_in_the_middle_of_a_large_batch_is_replaced(
    storage: MeshStorage, raw: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw.execute(
        "INSERT INTO mesh_state (key, value) SELECT n, repeat('x', 200)::bytea FROM generate_series(1, 30000) n"
    )
    append, parts = Spool.append, itertools.count(1)

    def terminate(spool: Spool, rows: Any) -> None:
        if next(parts) == 2:
            raw.execute(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        append(spool, rows)

    monkeypatch.setattr(Spool, "append", terminate)
    seen: list[str] = []
    for batch in storage.watch("state", poll=POLL):
        seen += keys(batch)
        if not batch.more:
            break
    assert len(seen) == len(set(seen)) == 30_000
    assert next(parts) > 30_000 / 250


def test_a_full_disk_is_an_error_that_leaves_the_connection_usable(
    storage: MeshStorage, raw: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw.execute(
        "INSERT INTO mesh_state (key, value) SELECT n, repeat('x', 200)::bytea FROM generate_series(1, 30000) n"
    )

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Spool, "append", refuse)
    with pytest.raises(MeshStorageError, match="OSError") as error:
        next(storage.watch("state", poll=POLL))
    assert isinstance(error.value.__cause__, OSError)
    with storage.begin(read_only=True) as uow:
        assert uow.state.get("1").value == b"x" * 200
    assert raw.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND datname = current_database()"
    ).fetchone() == (1,)


def test_an_error_that_will_not_pass_is_raised(storage: MeshStorage, raw: psycopg.Connection[Any]) -> None:
    watching = storage.watch("state", poll=POLL)
    next(watching)
    raw.execute("ALTER TABLE mesh_changes RENAME TO elsewhere")
    with pytest.raises(Exception, match="mesh-storage upgrade"):
        next(watching)


@pytest.mark.slow
def test_a_standby_is_refused_until_it_is_promoted(raw: psycopg.Connection[Any]) -> None:
    programs = find(str(raw.info.server_version // 10_000))
    assert programs is not None
    with new_cluster(programs) as cluster:
        schema.upgrade(cluster.url)
        standby = cluster.standby
        assert standby is not None
        url = f"postgresql://postgres:{quote(PASSWORD, '')}@127.0.0.1:{standby.port}/postgres"
        with MeshStorage.open(url) as storage:
            with storage.begin(read_only=True) as uow, pytest.raises(ConfigurationError, match="target_session_attrs"):
                uow.changes.cursor()
            with pytest.raises(ConfigurationError, match="target_session_attrs"):
                next(storage.watch("state", poll=POLL))
            cluster.promote()
            assert eventually(lambda: storage.health().writable)
            put(storage, "a")
            assert keys(next(storage.watch("state", poll=POLL))) == ["a"]


def test_a_new_cursor_comes_from_time_to_time_without_a_change(
    storage: MeshStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_BOOKMARK_S", 0.1)
    watching = storage.watch("state", prefix="mine/", poll=POLL)
    first = next(watching)
    put(storage, "other")
    second = next(watching)
    while second.cursor == first.cursor:  # the other's commit is not on disk yet, on a server that does not wait for it
        second = next(watching)
    assert second.changes == []
    put(storage, "mine/a")
    assert keys(next(storage.watch("state", after=second.cursor, poll=POLL))) == ["mine/a"]
    assert keys(next(watching)) == ["mine/a"]


CHILD = """
import sys
from mesh_storage import MeshStorage
with MeshStorage.open(sys.argv[1]) as storage:
    for batch in storage.watch("state", after=sys.argv[2], poll=0.02):
        print(*(change.key for change in batch.changes), batch.cursor)
        break
"""


def test_another_process_goes_on(storage: MeshStorage, mesh_storage_url: str) -> None:
    cursor = next(storage.watch("state", poll=POLL)).cursor
    for n in range(2):
        put(storage, f"{n}")
        ran = subprocess.run(
            [sys.executable, "-c", CHILD, mesh_storage_url, cursor], capture_output=True, text=True, check=True
        )
        key, cursor = ran.stdout.split()
        assert key == f"{n}"


# Size


def test_the_memory_does_not_grow_with_the_batch(storage: MeshStorage, raw: psycopg.Connection[Any]) -> None:
    cursor = next(storage.watch("state", poll=POLL)).cursor
    raw.execute(
        "INSERT INTO mesh_state (key, value) SELECT n::text, decode(repeat('00', 200), 'hex') "
        "FROM generate_series(1, %s) n",
        [LARGE],
    )
    for after in (cursor, None):
        watching = storage.watch("state", after=after, poll=POLL)
        tracemalloc.start()
        try:
            seen = 0
            for batch in watching:
                seen += len(batch.changes)
                assert len(batch.changes) <= 1000
                if not batch.more:
                    break
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert seen == LARGE
        assert peak < 16 * 2**20


def test_changes_that_are_not_committed_cost_a_watcher_nothing(storage: MeshStorage, mesh_storage_url: str) -> None:
    with psycopg.connect(mesh_storage_url) as writer:
        writer.execute("INSERT INTO mesh_state (key, value) SELECT n::text, '' FROM generate_series(1, 20000) n")
        put(storage, "other")
        with storage.begin(read_only=True) as uow:
            cursor = uow.changes.since(None, ["state"]).cursor
        read = "SELECT idx_tup_fetch + seq_tup_read FROM pg_stat_xact_user_tables WHERE relname = 'mesh_changes'"
        with storage.begin(read_only=True, isolation="repeatable read") as uow:
            assert uow.changes.since(cursor, ["state"]).changes == []
            assert uow.session.connection().exec_driver_sql(read).scalar_one() < 100
        writer.commit()
    with storage.begin(read_only=True) as uow:
        assert len(uow.changes.since(cursor, ["state"]).changes) == 20_000


# Many writers


class Follower:
    """A copy of the shared state that is kept by batches, each of which is checked."""

    def __init__(self) -> None:
        self.copy: dict[str, bytes] = {}
        self.seen: set[tuple[str, int]] = set()
        self.cursor: str | None = None

    def apply(self, batch: Batch) -> None:
        changes = {(change.key, change.version) for change in batch.changes}
        assert len(set(keys(batch))) == len(batch.changes)
        assert not changes & self.seen, "the same change twice"
        self.seen |= changes
        for change in batch.changes:
            if change.entry is None:
                self.copy.pop(change.key, None)
            else:
                assert change.entry.version == change.version
                self.copy[change.key] = change.entry.value
        self.cursor = batch.cursor


class Writers:
    """Writers of all kinds, flat out."""

    KEYS = 40

    def __init__(self, storage: MeshStorage, url: str) -> None:
        self.storage, self.url = storage, url
        self.stop = threading.Event()
        self.written = 0

    def put(self, chance: random.Random) -> None:
        with self.storage.begin() as uow:
            uow.state.put(self.key(chance), b"%d" % chance.randrange(10**9))

    def put_many_in_order(self, chance: random.Random) -> None:
        with self.storage.begin() as uow:
            uow.state.put_many({self.key(chance): b"many" for _ in range(3)})

    def abort(self, chance: random.Random) -> None:
        with self.storage.unit_of_work() as uow:
            uow.state.put(self.key(chance), b"never")

    def savepoint(self, chance: random.Random) -> None:
        with self.storage.begin() as uow, suppress(ZeroDivisionError), uow.savepoint():
            uow.state.put(self.key(chance), b"never")
            raise ZeroDivisionError

    def stay_open(self, chance: random.Random) -> None:
        with self.storage.begin() as uow:
            uow.state.put(self.key(chance), b"late")
            self.stop.wait(chance.random() / 5)

    def delete(self, chance: random.Random) -> None:
        with self.storage.begin() as uow:
            uow.state.delete_prefix(self.key(chance))

    def sql(self, chance: random.Random) -> None:
        with psycopg.connect(self.url) as connection:
            connection.execute(
                "INSERT INTO mesh_state (key, value) VALUES (%s, 'sql') ON CONFLICT (key) DO UPDATE SET value = 'sql'",
                [self.key(chance)],
            )

    def key(self, chance: random.Random) -> str:
        return f"{chance.randrange(self.KEYS):02}"

    def work(self, seed: int) -> None:
        chance = random.Random(seed)
        how = [self.put] * 8 + [
            self.put_many_in_order,
            self.abort,
            self.savepoint,
            self.stay_open,
            self.delete,
            self.sql,
        ]
        while not self.stop.is_set():
            chance.choice(how)(chance)
            self.written += 1


def test_nothing_is_lost_and_nothing_comes_twice_beside_eight_writers(
    mesh_storage_url: str,
) -> None:
    """A follower that is killed and begins anew where it was equals the table at the moment of each batch."""
    chance = random.Random(7)
    follower, checked, restarts = Follower(), 0, 0
    with (
        MeshStorage.open(mesh_storage_url) as storage,
        MeshStorage.open(mesh_storage_url) as reading,
        psycopg.connect(mesh_storage_url) as foreign,
        ThreadPoolExecutor(8) as threads,
    ):
        foreign.execute("SELECT pg_current_xact_id()")  # open throughout, and it wrote
        writers = Writers(storage, mesh_storage_url)
        running = [threads.submit(writers.work, seed) for seed in range(8)]
        try:
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                # Through the loop, until it is killed at some moment.
                for batch in reading.watch("state", after=follower.cursor, poll=0.01):
                    follower.apply(batch)
                    if chance.random() < 0.2:
                        restarts += 1
                        break
                # And at one moment together with the table.
                with reading.begin(read_only=True, isolation="repeatable read") as uow:
                    batch = uow.changes.since(follower.cursor, ["state"])
                    table = {entry.key: entry.value for entry in uow.state.stream()}
                follower.apply(batch)
                assert follower.copy == table
                checked += 1
        finally:
            writers.stop.set()
            for each in running:
                each.result()
        with reading.begin(read_only=True, isolation="repeatable read") as uow:
            follower.apply(uow.changes.since(follower.cursor, ["state"]))
            assert follower.copy == {entry.key: entry.value for entry in uow.state.stream()}
            assert {(entry.key, entry.version) for entry in uow.state.stream()} <= follower.seen
    assert checked > SECONDS
    assert restarts
    assert writers.written > 100


# Transactions in any order


class Interleaved(RuleBasedStateMachine):
    """Transactions that begin, write and end in any order, over a model of what is committed."""

    CONNECTIONS = 3

    def __init__(self, storage: MeshStorage, url: str) -> None:
        super().__init__()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DELETE FROM mesh_state")
        self.storage = storage
        self.connections = [psycopg.connect(url) for _ in range(self.CONNECTIONS)]
        self.pending: list[dict[str, bytes | None]] = [{} for _ in self.connections]
        self.committed: dict[str, bytes] = {}
        self.follower = Follower()
        with storage.begin(read_only=True) as uow:
            self.follower.apply(uow.changes.since(None, ["state"]))
        self.changed: set[str] = set()

    def free(self, number: int, key: str) -> bool:
        """Return whether no other transaction has locked the key."""
        return not any(key in pending for other, pending in enumerate(self.pending) if other != number)

    @rule(number=st.integers(0, CONNECTIONS - 1), key=st.sampled_from("abcd"), value=st.binary(max_size=2))
    def write(self, number: int, key: str, value: bytes) -> None:
        if self.free(number, key):
            self.connections[number].execute(
                "INSERT INTO mesh_state (key, value) VALUES (%s, %s) ON CONFLICT (key) DO UPDATE SET value = %s",
                [key, value, value],
            )
            self.pending[number][key] = value

    @rule(number=st.integers(0, CONNECTIONS - 1), key=st.sampled_from("abcd"))
    def delete(self, number: int, key: str) -> None:
        there = self.pending[number].get(key, self.committed.get(key))
        if self.free(number, key) and there is not None:
            self.connections[number].execute("DELETE FROM mesh_state WHERE key = %s", [key])
            self.pending[number][key] = None

    @rule(number=st.integers(0, CONNECTIONS - 1), key=st.sampled_from("abcd"))
    def undo_to_a_savepoint(self, number: int, key: str) -> None:
        if self.free(number, key):
            connection = self.connections[number]
            connection.execute("SAVEPOINT s")
            connection.execute("INSERT INTO mesh_state (key, value) VALUES (%s, '') ON CONFLICT DO NOTHING", [key])
            connection.execute("ROLLBACK TO s")
            self.pending[number].setdefault("", None)  # it has begun

    @rule(number=st.integers(0, CONNECTIONS - 1))
    def commit(self, number: int) -> None:
        self.connections[number].commit()
        for key, value in self.pending[number].items():
            if key:
                self.changed.add(key)
                self.committed.pop(key, None)
                if value is not None:
                    self.committed[key] = value
        self.pending[number] = {}

    @rule(number=st.integers(0, CONNECTIONS - 1))
    def roll_back(self, number: int) -> None:
        self.connections[number].rollback()
        self.pending[number] = {}

    @rule()
    def look(self) -> None:
        with self.storage.begin(read_only=True) as uow:
            batch = uow.changes.since(self.follower.cursor, ["state"])
        assert set(keys(batch)) == self.changed
        self.follower.apply(batch)
        assert self.follower.copy == self.committed
        self.changed.clear()

    def teardown(self) -> None:
        for connection in self.connections:
            connection.close()


def test_transactions_that_end_in_any_order(mesh_storage_databases: Databases) -> None:
    with mesh_storage_databases.fresh() as url, MeshStorage.open(url) as storage:
        run_state_machine_as_test(
            lambda: Interleaved(storage, url),
            settings=settings(
                max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )
