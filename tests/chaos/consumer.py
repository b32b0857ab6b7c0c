"""A process that consumes messages, whose handler fails in every way there is; see test_consume.py.

    python -m tests.chaos.consumer URL RECEIVER LEASE

It ends when its standard input does.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from contextlib import suppress
from datetime import timedelta

from pydantic import SecretStr
from sqlalchemy import text

from mesh_storage import Delivery, MeshStorage, Settings, UnavailableError, UnitOfWork
from tests.chaos.disturber import APPLICATION

EFFECT = text("INSERT INTO effects (id, key, content) VALUES (:id, :key, :content)")


def handle(uow: UnitOfWork, delivery: Delivery) -> None:
    """Have the one effect of a message, and sometimes fail before or after it."""
    chance = random.random()
    if chance < 0.01:
        raise ValueError("before the effect")
    given = {"id": delivery.message.id, "key": delivery.key, "content": delivery.message.content.decode()}
    uow.session.execute(EFFECT, given)
    if chance < 0.02:
        raise ValueError("after the effect")
    if chance < 0.024:  # the acknowledgement finds its connection lost
        with MeshStorage.open(settings=settings(sys.argv[1])) as other, other.begin() as beside:
            pid = uow.session.execute(text("SELECT pg_backend_pid()")).scalar_one()
            beside.session.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
    elif chance < 0.027:
        os.kill(os.getpid(), signal.SIGKILL)
    elif chance < 0.030:  # it hangs until whoever watches lets it go on, beyond its lease
        os.kill(os.getpid(), signal.SIGSTOP)


def settings(url: str) -> Settings:
    """Return the settings of a worker."""
    return Settings(
        url=SecretStr(url), application_name=APPLICATION, pool_size=2, connect_timeout=3, statement_timeout=5,
        lock_timeout=3, slow_unit_of_work=0,
    )  # fmt: skip


def main(url: str, receiver: str, lease: str) -> None:
    """Consume until nobody is at the other end of the standard input."""
    stop = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=wait, daemon=True).start()
    storage = None
    while storage is None and not stop.wait(0.1):
        with suppress(UnavailableError):  # it may begin while there is no primary
            storage = MeshStorage.open(settings=settings(url))
    if storage is None:
        return
    with storage:
        seconds = timedelta(seconds=float(lease))
        storage.consume(receiver, handle, batch=5, lease=seconds, poll=0.05, max_attempts=50, stop=stop)


if __name__ == "__main__":
    main(*sys.argv[1:])
