"""Shows that deliveries act like a small model in memory, whatever is done to them, and in whatever order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from sqlalchemy import text

from mesh_storage import ConflictError, Delivery, MeshStorage, Message, NotFoundError

pytestmark = pytest.mark.slow

RUNS = settings(max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
HOUR = timedelta(hours=1)
MOST_ATTEMPTS = 4
# The statement has one moment for all rows, as those of the library have.
LAPSE = """
    UPDATE mesh_deliveries SET available_at = (SELECT clock_timestamp())
    WHERE state IN ('queued', 'leased') AND available_at > (SELECT clock_timestamp())
"""

ids = st.sampled_from(["1", "2", "3", "4", "5"])
keys = st.sampled_from([None, None, "k", "l"])
receivers = st.sampled_from(["a", "b"])
# In a distributed database, a message is for its to_node only.
everybody = st.lists(receivers, min_size=1, max_size=2, unique=True)
several = st.just(["a"]) if os.environ.get("MESH_STORAGE_TEST_DISTRIBUTE") == "1" else everybody


@dataclass
class Expected:
    """A delivery of the model."""

    id: str
    receiver: str
    key: str | None
    seq: int
    state: str
    due: int | None
    """The number of the moment since when it is due; None if it is not."""
    attempts: int = 0
    token: int | None = None
    reason: str | None = None


@dataclass
class Model:
    """What is stored, what was ever queued, and the deliveries in the order of sending."""

    stored: set[str] = field(default_factory=set)
    queued: set[str] = field(default_factory=set)
    open: list[Expected] = field(default_factory=list)

    def of(self, receiver: str, state: str) -> list[Expected]:
        return [each for each in self.open if each.receiver == receiver and each.state == state]

    def find(self, delivery: Delivery) -> Expected | None:
        """Return the delivery whose lease this is, if it is held."""
        for each in self.open:
            place = (each.id, each.receiver, each.token, each.state)
            if place == (delivery.message.id, delivery.receiver, delivery.token, "leased") and each.due is None:
                return each
        return None


class Deliveries(RuleBasedStateMachine):
    """Steps in units of work of their own."""

    def __init__(self, storage: MeshStorage) -> None:
        super().__init__()
        self.storage = storage
        with storage.begin() as uow:
            uow.session.execute(text("TRUNCATE mesh_messages, mesh_deliveries, mesh_delivery_lanes"))
        self.model = Model()
        self.numbers = count()
        self.claimed: list[Delivery] = []

    def queue(self, id_: str, to: list[str], key: str | None, *, due: bool = True) -> None:
        self.model.stored.add(id_)
        if id_ in self.model.queued:
            return
        self.model.queued.add(id_)
        moment = next(self.numbers) if due else None
        for receiver in sorted(to):
            behind = key is not None and any((each.receiver, each.key) == (receiver, key) for each in self.model.open)
            state = "waiting" if behind else "queued"
            self.model.open.append(Expected(id_, receiver, key, next(self.numbers), state, moment))

    def remove(self, gone: list[Expected]) -> None:
        """Remove deliveries, and let the next of their keys follow."""
        moment = next(self.numbers)
        for each in gone:
            self.model.open.remove(each)
        for each in gone:
            if each.key is None:
                continue
            of_key = [one for one in self.model.open if (one.receiver, one.key) == (each.receiver, each.key)]
            if of_key and of_key[0].state == "waiting":
                of_key[0].state = "queued"
                of_key[0].due = None if of_key[0].due is None else moment

    @rule(id_=ids)
    def store(self, id_: str) -> None:
        with self.storage.begin() as uow:
            uow.messages.store(message(id_))
        self.model.stored.add(id_)

    @rule(id_=ids, key=keys, to=several, delay=st.sampled_from([None, None, HOUR]))
    def send(self, id_: str, key: str | None, to: list[str], delay: timedelta | None) -> None:
        with self.storage.begin() as uow:
            uow.messages.send(message(id_), key=key, receivers=to, delay=delay)
        self.queue(id_, to, key, due=delay is None)

    @rule(given=st.lists(ids, max_size=5))
    def send_many(self, given: list[str]) -> None:
        new = [id_ for id_ in dict.fromkeys(given) if id_ not in self.model.queued]
        with self.storage.begin() as uow:
            assert uow.messages.send_many(map(message, given)) == len(new)
        # What is new in the table comes before what was only stored.
        stored = {*self.model.stored}
        for id_ in sorted(new, key=lambda each: each in stored):
            self.queue(id_, ["a"], None)

    @rule()
    def enqueue(self) -> None:
        left = sorted(self.model.stored - self.model.queued)
        with self.storage.begin() as uow:
            assert uow.messages.enqueue(since=0) == len(left)
        for id_ in left:
            self.queue(id_, ["a"], None)

    @rule(receiver=receivers, limit=st.integers(1, 3), kept=st.booleans())
    def claim(self, receiver: str, limit: int, kept: bool) -> None:
        with self.storage.unit_of_work() as uow:
            found = uow.messages.claim(receiver, limit=limit, lease=HOUR, max_attempts=MOST_ATTEMPTS)
            if kept:
                uow.commit()
        due = [each for each in self.model.open if each.receiver == receiver and each.due is not None]
        due = sorted(
            (each for each in due if each.state in ("queued", "leased")), key=lambda each: (each.due, each.seq)
        )
        # Those set aside make room for others.
        passed = 0
        expected = []
        for each in due:
            if len(expected) == limit:
                break
            passed += 1
            if each.attempts < MOST_ATTEMPTS:
                expected.append(each)
        assert [each.message.id for each in found] == [each.id for each in expected]
        if not kept:
            return
        for each in due[:passed]:
            each.due = None
            if each in expected:
                each.state, each.attempts = "leased", each.attempts + 1
                each.token = next(one.token for one in found if one.message.id == each.id)
            else:
                each.state, each.reason = "dead", f"not acknowledged in {MOST_ATTEMPTS} claims"
        assert [each.attempts for each in found] == [each.attempts for each in expected]
        self.claimed += found

    @rule(
        how=st.sampled_from(["ack", "nack", "nack later", "extend", "bury"]),
        picks=st.lists(st.integers(0, 1000), min_size=1, max_size=3),
        latest=st.booleans(),
    )
    def settle(self, how: str, picks: list[int], latest: bool) -> None:
        if not self.claimed:
            return
        pool = self.claimed[-3:] if latest else self.claimed
        chosen = list({id(each): each for each in (pool[pick % len(pool)] for pick in picks)}.values())
        found = [self.model.find(each) for each in chosen]
        held = [each for each in found if each is not None]
        arguments: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
            "ack": ("ack", (), {}),
            "nack": ("nack", (), {"delay": timedelta(0)}),
            "nack later": ("nack", (), {"delay": HOUR}),
            "extend": ("extend", (HOUR,), {}),
            "bury": ("bury", ("reason",), {}),
        }
        name, positional, named = arguments[how]
        if len(held) < len(found):
            with pytest.raises(ConflictError), self.storage.begin() as uow:
                getattr(uow.messages, name)(chosen, *positional, **named)
            return
        with self.storage.begin() as uow:
            getattr(uow.messages, name)(chosen, *positional, **named)
        moment = next(self.numbers)
        if how == "ack":
            self.remove(held)
        for each in held:
            if how == "nack":
                each.state, each.due = "queued", moment
            elif how == "nack later":
                each.state = "queued"
            elif how == "bury":
                each.state, each.reason = "dead", "reason"

    @rule()
    def time_passes(self) -> None:
        with self.storage.begin() as uow:
            uow.session.execute(text(LAPSE))
        moment = next(self.numbers)
        for each in self.model.open:
            if each.state in ("queued", "leased") and each.due is None:
                each.due = moment

    @rule(receiver=receivers, given=st.none() | st.lists(ids, max_size=3))
    def redrive(self, receiver: str, given: list[str] | None) -> None:
        back = [each for each in self.model.of(receiver, "dead") if given is None or each.id in given]
        with self.storage.begin() as uow:
            assert uow.messages.redrive(receiver, given) == len(back)
        moment = next(self.numbers)
        for each in back:
            each.state, each.due, each.attempts, each.reason = "queued", moment, 0, None

    @rule(id_=ids)
    def delete(self, id_: str) -> None:
        if id_ not in self.model.stored:
            with pytest.raises(NotFoundError), self.storage.begin() as uow:
                uow.messages.delete(id_)
            return
        with self.storage.begin() as uow:
            uow.messages.delete(id_)
        self.forget([id_])

    @rule(given=st.lists(ids, max_size=4))
    def delete_many(self, given: list[str]) -> None:
        busy = {each.id for each in self.model.open if each.state != "dead"}
        gone = {*given} & self.model.stored - busy
        with self.storage.begin() as uow:
            assert uow.messages.delete_many(given) == len(gone)
        self.forget(sorted(gone))

    @rule()
    def purge(self) -> None:
        gone = self.model.stored - {each.id for each in self.model.open}
        with self.storage.begin() as uow:
            assert uow.messages.purge(1000) == len(gone)
        self.forget(sorted(gone))

    def forget(self, gone: list[str]) -> None:
        self.model.stored -= {*gone}
        self.model.queued -= {*gone}
        self.remove([each for each in self.model.open if each.id in gone])

    @invariant()
    def the_backlog_is_that_of_the_model(self) -> None:
        with self.storage.begin(read_only=True) as uow:
            for receiver in ("a", "b"):
                found = uow.messages.backlog(receiver)
                mine = [each for each in self.model.open if each.receiver == receiver]
                active = [each for each in mine if each.state in ("queued", "leased")]
                assert found.due == sum(each.due is not None for each in active)
                assert found.leased == sum(each.state == "leased" and each.due is None for each in active)
                assert found.delayed == sum(each.state == "queued" and each.due is None for each in active)
                assert found.waiting == len(self.model.of(receiver, "waiting"))
                assert found.dead == len(self.model.of(receiver, "dead"))
                assert (found.oldest_due is None) == (found.due == 0)
                failed = [each for each in active if each.state == "queued" and each.due is None and each.attempts]
                held = [each.key for each in mine if each.key and (each.state == "dead" or each in failed)]
                assert list(found.held) == held
            dead = [(each.receiver, each.message.id, each.reason) for each in uow.messages.dead().items]
            assert dead == [
                (each.receiver, each.id, each.reason) for name in ("a", "b") for each in self.model.of(name, "dead")
            ]
            assert {each.id for each in uow.messages.stream()} == self.model.stored

    @invariant()
    def there_is_a_lane_for_each_key_with_a_delivery(self) -> None:
        with self.storage.begin(read_only=True) as uow:
            lanes = uow.session.execute(text("SELECT receiver, key FROM mesh_delivery_lanes")).all()
        assert {tuple(each) for each in lanes} == {(each.receiver, each.key) for each in self.model.open if each.key}


def message(id_: str) -> Message:
    return Message(id=id_, from_node="x", to_node="a", content=b"", timestamp=int(id_))


@pytest.fixture(scope="module")
def shared(mesh_storage_databases: Any) -> Iterator[MeshStorage]:
    """Yield a storage for all runs."""
    with mesh_storage_databases.fresh() as url, MeshStorage.open(url) as storage:
        yield storage


def test_deliveries_act_like_the_model(shared: MeshStorage) -> None:
    run_state_machine_as_test(lambda: Deliveries(shared), settings=RUNS)  # type: ignore[no-untyped-call]
