"""Shows versions, compare-and-set and expiry, with the same results on the sync and the async side."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from threading import Barrier
from typing import Any

import psycopg
import pytest
from sqlalchemy import text

from mesh_storage import (
    ConfigEntry,
    ConflictError,
    InvalidInputError,
    Mesh,
    MeshStorage,
    Node,
    NotFoundError,
    Route,
    StateEntry,
    UnitOfWork,
)
from tests.contract.conftest import Open
from tests.processes import changes_are_over, eventually

DAY = timedelta(days=1)
MOMENT = timedelta(microseconds=1)


@pytest.fixture(params=["state", "runtime_config"])
def entries(request: pytest.FixtureRequest) -> Callable[[UnitOfWork], Any]:
    """Return what gives one of the repositories whose entries may expire; bytes would be no JSON, text no bytes."""
    name: str = request.param

    def of(uow: UnitOfWork) -> Any:
        return getattr(uow, name)

    return of


@pytest.fixture
def value(entries: Callable[[UnitOfWork], Any], uow: UnitOfWork) -> Callable[[int], Any]:
    """Return what makes a value for these entries."""
    return (lambda number: b"%d" % number) if entries(uow)._entries.model is StateEntry else (lambda number: number)


def refused(uow: UnitOfWork, work: Callable[[], Any]) -> ConflictError:
    with pytest.raises(ConflictError) as error, uow.savepoint():
        work()
    return error.value


def expire(uow: UnitOfWork, table: str, key: str) -> None:
    """Let an entry have expired, by the database's clock."""
    uow.session.execute(
        text(f"UPDATE {table} SET expires_at = (SELECT clock_timestamp()) WHERE key = :key"), {"key": key}
    )


def test_a_version_changes_with_every_write_and_only_grows(storage: MeshStorage, mesh_storage_url: str) -> None:
    def current() -> int:
        with storage.begin() as uow:
            version = uow.state.get("k").version
        assert version is not None
        return version

    with storage.begin() as uow:
        versions = [uow.state.put("k", b"1").version]
        versions.append(uow.state.put("k", b"1").version)
    with psycopg.connect(mesh_storage_url, autocommit=True) as connection:
        for statement in (
            "UPDATE mesh_state SET value = value WHERE key = 'k'",
            "UPDATE mesh_state SET version = 7 WHERE key = 'k'",
            "INSERT INTO mesh_state (key, value) VALUES ('k', '2') ON CONFLICT (key) DO UPDATE SET value = '2'",
        ):
            connection.execute(statement.encode())
            versions.append(current())
        connection.execute("DELETE FROM mesh_state")
        connection.execute("INSERT INTO mesh_state (key, value, version) VALUES ('k', '', 3)")
    versions.append(current())
    assert versions == sorted(set(versions))


def test_every_kind_with_a_version_has_a_new_one_after_each_write(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        mesh, nodes = uow.meshes.add(Mesh(name="m")), uow.nodes.add_many([Node(name=n, ip_address="a") for n in "ab"])
        route = uow.routes.add(Route(source_node_id=nodes[0].id, target_node_id=nodes[1].id))
        before = [mesh.version, *(node.row_version for node in nodes), route.version]
        assert None not in before
        for entity in nodes:
            assert uow.nodes.update(entity) is entity
        uow.meshes.update(mesh)
        uow.routes.update(route)
        after = [mesh.version, *(node.row_version for node in nodes), route.version]
        assert all(new > old for new, old in zip(after, before, strict=True) if new and old)
        assert uow.meshes.get(mesh.id).version == mesh.version
        assert [uow.nodes.get(node.id).row_version for node in nodes] == [node.row_version for node in nodes]
        put = [uow.routing_table.put("d", n).version for n in range(2)]
        put += [entry.version for entry in uow.routing_table.put_many({"d": 3})]
        uow.routing_table.replace_all({"d": 4})
        put.append(uow.routing_table.get("d").version)
        assert put == sorted(set(put))
    assert Node(name="n", ip_address="a").row_version is None
    assert StateEntry(key="k", value=b"").version is None


def test_of_two_administrators_the_second_is_told(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        made = uow.nodes.add(Node(name="n", ip_address="10.0.0.1"))
    with storage.begin() as uow:
        first, second = uow.nodes.get(made.id), uow.nodes.get(made.id)
    with storage.begin() as uow:
        first.port = 1
        uow.nodes.update(first)
    with pytest.raises(ConflictError, match="read it and change it again") as error, storage.begin() as uow:
        second.description = "mine"
        uow.nodes.update(second)
    assert error.value.actual == first.row_version
    with storage.begin() as uow:
        found = uow.nodes.get(made.id)
        assert (found.port, found.description) == (1, "")
        found.description = "mine"
        assert uow.nodes.update(found).port == 1
        # It was never read, so it would overwrite what others have changed.
        assert refused(uow, lambda: uow.nodes.update(Node(id=made.id, name="n", ip_address="a"))).actual is not None
        uow.nodes.delete(made.id)
        with pytest.raises(NotFoundError):
            uow.nodes.update(found)


def test_an_object_made_anew_is_whole_after_an_update(uow: UnitOfWork) -> None:
    made = uow.nodes.add(Node(name="n", ip_address="10.0.0.1", port=1))
    anew = uow.nodes.update(Node(id=made.id, name="m", ip_address="10.0.0.2", row_version=made.row_version))
    found = uow.nodes.get(made.id)
    names = ("name", "description", "region_id", "port", "status", "created", "updated", "row_version")
    assert [getattr(anew, name) for name in names] == [getattr(found, name) for name in names]


def test_the_session_compares_versions_too(storage: MeshStorage, open_storage: Open, mesh_storage_url: str) -> None:
    with storage.begin() as uow:
        made = uow.meshes.add(Mesh(name="m"))
    with open_storage(mesh_storage_url) as other:
        with pytest.raises(ConflictError, match="another version"), other.begin() as uow:
            found = uow.session.get(Mesh, made.id)
            assert found is not None
            with storage.begin() as first:
                made.description = "first"
                first.meshes.update(made)
            found.description = "second"
        with other.begin() as uow:
            found = uow.session.get(Mesh, made.id)
            assert found is not None
            found.description = "third"
            uow.session.flush()
            assert found.version is not None
            assert made.version is not None
            assert found.version > made.version
            uow.meshes.update(found)


def test_a_put_with_a_version_replaces_that_one_only(
    uow: UnitOfWork, entries: Callable[[UnitOfWork], Any], value: Callable[[int], Any]
) -> None:
    own = entries(uow)
    assert refused(uow, lambda: own.put("k", value(1), if_version=5)).actual == 0
    first = own.put("k", value(1), if_version=0)
    assert refused(uow, lambda: own.put("k", value(2), if_version=0)).actual == first.version
    second = own.put("k", value(2), if_version=first.version)
    error = refused(uow, lambda: own.put("k", value(3), if_version=first.version))
    assert error.actual == second.version
    assert "'k'" in str(error)
    assert pickle.loads(pickle.dumps(error)).actual == second.version  # noqa: S301 - its own
    assert own.get("k").value == value(2)
    assert refused(uow, lambda: own.delete("k", if_version=first.version)).actual == second.version
    own.delete("k", if_version=second.version)
    assert refused(uow, lambda: own.delete("k", if_version=second.version)).actual == 0
    assert own.put("k", value(4), if_version=0).version > second.version


def test_what_has_expired_is_not_there(
    uow: UnitOfWork, entries: Callable[[UnitOfWork], Any], value: Callable[[int], Any]
) -> None:
    own = entries(uow)
    old, kept = own.put("a/1", value(1), ttl=DAY), own.put("a/2", value(2), ttl=DAY)
    assert own.get("a/1").expires_at == old.expires_at > old.updated_at + DAY - timedelta(seconds=1)
    expire(uow, own._entries.table.name, "a/1")
    assert own.find("a/1") is None
    with pytest.raises(NotFoundError):
        own.get("a/1")
    assert (own.count("a/"), [entry.key for entry in own.page("a/").items]) == (1, ["a/2"])
    assert [entry.key for entry in own.stream()] == ["a/2"]
    assert [*own.get_many(["a/1", "a/2"])] == ["a/2"]
    with pytest.raises(NotFoundError):
        own.delete("a/1")
    for work in (
        lambda: own.put("a/1", value(2), if_version=old.version),
        lambda: own.touch("a/1", if_version=old.version, ttl=DAY),
        lambda: own.delete("a/1", if_version=old.version),
    ):
        assert refused(uow, work).actual == 0
    assert own.delete_prefix("a/1") == 0
    again = own.put("a/1", value(3), if_version=0)
    assert (again.expires_at, again.version > kept.version) == (None, True)
    assert again.created_at > old.created_at


def test_an_expiry_is_by_the_clock_not_by_the_start_of_the_transaction(uow: UnitOfWork) -> None:
    uow.state.put("k", b"", ttl=MOMENT)
    assert uow.state.find("k") is None
    uow.session.execute(text("SELECT pg_sleep(0.2)"))
    entry = uow.state.put("k", b"", ttl=timedelta(seconds=0.1), if_version=0)
    assert entry.expires_at is not None
    started = uow.session.execute(text("SELECT now()")).scalar_one()
    assert entry.expires_at - started > timedelta(seconds=0.3)


def test_a_put_without_a_ttl_never_expires_again(
    uow: UnitOfWork, entries: Callable[[UnitOfWork], Any], value: Callable[[int], Any]
) -> None:
    own = entries(uow)
    first = own.put("k", value(1), ttl=DAY)
    assert own.put("k", value(1)).expires_at is None
    assert own.get("k").expires_at is None
    assert own.put("k", value(1), ttl=DAY, if_version=own.get("k").version).expires_at > first.expires_at
    (many,) = own.put_many({"k": value(2)})
    assert many.expires_at is None
    several = own.put_many({"k": value(2), "l": value(3)}, ttl=DAY)
    found = own.get_many(["k", "l"])
    assert [found[entry.key].expires_at for entry in several] == [entry.expires_at for entry in several]
    assert None not in [entry.expires_at for entry in several]


def test_a_touch_keeps_the_version(
    uow: UnitOfWork, entries: Callable[[UnitOfWork], Any], value: Callable[[int], Any]
) -> None:
    own = entries(uow)
    first = own.put("k", value(1), ttl=DAY)
    touched = own.touch("k", if_version=first.version, ttl=2 * DAY)
    assert (touched.version, touched.value, touched.updated_at) == (first.version, first.value, first.updated_at)
    assert touched.expires_at > first.expires_at + DAY - timedelta(seconds=1)
    assert own.touch("k", if_version=first.version, ttl=None).expires_at is None
    assert own.get("k").expires_at is None
    assert refused(uow, lambda: own.touch("k", if_version=first.version + 1, ttl=DAY)).actual == first.version


def test_many_are_read_and_deleted_in_one_call(
    uow: UnitOfWork, entries: Callable[[UnitOfWork], Any], value: Callable[[int], Any]
) -> None:
    own = entries(uow)
    own.put_many({key: value(1) for key in ("a%", "ab", "b", "é")})
    assert [*own.get_many(["é", "nothing", "a%", "é"])] == ["é", "a%"]
    assert own.get_many([]) == {}
    assert own.delete_prefix("a%") == 1
    assert own.delete_prefix("nothing") == 0
    assert own.delete_prefix("") == 3
    assert own.count() == 0


@pytest.mark.parametrize(
    ("field", "call"),
    [
        ("if_version", lambda own: own.put("k", b"", if_version=-1)),
        ("if_version", lambda own: own.put("k", b"", if_version=True)),
        ("if_version", lambda own: own.delete("k", if_version=0)),
        ("if_version", lambda own: own.touch("k", if_version=0, ttl=DAY)),
        ("ttl", lambda own: own.put("k", b"", ttl=timedelta(0))),
        ("ttl", lambda own: own.put("k", b"", ttl=5)),
        ("ttl", lambda own: own.put_many({"k": b""}, ttl=-DAY)),
        ("ttl", lambda own: own.touch("k", if_version=1, ttl=timedelta.max)),
        ("ttl", lambda own: own.put("k", b"", ttl=timedelta(days=36_500, microseconds=1))),
        ("keys", lambda own: own.get_many("abc")),
        ("version", lambda own: own.check("k", version=0)),
    ],
)
def test_what_is_no_version_or_ttl_is_refused(uow: UnitOfWork, field: str, call: Callable[[Any], Any]) -> None:
    with pytest.raises(InvalidInputError) as error:
        call(uow.state)
    assert error.value.field == field


def test_a_check_holds_the_version_until_the_end(
    storage: MeshStorage, open_storage: Open, mesh_storage_url: str
) -> None:
    with storage.begin() as uow:
        entry = uow.state.put("k", b"1")
    assert entry.version is not None
    with open_storage(mesh_storage_url, lock_timeout=0.2) as other, storage.begin() as uow:
        uow.state.check("k", version=entry.version)
        with pytest.raises(Exception, match="lock_timeout"), other.begin() as second:
            second.state.put("k", b"2")
        uow.state.check("k", version=entry.version)
    with storage.begin() as uow:
        put = uow.state.put("k", b"2")
        assert refused(uow, lambda: uow.state.check("k", version=entry.version or 0)).actual == put.version
        assert refused(uow, lambda: uow.state.check("nothing", version=1)).actual == 0


def test_of_many_at_once_one_wins(storage: MeshStorage) -> None:
    def race(work: Callable[[UnitOfWork], Any]) -> list[Any]:
        barrier = Barrier(8)

        def take(_: int) -> Any:
            with storage.begin() as uow:
                barrier.wait(20)
                try:
                    return work(uow)
                except ConflictError as error:
                    return error

        return [made for made in threads.map(take, range(8)) if not isinstance(made, ConflictError)]

    with ThreadPoolExecutor(8) as threads:
        for number in range(5):
            (won,) = race(lambda uow: uow.state.put("k", b"", if_version=0))
            (next_,) = race(lambda uow: uow.state.put("k", b"%d" % number, if_version=won.version))  # noqa: B023 - it ends here
            assert next_.version > won.version
            (gone,) = race(lambda uow: uow.state.delete("k", if_version=next_.version))  # noqa: B023 - it ends here
            assert gone is None


def test_maintenance_removes_what_is_over(storage: MeshStorage, mesh_storage_url: str) -> None:
    with storage.begin() as uow:
        uow.state.put_many({str(n): b"" for n in range(20)}, ttl=MOMENT)
        uow.runtime_config.put("c", 1, ttl=MOMENT)
        uow.state.put("kept", b"", ttl=DAY)
    made = storage.maintain()
    assert (made.expired, made.changes, made.messages) == (21, 0, 0)
    with psycopg.connect(mesh_storage_url) as connection:
        assert connection.execute("SELECT key FROM mesh_state").fetchall() == [("kept",)]
        assert eventually(lambda: changes_are_over(connection))
    assert storage.maintain(changes_older_than=timedelta(0)).changes == 43
    assert not storage.maintain()
    for ages in ({"changes_older_than": -DAY}, {"messages_older_than": 5}):
        with pytest.raises(InvalidInputError):
            storage.maintain(**ages)


def test_the_model_tells_when_it_expires() -> None:
    entry = ConfigEntry(key="k", value=1)
    assert (entry.version, entry.expires_at) == (None, None)
