"""Shows the routing table: put one or many, read it whole, and swap it whole in one step."""

from __future__ import annotations

from typing import Any

import pytest

from mesh_storage import InvalidInputError, MeshStorage, RoutingEntry, UnitOfWork


def test_put_gives_the_stored_entry_and_replaces_the_one_before(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        first = uow.routing_table.put("d", {"next_hop": "a"})
        assert isinstance(first, RoutingEntry)
        assert (first.destination, first.route) == ("d", {"next_hop": "a"})
    with storage.begin() as uow:
        second = uow.routing_table.put("d", {"next_hop": "b"})
        assert uow.routing_table.get("d").route == {"next_hop": "b"}
    assert second.created_at == first.created_at
    assert first.updated_at is not None
    assert second.updated_at is not None
    assert second.updated_at > first.updated_at


def test_put_many_stores_and_replaces_and_keeps_the_rest(uow: UnitOfWork) -> None:
    uow.routing_table.put_many({"a": 1, "b": 2})
    stored = uow.routing_table.put_many({"c": 3, "b": [4]})
    assert [(entry.destination, entry.route) for entry in stored] == [("c", 3), ("b", [4])]
    assert uow.routing_table.all() == {"a": 1, "b": [4], "c": 3}
    assert uow.routing_table.put_many({}) == []


def test_all_gives_the_whole_table_in_the_order_of_the_destinations(uow: UnitOfWork) -> None:
    assert uow.routing_table.all() == {}
    routes = {f"d{number:05}": {"next_hop": f"n{number}"} for number in range(3000)}
    uow.routing_table.put_many(dict(reversed(routes.items())))
    assert list(uow.routing_table.all().items()) == list(routes.items())


@pytest.mark.parametrize(
    "after",
    [{}, {"a": 1}, {"b": [2], "c": {"x": None}}, {"a": 2, "z": 3}, {"a'b\\": None, "%": "{}", "\U0001f600": 10**30}],
)
def test_replace_all_makes_the_table_exactly_that(uow: UnitOfWork, after: dict[str, Any]) -> None:
    uow.routing_table.put_many({"a": 1, "b": [2]})
    uow.routing_table.replace_all(after)
    assert uow.routing_table.all() == after
    assert uow.routing_table.count() == len(after)


def test_replace_all_writes_only_what_is_different(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.routing_table.put_many({"same": {"cost": 1}, "other": {"cost": 1}, "gone": 1})
        before = {entry.destination: entry.updated_at for entry in uow.routing_table.page().items}
    with storage.begin() as uow:
        uow.routing_table.replace_all({"same": {"cost": 1}, "other": {"cost": 2}})
        after = {entry.destination: entry.updated_at for entry in uow.routing_table.page().items}
    assert after["same"] == before["same"]
    assert after["other"] != before["other"]


@pytest.mark.parametrize(("old", "new"), [(1, 1.0), (1.0, 1), ([0], [False]), (True, 1), ({"a": 1}, {"a": 1.0})])
def test_replace_all_stores_a_number_of_another_type(uow: UnitOfWork, old: Any, new: Any) -> None:
    uow.routing_table.put("d", old)
    uow.routing_table.replace_all({"d": new})
    assert repr(uow.routing_table.all()["d"]) == repr(new)


def test_others_see_the_old_table_until_the_new_one_is_committed(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.routing_table.put_many({"a": 1, "b": 1})
    with storage.unit_of_work() as writer, storage.unit_of_work(read_only=True) as reader:
        writer.routing_table.replace_all({"b": 2, "c": 2})
        assert reader.routing_table.all() == {"a": 1, "b": 1}
        writer.commit()
        assert reader.routing_table.all() == {"b": 2, "c": 2}


def test_a_swap_that_is_rolled_back_leaves_the_old_table(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.routing_table.put("a", 1)
    with storage.unit_of_work() as uow:
        uow.routing_table.replace_all({"b": 2})
        uow.rollback()
        assert uow.routing_table.all() == {"a": 1}


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"a": 2, "": 1}, "RoutingEntry.destination"),
        ({"a": 2, "x" * 256: 1}, "RoutingEntry.destination"),
        ({"a": 2, "b": float("nan")}, "RoutingEntry.route"),
        ({"a": 2, None: 1}, "RoutingEntry.destination"),
        ([("a", 2)], "entries"),
        (None, "entries"),
    ],
)
def test_many_routes_are_refused_for_one_and_nothing_changes(uow: UnitOfWork, given: Any, field: str) -> None:
    uow.routing_table.put("a", 1)
    for call in (uow.routing_table.put_many, uow.routing_table.replace_all):
        with pytest.raises(InvalidInputError) as error:
            call(given)
        assert error.value.field == field
    assert uow.routing_table.all() == {"a": 1}
