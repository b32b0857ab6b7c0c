"""Elections among threads and processes that die, stand still, and lose their server: never two holders at once.

How long they go on is set in seconds by the variable ELECTIONS.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import text

from mesh_storage import MeshStorage, MeshStorageError
from tests.electors import NAME, Sight, Term, stand, terms
from tests.processes import ROOT, eventually

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("ELECTIONS", "10"))
TTL = timedelta(seconds=0.5)
VOTERS = 8
TERMINATE_SOME = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid() AND random() < 0.5"
)


def assert_one_at_a_time(found: list[Term]) -> None:
    for one, other in pairwise(found):
        assert one.end < other.start, f"two held at once: {one} and {other}"


def test_threads_hold_it_one_at_a_time(mesh_storage_url: str) -> None:
    sights: list[Sight] = []
    failures: list[BaseException] = []
    end = time.monotonic() + SECONDS

    def elect(seed: int) -> None:
        chance = random.Random(seed)
        while time.monotonic() < end:
            try:
                stand(storage, TTL, sights.append, chance)
            except MeshStorageError:
                continue
            except BaseException as error:
                failures.append(error)
                raise

    with (
        MeshStorage.open(mesh_storage_url) as storage,
        psycopg.connect(mesh_storage_url, autocommit=True) as connection,
    ):
        threads = [threading.Thread(target=elect, args=[seed]) for seed in range(VOTERS)]
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            time.sleep(random.uniform(0, 1))
            if random.random() < 0.5:
                connection.execute(TERMINATE_SOME)
            else:  # somebody takes it by force; who held it learns of it by the next renewal, before it expires
                connection.execute("UPDATE mesh_state SET value = 'usurper' WHERE key = %s", [NAME])
        for thread in threads:
            thread.join()
    assert failures == []
    found = terms(sights)
    print(f"threads: {len(found)} tokens in {SECONDS:g} s")
    assert_one_at_a_time(found)
    assert len(found) > SECONDS / TTL.total_seconds() / 4


class Voters:
    """Processes that stand for election, each with a file of what it saw."""

    def __init__(self, url: str, directory: Path) -> None:
        self._url, self._directory = url, directory
        self._paths: list[Path] = []
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        path = self._directory / f"voter-{len(self._paths) + 1}"
        self._paths.append(path)
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.electors", self._url, path, str(TTL.total_seconds())],
            cwd=ROOT,
            stderr=subprocess.DEVNULL,
        )
        self.processes[process.pid] = process

    def ready(self) -> bool:
        """Return whether all have started, which may take longer than they live."""
        return all(path.exists() for path in self._paths)

    def kill(self, pid: int) -> None:
        process = self.processes.pop(pid)
        process.kill()
        process.wait()

    def freeze(self, pid: int) -> None:
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(3 * TTL.total_seconds(), self.processes[pid].send_signal, [signal.SIGCONT]).start()

    def terms(self) -> list[Term]:
        lines = [line for path in self._paths if path.exists() for line in path.read_text().splitlines(True)]
        whole = [line.split() for line in lines if line.endswith("\n")]  # a killed one may leave half a line
        assert [line for line in whole if len(line) != 3] == []  # what ended a voter
        return terms(Sight(int(token), float(before), float(after)) for token, before, after in whole)


@contextmanager
def voters(url: str, directory: Path) -> Iterator[Voters]:
    found = Voters(url, directory)
    for _ in range(VOTERS):
        found.start()
    try:
        yield found
    finally:
        for pid in list(found.processes):
            found.kill(pid)


def holder(storage: MeshStorage) -> tuple[int, int]:
    """Return the process that holds it and its token, or zeros."""
    try:
        with storage.begin(read_only=True, timeout=2) as uow:
            entry = uow.state.find(NAME)
    except MeshStorageError:
        return 0, 0
    return (0, 0) if entry is None else (int(entry.value), entry.version or 0)


def test_processes_hold_it_one_at_a_time_whatever_befalls_them(tmp_path: Path) -> None:
    home = tmp_path / "mesh"
    url = f"embedded:{home}"
    chance = random.Random()
    struck: dict[int, tuple[str, float]] = {}
    with MeshStorage.open(url) as storage, voters(url, tmp_path) as found:
        assert eventually(found.ready, 60)
        begun = time.monotonic()
        restart, restarted = begun + SECONDS / 2, 0.0
        while (now := time.monotonic()) < begun + SECONDS:
            time.sleep(chance.uniform(0, 0.5))
            if restart and now > restart:
                restart, restarted = 0, now
                os.kill(int((home / "data" / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
                continue
            pid, token = holder(storage)
            if pid not in found.processes or chance.random() < 0.2:
                pid, token = chance.choice(list(found.processes)), 0
            match chance.choice(["kill", "freeze", "terminate"]):
                case "kill" if found.ready():
                    found.kill(pid)
                    struck[token] = "killed", time.monotonic()
                    found.start()
                case "kill" | "freeze":
                    found.freeze(pid)
                    struck[token] = "frozen", time.monotonic()
                case _:
                    with suppress(MeshStorageError), storage.begin(timeout=2) as uow:
                        uow.session.execute(text(TERMINATE_SOME))
        done = len(found.terms())
        # Those that stood still go on, and see that they lost it.
        assert eventually(lambda: len(found.terms()) > done + 2, 60)
    everything = found.terms()
    assert_one_at_a_time(everything)
    print(f"processes: {len(everything)} tokens in {time.monotonic() - begun:.1f} s, struck {len(struck)} holders")
    for kind in ("killed", "frozen"):
        waits = [
            next((other.start for other in everything if other.token > token), 0) - moment
            for token, (what, moment) in struck.items()
            if token and what == kind and not restarted - 3 < moment < restarted + 10
        ]
        print(f"{kind}: {len(waits)}, slowest follower after {max(waits, default=0):.2f} s of ttl {TTL}")
