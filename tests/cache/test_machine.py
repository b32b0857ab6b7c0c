"""A model of two processes that share a cache: every read is of a state that this process may see."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from mesh_storage import MeshStorage
from tests.cache.conftest import NEVER
from tests.redis_server import RedisServer

KEYS = ("a", "ab", "b")
QUICK = 0.02
State = dict[str, tuple[int, datetime | None]]

keys = st.sampled_from(KEYS)
processes = st.integers(0, 1)
writers = st.integers(0, 2)
ttls = st.sampled_from([None, timedelta(hours=1), timedelta(hours=2)])


class Machine(RuleBasedStateMachine):
    """Two storages stand for the processes, and a connection of psycopg for the earlier Go service.

    All states of the table are known, and which of them each process has seen or made at least. What it reads must be
    from one of those or a later one, whatever it reads next, and with a short `poll`, from none that was replaced
    longer ago than the promise says.
    """

    storages: tuple[MeshStorage, MeshStorage]
    raw: psycopg.Connection[Any]
    redis: RedisServer
    poll: float

    def __init__(self) -> None:
        super().__init__()
        self.raw.execute("DELETE FROM mesh_runtime_config")
        self.client = self.redis.client
        self.client.flushall()
        self.caches: list[Any] = [each.cached(self.redis.url, poll=self.poll) for each in self.storages]
        self.states: list[State] = [{}]
        self.replaced: list[float] = []
        self.seen = [0, 0]
        self.value = 0
        self.kept: list[dict[bytes, bytes]] = []

    def teardown(self) -> None:
        for cached in self.caches:
            cached.close()
        self.client.close()

    # Writes

    def commit(self, writer: int, change: Callable[[Any], None]) -> None:
        """Change the table by a process or by nobody, and note the state."""
        if writer < len(self.storages):
            with self.storages[writer].begin() as uow:
                change(uow.runtime_config)
        rows = self.raw.execute("SELECT key, value, expires_at FROM mesh_runtime_config").fetchall()
        self.replaced.append(time.monotonic())
        self.states.append({key: (value, expires_at) for key, value, expires_at in rows})
        if writer < len(self.storages):
            self.seen[writer] = len(self.states) - 1

    @rule(writer=writers, key=keys, ttl=ttls)
    def put(self, writer: int, key: str, ttl: timedelta | None) -> None:
        self.value += 1
        if writer == len(self.storages):
            self.raw.execute(
                "INSERT INTO mesh_runtime_config (key, value, expires_at)"
                " VALUES (%s, to_jsonb(%s::int), now() + %s::interval)"
                " ON CONFLICT (key) DO UPDATE SET value = excluded.value, expires_at = excluded.expires_at",
                [key, self.value, ttl],
            )
        self.commit(writer, lambda config: config.put(key, self.value, ttl=ttl))

    @rule(writer=writers, key=keys, ttl=ttls)
    def touch(self, writer: int, key: str, ttl: timedelta | None) -> None:
        if key not in self.states[-1]:
            return
        if writer == len(self.storages):
            self.raw.execute(
                "UPDATE mesh_runtime_config SET expires_at = now() + %s::interval WHERE key = %s", [ttl, key]
            )
        self.commit(writer, lambda config: config.touch(key, if_version=config.get(key).version, ttl=ttl))

    @rule(writer=writers, key=keys)
    def delete(self, writer: int, key: str) -> None:
        if key not in self.states[-1]:
            return
        if writer == len(self.storages):
            self.raw.execute("DELETE FROM mesh_runtime_config WHERE key = %s", [key])
        self.commit(writer, lambda config: config.delete(key))

    # Redis

    @rule()
    def flush(self) -> None:
        self.client.flushall()

    @rule()
    def keep(self) -> None:
        """Keep what is in Redis, for later."""
        self.kept.append(self.entries())

    @rule(number=st.integers(0, 9), some=st.sets(st.integers(0, 9)))
    def bring_back(self, number: int, some: set[int]) -> None:
        """Bring some of that back, as a Redis does that starts with old data, or a fill that comes late."""
        if self.kept:
            for place, (name, entry) in enumerate(self.kept[number % len(self.kept)].items()):
                if place % 10 not in some:
                    self.client.set(name, entry)

    @rule(process=processes)
    def lose_redis(self, process: int) -> None:
        """Let a process find Redis away, until it looks again."""
        self.entries_of(process)._next = float("inf")

    @rule(process=processes)
    def find_redis(self, process: int) -> None:
        self.entries_of(process)._next = float("-inf")

    @rule()
    def wait(self) -> None:
        if self.poll == QUICK:
            time.sleep(QUICK + 0.1)

    # Reads

    @rule(process=processes, key=keys)
    def find(self, process: int, key: str) -> None:
        def read(config: Any) -> Any:
            found = config.find(key)
            return found and (found.value, found.expires_at)

        self.check(process, read, lambda state: state.get(key))

    @rule(process=processes, prefix=st.sampled_from(["", "a", "b", "c"]))
    def all(self, process: int, prefix: str) -> None:
        self.check(
            process,
            lambda config: config.all(prefix),
            lambda state: {key: value for key, (value, _) in state.items() if key.startswith(prefix)},
        )

    def check(self, process: int, read: Callable[[Any], Any], of: Callable[[State], Any]) -> None:
        """Check a read, and note the earliest state that it may be from."""
        in_time = time.monotonic() - self.poll - 0.1
        oldest = max([self.seen[process], *(n for n, at in enumerate(self.replaced, 1) if at <= in_time)])
        found = read(self.caches[process].runtime_config)
        possible = [n for n in range(oldest, len(self.states)) if of(self.states[n]) == found]
        assert possible, (found, [of(state) for state in self.states[oldest:]])
        self.seen[process] = possible[0]

    def entries(self) -> dict[bytes, bytes]:
        found = self.client.keys()
        assert isinstance(found, list)
        return {name: self.client.get(name) or b"" for name in found}  # type: ignore[misc]

    def entries_of(self, process: int) -> Any:
        cached = self.caches[process]
        return (vars(cached).get("_wrapped") or cached)._reader._entries


@pytest.mark.parametrize("poll", [QUICK, NEVER])
def test_every_read_is_of_a_state_that_the_process_may_see(
    storage: MeshStorage,
    other: MeshStorage,
    raw: psycopg.Connection[Any],
    redis: RedisServer,
    poll: float,
) -> None:
    class Here(Machine):
        pass

    Here.storages, Here.raw, Here.redis, Here.poll = (storage, other), raw, redis, poll
    run_state_machine_as_test(
        Here,
        settings=settings(
            max_examples=25,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
