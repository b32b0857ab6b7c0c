"""Shows the consensus log: Raft's rules (an index once, no gaps, no falling term), and both ends cut off."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from mesh_storage import ConflictError, InvalidInputError, LogEntry, MeshStorage, NotFoundError, UnitOfWork

LAST = 2**63 - 1


def log(*entries: tuple[int, int]) -> list[LogEntry]:
    return [LogEntry(term=term, index=index, entry={"at": index}) for term, index in entries]


def stored(uow: UnitOfWork) -> list[tuple[int, int]]:
    return [(entry.term, entry.index) for entry in uow.consensus_log.range(1, LAST)]


def fill(uow: UnitOfWork, *entries: tuple[int, int]) -> None:
    uow.consensus_log.append_many(log(*entries))


def test_append_gives_the_stored_entry(uow: UnitOfWork) -> None:
    first = uow.consensus_log.append(1, 1, {"command": "set"})
    second = uow.consensus_log.append(1, 2, None)
    assert isinstance(first, LogEntry)
    assert (first.term, first.index, first.entry) == (1, 1, {"command": "set"})
    assert (second.term, second.index, second.entry) == (1, 2, None)
    found = uow.consensus_log.get(1)
    assert (found.term, found.entry, found.created_at) == (1, {"command": "set"}, first.created_at)
    assert first.created_at is not None
    assert second.created_at == uow.consensus_log.get(2).created_at is not None


def test_an_empty_log_has_ends_of_zero(uow: UnitOfWork) -> None:
    log = uow.consensus_log
    assert (log.first_index(), log.last_index(), log.last_term(), log.count()) == (0, 0, 0, 0)
    assert log.range(1, LAST) == []
    assert log.find(1) is None
    assert log.delete_range(1, LAST) == 0


@pytest.mark.parametrize("first", [1, 2, 1000, LAST - 1])
@pytest.mark.parametrize("term", [0, 1, LAST])
def test_an_empty_log_may_begin_anywhere(uow: UnitOfWork, first: int, term: int) -> None:
    uow.consensus_log.append(term, first, {})
    uow.consensus_log.append(term, first + 1, {})
    log = uow.consensus_log
    assert (log.first_index(), log.last_index(), log.last_term(), log.count()) == (first, first + 1, term, 2)


def test_the_highest_index_is_the_end_of_the_log(uow: UnitOfWork) -> None:
    uow.consensus_log.append(LAST, LAST, "end")
    assert uow.consensus_log.last_index() == LAST
    assert uow.consensus_log.append(LAST, LAST, "end").entry == "end"
    with pytest.raises(InvalidInputError):
        uow.consensus_log.append(LAST, LAST + 1, "behind")
    assert uow.consensus_log.delete_range(1, LAST) == 1


@pytest.mark.parametrize(
    ("term", "index", "field"),
    [
        (-1, 1, "term"),
        (2**63, 1, "term"),
        (1, 0, "index"),
        (1, -1, "index"),
        (1, 2**63, "index"),
        (True, 1, "term"),
        (1, 1.0, "index"),
        ("1", 1, "term"),
        (1, None, "index"),
    ],
)
def test_a_term_or_index_out_of_range_is_refused_by_name(uow: UnitOfWork, term: Any, index: Any, field: str) -> None:
    for call in (
        lambda: uow.consensus_log.append(term, index, {}),
        lambda: uow.consensus_log.append_many([LogEntry(term=term, index=index, entry={})]),
    ):
        with pytest.raises(InvalidInputError) as error:
            call()
        assert error.value.field == f"LogEntry.{field}"
    assert uow.consensus_log.count() == 0


@pytest.mark.parametrize(
    ("term", "index"),
    [(2, 8), (2, LAST), (1, 7), (0, 7), (2, 3), (1, 3), (2, 4), (3, 6), (1, 6), (3, 5)],
)
def test_a_breach_of_the_rules_is_a_conflict_and_changes_nothing(uow: UnitOfWork, term: int, index: int) -> None:
    before = [(1, 4), (2, 5), (2, 6)]
    fill(uow, *before)
    for call in (
        lambda: uow.consensus_log.append(term, index, {"at": index}),
        lambda: fill(uow, (term, index)),
    ):
        with pytest.raises(ConflictError) as error:
            call()
        assert not error.value.retryable
    assert stored(uow) == before
    uow.consensus_log.append(2, 7, {})


@pytest.mark.parametrize("entry", [{"at": 2, "x": 1}, {}, None, {"at": 2.5}, {"at": "2"}, [2]])
def test_another_entry_at_a_taken_index_is_a_conflict(uow: UnitOfWork, entry: Any) -> None:
    fill(uow, (1, 1), (1, 2), (1, 3))
    with pytest.raises(ConflictError):
        uow.consensus_log.append(1, 2, entry)
    with pytest.raises(ConflictError):
        uow.consensus_log.append_many([LogEntry(term=1, index=2, entry=entry), *log((1, 3), (1, 4))])
    assert uow.consensus_log.get(2).entry == {"at": 2}
    assert uow.consensus_log.last_index() == 3


@pytest.mark.parametrize(("there", "given"), [(1, True), (0, False), ([1], [True]), ({"a": 1}, {"a": True})])
def test_true_and_one_are_different_entries(uow: UnitOfWork, there: Any, given: Any) -> None:
    uow.consensus_log.append(1, 1, there)
    with pytest.raises(ConflictError):
        uow.consensus_log.append(1, 1, given)


def test_the_same_entry_again_changes_nothing(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        first = uow.consensus_log.append(1, 5, {"a": [1, None], "b": 2.5})
        fill(uow, (1, 6), (3, 7))
    with storage.begin() as uow:
        again = uow.consensus_log.append(1, 5, {"b": 2.5, "a": [1, None]})
        assert again.created_at == first.created_at
        fill(uow, (1, 6), (3, 7))
        assert uow.consensus_log.append(3, 7, {"at": 7}).index == 7
        assert stored(uow) == [(1, 5), (1, 6), (3, 7)]


def test_append_many_appends_behind_those_that_are_there_already(uow: UnitOfWork) -> None:
    fill(uow, (1, 1), (1, 2))
    fill(uow, (1, 2), (2, 3), (2, 4))
    fill(uow)
    uow.consensus_log.append_many(iter(log((5, 5))))
    assert stored(uow) == [(1, 1), (1, 2), (2, 3), (2, 4), (5, 5)]
    assert [entry.entry for entry in uow.consensus_log.range(1, 5)] == [{"at": index} for index in range(1, 6)]


@pytest.mark.parametrize(
    "given",
    [
        [(2, 3), (2, 5)],
        [(2, 4), (2, 3)],
        [(2, 3), (2, 3)],
        [(3, 3), (2, 4)],
        [(1, 3)],
        [(1, 3), (2, 4)],
        [(1, 3), (3, 4)],
        [(2, 4)],
        [(1, 2), (1, 3)],
        [(1, 1), (2, 2), (1, 3)],
        [(0, 1), (2, 2), (2, 3)],
        [(1, 1), (2, 2), (3, 3), (2, 4)],
    ],
    ids=str,
)
def test_append_many_is_all_or_nothing(uow: UnitOfWork, given: list[tuple[int, int]]) -> None:
    fill(uow, (1, 1), (2, 2))
    with pytest.raises(ConflictError):
        fill(uow, *given)
    assert stored(uow) == [(1, 1), (2, 2)]


def test_append_many_refuses_what_is_no_entry(uow: UnitOfWork) -> None:
    for given, field in (
        ((1, 2), "entries"),
        ({"term": 1}, "entries"),
        (LogEntry(term=1, index=2, entry={1: 2}), "LogEntry.entry"),
    ):
        with pytest.raises(InvalidInputError) as error:
            uow.consensus_log.append_many([*log((1, 1)), given])
        assert error.value.field == field
    assert uow.consensus_log.count() == 0


def test_append_many_takes_triples_as_well(uow: UnitOfWork) -> None:
    uow.consensus_log.append_many([(1, 1, "a"), LogEntry(term=1, index=2, entry="b"), (2, 3, None)])
    assert [(entry.term, entry.index, entry.entry) for entry in uow.consensus_log.range(1, 3)] == [
        (1, 1, "a"),
        (1, 2, "b"),
        (2, 3, None),
    ]


def test_append_many_takes_ten_thousand_at_once(uow: UnitOfWork) -> None:
    fill(uow, *((index // 100, index) for index in range(1, 10_001)))
    assert (uow.consensus_log.count(), uow.consensus_log.last_term()) == (10_000, 100)


def test_an_unknown_index_is_not_found(uow: UnitOfWork) -> None:
    fill(uow, (1, 3))
    for index in (2, 4, LAST, 0, -1):
        assert uow.consensus_log.find(index) is None
        with pytest.raises(NotFoundError) as error:
            uow.consensus_log.get(index)
        assert (error.value.entity, error.value.key) == ("LogEntry", index)


@pytest.mark.parametrize("index", [2**63, -(2**63) - 1, 1.0, "1", None, True])
def test_what_is_no_index_is_refused_by_name(uow: UnitOfWork, index: Any) -> None:
    for call in (uow.consensus_log.get, uow.consensus_log.find):
        with pytest.raises(InvalidInputError) as error:
            call(index)
        assert error.value.field == "LogEntry.index"
    for call, field in itertools.product((uow.consensus_log.range, uow.consensus_log.delete_range), ("start", "end")):
        with pytest.raises(InvalidInputError) as error:
            call(**({"start": 1, "end": 1} | {field: index}))
        assert error.value.field == field


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (3, 5, [3, 4, 5]),
        (4, 4, [4]),
        (1, LAST, [3, 4, 5]),
        (-(2**63), LAST, [3, 4, 5]),
        (0, 3, [3]),
        (5, 9, [5]),
        (5, 4, []),
        (6, LAST, []),
        (-5, 2, []),
    ],
)
def test_a_range_has_both_its_ends_and_what_exists_of_it(
    uow: UnitOfWork, start: int, end: int, expected: list[int]
) -> None:
    fill(uow, (1, 3), (1, 4), (2, 5))
    assert [entry.index for entry in uow.consensus_log.range(start, end)] == expected


@pytest.mark.parametrize(
    ("start", "end", "left"),
    [
        (3, 4, [5, 6]),
        (1, 3, [4, 5, 6]),
        (-(2**63), 4, [5, 6]),
        (5, 6, [3, 4]),
        (6, LAST, [3, 4, 5]),
        (3, 6, []),
        (0, LAST, []),
        (7, 9, [3, 4, 5, 6]),
        (1, 2, [3, 4, 5, 6]),
        (6, 5, [3, 4, 5, 6]),
        (4, 3, [3, 4, 5, 6]),
    ],
)
def test_a_prefix_or_suffix_is_deleted(uow: UnitOfWork, start: int, end: int, left: list[int]) -> None:
    fill(uow, (1, 3), (1, 4), (2, 5), (3, 6))
    assert uow.consensus_log.delete_range(start, end) == 4 - len(left)
    assert [index for _, index in stored(uow)] == left
    log = uow.consensus_log
    ends = (left[0], left[-1]) if left else (0, 0)
    assert (log.first_index(), log.last_index(), log.count()) == (*ends, len(left))


@pytest.mark.parametrize(("start", "end"), [(4, 4), (4, 5), (5, 5)])
def test_a_range_from_the_middle_is_refused(uow: UnitOfWork, start: int, end: int) -> None:
    before = [(1, 3), (1, 4), (2, 5), (3, 6)]
    fill(uow, *before)
    with pytest.raises(InvalidInputError) as error:
        uow.consensus_log.delete_range(start, end)
    assert error.value.field in ("start", "end")
    assert stored(uow) == before


def test_a_new_leader_replaces_the_end_of_the_log(uow: UnitOfWork) -> None:
    fill(uow, (1, 1), (2, 2), (2, 3))
    uow.consensus_log.delete_range(2, LAST)
    assert uow.consensus_log.last_term() == 1
    fill(uow, (1, 2), (3, 3))
    assert stored(uow) == [(1, 1), (1, 2), (3, 3)]


def test_a_log_goes_on_behind_its_snapshot(uow: UnitOfWork) -> None:
    fill(uow, (1, 1), (1, 2), (1, 3))
    uow.consensus_log.delete_range(1, 2)
    with pytest.raises(ConflictError):
        uow.consensus_log.append(1, 2, {"at": 2})
    uow.consensus_log.append(1, 4, {})
    uow.consensus_log.delete_range(1, 4)
    uow.consensus_log.append(0, 100, {})
    assert stored(uow) == [(0, 100)]
