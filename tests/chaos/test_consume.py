"""Four processes consume while they, their sessions and the servers are killed, frozen, restarted and replaced.

How many messages there are is set by the variable CONSUME_MESSAGES, how long they are disturbed by CHAOS_SECONDS.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from mesh_storage import Backlog, MeshStorage, MeshStorageError, Message, schema
from tests.chaos.consumer import settings
from tests.chaos.disturber import Disturber
from tests.chaos.record import Record
from tests.processes import ROOT, eventually
from tests.servers import Cluster, new_cluster
from tools.test_matrix import find

pytestmark = pytest.mark.slow

MESSAGES = int(os.environ.get("CONSUME_MESSAGES") or 4_000)
SECONDS = float(os.environ.get("CHAOS_SECONDS") or 30)
SEED = os.environ.get("CHAOS_SEED") or str(random.randrange(10**6))
WORKERS = 4
LEASE_S = 2.0
KEYS = 8
EMPTY = Backlog(0, 0, 0, 0, 0, None, ())


class Workers:
    """The processes, of which each that dies is replaced, and each that stands still goes on after its lease."""

    def __init__(self, url: str, log: Path) -> None:
        self._command = [sys.executable, "-m", "tests.chaos.consumer", url, "b", str(LEASE_S)]
        self._log = log
        self._stopped = threading.Event()
        self.ends = Counter[int]()
        self.hung = 0

    def run(self) -> None:
        threads = [threading.Thread(target=self._keep) for _ in range(WORKERS)]
        for thread in threads:
            thread.start()
        self._stopped.wait()
        for thread in threads:
            thread.join()

    def stop(self) -> None:
        self._stopped.set()

    def _keep(self) -> None:
        while not self._stopped.is_set():
            with self._log.open("ab") as log:
                process = subprocess.Popen(self._command, cwd=ROOT, stdin=subprocess.PIPE, stderr=log)
            while process.poll() is None and not self._stopped.wait(0.1):
                if self._stands_still(process.pid):
                    self.hung += 1
                    time.sleep(LEASE_S + 1.5)
                    process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGCONT)
            process.communicate()
            self.ends[process.returncode] += 1

    @staticmethod
    def _stands_still(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        except FileNotFoundError:
            return False


@contextmanager
def working(cluster: Cluster, log: Path) -> Iterator[Workers]:
    workers = Workers(cluster.url, log)
    thread = threading.Thread(target=workers.run)
    thread.start()
    try:
        yield workers
    finally:
        workers.stop()
        thread.join()


def send(cluster: Cluster) -> None:
    """Queue the messages, every fourth with one of a few keys, and number those of a key."""
    with MeshStorage.open(settings=settings(cluster.url)) as storage:
        for start in range(0, MESSAGES, 1000):
            numbers = range(start, min(start + 1000, MESSAGES))
            with storage.begin() as uow:
                uow.messages.send_many(message(number) for number in numbers if number % 4)
                for number in numbers[::4]:
                    uow.messages.send(message(number), key=f"key-{number // 4 % KEYS}")


def message(number: int) -> Message:
    return Message(id=f"m-{number}", from_node="a", to_node="b", content=str(number).encode())


def backlog(storage: MeshStorage) -> Backlog | None:
    try:
        with storage.begin(read_only=True, timeout=5) as uow:
            return uow.messages.backlog("b")
    except MeshStorageError:
        return None


@pytest.mark.timeout(SECONDS + MESSAGES / 20 + 240)
def test_each_effect_happens_once_and_in_the_order_of_its_key(mesh_storage_url: str, tmp_path: Path) -> None:
    with psycopg.connect(mesh_storage_url) as connection:
        programs = find(str(connection.info.server_version // 10_000))
    assert programs is not None
    print(f"\nCHAOS_SEED={SEED}")
    record = Record()
    with new_cluster(programs) as cluster:
        schema.upgrade(cluster.url)
        with cluster.session() as session:
            session.execute("CREATE TABLE effects (n bigserial PRIMARY KEY, id text, key text, content text)")
        send(cluster)
        begun = time.monotonic()
        with working(cluster, tmp_path / "log") as workers, MeshStorage.open(settings=settings(cluster.url)) as storage:
            Disturber(cluster, record, SEED).disturb(SECONDS)

            def only_stuck() -> bool:
                found = backlog(storage)
                return found is not None and not found.due and not found.waiting

            assert eventually(only_stuck, MESSAGES / 20 + 60), (
                backlog(storage),
                (tmp_path / "log").read_text()[-3000:],
            )
            # Nothing is due, so what is left is claimed or to be tried again: it is done within a lease and a second.
            drained = eventually(lambda: backlog(storage) == EMPTY, 30)
            left = backlog(storage)
        assert drained, (left, (tmp_path / "log").read_text()[-3000:])
        took = time.monotonic() - begun
        with cluster.session() as session:
            effects = session.execute("SELECT id, key, content FROM effects ORDER BY n").fetchall()
    print(f"{MESSAGES} messages in {took:.1f} s, {dict(record.disturbances)}, ends {dict(workers.ends)}")
    print(f"hung {workers.hung}")
    assert Counter(id_ for id_, _, _ in effects) == Counter(f"m-{number}" for number in range(MESSAGES))
    for key in range(KEYS):
        of_key = [int(content) for _, name, content in effects if name == f"key-{key}"]
        assert of_key == sorted(of_key)
    assert set(workers.ends) <= {0, -signal.SIGKILL}, workers.ends
