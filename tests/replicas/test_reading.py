"""Reads from replicas that all are as they should be, or lag."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import hypothesis
import psycopg
import pytest
from hypothesis import strategies as st
from pydantic import SecretStr
from sqlalchemy import event, insert, text
from sqlalchemy.engine import Engine

from mesh_storage import (
    ConfigurationError,
    ConflictError,
    InvalidInputError,
    MeshStorage,
    Settings,
    StateEntry,
    StorageTimeoutError,
)
from mesh_storage.postgres.wal import Position, parse
from tests.replicas.conftest import Side, pause, port_of, ports, position_of, put, read, reasons, resume, settings_of
from tests.servers import PASSWORD, Replication, execute

SOON = {"replica_timeout": 0.3}


def test_reads_are_spread_over_the_replicas(servers: Replication, side: Side) -> None:
    async def main() -> None:
        async with side.open(servers) as storage:
            position = await put(storage, b"spread")
            answers = [await read(storage, after=position) for _ in range(40)]
            assert {value for value, _ in answers} == {b"spread"}
            assert {port for _, port in answers} == ports(*servers.standbys)

    side.run(main())


def test_the_order_of_the_url_is_kept_if_it_says_so(servers: Replication, side: Side) -> None:
    async def main() -> None:
        url = servers.url(*servers.standbys, load_balance_hosts="disable")
        async with side.open(servers, replica_url=SecretStr(url)) as storage:
            position = await put(storage, b"in order")
            for standby in servers.standbys:
                servers.await_replay(standby)
            assert {(await read(storage, after=position))[1] for _ in range(20)} == ports(servers.standbys[0])

    side.run(main())


def test_what_the_url_of_the_replicas_leaves_out_is_that_of_the_primary(servers: Replication, side: Side) -> None:
    async def main() -> None:
        hosts = ",".join(f"127.0.0.1:{standby.port}" for standby in servers.standbys)
        async with side.open(servers, replica_url=SecretStr(f"postgresql://{hosts}")) as storage:
            position = await put(storage, b"the same login")
            assert (await read(storage, after=position))[1] in ports(*servers.standbys)

    side.run(main())


def test_a_read_after_a_position_waits_until_it_is_replayed(servers: Replication) -> None:
    with MeshStorage.open(settings=settings_of(servers)) as storage:
        with storage.begin() as uow:
            uow.state.put("k", b"before")
        servers.await_replay()
        pause(*servers.standbys)
        with storage.begin(position=True) as uow:
            uow.state.put("k", b"after")
        with storage.begin(read_only=True, replica=True) as old:
            assert old.state.get("k").value == b"before"
        seen: list[tuple[bytes, int]] = []

        def wait() -> None:
            with storage.begin(read_only=True, replica=True, after=uow.position) as new:
                seen.append((new.state.get("k").value, new._connection.driver.connection.info.port))

        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        resume(*servers.standbys)
        thread.join()
    assert [value for value, _ in seen] == [b"after"]
    assert seen[0][1] in ports(*servers.standbys)


def test_the_replica_that_has_replayed_the_position_answers(servers: Replication, side: Side) -> None:
    async def main() -> None:
        async with side.open(servers) as storage:
            pause(servers.standbys[0])
            position = await put(storage, b"on the other")
            for _ in range(10):
                assert await read(storage, after=position) == (b"on the other", servers.standbys[1].port)

    side.run(main())


def test_where_none_has_it_in_time_the_primary_answers_and_that_is_logged(
    servers: Replication, side: Side, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with side.open(servers, replica_timeout=1.5) as storage:
            await put(storage, b"before")
            servers.await_replay()
            pause(*servers.standbys)
            position = await put(storage, b"after")
            begun = time.monotonic()
            assert await read(storage, after=position) == (b"after", servers.primary.port)
            assert time.monotonic() - begun > 1
            begun = time.monotonic()
            assert await read(storage, after=position) == (b"after", servers.primary.port)
            assert time.monotonic() - begun < 1, "nobody waits in vain twice"
            assert reasons(caplog) == ["behind"]
            resume(*servers.standbys)
            servers.await_replay()
            assert (await read(storage, after=position))[1] in ports(*servers.standbys)

    side.run(main())


def test_a_short_timeout_does_not_make_others_impatient(servers: Replication, side: Side) -> None:
    async def main() -> None:
        async with side.open(servers) as storage:
            await read(storage)
            pause(*servers.standbys)
            position = await put(storage, b"soon")
            assert (await read(storage, after=position, timeout=0.5))[1] == servers.primary.port
            resumed = threading.Timer(0.3, resume, servers.standbys)
            resumed.start()
            value, port = await read(storage, after=position)
            assert (value, port in ports(*servers.standbys)) == (b"soon", True)
            resumed.join()

    side.run(main())


def test_a_replica_that_is_too_slow_for_a_short_timeout_is_not_too_slow_for_others(
    servers: Replication, side: Side
) -> None:
    async def main() -> None:
        async with side.open(servers) as storage:
            await put(storage, b"in time")
            servers.await_replay()
            with suppress(StorageTimeoutError):  # there is no connection yet
                await read(storage, timeout=0.006)
            value, port = await read(storage)
            assert (value, port in ports(*servers.standbys)) == (b"in time", True)

    side.run(main())


@hypothesis.given(
    system=st.integers(-(2**63), 2**63 - 1), timeline=st.integers(0, 2**31 - 1), lsn=st.integers(0, 2**63 - 1)
)
def test_a_position_is_read_as_it_was_written(system: int, timeline: int, lsn: int) -> None:
    assert parse(str(Position(system, timeline, lsn))) == (system, timeline, lsn)


def test_a_timeout_leaves_time_for_the_primary(servers: Replication, side: Side) -> None:
    async def main() -> None:
        async with side.open(servers) as storage:
            pause(*servers.standbys)
            position = await put(storage, b"in time")
            assert await read(storage, after=position, timeout=4.0) == (b"in time", servers.primary.port)

    side.run(main())


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read"])
@pytest.mark.parametrize("timeout", [None, 60.0])
def test_the_snapshot_is_taken_after_the_position_was_seen(
    servers: Replication, side: Side, isolation: str, timeout: float | None
) -> None:
    async def main() -> None:
        async with side.open(servers) as storage:
            for number in range(20):
                position = await put(storage, str(number).encode())
                value, port = await read(storage, after=position, isolation=isolation, timeout=timeout)
                assert (value, port in ports(*servers.standbys)) == (str(number).encode(), True)

    side.run(main())


def test_a_position_of_the_storage_is_after_all_that_is_visible(servers: Replication, side: Side) -> None:
    async def main() -> None:
        async with side.open(servers) as storage:
            for number in range(10):
                async with storage.begin(durability="relaxed") as uow:
                    await uow.state.put("k", str(number).encode())
                value, port = await read(storage, after=await storage.position())
                assert (value, port in ports(*servers.standbys)) == (str(number).encode(), True)

    side.run(main())


def test_the_position_of_a_strict_commit_is_on_disk_whatever_others_are_about_to_write(
    servers: Replication, side: Side, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        with psycopg.connect(**servers.primary.connect) as other:

            def write(_connection: object, _cursor: object, statement: str, *_: object) -> None:
                if "pg_walfile_name" in statement:
                    other.execute("INSERT INTO mesh_state (key, value) VALUES ('never committed', '')")

            async with side.open(servers, replica_timeout=2.0) as storage:
                await put(storage, b"before")
                await read(storage)
                event.listen(Engine, "before_cursor_execute", write)
                try:
                    position = await put(storage, b"on disk")
                finally:
                    event.remove(Engine, "before_cursor_execute", write)
                value, port = await read(storage, after=position)
                assert (value, port in ports(*servers.standbys)) == (b"on disk", True)
                assert reasons(caplog) == []
            other.rollback()

    side.run(main())


def test_the_position_of_a_commit_that_waits_for_no_disk_is_after_it(servers: Replication, side: Side) -> None:
    async def main() -> None:
        for options, durability in (("-csynchronous_commit=off", "strict"), ("", "relaxed")):
            url = SecretStr(servers.url(servers.primary, options=options))
            async with side.open(servers, url=url) as storage:
                for number in range(8):
                    async with storage.begin(position=True, durability=durability) as uow:
                        await uow.state.put("k", str(number).encode())
                    value, port = await read(storage, after=position_of(uow))
                    assert (value, port in ports(*servers.standbys)) == (str(number).encode(), True)

    side.run(main())


def test_a_position_right_behind_the_header_of_a_segment_can_be_reached(servers: Replication, side: Side) -> None:
    async def main() -> None:
        async with side.open(servers) as storage:
            await put(storage, b"switched")
            execute(servers.primary, "SELECT pg_switch_wal()")
            value, port = await read(storage, after=await storage.position())
            assert (value, port in ports(*servers.standbys)) == (b"switched", True)

    side.run(main())


def test_positions_are_known_after_a_commit_and_are_in_order(servers: Replication, side: Side) -> None:
    async def main() -> None:
        async with side.open(servers) as storage:
            async with storage.unit_of_work(position=True) as uow:
                await uow.state.put("k", b"1")
                with pytest.raises(Exception, match="position=True, and a commit"):
                    position_of(uow)
                await uow.commit()
                first = position_of(uow)
                await uow.state.put("k", b"2")
                await uow.commit()
                second = position_of(uow)
            async with storage.begin(position=True, timeout=30.0) as uow:
                await uow.session.execute(insert(StateEntry).values(key=f"key {side.blocking}", value=b""))
            third = position_of(uow)
            places = [int(each.rpartition("/")[2]) for each in (first, second, third, await storage.position())]
            assert places == sorted(places)
            assert places[0] < places[1] < places[2]
            assert (await read(storage, after=second))[0] == b"2"
            async with storage.begin() as uow:
                await uow.state.put("k", b"3")
            with pytest.raises(Exception, match="position=True, and a commit"):
                position_of(uow)

    side.run(main())


def test_max_lag_is_kept(servers: Replication, side: Side, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with side.open(servers, replica_timeout=1.5) as storage:
            await put(storage, b"before")
            servers.await_replay()
            assert (await read(storage, max_lag=timedelta(seconds=0.4)))[1] in ports(*servers.standbys)
            pause(*servers.standbys)
            await put(storage, b"after")
            await side.sleep(0.5)
            assert await read(storage, max_lag=timedelta(seconds=0.4)) == (b"after", servers.primary.port)
            assert reasons(caplog) == ["lagging"]
            assert (await read(storage, max_lag=timedelta(minutes=5)))[0] == b"before"
            resume(servers.standbys[1])
            servers.await_replay(servers.standbys[1])
            answer = await read(storage, max_lag=timedelta(seconds=0.4))
            assert answer == (b"after", servers.standbys[1].port)

    side.run(main())


@pytest.mark.skipif(sys.platform != "linux", reason="other platforms have no such clock")
def test_max_lag_is_kept_by_a_machine_that_was_suspended(
    servers: Replication, side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    awake = time.clock_gettime

    async def main() -> None:
        async with side.open(servers, replica_timeout=0.5) as storage:
            position = await put(storage, b"before")
            await read(storage, after=position, max_lag=timedelta(minutes=1))
            pause(*servers.standbys)
            await put(storage, b"meanwhile")
            monkeypatch.setattr(time, "clock_gettime", lambda clock: awake(clock) + 3600)
            answer = await read(storage, max_lag=timedelta(minutes=1))
            assert answer == (b"meanwhile", servers.primary.port)

    side.run(main())


def test_a_replica_of_a_primary_that_nobody_writes_to_does_not_lag(
    servers: Replication, side: Side, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with side.open(servers) as storage:
            servers.await_replay()
            for _ in range(3):
                await side.sleep(0.4)
                assert (await read(storage, max_lag=timedelta(seconds=0.3)))[1] in ports(*servers.standbys)
            assert reasons(caplog) == []

    side.run(main())


def test_a_write_is_refused_before_anything_is_sent(servers: Replication, side: Side) -> None:
    sent: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        sent.append(statement)

    async def main() -> None:
        async with side.open(servers) as storage:
            await read(storage)
            event.listen(Engine, "before_cursor_execute", note)
            try:
                for write in (
                    lambda uow: uow.state.put("k", b"v"),
                    lambda uow: uow.state.delete("k"),
                    lambda uow: uow.messages.claim("b", lease=timedelta(seconds=1)),
                    lambda uow: uow.session.execute(insert(StateEntry).values(key="k", value=b"")),
                ):
                    async with storage.begin(read_only=True, replica=True) as uow:
                        with pytest.raises(InvalidInputError, match="read-only"):
                            await write(uow)
                with pytest.raises(InvalidInputError, match="read-only"):
                    async with storage.begin(read_only=True, replica=True) as uow:
                        getattr(uow, "_wrapped", uow).session.add(StateEntry(key="k", value=b"v"))
            finally:
                event.remove(Engine, "before_cursor_execute", note)
            assert [each for each in sent if "mesh_state" in each] == []
            with pytest.raises(InvalidInputError, match="read-only"):  # what only the server understands
                async with storage.begin(read_only=True, replica=True) as uow:
                    await uow.session.execute(text("DELETE FROM mesh_state"))

    side.run(main())


def test_run_reads_from_replicas_too(servers: Replication, side: Side) -> None:
    async def main() -> None:
        async def work(uow: object) -> tuple[bytes, int]:
            return (await uow.state.get("k")).value, await port_of(uow)  # type: ignore[attr-defined]

        async with side.open(servers) as storage:
            position = await put(storage, b"run")
            value, port = await storage.run(work, read_only=True, replica=True, after=position)
            assert (value, port in ports(*servers.standbys)) == (b"run", True)

    side.run(main())


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"replica": True}, "replica"),
        ({"replica": "yes", "read_only": True}, "replica"),
        ({"after": "1/1/1", "read_only": True}, "after"),
        ({"max_lag": timedelta(seconds=1), "read_only": True}, "max_lag"),
        ({"replica": True, "read_only": True, "after": "somewhere"}, "after"),
        ({"replica": True, "read_only": True, "after": "1/01/1"}, "after"),
        ({"replica": True, "read_only": True, "after": 1}, "after"),
        ({"replica": True, "read_only": True, "max_lag": timedelta(0)}, "max_lag"),
        ({"replica": True, "read_only": True, "max_lag": 1.0}, "max_lag"),
        ({"replica": True, "read_only": True, "isolation": "serializable"}, "isolation"),
        ({"replica": True, "read_only": True, "position": True}, "position"),
        ({"position": 1}, "position"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(storage: MeshStorage, given: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidInputError) as error, storage.begin(**given):  # type: ignore[arg-type]
        pass
    assert error.value.field == field


def test_without_replicas_the_primary_answers(storage: MeshStorage, caplog: pytest.LogCaptureFixture) -> None:
    with storage.begin(position=True) as uow:
        uow.state.put("k", b"v")
    for asked in ({}, {"after": uow.position}, {"max_lag": timedelta(seconds=1)}):
        with storage.begin(read_only=True, replica=True, **asked) as reading:  # type: ignore[arg-type]
            assert reading.state.get("k").value == b"v"
    assert reasons(caplog) == []


def test_a_position_of_another_cluster_is_refused(servers: Replication, storage: MeshStorage, side: Side) -> None:
    async def main() -> None:
        async with side.open(servers) as own:
            with pytest.raises(InvalidInputError, match="another database cluster") as error:
                await read(own, after=storage.position())
            assert error.value.field == "after"

    side.run(main())


def test_a_cluster_that_has_taken_the_place_of_another_is_noticed(servers: Replication, side: Side) -> None:
    async def main() -> None:
        async with side.open(servers) as storage:
            position = await put(storage, b"in the new one")
            await storage.position()
            samples = getattr(storage, "_wrapped", storage)._replicas.samples
            known = samples.newest
            samples.add(known._replace(position=known.position._replace(system=1), at=known.at - 60))
            assert samples.newest.position.system == 1
            value, port = await read(storage, after=position)
            assert (value, port in ports(*servers.standbys)) == (b"in the new one", True)

    side.run(main())


def test_a_position_that_is_nowhere_is_lost(servers: Replication, side: Side) -> None:
    async def main() -> None:
        async with side.open(servers, **SOON) as storage:
            system, timeline, place = (await storage.position()).split("/")
            with pytest.raises(ConflictError, match="lost"):
                await read(storage, after=f"{system}/{timeline}/{int(place) + 10**9}")

    side.run(main())


def test_a_role_without_privileges_on_statistics_reads_as_well(servers: Replication, side: Side) -> None:
    role = f"reader_{side.blocking}".lower()
    execute(servers.primary, f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD.replace(chr(39), chr(39) * 2)}'")
    execute(servers.primary, f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    servers.await_replay()

    async def main() -> None:
        async with side.open(servers) as storage:
            position = await put(storage, b"for all")
        url = servers.url().replace("//postgres:", f"//{role}:")
        async with side.open(servers, url=SecretStr(url), replica_url=SecretStr(_hosts(servers))) as storage:
            for asked in ({"after": position}, {"max_lag": timedelta(seconds=5)}):
                value, port = await read(storage, **asked)
                assert (value, port in ports(*servers.standbys)) == (b"for all", True)
            assert [each.lag_bytes for each in (await storage.health()).replicas] == [0, 0]

    side.run(main())


def _hosts(servers: Replication) -> str:
    return "postgresql://" + ",".join(f"127.0.0.1:{standby.port}" for standby in servers.standbys)


def test_a_pool_that_is_exhausted_leaves_reads_to_the_primary(
    servers: Replication, side: Side, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with side.open(servers, replica_pool_size=1, **SOON) as storage:
            await put(storage, b"busy")
            servers.await_replay()
            reading = {"read_only": True, "replica": True}
            async with storage.begin(**reading) as one, storage.begin(**reading) as two:
                held = {await port_of(one), await port_of(two)}
                assert await read(storage) == (b"busy", servers.primary.port)
            assert held == ports(*servers.standbys)
            assert reasons(caplog) == ["busy"]

    side.run(main())


def test_a_replica_of_another_cluster_or_database_is_not_read(
    servers: Replication, mesh_storage_url: str, side: Side, caplog: pytest.LogCaptureFixture
) -> None:
    execute(servers.primary, "DROP DATABASE IF EXISTS other")
    execute(servers.primary, "CREATE DATABASE other TEMPLATE template0")
    servers.await_replay()

    async def main() -> None:
        elsewhere = servers.url(*servers.standbys).replace("/postgres", "/other")
        for url in (mesh_storage_url, elsewhere):
            async with side.open(servers, replica_url=SecretStr(url)) as storage:
                position = await put(storage, b"the right one")
                for _ in range(3):
                    assert await read(storage) == (b"the right one", servers.primary.port)
                assert (await read(storage, after=position))[1] == servers.primary.port
                assert {str(each.error is None) for each in (await storage.health()).replicas} == {"False"}
        assert set(reasons(caplog)) <= {"promoted", "foreign", "unreachable"}

    side.run(main())


def test_health_tells_the_lag_of_each_replica(servers: Replication, side: Side) -> None:
    async def main() -> None:
        async with side.open(servers) as storage:
            await put(storage, b"healthy")
            servers.await_replay()
            health = await storage.health()
            assert health.ok
            assert [each.address for each in health.replicas] == [
                f"127.0.0.1:{standby.port}/postgres" for standby in servers.standbys
            ]
            assert [(each.connected, each.lag_bytes, each.lag, each.error) for each in health.replicas] == [
                (True, 0, timedelta(0), None)
            ] * 2
            pause(servers.standbys[0])
            await put(storage, os.urandom(10_000))
            await side.sleep(0.1)
            servers.await_replay(servers.standbys[1])
            lagging, other = (await storage.health()).replicas
            assert lagging.lag_bytes is not None
            assert lagging.lag_bytes > 10_000
            assert lagging.lag is not None
            assert lagging.lag >= timedelta(seconds=0.1)
            assert other.lag_bytes == 0

    side.run(main())


def test_storages_without_replicas_say_so(storage: MeshStorage) -> None:
    assert storage.health().replicas == ()


def test_the_connections_to_replicas_are_closed_with_the_storage(servers: Replication, side: Side) -> None:
    name = f"closing {side.blocking}"
    sessions = f"SELECT count(*) FROM pg_stat_activity WHERE application_name = '{name}'"

    async def main() -> None:
        async with side.open(servers, application_name=name) as storage:
            for _ in range(20):
                await read(storage)
            assert [execute(each, sessions) for each in servers.standbys] == [[(1,)], [(1,)]]
            with pytest.raises(InvalidInputError):
                await read(storage, after="")
        for standby in servers.standbys:
            for _ in range(100):
                if execute(standby, sessions) == [(0,)]:
                    break
                await side.sleep(0.05)
            assert execute(standby, sessions) == [(0,)]

    side.run(main())


def test_a_bundled_server_has_no_replicas(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="replica_url"):
        MeshStorage.open(
            settings=Settings(url=SecretStr(f"embedded:{tmp_path / 'mesh'}"), replica_url=SecretStr("postgresql://db2"))
        )
