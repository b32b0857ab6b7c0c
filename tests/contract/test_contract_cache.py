"""Reads through the cache, on either API: the results of the database, none that has been replaced or has expired."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from decimal import Decimal
from typing import Any

import psycopg
import pytest
import sqlalchemy

from mesh_storage import (
    Cached,
    ClosedError,
    ConfigurationError,
    InvalidInputError,
    Mesh,
    MeshStorage,
    Message,
    Node,
    NotFoundError,
    Route,
)
from mesh_storage.cache import cached as module
from tests.contract.conftest import Open
from tests.processes import changes_are_over, eventually

POLL = 0.1
LATEST = POLL + 0.1
"""The seconds after which everybody sees a commit, by the promise."""
NEVER = 60.0
LOOK = "mesh_changes"
"""What the statement that looks at what has changed is known by."""
JSON = [1, 1.0, -0.5, 10**40, 1e308, 5e-324, True, None, "é\U0001f600\u2028", {"": [], "a": {"b": [{}]}}, [[]]]


@pytest.fixture
def cached(storage: MeshStorage, redis_url: str) -> Cached:
    return storage.cached(redis_url, poll=POLL)


@pytest.fixture
def raw(mesh_storage_url: str) -> Iterator[psycopg.Connection[Any]]:
    """Yield a connection that is none of the library's, like that of the earlier Go service."""
    with psycopg.connect(mesh_storage_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def statements() -> Iterator[list[str]]:
    """Yield the statements that the library executes, as they come."""
    made: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        made.append(statement)

    sqlalchemy.event.listen(sqlalchemy.Engine, "before_cursor_execute", note)
    yield made
    sqlalchemy.event.remove(sqlalchemy.Engine, "before_cursor_execute", note)


def typed(value: Any) -> Any:
    """Return a value with the types of all its parts, since 1, 1.0 and True are equal."""
    if isinstance(value, dict):
        return {key: typed(member) for key, member in value.items()}
    if isinstance(value, list):
        return [typed(member) for member in value]
    if hasattr(value, "__table__"):
        return type(value), {key: typed(member) for key, member in vars(value).items()}
    return type(value), repr(value)


def outcome(read: Callable[[], Any]) -> Any:
    """Return what a call returns or raises."""
    try:
        return typed(read())
    except (NotFoundError, InvalidInputError) as error:
        return type(error), str(error), vars(error)


def fill(storage: MeshStorage) -> dict[str, str]:
    """Store something of each kind, and return the ids."""
    with storage.begin() as uow:
        mesh = uow.meshes.add(Mesh(name="m", description="é", allow_join=True, public_key="p"))
        uow.meshes.set_join_key(mesh.id, "secret")
        a = uow.nodes.add(Node(name="a", ip_address="10.0.0.1", region_id="region_" + "0" * 26))
        b = uow.nodes.add(Node(name="b", ip_address="::1", port=1))
        there = uow.routes.add(Route(source_node_id=a.id, target_node_id=b.id, latency_ms=Decimal("0.10"), cost=7))
        uow.routes.add(Route(source_node_id=b.id, target_node_id=a.id, bidirectional=True, bandwidth_mbps=Decimal(10)))
        uow.state.put("bytes", bytes(range(256)))
        uow.state.put("expiring", b"", ttl=timedelta(hours=1))
        uow.runtime_config.put("json", JSON)
        uow.runtime_config.put("j%", None, ttl=timedelta(hours=1))
        uow.routing_table.replace_all({"z": JSON, "A": {"next_hop": "a"}, "é": 1})
    return {"mesh": mesh.id, "a": a.id, "b": b.id, "route": there.id}


NONE = "mesh_" + "0" * 26
CALLS: dict[str, Callable[[Any, dict[str, str]], Any]] = {
    "meshes.get": lambda at, ids: at.meshes.get(ids["mesh"]),
    "meshes.get none": lambda at, _: at.meshes.get(NONE),
    "meshes.get wrong": lambda at, _: at.meshes.get(""),
    "meshes.find": lambda at, ids: at.meshes.find(ids["mesh"]),
    "meshes.find none": lambda at, _: at.meshes.find(NONE),
    "meshes.get_by_name": lambda at, _: at.meshes.get_by_name("m"),
    "meshes.get_by_name none": lambda at, _: at.meshes.get_by_name("none"),
    "meshes.get_by_name wrong": lambda at, _: at.meshes.get_by_name("x" * 256),
    "nodes.get": lambda at, ids: at.nodes.get(ids["a"]),
    "nodes.find": lambda at, ids: at.nodes.find(ids["b"]),
    "nodes.get_by_name": lambda at, _: at.nodes.get_by_name("b"),
    "nodes.get_by_name none": lambda at, _: at.nodes.get_by_name("none"),
    "nodes.get_by_name wrong": lambda at, _: at.nodes.get_by_name(1),
    "routes.get": lambda at, ids: at.routes.get(ids["route"]),
    "routes.find": lambda at, ids: at.routes.find(ids["route"]),
    "routes.between": lambda at, ids: at.routes.between(ids["a"], ids["b"]),
    "routes.between back": lambda at, ids: at.routes.between(ids["b"], ids["a"]),
    "routes.between none": lambda at, _: at.routes.between("a", "b"),
    "routes.between wrong": lambda at, _: at.routes.between("a", "\0"),
    "routes.for_node": lambda at, ids: at.routes.for_node(ids["b"]),
    "routes.for_node wrong": lambda at, _: at.routes.for_node("\ud800"),
    "state.get": lambda at, _: at.state.get("bytes"),
    "state.find": lambda at, _: at.state.find("expiring"),
    "state.get none": lambda at, _: at.state.get("none"),
    "state.get wrong": lambda at, _: at.state.get(b"bytes"),
    "runtime_config.get": lambda at, _: at.runtime_config.get("json"),
    "runtime_config.find": lambda at, _: at.runtime_config.find("j%"),
    "runtime_config.value": lambda at, _: at.runtime_config.value("json"),
    "runtime_config.value none": lambda at, _: at.runtime_config.value("none"),
    "runtime_config.value default": lambda at, _: at.runtime_config.value("none", None),
    "runtime_config.all": lambda at, _: list(at.runtime_config.all().items()),
    "runtime_config.all prefix": lambda at, _: list(at.runtime_config.all("j%").items()),
    "runtime_config.all wrong": lambda at, _: at.runtime_config.all(None),
    "routing_table.get": lambda at, _: at.routing_table.get("z"),
    "routing_table.find": lambda at, _: at.routing_table.find("none"),
    "routing_table.all": lambda at, _: [[*pair] for pair in at.routing_table.all().items()],
}


def test_results_and_errors_are_those_of_the_repositories_from_redis_as_well(
    storage: MeshStorage, cached: Cached, statements: list[str]
) -> None:
    ids = fill(storage)
    for name, call in CALLS.items():
        with storage.begin(read_only=True) as uow:
            expected = outcome(lambda call=call, uow=uow: call(uow, ids))
        assert outcome(lambda call=call: call(cached, ids)) == expected, name
        statements.clear()
        assert outcome(lambda call=call: call(cached, ids)) == expected, f"{name} from Redis"
        assert [each for each in statements if LOOK not in each] == [], name


def test_every_method_is_one_of_the_repository_and_was_called() -> None:
    kinds = {
        "meshes": module.CachedMeshes,
        "nodes": module.CachedNodes,
        "routes": module.CachedRoutes,
        "state": module.CachedRepository,
        "runtime_config": module.CachedRuntimeConfig,
        "routing_table": module.CachedRoutingTable,
    }
    offered = {f"{each}.{name}" for each, kind in kinds.items() for name in dir(kind) if not name.startswith("_")}
    assert {name.split()[0] for name in CALLS} == offered


def test_what_is_absent_is_remembered_until_it_is_created(
    storage: MeshStorage, redis_url: str, statements: list[str]
) -> None:
    cached = storage.cached(redis_url, poll=NEVER)
    assert cached.state.find("a") is None
    statements.clear()
    for _ in range(5):
        assert cached.state.find("a") is None
    assert statements == []
    with storage.begin() as uow:
        uow.state.put("a", b"1")
    assert cached.state.get("a").value == b"1"


def test_hits_execute_nothing_on_the_server(storage: MeshStorage, redis_url: str, statements: list[str]) -> None:
    with storage.begin() as uow:
        uow.runtime_config.put("a", 1)
    cached = storage.cached(redis_url, poll=NEVER)
    assert cached.runtime_config.value("a") == 1
    statements.clear()
    for _ in range(20):
        assert cached.runtime_config.value("a") == 1
    assert statements == []


def test_another_process_is_served_what_one_has_read(
    storage: MeshStorage, open_storage: Open, mesh_storage_url: str, redis_url: str, statements: list[str]
) -> None:
    with storage.begin() as uow:
        uow.runtime_config.put("a", 1)
        uow.runtime_config.put("b", 2)
    with open_storage(mesh_storage_url) as other:
        one, two = storage.cached(redis_url, poll=NEVER), other.cached(redis_url, poll=NEVER)
        assert two.runtime_config.value("b") == 2
        assert one.runtime_config.value("a") == 1
        statements.clear()
        assert two.runtime_config.value("a") == 1
        assert [each for each in statements if LOOK not in each] == []


# What this process has committed


def version(entry: Any) -> int:
    return 0 if entry is None else entry.version


def in_savepoint(uow: Any, n: int) -> None:
    with uow.savepoint():
        uow.state.put("a", b"%d" % n)


WRITES: dict[str, Callable[[Any, int], Any]] = {
    "put": lambda uow, n: uow.state.put("a", b"%d" % n),
    "put in a savepoint": in_savepoint,
    "put_many": lambda uow, n: uow.state.put_many({"a": b"%d" % n, "b": b""}),
    "put an expiry": lambda uow, n: uow.state.put("a", b"%d" % n, ttl=timedelta(hours=n)),
    "put if": lambda uow, n: uow.state.put("a", b"%d" % n, if_version=version(uow.state.find("a"))),
}


@pytest.mark.parametrize("way", WRITES)
def test_the_process_sees_what_it_has_committed(storage: MeshStorage, redis_url: str, way: str) -> None:
    cached = storage.cached(redis_url, poll=NEVER)
    for n in range(1, 6):
        with storage.begin() as uow:
            WRITES[way](uow, n)
        with storage.begin(read_only=True) as uow:
            stored = uow.state.get("a")
        for _ in range(2):
            assert typed(cached.state.get("a")) == typed(stored)
    with storage.begin() as uow:
        uow.state.delete("a")
    assert cached.state.find("a") is None
    assert cached.state.find("a") is None


def test_it_sees_an_explicit_commit_before_its_block_ends(storage: MeshStorage, redis_url: str) -> None:
    cached = storage.cached(redis_url, poll=NEVER)
    with storage.unit_of_work() as uow:
        for n in range(3):
            uow.runtime_config.put("a", n)
            uow.commit()
            assert cached.runtime_config.value("a") == n


def test_it_sees_what_a_session_has_committed(storage: MeshStorage, redis_url: str) -> None:
    cached = storage.cached(redis_url, poll=NEVER)
    ids = fill(storage)
    for n in range(3):
        assert cached.nodes.get(ids["a"]).port != n + 2
        with storage.begin() as uow:
            uow.session.execute(sqlalchemy.text("UPDATE nodes SET port = :port"), {"port": n + 2})
        assert cached.nodes.get(ids["a"]).port == n + 2
        assert cached.nodes.get_by_name("a").port == n + 2


def test_it_sees_what_it_did_to_listings(storage: MeshStorage, redis_url: str) -> None:
    cached = storage.cached(redis_url, poll=NEVER)
    ids = fill(storage)
    assert len(cached.routes.for_node(ids["a"])) == 2
    assert len(cached.routes.between(ids["a"], ids["b"])) == 2
    with storage.begin() as uow:
        uow.nodes.delete(ids["b"])  # its routes go with it
        uow.routing_table.replace_all({"b": 1})
        uow.runtime_config.delete_prefix("j")
    assert cached.routes.for_node(ids["a"]) == []
    assert cached.routes.between(ids["a"], ids["b"]) == []
    assert cached.routes.find(ids["route"]) is None
    assert cached.routing_table.all() == {"b": 1}
    assert cached.runtime_config.all() == {}
    with storage.begin() as uow:
        uow.nodes.add_many([Node(name="b", ip_address="10.0.0.9")])
    assert cached.nodes.get_by_name("b").ip_address == "10.0.0.9"


def test_it_does_not_see_what_is_not_committed(storage: MeshStorage, redis_url: str) -> None:
    cached = storage.cached(redis_url, poll=NEVER)
    with storage.unit_of_work() as uow:
        uow.state.put("a", b"")
        assert cached.state.find("a") is None
    assert cached.state.find("a") is None


def test_it_sees_its_lease(storage: MeshStorage, redis_url: str) -> None:
    cached = storage.cached(redis_url, poll=NEVER)
    assert cached.state.find("leader") is None
    with storage.lease("leader", b"me", ttl=timedelta(seconds=30)) as lease:
        assert cached.state.get("leader").version == lease.token
    assert cached.state.find("leader") is None


def test_what_others_do_not_read_costs_readers_nothing(
    storage: MeshStorage, redis_url: str, statements: list[str]
) -> None:
    cached = storage.cached(redis_url, poll=NEVER)
    assert cached.state.find("a") is None
    statements.clear()
    for n in range(3):
        with storage.begin() as uow:
            uow.messages.store(Message(id=f"{n}", from_node="a", to_node="b", content=b""))
            uow.node_states.put("a", n)
        assert cached.state.find("a") is None
    assert [each for each in statements if LOOK in each] == []


# What others have committed


def test_what_others_commit_is_seen_in_time_whoever_they_are(cached: Cached, raw: psycopg.Connection[Any]) -> None:
    for n in range(4):
        assert cached.runtime_config.value("a", None) == (n - 1 if n else None)
        raw.execute(
            "INSERT INTO mesh_runtime_config (key, value) VALUES ('a', %s)"
            " ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            [f"{n}"],
        )
        time.sleep(LATEST)
        assert cached.runtime_config.value("a") == n
        assert cached.runtime_config.all() == {"a": n}
    raw.execute("DELETE FROM mesh_runtime_config")
    time.sleep(LATEST)
    assert cached.runtime_config.find("a") is None
    assert cached.runtime_config.all() == {}


def test_a_long_transaction_is_seen_after_its_commit(
    storage: MeshStorage, cached: Cached, raw: psycopg.Connection[Any]
) -> None:
    with raw.transaction():
        raw.execute("INSERT INTO mesh_state (key, value) VALUES ('a', '')")
        for n in range(3):
            with storage.begin() as uow:
                uow.state.put("b", b"%d" % n)
            assert cached.state.find("a") is None
            assert cached.state.get("b").value == b"%d" % n
    time.sleep(LATEST)
    assert cached.state.get("a").value == b""


@pytest.mark.one_server
def test_a_truncate_is_seen(storage: MeshStorage, cached: Cached, raw: psycopg.Connection[Any]) -> None:
    fill(storage)
    assert cached.routing_table.find("z") is not None
    raw.execute("TRUNCATE mesh_routing_table")
    time.sleep(LATEST)
    assert cached.routing_table.find("z") is None
    assert cached.routing_table.all() == {}


def test_more_changes_than_are_read_at_once_are_seen(cached: Cached, raw: psycopg.Connection[Any]) -> None:
    assert cached.state.find("20000") is None
    raw.execute("INSERT INTO mesh_state (key, value) SELECT number::text, '' FROM generate_series(1, 20000) AS number")
    time.sleep(LATEST)
    assert cached.state.find("20000") is not None


def test_compacted_changes_are_no_loss(storage: MeshStorage, redis_url: str, raw: psycopg.Connection[Any]) -> None:
    cached = storage.cached(redis_url, poll=NEVER)
    assert cached.state.find("a") is None
    raw.execute("INSERT INTO mesh_state (key, value) VALUES ('a', '')")
    assert eventually(lambda: changes_are_over(raw))
    assert storage.maintain(changes_older_than=timedelta(0)).changes == 1
    assert cached.state.find("a") is not None


# Expiry


def test_what_has_expired_is_seen_by_no_read(
    storage: MeshStorage, cached: Cached, raw: psycopg.Connection[Any]
) -> None:
    with storage.begin() as uow:
        uow.state.put("a", b"", ttl=timedelta(seconds=0.5))
        uow.runtime_config.put("a", 1, ttl=timedelta(seconds=0.5))
        uow.runtime_config.put("b", 2)
        expires_at = uow.runtime_config.get("a").expires_at
    assert (cached.state.find("a") is not None, cached.runtime_config.all()) == (True, {"a": 1, "b": 2})
    over = False
    while not over:
        row = raw.execute("SELECT clock_timestamp() >= %s", [expires_at]).fetchone()
        assert row is not None
        over = row[0]
        state, config, everything = cached.state.find("a"), cached.runtime_config.find("a"), cached.runtime_config.all()
        if over:
            assert (state, config, everything) == (None, None, {"b": 2})
    assert cached.state.find("a") is None


@pytest.mark.parametrize("before", [timedelta(hours=1), None])
def test_an_earlier_expiry_by_others_is_kept(
    storage: MeshStorage, cached: Cached, raw: psycopg.Connection[Any], before: timedelta | None
) -> None:
    with storage.begin() as uow:
        uow.state.put("a", b"", ttl=before)
    assert cached.state.find("a") is not None
    raw.execute("UPDATE mesh_state SET expires_at = (SELECT clock_timestamp()) + interval '0.1 s'")
    time.sleep(LATEST)
    assert cached.state.find("a") is None


def test_its_own_touch_is_seen_at_once(storage: MeshStorage, redis_url: str) -> None:
    cached = storage.cached(redis_url, poll=NEVER)
    with storage.begin() as uow:
        made = uow.runtime_config.put("a", 1, ttl=timedelta(hours=1))
    assert cached.runtime_config.get("a").expires_at == made.expires_at
    for ttl in (timedelta(hours=2), None, timedelta(seconds=0.1)):
        assert made.version is not None
        with storage.begin() as uow:
            touched = uow.runtime_config.touch("a", if_version=made.version, ttl=ttl)
        assert typed(cached.runtime_config.get("a")) == typed(touched)
    time.sleep(0.1)
    assert cached.runtime_config.find("a") is None
    assert cached.runtime_config.all() == {}


def test_a_touch_is_still_no_change_to_those_who_watch(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        made = uow.state.put("a", b"", ttl=timedelta(hours=1))
        cursor = uow.changes.cursor()
    with storage.begin() as uow:
        cursor = uow.changes.cursor()
    assert made.version is not None
    with storage.begin() as uow:
        uow.state.touch("a", if_version=made.version, ttl=None)
        assert uow.changes.since(cursor, ["state"]).changes == []
    with storage.begin() as uow:
        assert uow.changes.since(cursor, ["state"]).changes == []


# Arguments, and the end


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_age": 0}, {"max_age": -1.0}, {"max_age": "60"}, {"max_age": True}, {"max_age": float("nan")},
        {"max_age": 86_401}, {"poll": 0}, {"poll": 61}, {"poll": None},
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(storage: MeshStorage, redis_url: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        storage.cached(redis_url, **wrong)
    assert caught.value.field in wrong


@pytest.mark.parametrize("url", ["http://:hush@host", "redis://:hush@host:port", "redis://:hush@host?socket_timeout=x"])
def test_a_wrong_url_is_refused_and_not_repeated(storage: MeshStorage, url: str) -> None:
    with pytest.raises(ConfigurationError, match="redis_url") as caught:
        storage.cached(url)
    assert "hush" not in f"{caught.value!r} {caught.value.__cause__!r}"
    with pytest.raises(InvalidInputError, match="redis_url"):
        storage.cached(7)  # type: ignore[arg-type]


def test_it_ends_by_itself_or_with_its_storage(open_storage: Open, mesh_storage_url: str, redis_url: str) -> None:
    with open_storage(mesh_storage_url) as opened:
        one, two = opened.cached(redis_url), opened.cached(redis_url)
        assert (one.state.find("a"), two.state.find("a")) == (None, None)
        one.close()
        one.close()
        with pytest.raises(ClosedError):
            one.state.find("a")
        assert two.state.find("a") is None
    with pytest.raises(ClosedError):
        two.state.find("a")
    with pytest.raises(ClosedError):
        opened.cached(redis_url)
