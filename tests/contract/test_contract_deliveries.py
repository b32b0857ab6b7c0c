"""Deliveries, by either API and by a pooler: to each receiver, with their effects once, in the order of a key."""

from __future__ import annotations

import logging
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from mesh_storage import (
    AlreadyExistsError,
    Backlog,
    ConflictError,
    Delivery,
    MeshStorage,
    MeshStorageError,
    Message,
    NotFoundError,
)
from tests.processes import eventually

LEASE = timedelta(seconds=30)
NOW = timedelta(0)
OLD, NEW = 1_000, 2**40


def message(number: int | str, to: str = "b", **given: Any) -> Message:
    return Message(id=f"m-{number}", from_node="a", to_node=to, content=b"%b" % str(number).encode(), **given)


def send(storage: MeshStorage, *numbers: int, **given: Any) -> None:
    with storage.begin() as uow:
        for number in numbers:
            uow.messages.send(message(number), **given)


def claim(storage: MeshStorage, limit: int = 10, receiver: str = "b", **given: Any) -> list[Delivery]:
    with storage.begin() as uow:
        return uow.messages.claim(receiver, limit=limit, **given)


def settle(storage: MeshStorage, how: str, deliveries: list[Delivery], *args: Any, **given: Any) -> Any:
    with storage.begin() as uow:
        return getattr(uow.messages, how)(deliveries, *args, **given)


def backlog(storage: MeshStorage, receiver: str | None = "b") -> Backlog:
    with storage.begin(read_only=True) as uow:
        return uow.messages.backlog(receiver)


def ids(deliveries: list[Delivery]) -> list[str]:
    return [each.message.id for each in deliveries]


def execute(url: str, statement: str) -> None:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode())


def lapse(url: str) -> None:
    """Let all leases and delays be over."""
    execute(url, "UPDATE mesh_deliveries SET available_at = now() WHERE state IN ('leased', 'queued')")


def test_a_message_is_delivered_once(storage: MeshStorage) -> None:
    send(storage, 1, 2)
    (first, second) = claim(storage)
    assert (first.message.id, first.message.content, first.message.from_node) == ("m-1", b"1", "a")
    assert (first.receiver, first.attempts, first.key, first.reason) == ("b", 1, None, None)
    assert claim(storage) == []
    restored = pickle.loads(pickle.dumps(second))  # noqa: S301 - our own
    assert (restored.message.id, restored.token, restored.leased_until) == ("m-2", second.token, second.leased_until)
    settle(storage, "ack", [first, restored])
    send(storage, 1, 2)  # the same again
    assert claim(storage) == []
    assert backlog(storage) == Backlog(0, 0, 0, 0, 0, None, ())
    with storage.begin() as uow:
        assert uow.messages.count() == 2
        assert uow.messages.send_many([message(3), message(2), message(1)]) == 1
        with pytest.raises(AlreadyExistsError):
            uow.messages.send(Message(id="m-1", from_node="a", to_node="b", content=b"another"))
    assert ids(claim(storage)) == ["m-3"]


def test_what_is_rolled_back_was_neither_sent_nor_claimed(storage: MeshStorage) -> None:
    with storage.unit_of_work() as uow:
        uow.messages.send(message(1))
        assert ids(uow.messages.claim("b")) == ["m-1"]
    assert claim(storage) == []
    send(storage, 1)
    with storage.unit_of_work() as uow:
        assert ids(uow.messages.claim("b")) == ["m-1"]
    (delivery,) = claim(storage)
    assert delivery.attempts == 1


@pytest.mark.one_server
def test_a_message_to_several_receivers_is_one_row_and_a_delivery_for_each(storage: MeshStorage) -> None:
    send(storage, 1, receivers=["c", "d", "c"])
    send(storage, 2)
    with storage.begin(read_only=True) as uow:
        assert uow.messages.count() == 2
    deliveries = [*claim(storage, receiver="c"), *claim(storage, receiver="d")]
    assert [(each.message.id, each.receiver) for each in deliveries] == [("m-1", "c"), ("m-1", "d")]
    settle(storage, "ack", deliveries)
    assert ids(claim(storage)) == ["m-2"]
    assert backlog(storage, None).leased == 1


@pytest.mark.parametrize("since", ["nobody", "another"])
def test_a_lost_lease_is_known_whoever_claimed_since(storage: MeshStorage, mesh_storage_url: str, since: str) -> None:
    send(storage, 1, 2)
    lost, held = claim(storage)
    execute(mesh_storage_url, "UPDATE mesh_deliveries SET available_at = now() WHERE message_id = 'm-1'")
    if since == "another":
        (again,) = claim(storage)
        assert (again.attempts, again.message.id) == (2, "m-1")
        assert again.token > lost.token
    calls = {"ack": (), "nack": (), "extend": (LEASE,), "bury": ("reason",)}
    for call, arguments in calls.items():
        with storage.unit_of_work() as uow:
            uow.state.put("effect", b"never")
            with pytest.raises(ConflictError, match="1 of 2 leases"):
                getattr(uow.messages, call)([lost, held], *arguments)
            with pytest.raises(MeshStorageError, match="an earlier call"):
                uow.state.get("effect")
            with pytest.raises(MeshStorageError, match="rolled back"):
                uow.commit()
    with storage.begin() as uow:  # what was refused changed nothing
        assert uow.state.find("effect") is None
        uow.messages.ack([held, again] if since == "another" else [held])


def test_a_lost_lease_is_known_beside_a_later_one_of_the_same_delivery(
    storage: MeshStorage, mesh_storage_url: str
) -> None:
    send(storage, 1)
    (lost,) = claim(storage)
    lapse(mesh_storage_url)
    (held,) = claim(storage)
    calls = {"ack": (), "nack": (), "extend": (LEASE,), "bury": ("reason",)}
    for call, arguments in calls.items():
        with pytest.raises(ConflictError, match="1 of 2 leases"):
            settle(storage, call, [lost, held], *arguments)
    settle(storage, "ack", [held])


def test_a_savepoint_takes_a_lost_lease(storage: MeshStorage, mesh_storage_url: str) -> None:
    send(storage, 1)
    deliveries = claim(storage)
    lapse(mesh_storage_url)
    with storage.begin() as uow:
        uow.state.put("kept", b"1")
        with pytest.raises(ConflictError), uow.savepoint():
            uow.messages.ack(deliveries)
    with storage.begin(read_only=True) as uow:
        assert uow.state.get("kept").value == b"1"


def test_an_acknowledgement_that_is_open_keeps_the_delivery(storage: MeshStorage, mesh_storage_url: str) -> None:
    send(storage, 1)
    deliveries = claim(storage, lease=timedelta(seconds=0.3))
    with storage.begin() as uow:
        uow.messages.ack(deliveries)
        with psycopg.connect(mesh_storage_url) as connection:
            connection.execute("SELECT pg_sleep(0.4)")
        assert claim(storage) == []  # its lease is over, but nobody gets it
    assert backlog(storage).due == 0


def test_given_back_it_waits_by_attempts_or_as_said(storage: MeshStorage, mesh_storage_url: str) -> None:
    send(storage, 1, 2)
    for attempt, longest in enumerate((1, 2, 4, 8), start=1):
        deliveries = claim(storage)
        assert [each.attempts for each in deliveries] == [attempt] * 2
        settle(storage, "nack", deliveries)
        assert claim(storage) == []
        assert backlog(storage).delayed == 2
        with psycopg.connect(mesh_storage_url) as connection:
            (least, most) = connection.execute(
                "SELECT min(available_at) - now(), max(available_at) - now() FROM mesh_deliveries"
            ).fetchall()[0]
        assert timedelta(seconds=longest / 2 - 0.4) <= least <= most <= timedelta(seconds=longest)
        lapse(mesh_storage_url)
    settle(storage, "nack", claim(storage), delay=NOW)
    settle(storage, "nack", claim(storage), delay=timedelta(hours=1))
    assert claim(storage) == []


def test_a_lease_is_extended(storage: MeshStorage) -> None:
    send(storage, 1)
    (delivery,) = claim(storage, lease=timedelta(seconds=5))
    (extended,) = settle(storage, "extend", [delivery], timedelta(hours=1))
    assert extended.token == delivery.token
    assert extended.leased_until - delivery.leased_until > timedelta(minutes=59)
    settle(storage, "ack", [delivery])


def test_a_delay_is_kept(storage: MeshStorage, mesh_storage_url: str) -> None:
    with storage.begin() as uow:
        uow.messages.send(message(1), delay=timedelta(hours=1))
        uow.messages.send_many([message(2)], delay=timedelta(hours=1))
        uow.messages.send(message(3))
    assert ids(claim(storage)) == ["m-3"]
    assert backlog(storage).delayed == 2
    lapse(mesh_storage_url)
    assert sorted(ids(claim(storage))) == ["m-1", "m-2", "m-3"]


def test_the_dead_keep_what_there_is_to_know_and_come_back_one_by_one_or_all(storage: MeshStorage) -> None:
    send(storage, 1, 2, 3, 4)
    first, *others = claim(storage)
    settle(storage, "bury", [first], "no use")
    settle(storage, "bury", others, "not now")
    assert claim(storage) == []
    with storage.begin() as uow:
        page = uow.messages.dead("b", limit=3)
        assert ids(page.items) == ["m-1", "m-2", "m-3"]
        found = page.items[0]
        assert (found.message.content, found.attempts, found.reason) == (b"1", 1, "no use")
        assert found.dead_at is not None
        assert found.leased_until is None
        assert ids(uow.messages.dead("b", after=page.next).items) == ["m-4"]
        assert ids(uow.messages.dead().items) == ["m-1", "m-2", "m-3", "m-4"]
        assert uow.messages.dead("c").items == []
        assert uow.messages.redrive("c") == 0
        assert uow.messages.redrive("b", ["m-3", "m-9"]) == 1
    (again,) = claim(storage)
    assert (again.message.id, again.attempts, again.reason) == ("m-3", 1, None)
    with storage.begin() as uow:
        assert uow.messages.redrive("b") == 3
    assert ids(claim(storage)) == ["m-1", "m-2", "m-4"]


def test_what_was_claimed_too_often_is_set_aside(storage: MeshStorage, mesh_storage_url: str) -> None:
    send(storage, 1)
    for attempts in (1, 2, 3):
        (delivery,) = claim(storage, max_attempts=3)
        assert delivery.attempts == attempts
        lapse(mesh_storage_url)
    send(storage, 2)
    assert ids(claim(storage, limit=1, max_attempts=3)) == ["m-2"]
    with storage.begin(read_only=True) as uow:
        (dead,) = uow.messages.dead("b").items
    assert (dead.message.id, dead.attempts) == ("m-1", 3)
    assert "3 claims" in str(dead.reason)
    with pytest.raises(ConflictError):
        settle(storage, "ack", [delivery])


@pytest.mark.one_server
def test_those_of_a_key_go_one_at_a_time_in_the_order_of_sending(storage: MeshStorage) -> None:
    send(storage, 1, 2, key="k")
    send(storage, 3, 4, key="other")
    send(storage, 5)
    send(storage, 6, key="k", receivers=["b", "c"])
    assert ids(claim(storage, receiver="c")) == ["m-6"]  # another receiver has an order of its own
    order = []
    while deliveries := claim(storage):
        order.append(ids(deliveries))
        settle(storage, "ack", deliveries)
    assert order == [["m-1", "m-3", "m-5"], ["m-2", "m-4"], ["m-6"]]
    send(storage, 7, key="k")
    assert [each.key for each in claim(storage)] == ["k"]


def test_a_first_one_that_fails_holds_its_key_and_no_other(storage: MeshStorage, mesh_storage_url: str) -> None:
    send(storage, 1, 2, key="k")
    send(storage, 3, key="other")
    first, other = claim(storage)
    settle(storage, "nack", [first])
    settle(storage, "ack", [other])
    assert claim(storage) == []
    assert backlog(storage).held == ("k",)
    assert (backlog(storage).delayed, backlog(storage).waiting) == (1, 1)
    lapse(mesh_storage_url)
    settle(storage, "bury", claim(storage), "no use")
    send(storage, 4, key="k")
    assert claim(storage) == []
    assert (backlog(storage).held, backlog(storage).waiting, backlog(storage).dead) == (("k",), 2, 1)
    with storage.begin() as uow:
        assert uow.messages.redrive("b") == 1
    assert backlog(storage).held == ()
    for expected in ("m-1", "m-2", "m-4"):
        deliveries = claim(storage)
        assert ids(deliveries) == [expected]
        settle(storage, "ack", deliveries)


@pytest.mark.one_server
@pytest.mark.parametrize("position", ["first", "middle"])
def test_a_deleted_message_takes_its_deliveries_along(storage: MeshStorage, position: str) -> None:
    send(storage, 1, 2, 3, key="k")
    send(storage, 4, receivers=["b", "c"])
    claimed = claim(storage)
    with storage.begin() as uow:
        uow.messages.delete("m-1" if position == "first" else "m-2")
        uow.messages.delete("m-4")
        with pytest.raises(NotFoundError):
            uow.messages.delete("m-4")
    assert claim(storage, receiver="c") == []
    with pytest.raises(ConflictError):
        settle(storage, "ack", claimed)
    if position == "middle":
        settle(storage, "ack", claimed[:1])
    order = []
    while deliveries := claim(storage):
        order += ids(deliveries)
        settle(storage, "ack", deliveries)
    assert order == (["m-2", "m-3"] if position == "first" else ["m-3"])
    send(storage, 5, key="k")
    assert ids(claim(storage)) == ["m-5"]


@pytest.mark.parametrize("key", [None, "k"])
def test_a_message_that_another_service_deleted_is_passed_over(
    storage: MeshStorage, mesh_storage_url: str, key: str | None
) -> None:
    send(storage, 1, 2, 3, key=key)
    execute(mesh_storage_url, "DELETE FROM mesh_messages WHERE id = 'm-1'")
    order = []
    while deliveries := claim(storage, limit=1) or claim(storage, limit=1):
        order += ids(deliveries)
        settle(storage, "ack", deliveries)
    assert order == ["m-2", "m-3"]
    assert backlog(storage) == Backlog(0, 0, 0, 0, 0, None, ())


@pytest.mark.parametrize("key", [None, "k"])
def test_a_message_that_another_service_deleted_is_not_set_aside(
    storage: MeshStorage, mesh_storage_url: str, key: str | None
) -> None:
    send(storage, 1, 2, key=key)
    claim(storage, limit=1)
    lapse(mesh_storage_url)
    execute(mesh_storage_url, "DELETE FROM mesh_messages WHERE id = 'm-1'")
    order = []
    while deliveries := claim(storage, limit=1, max_attempts=1) or claim(storage, limit=1, max_attempts=1):
        order += ids(deliveries)
        settle(storage, "ack", deliveries)
    assert order == ["m-2"]
    assert backlog(storage) == Backlog(0, 0, 0, 0, 0, None, ())


def test_old_messages_without_a_delivery_are_removed(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.messages.store(message(1, timestamp=OLD))
        for number in (2, 3, 4, 5):
            uow.messages.send(message(number, timestamp=OLD))
        uow.messages.store(message(6, timestamp=NEW))
    acknowledged, buried, *_ = claim(storage, limit=3)
    settle(storage, "ack", [acknowledged])
    settle(storage, "bury", [buried], "no use")
    with storage.begin() as uow:
        assert uow.messages.purge(OLD) == 0
        assert uow.messages.purge(OLD + 1, limit=1) == 1
        assert uow.messages.purge(OLD + 1) == 1
        assert [each.id for each in uow.messages.stream()] == ["m-3", "m-4", "m-5", "m-6"]
    assert storage.maintain(messages_older_than=timedelta(days=1)).messages == 0
    with storage.begin() as uow:
        assert uow.messages.delete_many(["m-3", "m-4", "m-5", "m-6", "m-9"]) == 2  # a dead one, and one never sent
        assert [each.id for each in uow.messages.stream()] == ["m-4", "m-5"]
        assert uow.messages.dead().items == []


def test_a_dead_first_one_that_is_deleted_holds_its_key_no_longer(storage: MeshStorage) -> None:
    send(storage, 1, 2, key="k")
    settle(storage, "bury", claim(storage), "no use")
    with storage.begin() as uow:
        assert uow.messages.delete_many(["m-1", "m-2"]) == 1
    assert ids(claim(storage)) == ["m-2"]


@pytest.mark.one_server
def test_what_was_only_stored_is_queued_once(storage: MeshStorage, mesh_storage_url: str) -> None:
    with storage.begin() as uow:
        uow.messages.store_many([message(2, timestamp=OLD + 1), message(1, timestamp=OLD + 2)])
        uow.messages.store(message(3, timestamp=OLD - 1))
    execute(
        mesh_storage_url,
        "INSERT INTO mesh_messages (id, from_node, to_node, content, timestamp) "
        f"VALUES ('m-4', 'a', 'b', '', {OLD}) ON CONFLICT (id) DO UPDATE SET content = excluded.content",
    )
    assert claim(storage) == []
    with storage.begin() as uow:
        assert uow.messages.enqueue(since=OLD, limit=2) == 2
        assert uow.messages.enqueue(since=OLD) == 1
        assert uow.messages.enqueue(since=OLD) == 0
    deliveries = claim(storage)
    assert ids(deliveries) == ["m-4", "m-2", "m-1"]
    settle(storage, "ack", deliveries)
    with storage.begin() as uow:
        assert uow.messages.enqueue(since=OLD) == 0
        uow.messages.send(message(1, timestamp=OLD + 2))  # was queued before
        uow.messages.send(message(3, timestamp=OLD - 1))  # was not
        assert uow.messages.enqueue(since=0) == 0
    assert ids(claim(storage)) == ["m-3"]


def test_the_oldest_that_was_never_queued_comes_first_and_each_to_its_receiver(storage: MeshStorage) -> None:
    given = [message(number, timestamp=OLD + number) for number in (3, 1, 2)]
    with storage.begin() as uow:
        uow.messages.store_many([*given, Message(id="m-0", from_node="a", to_node="c", content=b"", timestamp=OLD)])
        uow.messages.send(given[1])
        assert uow.messages.enqueue(since=OLD, limit=2) == 2
    assert (ids(claim(storage)), ids(claim(storage, receiver="c"))) == (["m-1", "m-2"], ["m-0"])
    with storage.begin() as uow:
        assert uow.messages.enqueue(since=OLD) == 1
    assert ids(claim(storage)) == ["m-3"]


def test_two_never_claim_the_same(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.messages.send_many([message(number) for number in range(200)])
    together = threading.Barrier(4)

    def work(_: int) -> list[str]:
        found = []
        together.wait(30)
        while deliveries := claim(storage, limit=7):
            found += ids(deliveries)
        return found

    with ThreadPoolExecutor(4) as threads:
        found = [each for part in threads.map(work, range(4)) for each in part]
    assert sorted(found) == sorted({f"m-{number}" for number in range(200)})


def test_a_worker_handles_what_comes_and_nothing_stops_it(
    storage: MeshStorage, caplog: pytest.LogCaptureFixture
) -> None:
    stop = threading.Event()
    seen: list[str] = []

    def handle(uow: Any, delivery: Delivery) -> None:
        seen.append(delivery.message.id)
        uow.state.put(f"effect of {delivery.message.id}", b"")
        if delivery.message.id == "m-1":
            raise ZeroDivisionError("content: 1")
        if delivery.message.id == "m-4":
            stop.set()

    send(storage, 1, 2, 3)
    with ThreadPoolExecutor(1) as threads:
        working = threads.submit(storage.consume, "b", handle, batch=2, max_attempts=1, stop=stop)
        assert eventually(lambda: len(seen) == 3)
        send(storage, 4, 5)
        working.result(30)
    assert seen == ["m-1", "m-2", "m-3", "m-4"]
    with storage.begin(read_only=True) as uow:
        assert [each.key for each in uow.state.stream(prefix="effect")] == [f"effect of m-{n}" for n in (2, 3, 4)]
        (dead,) = uow.messages.dead("b").items
        assert (dead.message.id, dead.reason) == ("m-1", "ZeroDivisionError: content: 1")
    assert ids(claim(storage)) == ["m-5"]
    (record,) = [vars(each) for each in caplog.records if each.levelno >= logging.WARNING]
    assert (record["event"], record["error"], record["attempts"], record["dead"]) == (
        "consume",
        "ZeroDivisionError",
        1,
        True,
    )
    assert str(record["raised_at"]).startswith(__file__)
    assert "content" not in str({name: value for name, value in record.items() if name != "exc_info"})


def test_a_lease_is_extended_for_as_long_as_it_is_handled(storage: MeshStorage) -> None:
    lease, stop = timedelta(seconds=0.6), threading.Event()
    attempts: list[int] = []

    def handle(_: Any, delivery: Delivery) -> None:
        attempts.append(delivery.attempts)
        if delivery.message.id == "m-1":
            assert not stop.wait(3 * lease.total_seconds())
        else:
            stop.set()

    send(storage, 1, 2)
    with ThreadPoolExecutor(1) as threads:
        working = threads.submit(storage.consume, "b", handle, batch=2, lease=lease, stop=stop)
        assert eventually(lambda: bool(attempts))
        while not stop.is_set():
            assert claim(storage) == []
            stop.wait(0.05)
        working.result(30)
    assert attempts == [1, 1]
    assert backlog(storage) == Backlog(0, 0, 0, 0, 0, None, ())
