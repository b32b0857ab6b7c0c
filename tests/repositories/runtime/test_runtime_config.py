"""Shows the runtime config: JSON under a key, its bare value with a default, and all settings of a prefix."""

from __future__ import annotations

from typing import Any

import pytest

from mesh_storage import ConfigEntry, InvalidInputError, MeshStorage, NotFoundError, UnitOfWork


def test_put_gives_the_stored_entry(uow: UnitOfWork) -> None:
    entry = uow.runtime_config.put("gossip.interval_ms", 500)
    assert isinstance(entry, ConfigEntry)
    assert (entry.key, entry.value) == ("gossip.interval_ms", 500)
    assert uow.runtime_config.get("gossip.interval_ms").value == 500


def test_put_again_replaces_the_value_and_keeps_the_time_of_creation(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        first = uow.runtime_config.put("k", {"a": 1})
    with storage.begin() as uow:
        second = uow.runtime_config.put("k", [1])
        assert uow.runtime_config.value("k") == [1]
    assert second.created_at == first.created_at
    assert first.updated_at is not None
    assert second.updated_at is not None
    assert second.updated_at > first.updated_at


def test_a_stored_value_does_not_change_with_the_object_it_was_made_of(uow: UnitOfWork) -> None:
    value = {"list": [1]}
    entry = uow.runtime_config.put("k", value)
    value["list"].append(2)
    assert entry.value == uow.runtime_config.value("k") == {"list": [1]}


@pytest.mark.parametrize("default", [None, 0, "x", {"a": 1}])
def test_value_gives_the_default_where_there_is_none(uow: UnitOfWork, default: Any) -> None:
    assert uow.runtime_config.value("k", default) == default
    assert uow.runtime_config.value("k", default=default) == default


def test_value_without_a_default_needs_the_setting(uow: UnitOfWork) -> None:
    with pytest.raises(NotFoundError) as error:
        uow.runtime_config.value("k")
    assert (error.value.entity, error.value.key) == ("ConfigEntry", "k")


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_a_stored_value_that_counts_as_false_is_no_reason_for_the_default(uow: UnitOfWork, value: Any) -> None:
    uow.runtime_config.put("k", value)
    assert uow.runtime_config.value("k", default="default") == value


def test_all_gives_the_values_of_a_prefix_in_the_order_of_their_keys(uow: UnitOfWork) -> None:
    settings = {"b.x": 1, "a.y": [2], "a.x": None, "a_x": 3, "a%": 4, "A": 5, "\U0001f600": {}}
    for key, value in settings.items():
        uow.runtime_config.put(key, value)
    assert list(uow.runtime_config.all().items()) == sorted(settings.items())
    assert list(uow.runtime_config.all("a.").items()) == [("a.x", None), ("a.y", [2])]
    assert uow.runtime_config.all("a_") == {"a_x": 3}
    assert uow.runtime_config.all("a%") == {"a%": 4}
    assert uow.runtime_config.all("c") == {}
    assert uow.runtime_config.count("a.") == 2
    assert [entry.key for entry in uow.runtime_config.page("a.").items] == ["a.x", "a.y"]
    assert [entry.key for entry in uow.runtime_config.stream("a.", batch_size=1)] == ["a.x", "a.y"]


def test_all_refuses_a_prefix_that_no_key_can_have(uow: UnitOfWork) -> None:
    with pytest.raises(InvalidInputError) as error:
        uow.runtime_config.all("a\0")
    assert error.value.field == "prefix"
