"""Leases whose process dies, stands still, is cut off, forks or is interrupted; the rest is in tests/contract."""

from __future__ import annotations

import gc
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from sqlalchemy import Engine, event

from mesh_storage import (
    ConflictError,
    InvalidInputError,
    Lease,
    MeshStorage,
    MeshStorageError,
    StorageTimeoutError,
    UnavailableError,
)
from mesh_storage.aio import AsyncLease
from mesh_storage.postgres import tenure
from mesh_storage.postgres.driver import Driver
from mesh_storage.testing import Databases
from tests.electors import NAME, Sight, Term, terms
from tests.processes import ROOT, eventually
from tests.relay import relayed

TTL = timedelta(seconds=0.6)
LONG = timedelta(hours=1)


@pytest.fixture
def server(mesh_storage_url: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(mesh_storage_url, autocommit=True) as connection:
        yield connection


def stored(server: psycopg.Connection[Any]) -> list[Any]:
    return [bytes(value) for (value,) in server.execute("SELECT value FROM mesh_state ORDER BY key")]


def renewing() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "mesh_storage renewal"]


# Arguments


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", "x" * 256),
        ("name", "a\0b"),
        ("name", 1),
        ("holder", "text"),
        ("holder", None),
        ("ttl", None),
        ("ttl", 10),
        ("ttl", timedelta(0)),
        ("ttl", timedelta(seconds=0.099)),
        ("ttl", timedelta(days=40_000)),
        ("wait", -1),
        ("wait", True),
        ("wait", "1"),
        ("wait", float("nan")),
        ("wait", float("inf")),
    ],
)
@pytest.mark.parametrize("lease", [Lease, AsyncLease])
def test_a_wrong_argument_is_refused_at_once(storage: MeshStorage, lease: Any, field: str, value: Any) -> None:
    given = {"name": "leader", "holder": b"", "ttl": LONG, "wait": None} | {field: value}
    with pytest.raises(InvalidInputError) as error:
        lease(storage, storage._pool, given.pop("name"), given.pop("holder"), **given)
    assert error.value.field == field


def test_it_is_entered_once_at_a_time_and_has_no_token_before(storage: MeshStorage) -> None:
    lease = storage.lease("leader", b"a", ttl=LONG)
    assert not lease.held
    with pytest.raises(MeshStorageError, match="not acquired"):
        _ = lease.token
    with lease:
        token = lease.token
        with pytest.raises(MeshStorageError, match="already acquired"), lease:
            pass
        assert lease.held
    with lease:
        assert lease.token > token


# What it costs


def test_a_renewal_is_one_statement(storage: MeshStorage) -> None:
    executed: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        executed.append(statement)

    with storage.lease("leader", b"a", ttl=TTL):
        event.listen(Engine, "before_cursor_execute", note)
        try:
            time.sleep(2 * TTL.total_seconds())
        finally:
            event.remove(Engine, "before_cursor_execute", note)
    assert 3 <= len(executed) <= 6
    assert all("UPDATE mesh_state SET expires_at" in each for each in executed)


# The thread that renews


def test_the_thread_ends_with_the_block(storage: MeshStorage) -> None:
    assert renewing() == []
    with storage.lease("leader", b"a", ttl=LONG):
        (thread,) = renewing()
        assert thread.daemon
    assert renewing() == []
    with (
        suppress(ConflictError),
        storage.lease("leader", b"a", ttl=LONG),
        storage.lease("leader", b"b", ttl=LONG, wait=0),
    ):
        pass
    assert renewing() == []


def test_a_lease_that_is_dropped_without_leaving_is_renewed_no_longer(
    storage: MeshStorage, server: psycopg.Connection[Any]
) -> None:
    lease = storage.lease("leader", b"a", ttl=TTL)
    lease.__enter__()
    assert len(renewing()) == 1
    del lease
    gc.collect()
    with storage.lease("leader", b"b", ttl=LONG, wait=TTL.total_seconds() + 1):
        assert stored(server) == [b"b"]
    assert eventually(lambda: renewing() == [])


def test_a_process_ends_although_it_holds_a_lease(mesh_storage_url: str) -> None:
    code = (
        "import sys; from datetime import timedelta; from mesh_storage import MeshStorage\n"
        "lease = MeshStorage.open(sys.argv[1]).lease('leader', b'a', ttl=timedelta(hours=1))\n"
        "print(lease.__enter__().held)"
    )
    ran = subprocess.run([sys.executable, "-c", code, mesh_storage_url], capture_output=True, check=True, timeout=60)
    assert (ran.stdout, ran.stderr) == (b"True\n", b"")


def test_a_forked_child_holds_nothing_and_gives_nothing_back(
    storage: MeshStorage, server: psycopg.Connection[Any]
) -> None:
    with ExitStack() as stack:
        lease = stack.enter_context(storage.lease("leader", b"parent", ttl=TTL))
        child = os.fork()
        if child == 0:
            code = 1
            try:
                held = lease.held
                stack.close()
                code = 10 + held
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 10
        time.sleep(TTL.total_seconds())
        assert lease.held
        assert stored(server) == [b"parent"]


# Clocks


def test_the_wall_clock_says_nothing(storage: MeshStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    right = time.time
    with storage.lease("leader", b"a", ttl=TTL) as lease:
        for jump in (-1e6, 1e6):
            monkeypatch.setattr(time, "time", lambda jump=jump: right() + jump)
            end = time.monotonic() + TTL.total_seconds()
            while time.monotonic() < end:
                assert lease.held
                time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="other platforms have no such clock")
def test_the_clock_goes_on_while_the_machine_is_suspended(
    storage: MeshStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tenure.now() == pytest.approx(time.clock_gettime(time.CLOCK_BOOTTIME), abs=1)
    with storage.lease("leader", b"a", ttl=LONG) as lease:
        awake = tenure.now
        monkeypatch.setattr(tenure, "now", lambda: awake() + LONG.total_seconds())
        assert not lease.held


# Outages and slow servers


def test_a_lost_connection_is_no_lost_lease(storage: MeshStorage, server: psycopg.Connection[Any]) -> None:
    ttl = timedelta(seconds=2)
    with storage.lease("leader", b"a", ttl=ttl) as lease:
        end = time.monotonic() + 2 * ttl.total_seconds()
        while time.monotonic() < end:
            assert lease.held
            server.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            time.sleep(0.5)


def test_it_is_not_held_beyond_its_time_however_long_a_renewal_takes(
    storage: MeshStorage, server: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    with storage.lease("leader", b"a", ttl=TTL) as lease:
        with server.transaction():
            server.execute("SELECT FROM mesh_state FOR UPDATE")
            locked = time.monotonic()
            assert eventually(lambda: not lease.held)
            assert time.monotonic() - locked <= TTL.total_seconds() + 0.1
            assert eventually(lambda: "lease lost" in caplog.text)
            leaving = time.monotonic()
        time.sleep(TTL.total_seconds())
        assert not lease.held  # also now that it could be renewed
    assert time.monotonic() - leaving < 5
    assert [vars(each)["reason"] for each in caplog.records if each.getMessage() == "lease lost"] == ["expired"]


def test_an_outage_is_waited_out(mesh_storage_url: str, tmp_path: Path) -> None:
    with relayed(mesh_storage_url, tmp_path) as relay, MeshStorage.open(relay.url) as storage:
        relay.stop()
        with pytest.raises(UnavailableError), storage.lease("leader", b"a", ttl=LONG, wait=0):
            pass
        with pytest.raises(UnavailableError), storage.lease("leader", b"a", ttl=LONG, wait=0.5):
            pass
        threading.Timer(0.5, relay.start).start()
        with storage.lease("leader", b"a", ttl=LONG, wait=30) as lease:
            assert lease.held


def test_a_silent_server_is_waited_for_within_the_wait(mesh_storage_url: str, tmp_path: Path) -> None:
    with relayed(mesh_storage_url, tmp_path) as relay, MeshStorage.open(relay.url) as storage:
        relay.cut()
        begun = time.monotonic()
        with pytest.raises(StorageTimeoutError), storage.lease("leader", b"a", ttl=LONG, wait=0.5):
            pass
        assert time.monotonic() - begun < 3
        threading.Timer(1, relay.mend).start()
        with storage.lease("leader", b"a", ttl=LONG, wait=30) as lease:
            assert lease.held


# Commits of unknown outcome, and interruptions


@contextmanager
def commits(monkeypatch: pytest.MonkeyPatch, commit: Callable[[Driver, Callable[[], None]], None]) -> Iterator[None]:
    """Let the first commit go as given."""
    right, left = Driver.commit, [commit]

    def replaced(driver: Driver) -> None:
        if left:
            left.pop()(driver, partial(right, driver))
        else:
            right(driver)

    with monkeypatch.context() as patch:
        patch.setattr(Driver, "commit", replaced)
        yield


@pytest.mark.parametrize("committed", [True, False])
def test_a_lease_whose_commit_has_an_unknown_outcome_is_no_lease(
    storage: MeshStorage, server: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    def lose(driver: Driver, commit: Callable[[], None]) -> None:
        if committed:
            commit()
        driver.connection.pgconn.finish()
        raise psycopg.OperationalError("the connection is lost")

    with commits(monkeypatch, lose), pytest.raises(UnavailableError), storage.lease("leader", b"a", ttl=LONG, wait=0):
        pass
    assert stored(server) == []
    with commits(monkeypatch, lose), storage.lease("leader", b"a", ttl=LONG, wait=10) as lease:
        assert server.execute("SELECT version FROM mesh_state").fetchall() == [(lease.token,)]


@pytest.mark.parametrize("moment", ["before the commit", "after the commit", "once acquired"])
def test_an_interrupted_acquisition_leaves_nothing(
    storage: MeshStorage,
    server: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    moment: str,
) -> None:
    def interrupt(_: Driver, commit: Callable[[], None]) -> None:
        if moment != "before the commit":
            commit()
        if moment != "once acquired":
            raise KeyboardInterrupt

    def logged(record: logging.LogRecord) -> bool:
        if moment == "once acquired" and record.getMessage() == "lease acquired":
            raise KeyboardInterrupt
        return True

    logger = logging.getLogger("mesh_storage")
    caplog.set_level(logging.INFO, logger.name)
    logger.addFilter(logged)
    try:
        lease = storage.lease("leader", b"a", ttl=LONG)
        with commits(monkeypatch, interrupt), pytest.raises(KeyboardInterrupt), lease:
            pass
    finally:
        logger.removeFilter(logged)
    assert stored(server) == []
    assert not lease.held
    assert renewing() == []
    with lease:
        assert lease.held


@pytest.mark.usefixtures("unmeasured")
def test_ctrl_c_at_any_moment_leaves_nothing(mesh_storage_url: str) -> None:
    code = """
import signal, sys, threading, time, os, random
from datetime import timedelta
from mesh_storage import MeshStorage

interrupted = 0
with MeshStorage.open(sys.argv[1]) as storage:
    for number in range(60):
        timer = threading.Timer(random.uniform(0, 0.02), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            with storage.lease("leader", b"a", ttl=timedelta(hours=1)) as lease:
                time.sleep(30)
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
        with storage.begin(read_only=True) as uow:
            assert uow.state.find("leader") is None, number
print(interrupted)
"""
    ran = subprocess.run(
        [sys.executable, "-c", code, mesh_storage_url], capture_output=True, text=True, check=False, timeout=120
    )
    assert (ran.returncode, ran.stdout) == (0, "60\n"), ran.stderr


def test_a_signal_whose_handler_exits_ends_a_watch_and_gives_the_lease_back(mesh_storage_url: str) -> None:
    code = """
import signal, sys
from datetime import timedelta
from mesh_storage import MeshStorage

signal.signal(signal.SIGTERM, lambda *_: sys.exit())
with MeshStorage.open(sys.argv[1]) as storage, storage.lease("leader", b"a", ttl=timedelta(hours=1)):
    for batch in storage.watch("routes", poll=60):
        print("watching", flush=True)
"""
    command = [sys.executable, "-c", code, mesh_storage_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "watching\n"
            process.terminate()
            assert (*process.communicate(timeout=30), process.returncode) == ("", "", 0)
        finally:
            process.kill()
    with MeshStorage.open(mesh_storage_url) as storage, storage.begin(read_only=True) as uow:
        assert uow.state.find("leader") is None


# A holder that is gone


@contextmanager
def holding(url: str, path: Path, ttl: timedelta) -> Iterator[subprocess.Popen[bytes]]:
    """Let a process hold the lease for as long as it can."""
    command = [sys.executable, "-m", "tests.electors", url, path, str(ttl.total_seconds()), "1e6"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        try:
            assert eventually(lambda: path.exists() and b"\n" in path.read_bytes(), 60)
            yield process
        finally:
            process.kill()


def seen(path: Path) -> list[Term]:
    lines = [line.split() for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return terms(Sight(int(token), float(before), float(after)) for token, before, after in lines)


@pytest.mark.parametrize("fate", ["killed", "frozen", "cut off"])
def test_who_is_gone_is_followed_within_the_ttl_and_a_second(mesh_storage_url: str, tmp_path: Path, fate: str) -> None:
    ttl = timedelta(seconds=1)
    rounds = int(os.environ.get("FOLLOWS", "2"))
    waits = []
    with relayed(mesh_storage_url, tmp_path) as relay, MeshStorage.open(mesh_storage_url) as storage:
        for number in range(rounds):
            path = tmp_path / f"holder-{number}"
            with holding(relay.url, path, ttl) as process:
                time.sleep(random.uniform(0, 0.4))  # at any moment between two renewals
                gone = time.monotonic()
                if fate == "killed":
                    process.kill()
                elif fate == "frozen":
                    process.send_signal(signal.SIGSTOP)
                else:
                    relay.cut()
                with storage.lease(NAME, b"follower", ttl=ttl, wait=30) as lease:
                    followed = time.monotonic()
                    waits.append(followed - gone)
                    process.send_signal(signal.SIGCONT)
                    time.sleep(0.2)  # it would go on now
                    assert lease.held
                    process.kill()
                process.wait()
                relay.mend()
            (before,) = seen(path)
            assert before.end < followed
            assert before.token < lease.token
    print(f"{fate}: followed after {', '.join(f'{each:.2f}' for each in sorted(waits))} s")
    assert max(waits) < ttl.total_seconds() + 1


# Against a model

RUNS = settings(max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
holders = st.integers(0, 2)


class LeaseMachine(RuleBasedStateMachine):
    """Three leases of one name, whose renewals come when the machine says so, over a model of the entry."""

    def __init__(self, storage: MeshStorage) -> None:
        super().__init__()
        self.storage = storage
        with storage.begin() as uow:
            uow.state.delete_prefix("")
        self.leases = [storage.lease(NAME, b"%d" % number, ttl=LONG, wait=0) for number in range(3)]
        self.entered: set[int] = set()
        self.held: set[int] = set()
        self.holder: bytes | None = None
        """The holder of the live entry."""
        self.token = 0
        """The version of the live entry, or the last one."""

    def teardown(self) -> None:
        for number in self.entered:
            self.leases[number].__exit__(None, None, None)

    def change(self, sql: str) -> None:
        with self.storage.begin() as uow:
            uow.session.connection().exec_driver_sql(sql)

    @rule(number=holders)
    def acquire(self, number: int) -> None:
        if number in self.entered:
            return
        if self.holder is not None:
            with pytest.raises(ConflictError) as error:
                self.leases[number].__enter__()
            assert (error.value.holder, error.value.actual) == (self.holder, self.token)
        else:
            self.leases[number].__enter__()
            assert self.leases[number].token > self.token
            self.token, self.holder = self.leases[number].token, b"%d" % number
            self.entered.add(number)
            self.held.add(number)

    @rule(number=holders)
    def renew(self, number: int) -> None:
        if number in self.held:
            following = self.leases[number]._renew()
            if not self.is_live(number):
                assert following is None
                self.held.discard(number)
            else:
                assert following == pytest.approx(LONG.total_seconds() / 3, abs=5)

    @rule(number=holders)
    def leave(self, number: int) -> None:
        if number in self.entered:
            live = self.is_live(number)
            self.leases[number].__exit__(None, None, None)
            self.entered.discard(number)
            self.held.discard(number)
            if live:
                self.holder = None

    @rule()
    def expire(self) -> None:
        self.change(f"UPDATE mesh_state SET expires_at = clock_timestamp() WHERE key = '{NAME}'")
        self.holder = None

    @rule()
    def delete(self) -> None:
        self.change(f"DELETE FROM mesh_state WHERE key = '{NAME}'")
        self.holder = None

    @rule(number=st.integers(0, 3))
    def put(self, number: int) -> None:
        """Take it by force, also in the name of one of the three."""
        with self.storage.begin() as uow:
            version = uow.state.put(NAME, b"%d" % number, ttl=LONG).version
        assert version is not None
        assert version > self.token
        self.token, self.holder = version, b"%d" % number

    def is_live(self, number: int) -> bool:
        return self.holder is not None and number in self.entered and self.leases[number].token == self.token

    @invariant()
    def it_is_held_until_a_renewal_says_otherwise(self) -> None:
        assert {number for number in range(3) if self.leases[number].held} == self.held

    @invariant()
    def only_the_holder_of_the_live_entry_passes_the_check(self) -> None:
        for number in self.entered:
            if self.is_live(number):
                self.check(number)
            else:
                with pytest.raises(ConflictError) as error:
                    self.check(number)
                assert error.value.actual == (0 if self.holder is None else self.token)

    def check(self, number: int) -> None:
        with self.storage.begin() as uow:
            uow.state.check(NAME, version=self.leases[number].token)


@pytest.fixture(scope="module")
def shared(mesh_storage_databases: Databases) -> Iterator[MeshStorage]:
    with mesh_storage_databases.fresh() as url, MeshStorage.open(url) as storage:
        yield storage


def test_it_acts_like_its_model(shared: MeshStorage) -> None:
    run_state_machine_as_test(partial(LeaseMachine, shared), settings=RUNS)
