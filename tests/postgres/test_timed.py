"""A connection whose waits are limited: what is used of psycopg, and what an interrupted or silent server leaves."""

from __future__ import annotations

import inspect
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import waiting
from psycopg.pq import TransactionStatus

from mesh_storage.aio.postgres.timed import AsyncTimedConnection
from mesh_storage.postgres.liveness import GRACE_S
from mesh_storage.postgres.timed import TimedConnection
from tests.conftest import frozen


@pytest.fixture
def connection(mesh_storage_url: str) -> Iterator[TimedConnection]:
    made = TimedConnection.connect(mesh_storage_url, autocommit=True)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("ours", "theirs"), [(TimedConnection, psycopg.Connection), (AsyncTimedConnection, psycopg.AsyncConnection)]
)
def test_psycopg_waits_as_it_did_when_this_was_written(ours: type, theirs: type) -> None:
    names = ["self", "gen", "interval", "timeout"]
    assert list(inspect.signature(theirs.wait).parameters) == names  # type: ignore[attr-defined]
    assert list(inspect.signature(ours.wait).parameters) == names  # type: ignore[attr-defined]
    for function in (waiting.wait_selector, waiting.wait_async):
        assert list(inspect.signature(function).parameters) == ["gen", "fileno", "interval", "timeout"]


def test_a_deadline_cancels_the_statement_and_the_connection_stays(connection: TimedConnection) -> None:
    connection.deadline = time.monotonic() + 0.2
    with pytest.raises(psycopg.errors.QueryCanceled):
        connection.execute("SELECT pg_sleep(30)")
    assert connection.cancelled
    assert not connection.silent
    assert connection.info.transaction_status == TransactionStatus.IDLE


def test_a_limit_of_one_answer_is_for_each_statement(connection: TimedConnection) -> None:
    connection.response_timeout = 0.5
    for _ in range(3):
        connection.execute("SELECT pg_sleep(0.3)")
    with pytest.raises(psycopg.errors.QueryCanceled):
        connection.execute("SELECT pg_sleep(30)")


def test_a_silent_server_is_given_up_after_a_moment(connection: TimedConnection) -> None:
    with frozen(connection.info.backend_pid):
        connection.deadline = time.monotonic() + 0.2
        begun = time.monotonic()
        with pytest.raises(psycopg.OperationalError, match="did not respond"):
            connection.execute("SELECT 1")
        assert time.monotonic() - begun < 0.2 + 2 * GRACE_S + 1
    assert connection.silent
    assert connection.closed


@pytest.mark.parametrize("silent", [False, True])
def test_an_interrupt_returns_within_a_second(connection: TimedConnection, silent: bool) -> None:
    def interrupt() -> None:
        while not active(observer, connection.info.backend_pid):
            pass
        time.sleep(0.2)  # The statement was sent; nothing tells from outside that the wait for it has begun.
        if silent:
            os.kill(connection.info.backend_pid, signal.SIGSTOP)
        times.append(time.monotonic())
        signal.pthread_kill(main, signal.SIGINT)

    times: list[float] = []
    main = threading.get_ident()
    with psycopg.connect(connection.info.dsn, autocommit=True) as observer:
        pid = connection.info.backend_pid
        thread = threading.Thread(target=interrupt)
        thread.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                connection.execute("SELECT pg_sleep(30)")
            assert time.monotonic() - times[0] < 1
        finally:
            thread.join()
            os.kill(pid, signal.SIGCONT)
    assert connection.cancelled
    assert bool(connection.closed) == silent


def active(observer: psycopg.Connection[Any], pid: int) -> bool:
    row = observer.execute("SELECT state = 'active' FROM pg_stat_activity WHERE pid = %s", [pid]).fetchone()
    return row is not None and bool(row[0])
