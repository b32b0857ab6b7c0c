"""The worker loop: its end, outages, lost leases and lost connections, and what it refuses."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from sqlalchemy import text

from mesh_storage import (
    Backlog,
    ClosedError,
    Delivery,
    InvalidInputError,
    MeshStorage,
    Message,
    SchemaMismatchError,
    SerializationError,
    UnavailableError,
    UnitOfWork,
    schema,
)
from mesh_storage.consumer import Consumer
from mesh_storage.models import StateEntry
from tests.processes import eventually

EMPTY = Backlog(0, 0, 0, 0, 0, None, ())


@pytest.fixture
def raw(mesh_storage_url: str) -> Any:
    """Yield a connection of somebody else."""
    with psycopg.connect(mesh_storage_url, autocommit=True) as connection:
        yield connection


def send(storage: MeshStorage, *numbers: int, **given: Any) -> None:
    with storage.begin() as uow:
        for number in numbers:
            uow.messages.send(Message(id=f"m-{number}", from_node="a", to_node="b", content=b"secret"), **given)


def backlog(storage: MeshStorage) -> Backlog:
    with storage.begin(read_only=True) as uow:
        return uow.messages.backlog("b")


def until_empty(storage: MeshStorage, handle: Callable[[UnitOfWork, Delivery], object], **given: Any) -> None:
    """Consume until nothing is left."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        working = threads.submit(storage.consume, "b", handle, poll=0.02, stop=stop, **given)
        try:
            assert eventually(lambda: working.done() or backlog(storage) == EMPTY)
        finally:
            stop.set()
        working.result(30)


def consuming(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [vars(record) for record in caplog.records if vars(record).get("event") == "consume"]


def test_while_the_server_is_away_it_waits_and_says_so_once(
    storage: MeshStorage, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "mesh_storage")
    send(storage, 1)
    acquire, attempts = storage._pool.acquire, itertools.count(1)

    def refused(*args: Any, **kwargs: Any) -> Any:
        if next(attempts) <= 5:
            raise UnavailableError("away", sqlstate="57P03")
        return acquire(*args, **kwargs)

    stop = threading.Event()
    monkeypatch.setattr(storage._pool, "acquire", refused)
    storage.consume("b", lambda _uow, _delivery: stop.set(), stop=stop)
    lost, back = consuming(caplog)
    assert (lost["error"], lost["sqlstate"], lost["receiver"]) == ("UnavailableError", "57P03", "b")
    assert back["attempts"] == 5
    assert backlog(storage) == EMPTY


def test_a_connection_lost_while_it_is_handled_makes_no_effect_twice(storage: MeshStorage, raw: Any) -> None:
    raw.execute("CREATE TABLE effects (id text)")
    struck: list[str] = []

    def handle(uow: UnitOfWork, delivery: Delivery) -> None:
        uow.session.execute(text("INSERT INTO effects VALUES (:id)"), {"id": delivery.message.id})
        if delivery.message.id not in struck:
            struck.append(delivery.message.id)
            pid = uow.session.execute(text("SELECT pg_backend_pid()")).scalar_one()
            raw.execute("SELECT pg_terminate_backend(%s, 10000)", [pid])

    send(storage, 1, 2, 3)
    until_empty(storage, handle, batch=3)
    assert raw.execute("SELECT id FROM effects ORDER BY id").fetchall() == [("m-1",), ("m-2",), ("m-3",)]


def test_an_acknowledgement_whose_commit_was_lost_is_not_made_again(
    storage: MeshStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server committed, but the client does not know."""
    from mesh_storage.postgres.transaction import UnitOfWorkTransaction

    commit, lost = UnitOfWorkTransaction.commit, []

    def commit_and_lose(transaction: Any) -> None:
        commit(transaction)
        if threading.get_ident() in workers and not lost:  # others commit too, such as who looks at the backlog
            lost.append(True)
            transaction._driver.connection.close()
            raise psycopg.OperationalError("connection lost")

    def handle(_: UnitOfWork, delivery: Delivery) -> None:
        handled.append(delivery.attempts)
        workers.add(threading.get_ident())

    handled: list[int] = []
    workers: set[int] = set()
    send(storage, 1)
    monkeypatch.setattr(UnitOfWorkTransaction, "commit", commit_and_lose)
    until_empty(storage, handle)
    assert (handled, lost) == ([1], [True])


def test_a_lease_that_was_lost_has_no_effect_and_is_logged(
    storage: MeshStorage, raw: Any, caplog: pytest.LogCaptureFixture
) -> None:
    handled: list[int] = []

    def handle(uow: UnitOfWork, delivery: Delivery) -> None:
        handled.append(delivery.attempts)
        uow.state.put(f"effect {delivery.attempts}", b"")
        if delivery.attempts == 1:
            raw.execute("UPDATE mesh_deliveries SET available_at = now()")

    send(storage, 1)
    until_empty(storage, handle)
    assert handled == [1, 2]
    with storage.begin(read_only=True) as uow:
        assert [entry.key for entry in uow.state.stream()] == ["effect 2"]
    (record,) = consuming(caplog)
    assert "lost" in record["msg"]
    assert (record["message_id"], record["attempts"]) == ("m-1", 1)


def test_what_the_database_says_may_be_tried_again_is_at_once(storage: MeshStorage) -> None:
    handled: list[int] = []

    def handle(_: UnitOfWork, delivery: Delivery) -> None:
        handled.append(delivery.attempts)
        if delivery.attempts < 4:
            raise SerializationError

    send(storage, 1)
    until_empty(storage, handle)
    assert handled == [1, 2, 3, 4]


def test_a_failure_is_tried_again_later_and_the_last_time_set_aside(
    storage: MeshStorage, raw: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def handle(_: UnitOfWork, __: Delivery) -> None:
        raise ValueError("secret \0 \ud800" + "x" * 5000)

    send(storage, 1, key="k")
    stop = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        working = threads.submit(storage.consume, "b", handle, poll=0.02, max_attempts=2, stop=stop)
        assert eventually(lambda: backlog(storage).delayed == 1)
        assert backlog(storage).held == ("k",)
        raw.execute("UPDATE mesh_deliveries SET available_at = now()")
        assert eventually(lambda: backlog(storage).dead == 1)
        stop.set()
        working.result(30)
    with storage.begin(read_only=True) as uow:
        (dead,) = uow.messages.dead("b").items
    assert (dead.attempts, str(dead.reason)[:20]) == (2, "ValueError: secret  ")
    assert [(record["attempts"], record["dead"]) for record in consuming(caplog)] == [(1, False), (2, True)]
    assert all("secret" not in str(record) for record in consuming(caplog))


def test_an_error_that_will_not_pass_is_raised(storage: MeshStorage, raw: Any) -> None:
    raw.execute("ALTER TABLE mesh_deliveries RENAME TO elsewhere")
    with pytest.raises(SchemaMismatchError):
        storage.consume("b", lambda *_: None)


def test_a_worker_ends_with_its_storage(mesh_storage_url: str) -> None:
    with ThreadPoolExecutor(1) as threads, MeshStorage.open(mesh_storage_url) as storage:
        send(storage, 1)
        handling, closed = threading.Event(), threading.Event()

        def handle(_: UnitOfWork, __: Delivery) -> None:
            handling.set()
            assert closed.wait(30)

        working = threads.submit(storage.consume, "b", handle)
        assert handling.wait(30)
        storage.close()
        closed.set()
        working.result(30)
        with pytest.raises(ClosedError):
            storage.consume("b", handle)
    with MeshStorage.open(mesh_storage_url) as storage:
        assert backlog(storage) == EMPTY


def test_an_interrupt_gives_back_what_is_in_hand(storage: MeshStorage) -> None:
    def handle(uow: UnitOfWork, _: Delivery) -> None:
        uow.state.put("effect", b"")
        raise KeyboardInterrupt

    send(storage, 1, 2)
    with pytest.raises(KeyboardInterrupt):
        storage.consume("b", handle, batch=2)
    assert (backlog(storage).due, backlog(storage).leased) == (2, 0)
    with storage.begin(read_only=True) as uow:
        assert uow.state.find("effect") is None


def test_one_of_a_batch_that_is_gone_keeps_none_of_the_others_from_being_given_back(storage: MeshStorage) -> None:
    stop = threading.Event()

    def handle(_uow: UnitOfWork, _delivery: Delivery) -> None:
        with storage.begin() as other:
            other.messages.delete("m-3")
        stop.set()

    send(storage, 1, 2, 3, 4, 5)
    storage.consume("b", handle, batch=5, stop=stop)
    assert (backlog(storage).due, backlog(storage).leased) == (3, 0)


def test_no_thread_is_left_behind(storage: MeshStorage) -> None:
    send(storage, 1)
    stop = threading.Event()
    before = threading.active_count()
    storage.consume("b", lambda *_: stop.set(), stop=stop)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("receiver", ""),
        ("receiver", "x" * 65),
        ("handle", None),
        ("batch", 0),
        ("batch", 10_001),
        ("lease", timedelta(seconds=0.01)),
        ("lease", 30),
        ("poll", 0),
        ("poll", 61),
        ("poll", True),
        ("max_attempts", 0),
        ("stop", object()),
    ],
)
def test_what_makes_no_sense_is_refused(storage: MeshStorage, field: str, value: Any) -> None:
    given = {"receiver": "b", "handle": lambda *_: None} | {field: value}
    with pytest.raises(InvalidInputError) as error:
        storage.consume(**given)
    assert error.value.field == field


def test_a_coroutine_function_is_refused(storage: MeshStorage) -> None:
    async def handle(*_: object) -> None:
        raise AssertionError("never called")

    with pytest.raises(InvalidInputError, match="AsyncMeshStorage"):
        storage.consume("b", handle)


async def coroutine(*_: object) -> None:
    raise AssertionError("never awaited")


class Handler:
    """What is called as a coroutine function is, although it is none."""

    async def __call__(self, uow: UnitOfWork, delivery: Delivery) -> None:
        await coroutine(uow, delivery)


def test_an_object_that_is_called_as_a_coroutine_function_is_refused(storage: MeshStorage) -> None:
    def returning(uow: UnitOfWork) -> object:
        return coroutine(uow)

    with pytest.raises(InvalidInputError, match="AsyncMeshStorage"):
        storage.consume("b", Handler())
    with pytest.raises(InvalidInputError, match="AsyncMeshStorage"):
        storage.run(returning)


def test_a_coroutine_that_nobody_awaits_acknowledges_nothing(storage: MeshStorage) -> None:
    send(storage, 1)
    stop = threading.Event()

    def handle(uow: UnitOfWork, delivery: Delivery) -> object:
        stop.set()
        return coroutine(uow, delivery)

    storage.consume("b", handle, max_attempts=1, stop=stop)
    with storage.begin(read_only=True) as uow:
        (dead,) = uow.messages.dead("b").items
    assert "plain function" in str(dead.reason)


def test_a_reason_that_the_encoding_of_the_database_lacks_ends_no_worker(mesh_storage_url: str) -> None:
    with psycopg.connect(mesh_storage_url, autocommit=True) as admin:
        admin.execute("CREATE DATABASE latin1 ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    url = urlsplit(mesh_storage_url)._replace(path="/latin1").geturl()
    try:
        schema.upgrade(url)
        with MeshStorage.open(url) as storage:
            send(storage, 1)
            stop = threading.Event()

            def handle(_uow: UnitOfWork, _delivery: Delivery) -> None:
                stop.set()
                raise ValueError("5 \u20ac")

            storage.consume("b", handle, max_attempts=1, stop=stop)
            with storage.begin(read_only=True) as uow:
                assert [each.reason for each in uow.messages.dead("b").items] == ["ValueError: 5 \\u20ac"]
    finally:
        with psycopg.connect(mesh_storage_url, autocommit=True) as admin:
            admin.execute("DROP DATABASE latin1 WITH (FORCE)")


class SpeechlessError(Exception):
    """An error without a text."""

    def __str__(self) -> str:
        raise ValueError


def test_an_error_without_a_text_stops_nothing(storage: MeshStorage) -> None:
    def handle(_: UnitOfWork, delivery: Delivery) -> None:
        if delivery.message.id == "m-1":
            raise SpeechlessError

    send(storage, 1, 2)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        working = threads.submit(storage.consume, "b", handle, max_attempts=1, poll=0.02, stop=stop)
        assert eventually(lambda: backlog(storage) == replace(EMPTY, dead=1))
        stop.set()
        working.result(30)
    with storage.begin(read_only=True) as uow:
        assert [each.reason for each in uow.messages.dead("b").items] == ["SpeechlessError: no text"]


def test_a_conflict_of_the_effects_is_no_lost_lease(storage: MeshStorage, caplog: pytest.LogCaptureFixture) -> None:
    """The session notices it only while the delivery is acknowledged."""

    def handle(uow: UnitOfWork, _: Delivery) -> None:
        entry = uow.session.get(StateEntry, "stock")
        assert entry is not None
        entry.value = b"mine"
        with storage.begin() as other:
            other.state.put("stock", b"of somebody else")
        stop.set()

    with storage.begin() as uow:
        uow.state.put("stock", b"")
    send(storage, 1)
    stop = threading.Event()
    storage.consume("b", handle, max_attempts=1, stop=stop)
    with storage.begin(read_only=True) as uow:
        (dead,) = uow.messages.dead("b").items
    assert str(dead.reason).startswith("ConflictError: ")
    (record,) = consuming(caplog)
    assert (record["error"], record["dead"]) == ("ConflictError", True)


def test_it_ends_in_an_outage_before_a_failed_one_is_given_back(
    storage: MeshStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def handle(_uow: UnitOfWork, _delivery: Delivery) -> None:
        stop.set()
        monkeypatch.setattr(storage._pool, "acquire", refused)
        raise ValueError

    def refused(*_args: Any, **_given: Any) -> Any:
        raise UnavailableError("away", sqlstate="57P03")

    send(storage, 1)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        threads.submit(storage.consume, "b", handle, lease=timedelta(hours=1), stop=stop).result(30)


def test_one_of_a_batch_that_is_lost_costs_the_extension_of_the_others_little(
    storage: MeshStorage, raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def handle(_uow: UnitOfWork, delivery: Delivery) -> None:
        if delivery.message.id != "m-0":
            return
        raw.execute("UPDATE mesh_deliveries SET available_at = now() WHERE message_id = 'm-77'")
        assert extended.wait(30)
        stop.set()

    def extend(consumer: Any) -> Any:
        calls.clear()
        following = once(consumer)
        extended.set()
        return following

    def extend_all(consumer: Any, held: Any) -> None:
        calls.append(len(held))
        some(consumer, held)

    once, some = Consumer._extend, Consumer._extend_all
    calls, extended, stop = list[int](), threading.Event(), threading.Event()
    monkeypatch.setattr(Consumer, "_extend", extend)
    monkeypatch.setattr(Consumer, "_extend_all", extend_all)
    send(storage, *range(256))
    storage.consume("b", handle, batch=256, lease=timedelta(seconds=1.5), stop=stop)
    assert calls[0] == 256
    assert len(calls) <= 17  # two for each half
