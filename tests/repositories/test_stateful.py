"""Shows that each key-value aggregate and the consensus log act like a dict and a list, whatever is done to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from datetime import timedelta
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import text

from mesh_storage import ConflictError, InvalidInputError, LogEntry, MeshStorage, NotFoundError, UnitOfWork
from mesh_storage.testing import Databases

pytestmark = pytest.mark.slow

RUNS = settings(max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
LAST = 2**63 - 1

keys = st.sampled_from(["a", "ab", "a%", "a_", "A", "\u00e9", "\U0001f600", "a\\", "\U0010ffff"])
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(texts, children, max_size=3),
    max_leaves=5,
)
mostly_one = st.sampled_from([1, 1, 1, 1, 2, 0])
objects = st.dictionaries(st.sampled_from("xyz"), json_values, max_size=3)


class Undo(Exception):  # noqa: N818 - no error: it ends a savepoint
    """Leaves a savepoint so that what was done in it is undone."""


class Machine(RuleBasedStateMachine):
    """Steps in a unit of work over a model of what it sees, and of what the others see."""

    table: ClassVar[str]

    def __init__(self, storage: MeshStorage) -> None:
        super().__init__()
        with storage.begin() as uow:
            uow.session.execute(text(f"DELETE FROM {self.table}"))
        self.stack = ExitStack()
        self.uow = self.stack.enter_context(storage.unit_of_work())
        self.other = self.stack.enter_context(storage.unit_of_work(read_only=True))
        self.model: Any = self.empty()
        self.committed: Any = self.empty()
        self.savepoints: list[tuple[AbstractContextManager[None], Any]] = []

    def empty(self) -> Any:
        raise NotImplementedError

    def stored(self, uow: UnitOfWork) -> Any:
        """Return everything that a unit of work sees, in the form of the model."""
        raise NotImplementedError

    def teardown(self) -> None:
        while self.savepoints:
            self.savepoints.pop()[0].__exit__(None, None, None)
        self.stack.close()

    @precondition(lambda self: not self.savepoints)
    @rule()
    def commit(self) -> None:
        self.uow.commit()
        self.committed = self.model.copy()

    @precondition(lambda self: not self.savepoints)
    @rule()
    def roll_back(self) -> None:
        self.uow.rollback()
        self.model = self.committed.copy()

    @precondition(lambda self: len(self.savepoints) < 3)
    @rule()
    def set_savepoint(self) -> None:
        savepoint = self.uow.savepoint()
        savepoint.__enter__()
        self.savepoints.append((savepoint, self.model.copy()))

    @precondition(lambda self: self.savepoints)
    @rule()
    def release_savepoint(self) -> None:
        self.savepoints.pop()[0].__exit__(None, None, None)

    @precondition(lambda self: self.savepoints)
    @rule()
    def undo_to_savepoint(self) -> None:
        savepoint, self.model = self.savepoints.pop()
        assert not savepoint.__exit__(Undo, Undo(), None)

    @invariant()
    def this_unit_of_work_sees_what_it_did(self) -> None:
        assert self.stored(self.uow) == self.model

    @invariant()
    def others_see_what_was_committed(self) -> None:
        assert self.stored(self.other) == self.committed


class KeyValueMachine(Machine):
    """What all key-value aggregates do, over a dict."""

    name: ClassVar[str]
    key: ClassVar[str]
    value: ClassVar[str]

    def empty(self) -> dict[str, Any]:
        return {}

    def stored(self, uow: UnitOfWork) -> dict[str, Any]:
        return dict(map(self.pair, getattr(uow, self.name).stream(batch_size=3)))

    def pair(self, entry: Any) -> tuple[str, Any]:
        return getattr(entry, self.key), getattr(entry, self.value)

    @property
    def repository(self) -> Any:
        return getattr(self.uow, self.name)

    def put(self, key: str, value: Any) -> None:
        assert self.pair(self.repository.put(key, value)) == (key, value)
        self.model[key] = value

    @rule(key=keys)
    def get_or_find(self, key: str) -> None:
        found = self.repository.find(key)
        if key in self.model:
            assert self.pair(found) == self.pair(self.repository.get(key)) == (key, self.model[key])
        else:
            assert found is None
            with pytest.raises(NotFoundError):
                self.repository.get(key)

    @rule(key=keys)
    def delete(self, key: str) -> None:
        if key in self.model:
            self.repository.delete(key)
            del self.model[key]
        else:
            with pytest.raises(NotFoundError):
                self.repository.delete(key)

    @rule(limit=st.integers(1, 4))
    def list_in_pages(self, limit: int) -> None:
        page = self.repository.page(limit=limit)
        found = [self.pair(entry) for entry in page.items]
        while page.next is not None:
            page = self.repository.page(limit=limit, after=page.next)
            found += [self.pair(entry) for entry in page.items]
        assert found == list(map(self.pair, self.repository.stream()))
        assert dict(found) == self.model
        assert self.repository.count() == len(found) == len(self.model)


class PrefixMachine(KeyValueMachine):
    """What those do that are listed by prefix."""

    @rule(prefix=keys)
    def list_a_prefix(self, prefix: str) -> None:
        expected = [(key, value) for key, value in sorted(self.model.items()) if key.startswith(prefix)]
        assert list(map(self.pair, self.repository.page(prefix).items)) == expected
        assert self.repository.count(prefix) == len(expected)


class ManyMachine(KeyValueMachine):
    """What those do that are put many at once."""

    @rule(given=st.dictionaries(keys, json_values, max_size=4))
    def put_many(self, given: dict[str, Any]) -> None:
        assert [self.pair(entry) for entry in self.repository.put_many(given)] == list(given.items())
        self.model |= given


class StateMachine(PrefixMachine):
    """The shared state."""

    table, name, key, value = "mesh_state", "state", "key", "value"

    @rule(key=keys, value=st.binary(max_size=5))
    def put_bytes(self, key: str, value: bytes) -> None:
        self.put(key, value)


class RuntimeConfigMachine(PrefixMachine):
    """The runtime config."""

    table, name, key, value = "mesh_runtime_config", "runtime_config", "key", "value"

    @rule(key=keys, value=json_values)
    def put_json(self, key: str, value: Any) -> None:
        self.put(key, value)

    @rule(key=keys)
    def value_or_default(self, key: str) -> None:
        assert self.repository.value(key, default="default") == self.model.get(key, "default")

    @rule(prefix=st.just("") | keys)
    def read_all(self, prefix: str) -> None:
        expected = [(key, value) for key, value in sorted(self.model.items()) if key.startswith(prefix)]
        assert list(self.repository.all(prefix).items()) == expected


class NodeStatesMachine(ManyMachine):
    """The node states."""

    table, name, key, value = "mesh_node_state", "node_states", "node_id", "state"

    @rule(key=keys, value=json_values | objects)
    def put_json(self, key: str, value: Any) -> None:
        self.put(key, value)

    @rule(key=keys, patch=objects)
    def merge(self, key: str, patch: dict[str, Any]) -> None:
        there = self.model.get(key, {})
        if isinstance(there, dict):
            self.model[key] = {**there, **patch}
            assert self.pair(self.repository.merge(key, patch)) == (key, self.model[key])
        else:
            with pytest.raises(ConflictError):
                self.repository.merge(key, patch)

    @rule()
    def all_are_stale_for_an_age_of_less_than_nothing(self) -> None:
        assert dict(map(self.pair, self.repository.stale(timedelta(seconds=-60)))) == self.model
        assert self.repository.stale(timedelta(days=1)) == []


class RoutingTableMachine(ManyMachine):
    """The routing table."""

    table, name, key, value = "mesh_routing_table", "routing_table", "destination", "route"

    @rule(key=keys, value=json_values)
    def put_json(self, key: str, value: Any) -> None:
        self.put(key, value)

    @rule(given=st.dictionaries(keys, json_values, max_size=4))
    def replace_all(self, given: dict[str, Any]) -> None:
        self.repository.replace_all(given)
        self.model = dict(given)

    @rule()
    def read_all(self) -> None:
        assert list(self.repository.all().items()) == list(map(self.pair, self.repository.stream()))


class ConsensusLogMachine(Machine):
    """The consensus log, over a list of (term, index, entry)."""

    table = "mesh_consensus_log"

    def empty(self) -> list[tuple[int, int, Any]]:
        return []

    def stored(self, uow: UnitOfWork) -> list[tuple[int, int, Any]]:
        return [(entry.term, entry.index, entry.entry) for entry in uow.consensus_log.range(1, LAST)]

    def appended(self, given: list[tuple[int, int, Any]]) -> list[tuple[int, int, Any]] | None:
        """Return the log with these entries appended, or None if Raft's rules are against it."""
        log = list(self.model)
        for term, index, entry in given:
            if log and log[0][1] <= index <= log[-1][1]:
                if log[index - log[0][1]] != (term, index, entry):
                    return None
            elif not log or (index == log[-1][1] + 1 and term >= log[-1][0]):
                log.append((term, index, entry))
            else:
                return None
        return log

    def check(self, given: list[tuple[int, int, Any]], append: Callable[[], object]) -> None:
        expected = self.appended(given)
        if expected is None:
            with pytest.raises(ConflictError):
                append()
        else:
            append()
            self.model = expected

    @rule(ahead=st.integers(-3, 3), rise=st.integers(-1, 2), entry=st.integers(0, 2))
    def append(self, ahead: int, rise: int, entry: int) -> None:
        last_term, last_index = self.model[-1][:2] if self.model else (1, 9)
        term, index = max(0, last_term + rise), max(1, last_index + ahead)
        self.check([(term, index, entry)], lambda: self.uow.consensus_log.append(term, index, entry))

    @rule(
        ahead=st.integers(-4, 2),
        steps=st.lists(st.sampled_from([1, 1, 1, 1, 2, 0]), max_size=5),
        rise=st.integers(0, 1),
    )
    def append_many(self, ahead: int, steps: list[int], rise: int) -> None:
        last_term, last_index = self.model[-1][:2] if self.model else (1, 9)
        there = {index: (term, index, entry) for term, index, entry in self.model}
        index, given = max(1, last_index + ahead), []
        for step in steps:
            given.append(there.get(index, (last_term + rise, index, 0)))
            index += step
        entries = [LogEntry(term=term, index=index, entry=entry) for term, index, entry in given]
        in_order = all(second[1] == first[1] + 1 for first, second in pairwise(given))
        if in_order:
            self.check(given, lambda: self.uow.consensus_log.append_many(entries))
        else:
            with pytest.raises(ConflictError):
                self.uow.consensus_log.append_many(entries)

    @rule(start=st.integers(-3, 4), length=st.integers(-1, 6), suffix=st.booleans())
    def delete_range(self, start: int, length: int, suffix: bool) -> None:
        first, last = (self.model[0][1], self.model[-1][1]) if self.model else (0, 0)
        start += last if suffix else first
        end = start + length - 1
        left = [entry for entry in self.model if not start <= entry[1] <= end]
        if first < start <= end < last:
            with pytest.raises(InvalidInputError):
                self.uow.consensus_log.delete_range(start, end)
        else:
            assert self.uow.consensus_log.delete_range(start, end) == len(self.model) - len(left)
            self.model = left

    @rule()
    def delete_everything(self) -> None:
        assert self.uow.consensus_log.delete_range(1, LAST) == len(self.model)
        self.model = []

    @rule(index=st.integers(1, 15))
    def get_or_find(self, index: int) -> None:
        entry = next((entry for entry in self.model if entry[1] == index), None)
        found = self.uow.consensus_log.find(index)
        assert (None if found is None else (found.term, found.index, found.entry)) == entry
        if entry is None:
            with pytest.raises(NotFoundError):
                self.uow.consensus_log.get(index)

    @invariant()
    def the_ends_are_those_of_the_list(self) -> None:
        log = self.uow.consensus_log
        first, last = (self.model[0], self.model[-1]) if self.model else ((0, 0, None), (0, 0, None))
        assert (log.first_index(), log.last_index(), log.last_term()) == (first[1], last[1], last[0])
        assert log.count() == len(self.model)


@pytest.fixture(scope="module")
def shared(mesh_storage_databases: Databases) -> Iterator[MeshStorage]:
    with mesh_storage_databases.fresh() as url, MeshStorage.open(url) as storage:
        yield storage


@pytest.mark.parametrize(
    "machine",
    [StateMachine, RuntimeConfigMachine, NodeStatesMachine, RoutingTableMachine, ConsensusLogMachine],
    ids=lambda machine: machine.table,
)
def test_it_acts_like_its_model(shared: MeshStorage, machine: type[Machine]) -> None:
    run_state_machine_as_test(partial(machine, shared), settings=RUNS)
