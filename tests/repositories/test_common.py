"""Shows what all keyed repositories have in common: get, find, delete, count, pages by cursor and streams."""

from __future__ import annotations

import base64
import itertools
import json
import subprocess
import sys
from datetime import UTC
from typing import Any

import pytest

from mesh_storage import InvalidInputError, MeshStorage, NotFoundError, UnitOfWork, testing
from mesh_storage.models.base import new_id

KINDS: dict[str, tuple[Any, str, str]] = {
    "meshes": (testing.MeshFactory, "id", new_id("mesh")),
    "nodes": (testing.NodeFactory, "id", new_id("node")),
    "routes": (testing.RouteFactory, "id", new_id("route")),
    "messages": (testing.MessageFactory, "id", "nobody"),
    "state": (testing.StateEntryFactory, "key", "nobody"),
    "node_states": (testing.NodeStateFactory, "node_id", "nobody"),
    "routing_table": (testing.RoutingEntryFactory, "destination", "nobody"),
    "runtime_config": (testing.ConfigEntryFactory, "key", "nobody"),
}

every_kind = pytest.mark.parametrize("kind", KINDS)


every_sequence = pytest.mark.parametrize("first", [0, 8, 98])
"""Where the factories' numbers begin: "key-10" sorts before "key-8"."""


def create(uow: UnitOfWork, kind: str, number: int) -> list[Any]:
    """Store some aggregates and give them in the order of their creation."""
    return list(KINDS[kind][0].create_batch(number, uow=uow))


def create_sorted(uow: UnitOfWork, kind: str, number: int, first: int) -> list[str]:
    """Store some aggregates, numbered from `first` on, and give their keys in the order of a listing."""
    KINDS[kind][0].reset_sequence(first)
    return sorted(keys_of(kind, create(uow, kind, number)))


def key_of(kind: str, aggregate: Any) -> str:
    return str(getattr(aggregate, KINDS[kind][1]))


def columns_of(aggregate: Any) -> dict[str, Any]:
    return {
        column.key: getattr(aggregate, column.key)
        for column in aggregate.__mapper__.column_attrs
        if not column.deferred
    }


def keys_of(kind: str, aggregates: Any) -> list[str]:
    return [key_of(kind, aggregate) for aggregate in aggregates]


@every_kind
def test_what_was_stored_is_got_and_found_whole(storage: MeshStorage, kind: str) -> None:
    with storage.begin() as uow:
        stored = create(uow, kind, 2)[0]
    with storage.unit_of_work(read_only=True) as uow:
        repository = getattr(uow, kind)
        key = key_of(kind, stored)
        assert columns_of(repository.get(key)) == columns_of(repository.find(key)) == columns_of(stored)


def test_a_process_that_only_reads_can_read_every_kind(storage: MeshStorage, mesh_storage_url: str) -> None:
    with storage.begin() as uow:
        stored = {kind: key_of(kind, create(uow, kind, 1)[0]) for kind in KINDS}
    program = (
        "import json, sys; from mesh_storage import MeshStorage\n"
        "with MeshStorage.open(sys.argv[1]) as storage, storage.unit_of_work() as uow:\n"
        "    for kind, (name, key) in json.loads(sys.argv[2]).items():\n"
        "        assert getattr(getattr(uow, kind).get(key), name) == key"
    )
    wanted = json.dumps({kind: (KINDS[kind][1], key) for kind, key in stored.items()})
    done = subprocess.run(
        [sys.executable, "-c", program, mesh_storage_url, wanted], stderr=subprocess.PIPE, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


@every_kind
def test_the_times_come_from_the_database_with_their_zone(uow: UnitOfWork, kind: str) -> None:
    stored = create(uow, kind, 1)[0]
    times = [value for name, value in columns_of(stored).items() if name.startswith(("created", "updated"))]
    assert times
    assert len(set(times)) == 1
    assert times[0].utcoffset() == UTC.utcoffset(None)


@every_kind
def test_an_unknown_key_is_not_found(uow: UnitOfWork, kind: str) -> None:
    repository, (factory, _, unknown) = getattr(uow, kind), KINDS[kind]
    create(uow, kind, 1)
    assert repository.find(unknown) is None
    for call in (repository.get, repository.delete):
        with pytest.raises(NotFoundError) as error:
            call(unknown)
        assert (error.value.entity, error.value.key) == (factory._meta.model.__name__, unknown)
        assert not error.value.retryable
    assert repository.count() == 1


@every_kind
def test_a_key_that_cannot_be_stored_is_refused_by_name(uow: UnitOfWork, kind: str) -> None:
    repository, (factory, name, _) = getattr(uow, kind), KINDS[kind]
    keys: tuple[Any, ...] = ("", "\0", "a\0", "\ud800", "x" * 256, b"bytes", None, 5)
    for call, key in itertools.product((repository.get, repository.find, repository.delete), keys):
        with pytest.raises(InvalidInputError) as error:
            call(key)
        assert error.value.field == f"{factory._meta.model.__name__}.{name}"
    assert repository.count() == 0


@every_kind
def test_delete_takes_away_that_one_alone(uow: UnitOfWork, kind: str) -> None:
    repository = getattr(uow, kind)
    first, second, third = keys_of(kind, create(uow, kind, 3))
    repository.delete(second)
    assert repository.find(second) is None
    assert sorted(keys_of(kind, repository.page().items)) == sorted([first, third])
    with pytest.raises(NotFoundError):
        repository.delete(second)


@every_kind
def test_pages_give_everything_once_and_in_order(uow: UnitOfWork, kind: str) -> None:
    stored = keys_of(kind, create(uow, kind, 7))
    for limit in (1, 2, 3, 6, 7, 8, 10_000):
        pages = [getattr(uow, kind).page(limit=limit)]
        while pages[-1].next is not None:
            pages.append(getattr(uow, kind).page(limit=limit, after=pages[-1].next))
        assert [key for page in pages for key in keys_of(kind, page.items)] == sorted(stored)
        assert [len(page.items) for page in pages[:-1]] == [limit] * (len(pages) - 1)
        assert len(pages) == -(-7 // limit)


@every_kind
def test_a_page_of_an_empty_table_is_empty_and_the_last(uow: UnitOfWork, kind: str) -> None:
    page = getattr(uow, kind).page()
    assert (page.items, page.next) == ([], None)
    assert getattr(uow, kind).count() == 0
    assert list(getattr(uow, kind).stream()) == []


@every_kind
def test_a_page_has_a_hundred_items_unless_told_otherwise(uow: UnitOfWork, kind: str) -> None:
    create(uow, kind, 101)
    page = getattr(uow, kind).page()
    assert len(page.items) == 100
    assert len(getattr(uow, kind).page(after=page.next).items) == 1
    assert getattr(uow, kind).count() == 101


@every_kind
@every_sequence
def test_a_cursor_goes_on_behind_what_was_deleted_meanwhile_and_misses_nothing_new(
    uow: UnitOfWork, kind: str, first: int
) -> None:
    repository = getattr(uow, kind)
    before, deleted, behind = create_sorted(uow, kind, 3, first)
    page = repository.page(limit=2)
    repository.delete(deleted)
    new = key_of(kind, create(uow, kind, 1)[0])
    assert keys_of(kind, page.items) == [before, deleted]
    assert keys_of(kind, repository.page(after=page.next).items) == sorted(
        key for key in (behind, new) if key > deleted
    )


@every_kind
def test_a_limit_out_of_range_is_refused(uow: UnitOfWork, kind: str) -> None:
    limits: tuple[Any, ...] = (0, -1, 10_001, 2**63, True, 1.0, "1", None)
    calls = (("limit", getattr(uow, kind).page), ("batch_size", getattr(uow, kind).stream))
    for (name, call), limit in itertools.product(calls, limits):
        with pytest.raises(InvalidInputError) as error:
            list(call(**{name: limit}))
        assert error.value.field == name


def encoded(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


BAD_CURSORS = {
    "empty": "",
    "no base64": "!",
    "not ascii": "é",
    "a lone surrogate": "\ud800",
    "no JSON": base64.urlsafe_b64encode(b"\xff").decode(),
    "a number": encoded(5),
    "null": encoded(None),
    "a text": encoded("a"),
    "an object": encoded({"a": 1}),
    "of no value": encoded([]),
    "of too many values": encoded(["a", "a", "a"]),
    "of another type": encoded([None]),
    "an empty key": encoded([""]),
    "a key with NUL": encoded(["\0"]),
    "a key with a lone surrogate": encoded(["\ud800"]),
    "nested too deep": base64.urlsafe_b64encode(b"[" * 100_000).decode(),
    "no text": 5,
}


@pytest.mark.parametrize("kind", ["state", "nodes", "messages"])
@pytest.mark.parametrize("cursor", BAD_CURSORS.values(), ids=list(BAD_CURSORS))
def test_what_is_no_cursor_is_refused(uow: UnitOfWork, kind: str, cursor: Any) -> None:
    with pytest.raises(InvalidInputError) as error:
        getattr(uow, kind).page(after=cursor)
    assert error.value.field == "after"
    assert getattr(uow, kind).count() == 0


@every_kind
def test_a_stream_gives_everything_once_and_in_order(uow: UnitOfWork, kind: str) -> None:
    stored = keys_of(kind, create(uow, kind, 7))
    for batch_size in (1, 3, 7, 8, 1000):
        assert keys_of(kind, getattr(uow, kind).stream(batch_size=batch_size)) == sorted(stored)


@every_kind
@every_sequence
def test_a_stream_may_be_left_and_lets_others_work_meanwhile(uow: UnitOfWork, kind: str, first: int) -> None:
    stored = create_sorted(uow, kind, 5, first)
    stream = getattr(uow, kind).stream(batch_size=2)
    seen = [key_of(kind, next(stream))]
    getattr(uow, kind).delete(stored[4])
    seen += keys_of(kind, [next(stream), next(stream)])
    stream.close()
    assert seen == stored[:3]
    assert getattr(uow, kind).count() == 4


@every_kind
def test_what_was_read_stays_readable_when_the_unit_of_work_is_over(storage: MeshStorage, kind: str) -> None:
    with storage.begin() as uow:
        stored = create(uow, kind, 1)[0]
        key = key_of(kind, stored)
    with storage.unit_of_work() as uow:
        read = getattr(uow, kind).get(key)
    assert columns_of(read) == columns_of(stored)
    assert repr(read) == f"{type(read).__name__}({KINDS[kind][1]}={key!r})"


@every_kind
def test_what_is_not_committed_is_gone(storage: MeshStorage, kind: str) -> None:
    with storage.unit_of_work() as uow:
        create(uow, kind, 3)
        assert getattr(uow, kind).count() == 3
    with storage.unit_of_work() as uow:
        assert getattr(uow, kind).count() == 0


@every_kind
def test_a_read_only_unit_of_work_reads_and_refuses_to_write(storage: MeshStorage, kind: str) -> None:
    with storage.begin() as uow:
        key = key_of(kind, create(uow, kind, 1)[0])
    with storage.unit_of_work(read_only=True) as uow:
        with pytest.raises(InvalidInputError) as error:
            getattr(uow, kind).delete(key)
        assert error.value.field == "read_only"
        assert getattr(uow, kind).count() == 1
