"""Reads from replicas that die, freeze, conflict, are promoted or left behind: no wrong answer, and no error."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from pydantic import SecretStr

from mesh_storage import ConfigurationError, ConflictError, MeshStorage, MeshStorageError, UnavailableError
from mesh_storage.aio import AsyncMeshStorage
from tests.replicas.conftest import (
    Side,
    pause,
    port_of,
    ports,
    put,
    read,
    reasons,
    resume,
    settings_of,
    until,
)
from tests.servers import PASSWORD, PostgresServer, Replication, execute

pytestmark = pytest.mark.slow

FILL = "INSERT INTO mesh_state (key, value) SELECT i, repeat('x', 100)::bytea FROM generate_series(1, 9999) i"
"""Makes the log of a server longer than those of the others."""


def test_a_replica_that_dies_is_no_error(
    own_servers: Replication, side: Side, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with side.open(own_servers, replica_timeout=2.0) as storage:
            position = await put(storage, b"alive")
            assert (await read(storage, after=position))[1] in ports(*own_servers.standbys)
            async with storage.begin(read_only=True, replica=True) as uow:
                assert (await uow.state.get("k")).value == b"alive"
                for standby in own_servers.standbys:
                    standby.stop(signal.SIGKILL)
                await put(storage, b"dead")
                assert [entry.key async for entry in uow.state.stream()] == ["k"] if not side.blocking else True
                assert (await uow.state.get("k")).value == b"dead", "the primary goes on"
                assert await port_of(uow) == own_servers.primary.port
            assert reasons(caplog) == ["failed"]
            for _ in range(5):
                assert await read(storage) == (b"dead", own_servers.primary.port)
            assert reasons(caplog) == ["failed", "unreachable"]
            errors = [each.error for each in (await storage.health()).replicas]
            assert [type(error) for error in errors] == [UnavailableError] * 2
            for standby in own_servers.standbys:
                standby.start()

            async def back() -> bool:
                return (await read(storage))[1] != own_servers.primary.port

            await until(storage, side, back)

    side.run(main())


def test_replicas_that_were_never_there_are_no_error(own_servers: Replication, side: Side) -> None:
    for standby in own_servers.standbys:
        standby.stop()

    async def main() -> None:
        async with side.open(own_servers, replica_timeout=2.0) as storage:
            position = await put(storage, b"alone")
            for asked in ({}, {"after": position}, {"max_lag": timedelta(seconds=1)}):
                assert await read(storage, **asked) == (b"alone", own_servers.primary.port)

    side.run(main())


def test_replicas_answer_while_the_primary_is_away(own_servers: Replication, side: Side) -> None:
    async def main() -> None:
        async with side.open(own_servers, replica_timeout=1.0) as storage:
            position = await put(storage, b"kept")
            assert (await read(storage, after=position))[0] == b"kept"
            own_servers.await_replay()
            own_servers.primary.stop(signal.SIGKILL)
            for asked in ({}, {"after": position}):
                value, port = await read(storage, **asked)
                assert (value, port in ports(*own_servers.standbys)) == (b"kept", True)
            await side.sleep(0.2)
            with pytest.raises(UnavailableError):  # nobody can tell whether there is something newer
                await read(storage, max_lag=timedelta(seconds=0.1))

    side.run(main())


def test_a_primary_that_freezes_leaves_time_for_the_replicas(
    own_servers: Replication, side: Side, caplog: pytest.LogCaptureFixture
) -> None:
    max_lag = timedelta(seconds=20)

    async def main() -> None:
        async with side.open(own_servers, replica_timeout=2.0) as storage:
            position = await put(storage, b"kept")
            for _ in range(6):
                await read(storage, after=position, max_lag=max_lag)
            await side.sleep(10.1)  # it is asked again after half of it
            own_servers.primary.freeze()
            try:
                begun = time.monotonic()
                async with storage.begin(read_only=True, replica=True, max_lag=max_lag) as uow:
                    assert time.monotonic() - begun < 2.0
                    assert (await uow.state.get("k")).value == b"kept"
                    session = getattr(uow, "_wrapped", uow)._connection.driver.connection
                    assert not session.cancelled, "a late request would cancel a statement"
                for asked in ({}, {"after": position}):
                    assert (await read(storage, **asked))[1] in ports(*own_servers.standbys)
                assert reasons(caplog) == []
            finally:
                own_servers.primary.thaw()

    side.run(main())


def test_a_replica_that_freezes_costs_one_wait(own_servers: Replication, side: Side) -> None:
    async def main() -> None:
        async with side.open(own_servers, replica_timeout=1.0) as storage:
            position = await put(storage, b"warm")
            for _ in range(10):
                await read(storage, after=position)
            await side.sleep(1.1)  # a session that was seen to be right is trusted for a second
            for standby in own_servers.standbys:
                standby.freeze()
            try:
                begun = time.monotonic()
                for _ in range(5):
                    assert await read(storage) == (b"warm", own_servers.primary.port)
                assert time.monotonic() - begun < 5 * 1.0, "not one for each read"
            finally:
                for standby in own_servers.standbys:
                    standby.thaw()

    side.run(main())


def test_a_replica_that_freezes_costs_short_timeouts_one_wait(own_servers: Replication, side: Side) -> None:
    async def main() -> None:
        async with side.open(own_servers, replica_timeout=10.0) as storage:
            position = await put(storage, b"warm")
            for _ in range(10):
                await read(storage, after=position)
            await side.sleep(1.1)
            for standby in own_servers.standbys:
                standby.freeze()
            try:
                begun = time.monotonic()
                for _ in range(6):
                    assert await read(storage, timeout=3.0) == (b"warm", own_servers.primary.port)
                assert time.monotonic() - begun < 6 * 1.5, "not one for each read"
            finally:
                for standby in own_servers.standbys:
                    standby.thaw()

    side.run(main())


def conflict(servers: Replication) -> None:
    """Lock a table on the standbys, which ends transactions that have read it."""
    execute(servers.primary, "ALTER TABLE mesh_state SET (fillfactor = 90)")
    execute(servers.primary, "ALTER TABLE mesh_state RESET (fillfactor)")
    execute(servers.primary, "TRUNCATE mesh_runtime_config")
    servers.await_replay()


@pytest.fixture
def impatient(servers: Replication) -> Any:
    """Let the standbys replay at once what conflicts with their readers."""
    for standby in servers.standbys:
        execute(standby, "ALTER SYSTEM SET max_standby_streaming_delay = 0")
        execute(standby, "SELECT pg_reload_conf()")
    yield servers
    for standby in servers.standbys:
        execute(standby, "ALTER SYSTEM RESET max_standby_streaming_delay")
        execute(standby, "SELECT pg_reload_conf()")


def test_a_conflict_with_recovery_is_no_error_in_run(
    impatient: Replication, side: Side, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        seen: list[int] = []

        async def work(uow: Any) -> list[str]:
            await uow.runtime_config.count()
            seen.append(await port_of(uow))
            if len(seen) == 1:
                conflict(impatient)
            return [await uow.state.count(), await uow.runtime_config.count()]

        async with side.open(impatient) as storage:
            await put(storage, b"conflict")
            impatient.await_replay()
            async with storage.begin(read_only=True) as uow:
                there = [await uow.state.count(), await uow.runtime_config.count()]
            assert await storage.run(work, read_only=True, replica=True, isolation="repeatable read") == there
        assert seen[0] in ports(*impatient.standbys)
        assert seen[1:] == [impatient.primary.port]
        assert reasons(caplog) == ["failed"]

    side.run(main())


def test_a_conflict_within_a_snapshot_is_an_error_to_try_again_after(impatient: Replication, side: Side) -> None:
    async def main() -> None:
        async with side.open(impatient) as storage:
            impatient.await_replay()
            with pytest.raises(MeshStorageError) as error:
                async with storage.begin(read_only=True, replica=True, isolation="repeatable read") as uow:
                    await uow.runtime_config.count()
                    conflict(impatient)
                    await uow.runtime_config.count()
            assert error.value.retryable

    side.run(main())


def test_sessions_that_are_terminated_are_no_error(servers: Replication, side: Side) -> None:
    async def main() -> None:
        async with side.open(servers, application_name="doomed") as storage:
            await put(storage, b"go on")
            servers.await_replay()
            for isolation in ("read committed", "repeatable read"):
                async with storage.begin(read_only=True, replica=True, isolation=isolation, timeout=30.0) as uow:
                    for standby in servers.standbys:
                        execute(standby, TERMINATE)
                    assert (await uow.state.get("k")).value == b"go on"
                    assert await uow.state.count() >= 1

    side.run(main())


TERMINATE = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'doomed'"


def test_a_replica_that_lacks_a_migration_is_no_error(
    servers: Replication, side: Side, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with side.open(servers) as storage:
            await put(storage, b"here")
            servers.await_replay()
            execute(servers.primary, "ALTER TABLE mesh_state RENAME TO elsewhere")
            servers.await_replay()
            pause(*servers.standbys)
            execute(servers.primary, "ALTER TABLE elsewhere RENAME TO mesh_state")
            async with storage.begin(read_only=True, replica=True) as uow:
                assert (await uow.state.get("k")).value == b"here"
                assert await port_of(uow) == servers.primary.port
            assert reasons(caplog) == ["failed"]

    side.run(main())


def test_a_promoted_standby_is_read_no_more(own_servers: Replication, side: Side) -> None:
    primary, (gone, other) = own_servers.primary, own_servers.standbys

    async def main() -> None:
        async with side.open(own_servers, replica_timeout=1.0) as storage:
            position = await put(storage, b"one history")
            for _ in range(10):
                await read(storage, after=position)
            execute(gone, "SELECT pg_promote()")
            execute(gone, "UPDATE mesh_state SET value = 'another history'")
            await side.sleep(1.1)
            position = await put(storage, b"still one history")
            for asked in ({"after": position}, {}, {"max_lag": timedelta(seconds=1)}):
                for _ in range(10):
                    value, port = await read(storage, **asked)
                    assert (value, port in ports(other, primary)) == (b"still one history", True)
            errors = [each.error for each in (await storage.health()).replicas]
            assert [error is None for error in errors] == [False, True]

    side.run(main())


async def write_after(uow: Any) -> None:
    await uow.state.put("k", b"after")


def test_a_failover_moves_reads_along(own_servers: Replication, side: Side) -> None:
    old, (new, other) = own_servers.primary, own_servers.standbys
    url = SecretStr(own_servers.url(old, new, other, target_session_attrs="read-write"))

    async def main() -> None:
        async with side.open(own_servers, url=url, replica_timeout=10.0) as storage:
            before = await put(storage, b"before")
            assert (await read(storage, after=before))[0] == b"before"
            own_servers.await_replay()
            old.stop(signal.SIGKILL)
            own_servers.promote(new)
            own_servers.follow(other)
            await storage.run(write_after, within=30.0)
            after = await put(storage, b"after")
            assert before.split("/")[1:2] != after.split("/")[1:2], "the timeline is another one"
            for _ in range(10):
                value, port = await read(storage, after=after)
                assert (value, port in ports(new, other)) == (b"after", True)
                assert (await read(storage, after=before))[0] in (b"before", b"after")

            async def follows() -> bool:
                return (await read(storage, after=after))[1] == other.port

            await until(storage, side, follows)
            assert (await read(storage, max_lag=timedelta(seconds=5)))[0] == b"after"

    side.run(main())


def test_a_role_without_privileges_reads_from_the_primary_until_a_timeline_is_known(
    own_servers: Replication, side: Side, caplog: pytest.LogCaptureFixture
) -> None:
    old, (new, other) = own_servers.primary, own_servers.standbys
    execute(old, f"CREATE ROLE plain LOGIN PASSWORD '{PASSWORD.replace(chr(39), chr(39) * 2)}'")
    execute(old, "GRANT ALL ON ALL TABLES IN SCHEMA public TO plain")
    execute(old, "GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO plain")
    url, replica_url = (
        SecretStr(each.replace("//postgres:", "//plain:"))
        for each in (own_servers.url(old, new, target_session_attrs="read-write"), own_servers.url(other))
    )

    async def main() -> None:
        async with side.open(own_servers, url=url, replica_url=replica_url, replica_timeout=1.0) as storage:
            own_servers.await_replay()
            assert (await read(storage))[1] == other.port
            old.stop(signal.SIGKILL)
            own_servers.promote(new)
            own_servers.follow(other)
            await storage.run(write_after, within=30.0)
            position = await put(storage, b"new")
            own_servers.await_replay(other)
            assert await read(storage, after=position) == (b"new", new.port)
            assert reasons(caplog)[-1:] == ["behind"]
            assert (await read(storage))[1] == other.port
            execute(new, "CHECKPOINT")
            own_servers.await_replay(other)
            execute(other, "CHECKPOINT")
            assert await read(storage, after=position) == (b"new", other.port)

    side.run(main())


def test_a_standby_that_still_follows_the_old_primary_has_no_position_of_the_new_one(
    own_servers: Replication, side: Side
) -> None:
    old, (new, other) = own_servers.primary, own_servers.standbys

    async def main() -> None:
        own_servers.await_replay()
        execute(new, "SELECT pg_promote()")
        execute(old, "UPDATE mesh_state SET value = 'of the old primary'")
        execute(old, FILL)
        own_servers.await_replay(other)
        settings = settings_of(own_servers, url=SecretStr(own_servers.url(new)), replica_timeout=0.5)
        async with side.open(settings) as storage:
            position = await put(storage, b"of the new primary")
            for asked in ({"after": position}, {"max_lag": timedelta(hours=1)}):
                for _ in range(3):
                    assert await read(storage, **asked) == (b"of the new primary", new.port)
            assert (await storage.health()).replicas[-1].lag_bytes is None, "of a timeline that has branched off"

    side.run(main())


def test_a_standby_that_follows_another_server_is_read_no_more(own_servers: Replication, side: Side) -> None:
    primary, (new, other) = own_servers.primary, own_servers.standbys

    async def main() -> None:
        async with side.open(
            own_servers, replica_url=SecretStr(own_servers.url(other)), replica_timeout=0.5
        ) as storage:
            position = await put(storage, b"before")
            assert await read(storage, after=position) == (b"before", other.port)
            own_servers.promote(new)
            own_servers.follow(other)
            execute(new, FILL)
            own_servers.await_replay(other)
            position = await put(storage, b"after")
            await side.sleep(1.1)
            for asked in ({"after": position}, {}, {"max_lag": timedelta(seconds=0.5)}):
                assert await read(storage, **asked) == (b"after", primary.port)
            [health] = (await storage.health()).replicas
            assert (health.lag_bytes, type(health.error)) == (None, UnavailableError)

    side.run(main())


def test_a_primary_that_was_replaced_is_not_asked_for_what_it_cannot_have(own_servers: Replication, side: Side) -> None:
    new, _other = own_servers.standbys

    async def main() -> None:
        own_servers.await_replay()
        async with side.open(own_servers, replica_url=None, replica_timeout=0.5) as storage:
            await put(storage, b"of the old primary")
            execute(new, "SELECT pg_promote()")
            settings = settings_of(own_servers, url=SecretStr(own_servers.url(new)), replica_url=None)
            async with side.open(settings) as its:
                position = await put(its, b"of the new primary")
            with pytest.raises(UnavailableError, match="demoted"):
                await read(storage, after=position)

    side.run(main())


def test_a_position_that_a_failover_has_lost_is_an_error(own_servers: Replication, side: Side) -> None:
    old, (new, other) = own_servers.primary, own_servers.standbys

    async def main() -> None:
        for standby in (new, other):
            execute(standby, "ALTER SYSTEM SET primary_conninfo = ''")
            execute(standby, "SELECT pg_reload_conf()")
        url = SecretStr(own_servers.url(old, new, target_session_attrs="read-write"))
        while execute(old, "SELECT count(*) FROM pg_stat_replication") != [(0,)]:
            await side.sleep(0.05)
        async with side.open(own_servers, url=url, replica_timeout=0.5) as storage:
            async with storage.begin(position=True) as uow:
                for number in range(20):
                    await uow.state.put(f"lost {number}", os.urandom(100_000))
            position = getattr(uow, "_wrapped", uow).position
            old.stop(signal.SIGKILL)
            own_servers.promote(new)
            await storage.run(write_after, within=30.0)
            with pytest.raises(ConflictError, match="lost"):
                await read(storage, after=position)
            assert (await read(storage))[0] in (b"after", None)

    side.run(main())


@contextmanager
def disturbed(standbys: list[PostgresServer]) -> Generator[None]:
    """Pause, kill and restart standbys in turn."""
    stopped = threading.Event()

    def disturb() -> None:
        for number in range(1000):
            standby = standbys[number % len(standbys)]
            pause(standby)
            ended = stopped.wait(0.3)
            resume(standby)
            if number % 3 == 2:
                standby.stop(signal.SIGKILL)
                standby.start()
            if ended:
                return

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def test_readers_go_on_while_replicas_come_and_go(own_servers: Replication) -> None:
    written, wrong = [0], list[object]()
    with MeshStorage.open(settings=settings_of(own_servers, replica_timeout=0.5)) as storage:
        ended = time.monotonic() + 8

        def write() -> None:
            while time.monotonic() < ended:
                number = written[0] + 1
                with storage.begin(position=True) as uow:
                    uow.state.put("k", str(number).encode())
                positions.append((number, uow.position))
                written[0] = number

        def look(**asked: Any) -> None:
            try:
                while time.monotonic() < ended:
                    number, position = positions[-1]
                    if asked.get("after"):
                        asked["after"] = position
                    with storage.begin(read_only=True, replica=True, **asked) as uow:
                        found = int(uow.state.get("k").value)
                    if "after" in asked and found < number:
                        wrong.append((found, number))
            except Exception as error:  # noqa: BLE001 - every one is wrong
                wrong.append(error)

        with storage.begin(position=True) as uow:
            uow.state.put("k", b"0")
        positions = [(0, uow.position)]
        own_servers.await_replay()
        given: list[dict[str, Any]] = [{}, {"after": "1"}, {"after": "1"}, {"max_lag": timedelta(seconds=0.2)}]
        threads = [threading.Thread(target=write), *(threading.Thread(target=look, kwargs=each) for each in given)]
        with disturbed(own_servers.standbys):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert wrong == []
    assert written[0] > 20


def test_a_forked_child_reads_from_replicas_by_connections_of_its_own(servers: Replication) -> None:
    with MeshStorage.open(settings=settings_of(servers)) as storage:
        with storage.begin(position=True) as uow:
            uow.state.put("k", b"forked")
        with storage.begin(read_only=True, replica=True, after=uow.position) as reading:
            assert reading.state.get("k").value == b"forked"
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with storage.begin(read_only=True, replica=True, after=uow.position) as reading:
                    code = 0 if reading.state.get("k").value == b"forked" else 2
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        with storage.begin(read_only=True, replica=True, after=uow.position) as reading:
            assert reading.state.get("k").value == b"forked"


def test_the_position_needs_a_primary(servers: Replication, side: Side) -> None:
    async def main() -> None:
        url = SecretStr(servers.url(servers.standbys[0]))
        async with side.open(settings_of(servers, url=url, replica_url=None)) as storage:
            with pytest.raises(ConfigurationError, match="target_session_attrs"):
                await storage.position()

    side.run(main())


def test_a_primary_that_is_none_does_not_tell_how_old_a_replica_is(servers: Replication, side: Side) -> None:
    async def main() -> None:
        url = SecretStr(servers.url(servers.standbys[0]))
        async with side.open(servers, url=url, replica_timeout=0.3) as storage:
            with pytest.raises(UnavailableError, match="standby"):
                await read(storage, max_lag=timedelta(seconds=10))

    side.run(main())


def test_a_task_that_is_cancelled_while_it_waits_for_a_replica_leaves_nothing(servers: Replication) -> None:
    async def main() -> None:
        pause(*servers.standbys)
        async with AsyncMeshStorage.open(settings=settings_of(servers, replica_pool_size=1)) as storage:
            position = await put(storage, b"never mind")
            for delay in (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3):
                task = asyncio.create_task(read(storage, after=position))
                await asyncio.sleep(delay)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            resume(*servers.standbys)
            servers.await_replay()
            both = {"read_only": True, "replica": True, "after": position}
            async with storage.begin(**both) as one, storage.begin(**both) as two:
                assert {await port_of(one), await port_of(two)} == ports(*servers.standbys)

    asyncio.run(main())
