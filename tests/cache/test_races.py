"""Reads and writes that overtake each other: fills that come late, threads, and forked processes."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from mesh_storage import Cached, MeshStorage
from tests.cache.conftest import LATEST, NEVER, POLL
from tests.redis_server import RedisServer

READERS = 4
ROUNDS = 60


def put(storage: MeshStorage, value: Any) -> None:
    with storage.begin() as uow:
        uow.runtime_config.put("a", value)


def delete(storage: MeshStorage, _: Any = None) -> None:
    with storage.begin() as uow:
        uow.runtime_config.delete("a")


class Late:
    """Keeps back what a cache stores in Redis, as if its process stood still in between."""

    def __init__(self, cached: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        # The asyncio side is behind the names of the blocking one.
        self._entries = (vars(cached).get("_wrapped") or cached)._reader._entries
        self._put = self._entries.put
        self._kept: list[tuple[Any, ...]] = []
        self._cached = cached
        is_async = type(self._entries).__name__.startswith("Async")

        def keep(*entry: Any) -> None:
            self._kept.append(entry)

        async def keep_async(*entry: Any) -> None:
            keep(*entry)

        monkeypatch.setattr(self._entries, "put", keep_async if is_async else keep)

    def let_go(self) -> int:
        """Store it now, and return how much it was."""
        for entry in self._kept:
            stored = self._put(*entry)
            if hasattr(stored, "__await__"):
                self._cached._wait(stored)
        return len(self._kept)


@pytest.mark.parametrize("flushed", [False, True], ids=["replaced", "flushed"])
@pytest.mark.parametrize("write", [put, delete])
def test_a_fill_that_comes_late_replaces_nothing_newer(
    storage: MeshStorage,
    other: MeshStorage,
    redis: RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[MeshStorage, Any], None],
    *,
    flushed: bool,
) -> None:
    put(storage, "old")
    slow, quick = other.cached(redis.url, poll=POLL), storage.cached(redis.url, poll=NEVER)
    late = Late(slow, monkeypatch)
    assert slow.runtime_config.value("a") == "old"
    assert slow.runtime_config.all() == {"a": "old"}
    write(storage, "new")
    expected = {"a": "new"} if write is put else {}
    assert quick.runtime_config.all() == expected
    assert quick.runtime_config.value("a", None) == expected.get("a")
    with redis.client as client:
        if flushed:
            client.flushall()
        before = {name: client.get(name) for name in client.scan_iter()}
        assert len(before) == (0 if flushed else 2)
        assert late.let_go() == 2
        after = {name: client.get(name) for name in client.scan_iter()}
        assert flushed or after == before
    assert quick.runtime_config.all() == expected
    assert quick.runtime_config.value("a", None) == expected.get("a")
    time.sleep(LATEST)
    assert slow.runtime_config.all() == expected
    assert slow.runtime_config.value("a", None) == expected.get("a")


def test_a_key_that_is_deleted_and_created_while_an_insert_waits_has_a_smaller_version_and_is_seen(
    storage: MeshStorage, redis_url: str, raw: psycopg.Connection[Any], mesh_storage_url: str
) -> None:
    """An INSERT draws its version before it waits for the key; docs/coordination.md says so."""
    cached = storage.cached(redis_url, poll=POLL)
    insert = "INSERT INTO mesh_state (key, value) VALUES ('a', %s) RETURNING version"
    with psycopg.connect(mesh_storage_url, autocommit=True) as waiting, ThreadPoolExecutor(1) as thread:
        with raw.transaction():
            raw.execute(insert, [b"1"])
            later = thread.submit(lambda: waiting.execute(insert, [b"2"]).fetchone())
            while not raw.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone():
                time.sleep(0.01)
            raw.execute("UPDATE mesh_state SET value = '3'")
            raw.execute("DELETE FROM mesh_state")
        row = later.result()
        assert row is not None
    time.sleep(LATEST)
    assert cached.state.get("a").version == row[0]
    for value in (b"4", b"5"):
        with storage.begin() as uow:
            uow.state.put("a", value)
        assert cached.state.get("a").value == value


def test_threads_that_write_and_read_see_their_own_writes_and_never_an_older_one(
    storage: MeshStorage, other: MeshStorage, redis: RedisServer
) -> None:
    caches = [storage.cached(redis.url, poll=POLL), other.cached(redis.url, poll=POLL)]
    put(storage, 0)
    ended = threading.Event()

    def write(number: int) -> None:
        mine, cached = (storage, other)[number % 2], caches[number % 2]
        for n in range(ROUNDS):
            with mine.begin() as uow:
                uow.runtime_config.put(f"of/{number}", n)
            assert cached.runtime_config.value(f"of/{number}") == n
            assert cached.runtime_config.all(f"of/{number}") == {f"of/{number}": n}

    def read(number: int) -> int:
        cached, seen, reads = caches[number % 2], [-1] * READERS, 0
        while not ended.is_set():
            for key in range(READERS):
                value = cached.runtime_config.value(f"of/{key}", -1)
                assert value >= seen[key], "it went back in time"
                seen[key] = value
                reads += 1
        return reads

    def flush() -> None:
        with redis.client as client:
            while not ended.wait(0.01):
                client.flushall()

    with ThreadPoolExecutor(2 * READERS + 1) as threads:
        reading = [threads.submit(read, number) for number in range(READERS)]
        flushing = threads.submit(flush)
        writing = [threads.submit(write, number) for number in range(READERS)]
        try:
            for each in writing:
                each.result(120)
        finally:
            ended.set()
        assert all(each.result(10) for each in reading)
        flushing.result(10)


def in_a_child(work: Callable[[], None]) -> None:
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_a_forked_child_reads_and_writes_by_itself(mesh_storage_url: str, redis_url: str) -> None:
    with MeshStorage.open(mesh_storage_url) as storage:
        cached: Cached = storage.cached(redis_url, poll=POLL)
        put(storage, 1)
        assert cached.runtime_config.value("a") == 1

        def work() -> None:
            assert cached.runtime_config.value("a") == 1
            put(storage, 2)
            assert cached.runtime_config.value("a") == 2
            assert cached.runtime_config.value("a") == 2

        in_a_child(work)
        time.sleep(LATEST)
        assert cached.runtime_config.value("a") == 2
        put(storage, 3)
        assert cached.runtime_config.value("a") == 3


def test_what_was_read_past_redis_is_not_followed_by_something_older(
    storage: MeshStorage, redis: RedisServer, raw: psycopg.Connection[Any]
) -> None:
    cached: Any = storage.cached(redis.url, poll=NEVER)
    put(storage, "old")
    assert cached.runtime_config.value("a") == "old"
    raw.execute("""UPDATE mesh_runtime_config SET value = '"new"'""")
    entries = (vars(cached).get("_wrapped") or cached)._reader._entries
    entries._next = float("inf")  # Redis is left alone
    assert cached.runtime_config.value("a") == "new"
    entries._next = float("-inf")
    assert cached.runtime_config.value("a") == "new"


def test_what_another_has_stored_from_ahead_is_not_followed_by_something_older(
    storage: MeshStorage, other: MeshStorage, redis: RedisServer
) -> None:
    one, two = storage.cached(redis.url, poll=NEVER), other.cached(redis.url, poll=NEVER)
    put(storage, "old")
    assert (one.runtime_config.value("a"), one.runtime_config.all()) == ("old", {"a": "old"})
    assert (two.runtime_config.value("a"), two.runtime_config.all()) == ("old", {"a": "old"})
    put(storage, "new")
    assert one.runtime_config.value("a") == "new"
    assert two.runtime_config.value("a") == "new"
    with redis.client as client:
        assert client.dbsize() == 2  # the listing is the old one
    assert two.runtime_config.all() == {"a": "new"}


def test_what_has_expired_is_seen_by_no_read_though_redis_keeps_it(storage: MeshStorage, redis: RedisServer) -> None:
    cached = storage.cached(redis.url, poll=NEVER)
    with storage.begin() as uow:
        uow.state.put("a", b"", ttl=timedelta(seconds=1))
    assert cached.state.find("a") is not None
    with redis.client as client:
        [name] = client.keys()  # type: ignore[misc]
        client.persist(name)
        time.sleep(1)
        assert cached.state.find("a") is None
        assert client.exists(name)
