"""Shows the node states: put one or many, merge a patch, and find those that were silent for too long."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from mesh_storage import ConflictError, InvalidInputError, MeshStorage, NodeState, UnitOfWork


def age(uow: UnitOfWork, **seconds: int) -> None:
    """Let the states of nodes be as old as that."""
    for node_id, value in seconds.items():
        uow.session.execute(
            text("UPDATE mesh_node_state SET updated_at = now() - make_interval(secs => :s) WHERE node_id = :n"),
            {"s": value, "n": node_id},
        )


def states(found: list[NodeState]) -> dict[str, Any]:
    return {state.node_id: state.state for state in found}


def test_put_gives_the_stored_state_and_replaces_the_one_before(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        first = uow.node_states.put("n", {"status": "active", "peers": 1})
        assert isinstance(first, NodeState)
        assert (first.node_id, first.state) == ("n", {"status": "active", "peers": 1})
    with storage.begin() as uow:
        second = uow.node_states.put("n", {"status": "down"})
        assert uow.node_states.get("n").state == {"status": "down"}
    assert second.created_at == first.created_at
    assert first.updated_at is not None
    assert second.updated_at is not None
    assert second.updated_at > first.updated_at


def test_put_many_stores_and_replaces_and_gives_the_entries_in_the_order_given(uow: UnitOfWork) -> None:
    uow.node_states.put("b", "old")
    given = {"c": {"n": 3}, "a": [1], "b": None}
    stored = uow.node_states.put_many(given)
    assert [(state.node_id, state.state) for state in stored] == list(given.items())
    assert states(uow.node_states.page().items) == given
    assert all(state.created_at and state.updated_at for state in stored)


def test_put_many_of_nothing_is_nothing(uow: UnitOfWork) -> None:
    assert uow.node_states.put_many({}) == []
    assert uow.node_states.count() == 0


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"a": 1, "": 2}, "NodeState.node_id"),
        ({"a": 1, "x" * 65: 2}, "NodeState.node_id"),
        ({"a": 1, 5: 2}, "NodeState.node_id"),
        ({"a": 1, "b": float("nan")}, "NodeState.state"),
        ({"a": 1, "b": {1}}, "NodeState.state"),
        ([("a", 1)], "entries"),
    ],
)
def test_put_many_refuses_all_for_one_and_stores_nothing(uow: UnitOfWork, given: Any, field: str) -> None:
    with pytest.raises(InvalidInputError) as error:
        uow.node_states.put_many(given)
    assert error.value.field == field
    assert uow.node_states.count() == 0


def test_put_many_takes_ten_thousand_at_once(uow: UnitOfWork) -> None:
    given = {f"node-{number}": {"number": number} for number in range(10_000)}
    assert len(uow.node_states.put_many(given)) == uow.node_states.count() == 10_000
    assert states(list(uow.node_states.stream())) == given


def test_merge_replaces_top_level_keys_and_keeps_the_rest(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        first = uow.node_states.put("n", {"status": "active", "load": {"cpu": 1, "ram": 2}, "gone": 1})
    with storage.begin() as uow:
        merged = uow.node_states.merge("n", {"load": {"cpu": 3}, "gone": None, "new": [1.0]})
        expected = {"status": "active", "load": {"cpu": 3}, "gone": None, "new": [1.0]}
        assert merged.state == uow.node_states.get("n").state == expected
    assert merged.created_at == first.created_at
    assert first.updated_at is not None
    assert merged.updated_at is not None
    assert merged.updated_at > first.updated_at


def test_merge_creates_a_state_that_is_not_there(uow: UnitOfWork) -> None:
    assert uow.node_states.merge("n", {"a": 1}).state == {"a": 1}
    assert uow.node_states.get("n").state == {"a": 1}


def test_an_empty_patch_changes_no_key_but_is_a_sign_of_life(uow: UnitOfWork) -> None:
    uow.node_states.put("n", {"a": 1})
    age(uow, n=60)
    assert uow.node_states.merge("n", {}).state == {"a": 1}
    assert uow.node_states.stale(timedelta(seconds=30)) == []


@pytest.mark.parametrize("state", [None, 1, "text", [], [{"a": 1}]])
def test_merge_into_what_is_no_object_is_a_conflict_and_changes_nothing(uow: UnitOfWork, state: Any) -> None:
    uow.node_states.put("n", state)
    with pytest.raises(ConflictError) as error:
        uow.node_states.merge("n", {"a": 1})
    assert not error.value.retryable
    assert uow.node_states.get("n").state == state


@pytest.mark.parametrize("patch", [None, 1, "a", [], [("a", 1)], {1: 2}, {"a": float("inf")}, {"a\0": 1}])
def test_merge_refuses_a_patch_that_is_no_json_object(uow: UnitOfWork, patch: Any) -> None:
    with pytest.raises(InvalidInputError) as error:
        uow.node_states.merge("n", patch)
    assert error.value.field == "patch"
    assert uow.node_states.count() == 0


def test_stale_gives_the_silent_ones_oldest_first(uow: UnitOfWork) -> None:
    uow.node_states.put_many({node_id: {} for node_id in "abcde"})
    age(uow, a=10, b=300, c=200, d=300)
    assert [state.node_id for state in uow.node_states.stale(timedelta(seconds=100))] == ["b", "d", "c"]
    assert [state.node_id for state in uow.node_states.stale(timedelta(seconds=100), limit=2)] == ["b", "d"]
    assert [state.node_id for state in uow.node_states.stale(older_than=timedelta(seconds=1))] == ["b", "d", "c", "a"]
    assert uow.node_states.stale(timedelta(days=1)) == []


def test_a_state_as_old_as_now_is_not_stale_and_a_negative_age_reaches_into_the_future(uow: UnitOfWork) -> None:
    uow.node_states.put("n", 1)
    assert uow.node_states.stale(timedelta(0)) == []
    assert states(uow.node_states.stale(timedelta(seconds=-1))) == {"n": 1}


@pytest.mark.parametrize("older_than", [5, 5.0, "1 hour", None, timedelta.max, timedelta.min])
def test_an_age_that_is_none_is_refused_by_name(uow: UnitOfWork, older_than: Any) -> None:
    with pytest.raises(InvalidInputError) as error:
        uow.node_states.stale(older_than)
    assert error.value.field == "older_than"


@pytest.mark.parametrize("limit", [0, -1, 10_001, True, "1"])
def test_stale_refuses_a_limit_out_of_range(uow: UnitOfWork, limit: Any) -> None:
    with pytest.raises(InvalidInputError) as error:
        uow.node_states.stale(timedelta(0), limit=limit)
    assert error.value.field == "limit"
