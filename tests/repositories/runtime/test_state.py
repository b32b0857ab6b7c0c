"""Shows the shared state: put, replace, and listing by a prefix that is taken character by character."""

from __future__ import annotations

from typing import Any

import pytest

from mesh_storage import InvalidInputError, MeshStorage, StateEntry, UnitOfWork

KEYS = ["%", "%a", "A", "_", "_b", "a", "a%", "a%b", "a\\", "a\\%", "ab", "a_b", "b", "é", "\U0001f600", "\U0001f600x"]


@pytest.fixture
def filled(uow: UnitOfWork) -> UnitOfWork:
    for key in KEYS:
        uow.state.put(key, key.encode())
    return uow


def test_put_gives_the_stored_entry(uow: UnitOfWork) -> None:
    entry = uow.state.put("node_status", b"active")
    assert isinstance(entry, StateEntry)
    assert (entry.key, entry.value) == ("node_status", b"active")
    found = uow.state.get("node_status")
    assert (found.value, found.created_at, found.updated_at) == (b"active", entry.created_at, entry.updated_at)


def test_put_again_replaces_the_value_and_keeps_the_time_of_creation(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        first = uow.state.put("k", b"1")
    with storage.begin() as uow:
        second = uow.state.put("k", b"2")
        assert uow.state.get("k").value == b"2"
        assert uow.state.count() == 1
    assert second.created_at == first.created_at
    assert first.updated_at is not None
    assert second.updated_at is not None
    assert second.updated_at > first.updated_at


@pytest.mark.parametrize("value", ["text", None, 1, [1], bytearray(b"x"), memoryview(b"x")])
def test_only_bytes_are_stored(uow: UnitOfWork, value: Any) -> None:
    with pytest.raises(InvalidInputError) as error:
        uow.state.put("k", value)
    assert error.value.field == "StateEntry.value"
    assert uow.state.count() == 0


@pytest.mark.parametrize(
    "prefix", ["", "a", "A", "%", "_", "\\", "a\\", "a%", "a_", "é", "\U0001f600", "\U0010ffff", "zzz", "'", "x" * 300]
)
def test_a_prefix_is_taken_literally(filled: UnitOfWork, prefix: str) -> None:
    expected = sorted(key for key in KEYS if key.startswith(prefix))
    assert [entry.key for entry in filled.state.page(prefix).items] == expected
    assert [entry.key for entry in filled.state.stream(prefix, batch_size=2)] == expected
    assert filled.state.count(prefix) == len(expected)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_pages_of_a_prefix_stay_within_it(filled: UnitOfWork, limit: int) -> None:
    seen: list[str] = []
    page = filled.state.page("a", limit=limit)
    while True:
        seen += [entry.key for entry in page.items]
        if page.next is None:
            break
        page = filled.state.page("a", limit=limit, after=page.next)
    assert seen == sorted(key for key in KEYS if key.startswith("a"))


def test_a_cursor_of_another_prefix_never_leaves_the_one_that_is_asked_for(filled: UnitOfWork) -> None:
    cursor = filled.state.page("a", limit=1).next
    assert cursor is not None
    assert [entry.key for entry in filled.state.page("\U0001f600", after=cursor).items] == [
        "\U0001f600",
        "\U0001f600x",
    ]
    assert filled.state.page("%", after=cursor).items == []


@pytest.mark.parametrize(
    ("keys", "prefix"),
    [
        (["\ud7fe", "\ud7fez", "\ud7ff"], "\ud7fe"),
        (["\ud7ff", "\ud7ffz", "\ue000"], "\ud7ff"),
        (["\U0010ffff" * 255, "\U0010ffff", "\U0010fffe"], "\U0010ffff"),
        (["a\U0010ffff", "a\U0010ffff\U0010ffff", "b"], "a\U0010ffff"),
        (["a\x01", "a\x01\x01", "a\x02", "a"], "a\x01"),
        (["a" * 255, "a" * 254, "a" * 254 + "b"], "a" * 254),
    ],
)
def test_a_prefix_at_the_end_of_an_alphabet_finds_its_keys_alone(uow: UnitOfWork, keys: list[str], prefix: str) -> None:
    for key in keys:
        uow.state.put(key, b"")
    expected = sorted(key for key in keys if key.startswith(prefix))
    assert [entry.key for entry in uow.state.page(prefix).items] == expected
    assert [entry.key for entry in uow.state.stream(prefix, batch_size=1)] == expected


@pytest.mark.parametrize("prefix", ["\0", "a\0", "\ud800", None, 5, b"a"])
def test_a_prefix_that_no_key_can_have_is_refused(uow: UnitOfWork, prefix: Any) -> None:
    for call in (uow.state.page, uow.state.count, uow.state.stream):
        with pytest.raises(InvalidInputError) as error:
            list(call(prefix))
        assert error.value.field == "prefix"
