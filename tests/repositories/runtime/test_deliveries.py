"""Deliveries: what they refuse, how they stand races, and what a claim looks at."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import text

from mesh_storage import (
    AlreadyExistsError,
    ConflictError,
    Delivery,
    InvalidInputError,
    MeshStorage,
    Message,
    UnitOfWork,
)
from mesh_storage.postgres import floors
from mesh_storage.postgres.floors import BEGINNING, Floors
from tests.processes import eventually


def message(number: object, to: str = "b") -> Message:
    return Message(id=f"m-{number}", from_node="a", to_node=to, content=b"")


def send(storage: MeshStorage, *numbers: int, **given: Any) -> None:
    with storage.begin() as uow:
        for number in numbers:
            uow.messages.send(message(number), **given)


def take(storage: MeshStorage, limit: int = 1) -> list[str]:
    """Claim and acknowledge."""
    with storage.begin() as uow:
        deliveries = uow.messages.claim("b", limit=limit)
    with storage.begin() as uow:
        uow.messages.ack(deliveries)
    return [each.message.id for each in deliveries]


# What is refused

LEASED = Delivery(message(1), "b", 1, 1, datetime(2026, 1, 1, tzinfo=UTC))
LONG = timedelta(days=36_501)
REFUSED: dict[str, tuple[str, Any]] = {
    "no receiver": ("receiver", lambda messages: messages.claim("")),
    "a long receiver": ("receiver", lambda messages: messages.claim("x" * 65)),
    "a receiver that is no text": ("receiver", lambda messages: messages.backlog(5)),
    "a limit of 0": ("limit", lambda messages: messages.claim("b", limit=0)),
    "a large limit": ("limit", lambda messages: messages.claim("b", limit=10_001)),
    "no lease": ("lease", lambda messages: messages.claim("b", lease=timedelta(0))),
    "a lease in seconds": ("lease", lambda messages: messages.claim("b", lease=30)),
    "a long lease": ("lease", lambda messages: messages.extend([LEASED], LONG)),
    "no attempts": ("max_attempts", lambda messages: messages.claim("b", max_attempts=0)),
    "no delivery": ("deliveries", lambda messages: messages.ack([message(1)])),
    "no iterable": ("deliveries", lambda messages: messages.ack(LEASED)),
    "a delay in seconds": ("delay", lambda messages: messages.nack([LEASED], delay=5)),
    "a negative delay": ("delay", lambda messages: messages.send(message(1), delay=timedelta(seconds=-1))),
    "a long delay": ("delay", lambda messages: messages.send_many([message(1)], delay=LONG)),
    "an empty key": ("key", lambda messages: messages.send(message(1), key="")),
    "a long key": ("key", lambda messages: messages.send(message(1), key="x" * 256)),
    "a key with a NUL": ("key", lambda messages: messages.send(message(1), key="\0")),
    "no receivers": ("receivers", lambda messages: messages.send(message(1), receivers=[])),
    "receivers that are a text": ("receivers", lambda messages: messages.send(message(1), receivers="bc")),
    "a bad receiver of many": ("receivers", lambda messages: messages.send(message(1), receivers=["b", ""])),
    "no reason": ("reason", lambda messages: messages.bury([LEASED], "")),
    "a long reason": ("reason", lambda messages: messages.bury([LEASED], "x" * 10_001)),
    "ids that are a text": ("ids", lambda messages: messages.redrive("b", "m-1")),
    "ids to delete that are a text": ("ids", lambda messages: messages.delete_many("m-1")),
    "a time that is no number": ("before", lambda messages: messages.purge(datetime(2026, 1, 1, tzinfo=UTC))),
    "a time to queue from": ("since", lambda messages: messages.enqueue(since="now")),
    "a cursor of another listing": ("after", lambda messages: messages.dead(after="WyJhIl0=")),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sense_is_refused_by_name(uow: UnitOfWork, what: str) -> None:
    field, call = REFUSED[what]
    with pytest.raises(InvalidInputError) as error:
        call(uow.messages)
    assert error.value.field == field
    assert uow.messages.count() == 0  # the unit of work goes on


def test_nothing_is_settled_without_a_delivery(uow: UnitOfWork) -> None:
    uow.messages.ack([])
    uow.messages.nack([])
    uow.messages.bury([], "reason")
    assert uow.messages.extend([], timedelta(seconds=1)) == []
    assert uow.messages.send_many([]) == 0
    assert uow.messages.delete_many([]) == 0
    assert uow.messages.redrive("b", []) == 0


def test_a_different_message_among_many_is_refused(storage: MeshStorage) -> None:
    send(storage, 1)
    other = Message(id="m-1", from_node="a", to_node="b", content=b"other")
    with pytest.raises(AlreadyExistsError), storage.begin() as uow:
        uow.messages.send_many([message(2), other])
    assert take(storage, 10) == ["m-1"]


def test_many_are_delivered_in_the_order_given(storage: MeshStorage) -> None:
    numbers = random.Random(1).sample(range(100), 100)
    with storage.begin() as uow:
        uow.messages.store(message(numbers[3]))  # comes behind those that are new
        assert uow.messages.send_many(map(message, numbers)) == 100
    expected = [f"m-{number}" for number in numbers if number != numbers[3]]
    assert take(storage, 1000) == [*expected, f"m-{numbers[3]}"]


# Races


def waiting(storage: MeshStorage) -> int:
    """Count the sessions of the database that wait for a lock, as of a new transaction, since each looks only once."""
    with storage.begin(read_only=True) as beside:
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        return int(beside.session.execute(text(waits)).scalar_one())


def test_who_sends_to_a_key_waits_for_who_did_before(storage: MeshStorage) -> None:
    with ThreadPoolExecutor(1) as threads:
        with storage.begin() as uow:
            uow.messages.send(message(1), key="k")
            second = threads.submit(send, storage, 2, key="k")
            assert eventually(lambda: waiting(storage) == 1)
            send(storage, 3, key="another")  # which does not
        second.result(30)
    assert take(storage, 10) == ["m-1", "m-3"]
    assert take(storage, 10) == ["m-2"]


def test_an_acknowledgement_and_a_message_of_its_key_do_not_miss_each_other(storage: MeshStorage) -> None:
    """Were one missed, the lane would be without a first message for ever."""
    number, taken = 300, list[str]()
    together = threading.Barrier(2)

    def sender() -> None:
        together.wait(30)
        for each in range(number):
            send(storage, each, key="k")

    def receiver() -> None:
        together.wait(30)
        assert eventually(lambda: taken.extend(take(storage, 5)) or len(taken) == number, 60)

    with ThreadPoolExecutor(2) as threads:
        for working in [threads.submit(sender), threads.submit(receiver)]:
            working.result(90)
    assert taken == [f"m-{each}" for each in range(number)]


@pytest.mark.parametrize("first", ["delete", "ack"])
def test_a_waiting_message_that_is_deleted_while_its_turn_comes_leaves_no_gap(storage: MeshStorage, first: str) -> None:
    send(storage, 1, 2, 3, key="k")
    with storage.begin() as uow:
        deliveries = uow.messages.claim("b")

    def other() -> None:
        with storage.begin() as uow:
            uow.messages.ack(deliveries) if first == "delete" else uow.messages.delete("m-2")

    with ThreadPoolExecutor(1) as threads:
        with storage.begin() as uow:
            uow.messages.delete("m-2") if first == "delete" else uow.messages.ack(deliveries)
            second = threads.submit(other)
            assert eventually(lambda: waiting(storage) == 1)
        second.result(30)
    assert take(storage, 10) == ["m-3"]


@pytest.mark.one_server
def test_a_message_is_not_purged_while_it_is_queued(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.messages.store(Message(id="m", from_node="a", to_node="b", content=b"", timestamp=1))

    def purge() -> int:
        with storage.begin() as uow:
            return uow.messages.purge(10)

    with ThreadPoolExecutor(1) as threads:
        with storage.begin() as uow:
            assert uow.messages.enqueue(since=0) == 1
            assert threads.submit(purge).result(30) == 0
        assert purge() == 0
    assert take(storage) == ["m"]


# What a claim looks at


@pytest.mark.one_server
def test_a_claim_does_not_look_at_those_that_wait_behind_a_key(storage: MeshStorage) -> None:
    send(storage, 0, key="hot")
    fill = """
        WITH stored AS (
            INSERT INTO mesh_messages (id, from_node, to_node, content, queued)
            SELECT 'm-' || n, 'a', 'b', '', true FROM generate_series(1, 20000) AS n RETURNING id
        )
        INSERT INTO mesh_deliveries (message_id, receiver, key, state, available_at)
        SELECT id, 'b', 'hot', 'waiting', now() FROM stored
    """
    with storage.begin() as uow:
        uow.session.execute(text(fill))
        uow.session.execute(text("ANALYZE mesh_messages, mesh_deliveries, mesh_delivery_lanes"))
    with storage.unit_of_work() as uow:
        for number in range(3):
            (delivery,) = uow.messages.claim("b", limit=100)
            assert (delivery.message.id, delivery.attempts) == (f"m-{number}", 1)
            uow.messages.ack([delivery])
        query = "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'mesh_deliveries'"
        assert uow.session.execute(text(query)).scalar_one() < 50


def test_behind_an_old_snapshot_a_look_begins_where_the_last_one_did(
    storage: MeshStorage, mesh_storage_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floors, "_FROM_THE_BEGINNING_S", 60.0)
    with storage.begin() as uow:
        uow.messages.send_many(map(message, range(600)))
        uow.messages.send_many(message(number) for number in range(600, 1200))
    with psycopg.connect(mesh_storage_url) as holder:
        holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        holder.execute("SELECT FROM mesh_deliveries")
        while len(take(storage, 100)) and take(storage, 100)[-1] != "m-799":
            pass
        with storage.unit_of_work() as uow:
            before = fetched(uow)
            assert [each.message.id for each in uow.messages.claim("b", limit=2)] == ["m-800", "m-801"]
            assert fetched(uow) - before < 250  # those of the second sending, and none of the first


def fetched(uow: UnitOfWork, table: str = "mesh_deliveries") -> int:
    """Return how many index entries of a table this transaction has read."""
    query = """
        SELECT sum(pg_stat_get_xact_tuples_returned(indexrelid))::bigint FROM pg_index
        WHERE indrelid = CAST(:table AS regclass)
    """
    return int(uow.session.execute(text(query), {"table": table}).scalar_one())


def test_what_was_committed_late_with_an_early_time_is_not_missed(storage: MeshStorage) -> None:
    with storage.unit_of_work() as late:
        late.messages.send(message("late"))
        send(storage, 1, 2)
        assert take(storage) == ["m-1"]
        late.commit()
    assert take(storage, 10) == ["m-late", "m-2"]


def test_a_floor_holds_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    moment = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: moment[0])
    made, noon = Floors(), datetime(2026, 1, 1, 12, tzinfo=UTC)
    assert made.of("b") == BEGINNING
    made.note("b", noon, BEGINNING)
    assert (made.of("b"), made.of("c")) == (noon, BEGINNING)
    moment[0] += 0.2
    made.note("b", noon + timedelta(hours=1), noon)  # a later look from there is not one from the beginning
    assert made.of("b") == noon + timedelta(hours=1)
    moment[0] += 0.2
    assert made.of("b") == BEGINNING
    for number in range(5000):
        made.note(str(number), noon, BEGINNING)
    assert len(made._known) <= 1000
    made.forget("4999")
    assert made.of("4999") == BEGINNING


def in_between(monkeypatch: pytest.MonkeyPatch, number: int, work: Callable[[], object]) -> None:
    """Have another unit of work do something between two statements of the next one."""
    from mesh_storage.postgres.connection import UnitOfWorkConnection

    run, calls = UnitOfWorkConnection._run, itertools.count(1)

    def run_between(connection: Any, *args: Any) -> Any:
        if next(calls) == number:
            monkeypatch.undo()
            work()
        return run(connection, *args)

    monkeypatch.setattr(UnitOfWorkConnection, "_run", run_between)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("meanwhile", ["deleted", "queued"])
def test_a_stored_message_that_changes_while_it_is_sent_is_sent_once(
    storage: MeshStorage, monkeypatch: pytest.MonkeyPatch, meanwhile: str, many: bool
) -> None:
    given = message(1)
    with storage.begin() as uow:
        uow.messages.store(given)

    def work() -> None:
        with storage.begin() as other:
            assert other.messages.delete_many(["m-1"]) if meanwhile == "deleted" else other.messages.enqueue(since=0)

    in_between(monkeypatch, 3, work)
    with storage.begin() as uow:
        if many:
            assert uow.messages.send_many([given]) == (1 if meanwhile == "deleted" else 0)
        else:
            uow.messages.send(given)
    assert take(storage, 10) == ["m-1"]


@pytest.mark.one_server
def test_an_acknowledgement_of_several_receivers_and_a_message_to_them_do_not_deadlock(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.messages.send(message(1), key="k", receivers=["b", "c"])
    with storage.begin() as uow:
        deliveries = [*uow.messages.claim("c"), *uow.messages.claim("b")]

    def acknowledge() -> None:
        with storage.begin() as uow:
            uow.messages.ack(deliveries)

    with ThreadPoolExecutor(1) as threads:
        with storage.begin() as uow:
            uow.messages.send(message(2), key="k", receivers=["b"])
            acknowledging = threads.submit(acknowledge)
            assert eventually(lambda: waiting(storage) == 1)
            uow.messages.send(message(3), key="k", receivers=["c"])
        acknowledging.result(30)
    assert take(storage, 10) == ["m-2"]


@pytest.mark.parametrize("how", ["ack", "delete"])
@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_in_an_old_snapshot_no_lane_is_taken_for_empty(storage: MeshStorage, isolation: Any, how: str) -> None:
    """Those sent since would wait for ever."""
    send(storage, 1, key="k")
    with storage.begin() as uow:
        deliveries = uow.messages.claim("b")
    attempts = []

    def settle(uow: UnitOfWork) -> None:
        attempts.append(uow.messages.count())
        if len(attempts) == 1:
            send(storage, 2, key="k")
        uow.messages.ack(deliveries) if how == "ack" else uow.messages.delete("m-1")

    storage.run(settle, isolation=isolation)
    assert attempts == [1, 2]
    assert take(storage, 10) == ["m-2"]
    send(storage, 3, key="k")
    assert take(storage, 10) == ["m-3"]


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_in_an_old_snapshot_no_lane_is_left_behind_what_was_acknowledged_since(
    storage: MeshStorage, isolation: Any
) -> None:
    """Those sent later would wait for ever."""
    send(storage, 1, key="k")
    with storage.begin() as uow:
        deliveries = uow.messages.claim("b")
    attempts = []

    def delete(uow: UnitOfWork) -> int:
        attempts.append(uow.messages.count())
        if len(attempts) == 1:
            with storage.begin() as other:
                other.messages.ack(deliveries)
        return uow.messages.delete_many(["m-1"])

    assert storage.run(delete, isolation=isolation) == 1
    send(storage, 2, key="k")
    assert take(storage, 10) == ["m-2"]


def beside(storage: MeshStorage, first: Callable[[UnitOfWork], object], second: Callable[[UnitOfWork], Any]) -> Any:
    """Return what a unit of work gets that has to wait for another one."""

    def work() -> Any:
        with storage.begin() as uow:
            return second(uow)

    with ThreadPoolExecutor(1) as threads:
        with storage.begin() as uow:
            first(uow)
            working = threads.submit(work)
            assert eventually(lambda: waiting(storage) == 1)
        return working.result(30)


def test_a_message_that_is_queued_while_it_is_deleted_stays_or_takes_its_delivery_along(storage: MeshStorage) -> None:
    given = [message(1), message(2)]
    with storage.begin() as uow:
        uow.messages.store_many(given)

    def send_first(uow: UnitOfWork) -> None:
        uow.messages.send(given[0], key="k")

    assert beside(storage, send_first, lambda uow: uow.messages.delete_many(["m-1"])) == 0
    assert beside(storage, lambda uow: uow.messages.enqueue(since=0), lambda uow: uow.messages.delete("m-2")) is None
    with storage.begin(read_only=True) as uow:
        assert (uow.messages.count(), uow.messages.backlog().due) == (1, 1)
    assert take(storage, 10) == ["m-1"]


@pytest.mark.parametrize("how", ["delete", "delete_many"])
def test_a_key_whose_only_message_is_acknowledged_while_it_is_deleted_is_not_held(
    storage: MeshStorage, how: str
) -> None:
    send(storage, 1, key="k")
    with storage.begin() as uow:
        deliveries = uow.messages.claim("b")

    def delete(uow: UnitOfWork) -> None:
        uow.messages.delete("m-1") if how == "delete" else uow.messages.delete_many(["m-1"])

    beside(storage, lambda uow: uow.messages.ack(deliveries), delete)
    send(storage, 2, key="k")
    assert take(storage) == ["m-2"]


def test_a_dead_one_that_is_driven_back_while_it_is_deleted_stays(storage: MeshStorage) -> None:
    send(storage, 1, 2)
    with storage.begin() as uow:
        uow.messages.bury(uow.messages.claim("b", limit=2), "reason")
    drive_back = ["m-1"]
    ids = ["m-1", "m-2"]
    deleted = beside(
        storage, lambda uow: uow.messages.redrive("b", drive_back), lambda uow: uow.messages.delete_many(ids)
    )
    assert deleted == 1
    assert take(storage, 10) == ["m-1"]


STATES = {"queued": [], "leased": [], "dead": [], "waiting": [message(0)]}
KEYED = [(state, key) for state in STATES for key in (None, "k") if key or state != "waiting"]


@pytest.mark.parametrize("how", ["send", "send_many", "enqueue"])
@pytest.mark.parametrize(("state", "key"), KEYED)
def test_the_delivery_of_a_message_that_another_service_deleted_becomes_that_of_a_new_one(
    storage: MeshStorage, mesh_storage_url: str, key: str | None, state: str, how: str
) -> None:
    with storage.begin() as uow:
        for each in [*STATES[state], message(1)]:
            uow.messages.send(each, key=key)
        if state in ("leased", "dead"):
            claimed = uow.messages.claim("b")
        if state == "dead":
            uow.messages.bury(claimed, "reason")
    with psycopg.connect(mesh_storage_url, autocommit=True) as other:
        other.execute("DELETE FROM mesh_messages WHERE id = 'm-1'")
    new = Message(id="m-1", from_node="a", to_node="b", content=b"new")
    with storage.begin() as uow:
        if how == "send":
            uow.messages.send(new, key=key)
        elif how == "send_many":
            assert uow.messages.send_many([new]) == 1
        else:
            uow.messages.store(new)
            assert uow.messages.enqueue(since=0) == 1
    if state == "leased":
        with pytest.raises(ConflictError), storage.begin() as uow:
            uow.messages.ack(claimed)
    if state == "waiting":
        assert take(storage, 10) == ["m-0"]
    with storage.begin() as uow:
        (delivery,) = uow.messages.claim("b", limit=10)
        uow.messages.ack([delivery])
    assert (delivery.message.content, delivery.attempts, delivery.key) == (b"new", 1, key)
    send(storage, 2, key="k")  # whose lane is as it was
    assert take(storage, 10) == ["m-2"]


@pytest.mark.parametrize("former", [None, "another"])
def test_such_a_delivery_under_another_key_is_a_conflict(
    storage: MeshStorage, mesh_storage_url: str, former: str | None
) -> None:
    send(storage, 1, key=former)
    with psycopg.connect(mesh_storage_url, autocommit=True) as other:
        other.execute("DELETE FROM mesh_messages")
    with pytest.raises(ConflictError, match="m-1"):
        send(storage, 1, key="k")
    assert take(storage) == []  # it is removed
    send(storage, 1, key="k")
    send(storage, 2, key="k")
    assert (take(storage), take(storage)) == (["m-1"], ["m-2"])


def test_a_dead_one_whose_message_another_service_deleted_goes_when_it_is_driven_back(
    storage: MeshStorage, mesh_storage_url: str
) -> None:
    send(storage, 1, 2, key="k")
    with storage.begin() as uow:
        uow.messages.bury(uow.messages.claim("b"), "reason")
    with psycopg.connect(mesh_storage_url, autocommit=True) as other:
        other.execute("DELETE FROM mesh_messages WHERE id = 'm-1'")
    with storage.begin() as uow:
        assert uow.messages.redrive("b") == 1
    assert take(storage) == ["m-2"]


def seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


@pytest.mark.one_server
def test_each_of_many_takes_no_longer_the_more_there_are(storage: MeshStorage) -> None:
    """Together that would be the square of their number. The statistics of the server know nothing of them yet."""
    ids = [f"m-{number}" for number in range(10_000)]
    with storage.begin() as uow:
        uow.messages.send_many(message(number, "a") for number in range(20_000, 21_000))
        uow.session.execute(text("ANALYZE mesh_messages, mesh_deliveries"))

    def run(work: Callable[[UnitOfWork], int], result: int) -> float:
        def once() -> None:
            with storage.begin() as uow:
                assert work(uow) == result

        return seconds(once)

    stored = run(lambda uow: uow.messages.store_many(map(message, range(10_000))), 10_000)
    assert run(lambda uow: uow.messages.enqueue(since=0), 10_000) < 20 * stored
    assert run(lambda uow: uow.messages.delete_many(ids), 0) < 20 * stored


NUMBER = 2_000
BY_ID: dict[str, Callable[[Any], object]] = {
    "claim": lambda messages: messages.claim("b", limit=NUMBER // 2),
    "store again": lambda messages: [messages.store(message(number)) for number in range(50)],
    "send of what was stored": lambda messages: [messages.send(message(5000 + number)) for number in range(50)],
    "send_many of what was stored": lambda messages: messages.send_many(message(5000 + n) for n in range(NUMBER)),
    "delete_many": lambda messages: messages.delete_many([f"m-{5000 + number}" for number in range(NUMBER)]),
    "dead": lambda messages: messages.dead("c").items,
}


@pytest.mark.one_server
@pytest.mark.parametrize("name", BY_ID)
@pytest.mark.parametrize("collation", ["default", "C"])
def test_messages_are_found_by_their_ids_though_the_statistics_do_not_know_the_receiver(
    storage: MeshStorage, mesh_storage_url: str, name: str, collation: str
) -> None:
    with psycopg.connect(mesh_storage_url, autocommit=True) as owner:
        owner.execute(f'ALTER TABLE mesh_messages ALTER to_node TYPE varchar COLLATE "{collation}"'.encode())
        with storage.begin() as uow:
            uow.messages.send_many(message(number, "a") for number in range(20_000, 21_000))
        owner.execute("ANALYZE mesh_messages, mesh_deliveries")
    with storage.begin() as uow:
        uow.messages.send_many(map(message, range(NUMBER)))
        uow.messages.store_many(message(5000 + number) for number in range(NUMBER))
        uow.messages.send_many(message(10_000 + number, "c") for number in range(NUMBER))
    with storage.begin() as uow:
        uow.messages.bury(uow.messages.claim("c", limit=NUMBER), "reason")
    with storage.begin() as uow:
        before = fetched(uow, "mesh_messages")
        assert BY_ID[name](uow.messages)
        assert fetched(uow, "mesh_messages") - before < 10 * NUMBER
