"""Shows the messages: stored once however often they are sent, and listed in the order of their time."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from mesh_storage import AlreadyExistsError, InvalidInputError, MeshStorage, Message, UnitOfWork
from mesh_storage.testing import MessageFactory

OTHER = {"from_node": "node-x", "to_node": "node-y", "content": b"other", "timestamp": 7}


def message(**given: Any) -> Message:
    return Message(
        **({"id": "m", "from_node": "node-a", "to_node": "node-b", "content": b"hello", "timestamp": 5} | given)
    )


def ids(messages: Any) -> list[str]:
    return [found.id for found in messages]


def values(found: Message) -> tuple[Any, ...]:
    return found.id, found.from_node, found.to_node, found.content, found.timestamp


def test_store_gives_the_message_back_with_its_times(uow: UnitOfWork) -> None:
    given = message()
    assert uow.messages.store(given) is given
    found = uow.messages.get("m")
    assert values(found) == ("m", "node-a", "node-b", b"hello", 5)
    assert given.created_at is not None
    assert found.created_at == given.created_at


def test_a_message_without_a_timestamp_gets_the_clock_of_the_database(uow: UnitOfWork) -> None:
    one = uow.messages.store(message(timestamp=None))
    assert one.created_at is not None
    assert abs(one.timestamp - one.created_at.timestamp()) <= 1
    assert uow.messages.store_many([message(id="n", timestamp=None)]) == 1
    assert uow.messages.get("n").timestamp == uow.messages.get("m").timestamp == one.timestamp


def test_the_same_message_again_changes_nothing(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        first = uow.messages.store(message())
    with storage.begin() as uow:
        again = uow.messages.store(message())
        without_time = uow.messages.store(message(timestamp=None))
        assert uow.messages.store_many([message(), message()]) == 0
        assert again.created_at == without_time.created_at == first.created_at
        assert without_time.timestamp == 5
        assert uow.messages.count() == 1


@pytest.mark.parametrize(
    "field", [pytest.param(name, marks=[pytest.mark.one_server] if name == "to_node" else []) for name in OTHER]
)
def test_a_different_message_under_a_taken_id_is_refused_and_overwrites_nothing(uow: UnitOfWork, field: str) -> None:
    uow.messages.store(message())
    different = message(**{field: OTHER[field]})
    with pytest.raises(AlreadyExistsError) as error:
        uow.messages.store(different)
    assert not error.value.retryable
    assert "hello" not in str(error.value)
    with pytest.raises(AlreadyExistsError), uow.savepoint():
        uow.messages.store_many([message(id="new"), different])
    assert different.created_at is None
    assert [values(found) for found in uow.messages.stream()] == [values(message())]


def test_the_unit_of_work_goes_on_after_store_refused_a_message(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.messages.store(message())
        with pytest.raises(AlreadyExistsError):
            uow.messages.store(message(content=b"other"))
        uow.messages.store(message(id="n"))
    with storage.unit_of_work() as uow:
        assert ids(uow.messages.stream()) == ["m", "n"]


def test_store_many_counts_those_that_are_new(uow: UnitOfWork) -> None:
    uow.messages.store(message(id="b"))
    assert uow.messages.store_many(message(id=id_) for id_ in "cabc") == 2
    assert uow.messages.store_many([]) == 0
    assert ids(uow.messages.stream()) == ["a", "b", "c"]


def test_store_many_refuses_two_different_messages_of_one_id(uow: UnitOfWork) -> None:
    with pytest.raises(AlreadyExistsError), uow.savepoint():
        uow.messages.store_many([message(id="a"), message(), message(content=b"other")])
    assert uow.messages.count() == 0


def test_store_many_takes_ten_thousand_at_once(uow: UnitOfWork) -> None:
    assert uow.messages.store_many(MessageFactory.build_batch(10_000)) == uow.messages.count() == 10_000


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"id": ""}, "id"),
        ({"id": "x" * 65}, "id"),
        ({"id": None}, "id"),
        ({"from_node": ""}, "from_node"),
        ({"from_node": "x" * 65}, "from_node"),
        ({"to_node": "\0"}, "to_node"),
        ({"to_node": "\ud800"}, "to_node"),
        ({"content": "text"}, "content"),
        ({"content": None}, "content"),
        ({"content": bytearray(b"x")}, "content"),
        ({"timestamp": 2**63}, "timestamp"),
        ({"timestamp": -(2**63) - 1}, "timestamp"),
        ({"timestamp": 1.5}, "timestamp"),
        ({"timestamp": True}, "timestamp"),
        ({"timestamp": "5"}, "timestamp"),
    ],
)
def test_a_message_that_cannot_be_stored_is_refused_by_name(uow: UnitOfWork, given: dict[str, Any], field: str) -> None:
    for call in (
        lambda: uow.messages.store(message(**given)),
        lambda: uow.messages.store_many([message(id="good"), message(**given)]),
    ):
        with pytest.raises(InvalidInputError) as error:
            call()
        assert error.value.field == f"Message.{field}"
    assert uow.messages.count() == 0


@pytest.mark.parametrize("given", [None, "m", {"id": "m"}])
def test_what_is_no_message_is_refused(uow: UnitOfWork, given: Any) -> None:
    for call in (uow.messages.store, lambda one: uow.messages.store_many([one])):
        with pytest.raises(InvalidInputError) as error:
            call(given)
        assert error.value.field == "message"


@pytest.mark.parametrize("timestamp", [-(2**63), -1, 0, 2**63 - 1])
def test_every_time_of_64_bits_is_stored_and_listed(uow: UnitOfWork, timestamp: int) -> None:
    uow.messages.store(message(timestamp=timestamp))
    assert uow.messages.get("m").timestamp == timestamp
    assert ids(uow.messages.page().items) == ids(uow.messages.page(since=timestamp).items) == ["m"]
    assert uow.messages.count(until=timestamp) == 0


def test_the_order_is_that_of_time_then_of_id_however_they_came(uow: UnitOfWork) -> None:
    given = {"e": 2, "a": 9, "d": 2, "c": -4, "b": 2}
    uow.messages.store_many(message(id=id_, timestamp=time) for id_, time in given.items())
    assert ids(uow.messages.page().items) == ["c", "b", "d", "e", "a"]
    first = uow.messages.page(limit=2)
    second = uow.messages.page(limit=2, after=first.next)
    third = uow.messages.page(limit=2, after=second.next)
    assert [ids(page.items) for page in (first, second, third)] == [["c", "b"], ["d", "e"], ["a"]]
    assert third.next is None
    assert ids(uow.messages.stream(batch_size=2)) == ["c", "b", "d", "e", "a"]


def test_listings_are_filtered_by_ends_and_time(uow: UnitOfWork) -> None:
    stored = [
        message(id=f"{time}-{source}-{target}-{number}", from_node=source, to_node=target, timestamp=time)
        for time, source, target, number in itertools.product((1, 2, 3), "ab", "ab", (1, 2))
    ]
    uow.messages.store_many(stored)
    for to_node, from_node, since, until in itertools.product(
        (None, "a", "z"), (None, "b"), (None, 0, 2, 4), (None, 3, 2, 0)
    ):
        expected = sorted(
            found.id
            for found in stored
            if to_node in (None, found.to_node)
            and from_node in (None, found.from_node)
            and (since is None or since <= found.timestamp)
            and (until is None or found.timestamp < until)
        )
        matches: dict[str, Any] = {"to_node": to_node, "from_node": from_node, "since": since, "until": until}
        assert uow.messages.count(**matches) == len(expected)
        assert ids(uow.messages.stream(**matches, batch_size=3)) == expected
        first = uow.messages.page(**matches, limit=3)
        rest = uow.messages.page(**matches, after=first.next).items if first.next else []
        assert ids(first.items) + ids(rest) == expected


def test_a_cursor_never_leads_out_of_the_times_that_are_asked_for(uow: UnitOfWork) -> None:
    uow.messages.store_many(message(id=f"m{time}", timestamp=time) for time in range(6))
    early, late = uow.messages.page(limit=1).next, uow.messages.page(limit=5).next
    assert ids(uow.messages.page(since=3, after=early).items) == ["m3", "m4", "m5"]
    assert ids(uow.messages.page(until=3, after=early).items) == ["m1", "m2"]
    assert ids(uow.messages.page(until=3, after=late).items) == []
    assert ids(uow.messages.page(since=2, after=late).items) == ["m5"]


@pytest.mark.parametrize(
    "given",
    [
        {"to_node": ""},
        {"to_node": "x" * 65},
        {"from_node": "\0"},
        {"from_node": 5},
        {"since": 2**63},
        {"since": "1"},
        {"since": True},
        {"until": 2**63},
        {"until": 1.5},
    ],
)
def test_a_filter_that_no_message_can_have_is_refused(uow: UnitOfWork, given: dict[str, Any]) -> None:
    calls: tuple[Any, ...] = (uow.messages.page, uow.messages.stream, uow.messages.count)
    for call in calls:
        with pytest.raises(InvalidInputError) as error:
            list(call(**given))
        assert error.value.field == next(iter(given))


def test_nothing_is_before_the_beginning_of_time(uow: UnitOfWork) -> None:
    uow.messages.store(message(timestamp=-(2**63)))
    assert uow.messages.count(until=-(2**63)) == 0
    assert uow.messages.page(until=-(2**63)).items == []
