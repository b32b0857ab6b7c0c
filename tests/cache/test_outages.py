"""What readers get while Redis or the database is away, slow, full, or has lost or kept what it should not."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from mesh_storage import Cached, Mesh, MeshStorage, UnavailableError
from tests.cache.conftest import LATEST, NEVER, POLL
from tests.contract.conftest import Open
from tests.redis_server import PASSWORD, RedisServer
from tests.relay import relayed


def put(storage: MeshStorage, value: Any, key: str = "a", **given: Any) -> None:
    with storage.begin() as uow:
        uow.runtime_config.put(key, value, **given)


def warnings(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Return the records about caches, none of which may name a secret."""
    found = [vars(record) for record in caplog.records if vars(record).get("event") == "cache"]
    assert PASSWORD not in repr(found)
    assert PASSWORD not in caplog.text
    return found


def check_all_is_well(storage: MeshStorage, cached: Cached, start: int = 0) -> None:
    """Check that whatever is written is read."""
    for n in range(start, start + 4):
        put(storage, n)
        for _ in range(3):
            assert cached.runtime_config.value("a") == n


def test_while_redis_is_away_the_database_answers_and_one_record_says_so(
    storage: MeshStorage, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    cached = storage.cached(redis.url, poll=POLL)
    check_all_is_well(storage, cached)
    redis.kill()
    check_all_is_well(storage, cached, 10)
    assert [record["levelname"] for record in warnings(caplog)] == ["WARNING"]
    redis.start()
    time.sleep(1.1)  # it is left alone for a second
    check_all_is_well(storage, cached, 20)
    with redis.client as client:
        assert client.dbsize() == 1
    assert len(warnings(caplog)) == 1


def test_a_redis_that_was_never_there_is_no_error(
    storage: MeshStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cached = storage.cached(f"unix://:s3cret%2Fof%3Aredis@{tmp_path}/none.sock")
    check_all_is_well(storage, cached)
    assert len(warnings(caplog)) == 1


def test_a_wrong_password_is_no_error_and_is_not_told(
    storage: MeshStorage, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    cached = storage.cached(redis.url.replace("@", "x@"))
    check_all_is_well(storage, cached)
    assert [record["error"] for record in warnings(caplog)] in (["AuthenticationError"], ["ConnectionError"])
    assert PASSWORD not in repr(cached)


def test_readers_hardly_wait_for_a_redis_that_stands_still(
    storage: MeshStorage, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    cached = storage.cached(redis.hasty_url)
    check_all_is_well(storage, cached)
    with redis.frozen():
        begun = time.monotonic()
        reads = 0
        while time.monotonic() < begun + 2:
            assert cached.runtime_config.value("a") == 3
            reads += 1
        put(storage, 4)
        assert cached.runtime_config.value("a") == 4
    assert len(warnings(caplog)) == 1
    assert reads > 20  # it is asked about once a second, and given 0.1 s
    assert cached.runtime_config.value("a") == 4
    time.sleep(1.1)
    check_all_is_well(storage, cached, 20)


def test_readers_wait_for_redis_as_long_as_its_url_says(storage: MeshStorage, redis: RedisServer) -> None:
    cached = storage.cached(f"{redis.hasty_url}?socket_timeout=0.6&socket_connect_timeout=20")
    put(storage, 1)
    assert cached.runtime_config.value("a") == 1
    with redis.frozen():
        begun = time.monotonic()
        assert cached.runtime_config.value("a") == 1
        assert time.monotonic() >= begun + 0.6


def test_a_redis_that_is_full_or_a_replica_refuses_without_an_error(
    storage: MeshStorage, redis: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    cached = storage.cached(redis.url)
    check_all_is_well(storage, cached)
    with redis.client as client:
        client.config_set("maxmemory", 1)
        check_all_is_well(storage, cached, 10)
        client.config_set("maxmemory", 0)
        client.replicaof("127.0.0.1", 1)
        check_all_is_well(storage, cached, 20)
        client.replicaof("NO", "ONE")
    check_all_is_well(storage, cached, 30)
    assert len(warnings(caplog)) == 1


def test_a_redis_that_evicts_everything_is_no_harm(storage: MeshStorage, redis: RedisServer) -> None:
    cached = storage.cached(redis.url, poll=NEVER)
    with redis.client as client:
        for n in range(10):
            put(storage, n)
            assert cached.runtime_config.value("a") == n
            client.flushall()
            assert cached.runtime_config.value("a") == n


def test_a_redis_that_starts_anew_with_old_data_is_not_believed(
    storage: MeshStorage, other: MeshStorage, redis: RedisServer
) -> None:
    one, two = storage.cached(redis.url, poll=NEVER), other.cached(redis.url, poll=POLL)
    put(storage, "old")
    assert one.runtime_config.value("a") == two.runtime_config.value("a") == "old"
    assert one.runtime_config.all() == two.runtime_config.all() == {"a": "old"}
    redis.save()
    put(storage, "new")
    assert one.runtime_config.value("a") == "new"
    redis.kill()
    redis.start()
    assert one.runtime_config.value("a") == "new"
    assert one.runtime_config.all() == {"a": "new"}
    time.sleep(LATEST)
    assert two.runtime_config.value("a") == "new"
    assert two.runtime_config.all() == {"a": "new"}
    with storage.begin() as uow:
        uow.runtime_config.delete("a")
    redis.kill()
    redis.start()
    assert one.runtime_config.find("a") is None


@pytest.mark.parametrize(
    "garbage",
    [
        b"", b"x", b"0" * 19, b"0" * 20, b"9" * 20 + b"[[1]]", b"0" * 20 + b"[[]]", b"0" * 20 + b"\xff\xfe",
        b"\x80\x04N.", b"0" * 19 + b"1[{}]",
    ],
)  # fmt: skip
@pytest.mark.parametrize("keeps_position", [False, True])
def test_what_others_write_there_is_no_harm(
    storage: MeshStorage, redis: RedisServer, garbage: bytes, *, keeps_position: bool
) -> None:
    cached = storage.cached(redis.url, poll=NEVER)
    put(storage, "right")
    assert cached.runtime_config.value("a") == "right"
    with redis.client as client:
        [name] = client.keys()
        found = client.get(name)
        assert isinstance(found, bytes)
        client.set(name, found[:20] + garbage if keeps_position else garbage)
    assert cached.runtime_config.value("a") == "right"
    put(storage, "later")
    assert cached.runtime_config.value("a") == "later"


def test_an_entry_of_another_type_is_no_harm(storage: MeshStorage, redis: RedisServer) -> None:
    cached = storage.cached(redis.url, poll=NEVER)
    put(storage, "right")
    assert cached.runtime_config.value("a") == "right"
    with redis.client as client:
        [name] = client.keys()
        client.delete(name)
        client.lpush(name, "x")
    assert cached.runtime_config.value("a") == "right"


def test_no_secret_of_the_database_is_in_redis(storage: MeshStorage, redis: RedisServer) -> None:
    with storage.begin() as uow:
        mesh = uow.meshes.add(Mesh(name="m"))
        uow.meshes.set_join_key(mesh.id, "secret")
    cached = storage.cached(redis.url)
    assert cached.meshes.get(mesh.id).name == cached.meshes.get_by_name("m").name == "m"
    with redis.client as client:
        names = client.keys()
        assert isinstance(names, list)
        assert len(names) == 2
        assert not any(b"scrypt" in (client.get(name) or b"") for name in names)


def test_a_large_value_stays_in_the_database(storage: MeshStorage, redis: RedisServer) -> None:
    cached = storage.cached(redis.url)
    with storage.begin() as uow:
        uow.state.put("large", bytes(2**20))
        uow.state.put("small", bytes(2**16))
        uow.runtime_config.put("large", "\u20ac" * 2**19)
    for _ in range(2):
        assert cached.runtime_config.value("large") == "\u20ac" * 2**19
        assert cached.state.get("large").value == bytes(2**20)
        assert cached.state.get("small").value == bytes(2**16)
    with redis.client as client:
        assert client.dbsize() == 1


def test_what_this_library_would_not_store_is_not_cached(
    storage: MeshStorage, redis: RedisServer, raw: psycopg.Connection[Any]
) -> None:
    cached = storage.cached(redis.url)
    raw.execute("INSERT INTO mesh_runtime_config (key, value) VALUES ('a', ('1' || repeat('0', 5000))::jsonb)")
    for _ in range(2):
        assert cached.runtime_config.value("a") == 10**5000
    with redis.client as client:
        assert client.dbsize() == 0


def test_entries_live_for_max_age_at_most(storage: MeshStorage, redis: RedisServer) -> None:
    cached = storage.cached(redis.url, max_age=20)
    put(storage, 1)
    put(storage, 2, "b", ttl=timedelta(seconds=5))
    assert (cached.runtime_config.value("a"), cached.runtime_config.value("b")) == (1, 2)
    with redis.client as client:
        names = client.keys()
        assert isinstance(names, list)
        left = {bytes(name).endswith(b'"b"]'): int(client.pttl(name)) for name in names}  # type: ignore[arg-type]
    assert 0 < left[True] <= 5000 < left[False] <= 20_000


# The database


def test_while_the_database_is_away_the_cache_answers_for_max_age(  # noqa: PLR0917 - fixtures
    open_storage: Open,
    mesh_storage_url: str,
    raw: psycopg.Connection[Any],
    redis: RedisServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    max_age = 4.0
    with relayed(mesh_storage_url, tmp_path) as relay, open_storage(relay.url) as storage:
        put(storage, 1)
        cached = storage.cached(redis.url, max_age=max_age, poll=POLL)
        assert cached.runtime_config.value("a") == 1
        relay.stop()
        cut = time.monotonic()
        raw.execute("UPDATE mesh_runtime_config SET value = '2'")
        served = 0
        with pytest.raises(UnavailableError):
            while True:
                begun = time.monotonic()
                assert cached.runtime_config.value("a") == 1
                assert begun < cut + max_age
                served += 1
        assert served > 20
    assert len(warnings(caplog)) == 1


def test_a_database_that_stands_still_delays_readers_little(
    open_storage: Open, mesh_storage_url: str, redis: RedisServer, tmp_path: Path
) -> None:
    with relayed(mesh_storage_url, tmp_path) as relay, open_storage(relay.url) as storage:
        put(storage, 1)
        cached = storage.cached(redis.url, max_age=30, poll=POLL)
        assert cached.runtime_config.value("a") == 1
        relay.cut()
        begun = time.monotonic()
        reads = 0
        while time.monotonic() < begun + 4:
            assert cached.runtime_config.value("a") == 1
            reads += 1
        assert reads > 20
        relay.mend()
        put(storage, 2)
        assert cached.runtime_config.value("a") == 2


def test_after_a_commit_of_its_own_nothing_old_is_served_though_the_database_is_away(
    open_storage: Open, mesh_storage_url: str, redis: RedisServer, tmp_path: Path
) -> None:
    with relayed(mesh_storage_url, tmp_path) as relay, open_storage(relay.url) as storage:
        put(storage, 1)
        cached = storage.cached(redis.url, poll=NEVER)
        assert cached.runtime_config.value("a") == 1
        put(storage, 2)
        relay.stop()
        with pytest.raises(UnavailableError):
            cached.runtime_config.value("a")
