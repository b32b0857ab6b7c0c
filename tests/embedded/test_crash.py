"""A server that is killed in the middle of a load: nothing acknowledged is lost, and the same storage goes on."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

from mesh_storage import MeshStorage, MeshStorageError, Message, UnavailableError

WRITERS = 4
KILLS = 2


def test_what_was_committed_is_there_and_callers_saw_only_unavailable(tmp_path: Path) -> None:
    home = tmp_path / "mesh"
    acknowledged: set[str] = set()
    attempted: set[str] = set()
    errors: list[Exception] = []
    stop = threading.Event()

    def write(storage: MeshStorage, writer: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            ids = {f"{writer}-{number}-{part}" for part in "ab"}
            attempted.update(ids)
            try:
                with storage.begin() as uow:
                    for id_ in sorted(ids):
                        uow.messages.store(Message(id=id_, from_node="a", to_node="b", content=b"x"))
            except Exception as error:  # noqa: BLE001 - which ones they are is what is asked
                errors.append(error)
                stop.wait(0.01)
            else:
                acknowledged.update(ids)

    def wait_for_more(than: int) -> None:
        deadline = time.monotonic() + 60
        while len(acknowledged) <= than:
            assert time.monotonic() < deadline, errors[-1:]
            time.sleep(0.01)

    with MeshStorage.open(f"embedded:{home}") as storage:
        threads = [threading.Thread(target=write, args=(storage, writer)) for writer in range(WRITERS)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(KILLS):
                wait_for_more(len(acknowledged) + 100)
                pid = int((home / "data" / "postmaster.pid").read_text().split()[0])
                failures = len(errors)
                os.kill(pid, signal.SIGKILL)
                deadline = time.monotonic() + 60
                while len(errors) < failures + WRITERS:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                wait_for_more(len(acknowledged) + 100)
        finally:
            stop.set()
            for thread in threads:
                thread.join()

        kinds = {(type(error), error.retryable) for error in errors if isinstance(error, MeshStorageError)}
        assert kinds == {(UnavailableError, True)}
        assert all(isinstance(error, MeshStorageError) for error in errors)
        with storage.begin(read_only=True) as uow:
            stored = {message.id for message in uow.messages.stream()}
    assert acknowledged <= stored <= attempted
    # Each unit of work stored two or none.
    assert {id_[:-1] + "a" for id_ in stored} | {id_[:-1] + "b" for id_ in stored} == stored
