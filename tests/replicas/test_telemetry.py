"""What is measured of replicas: their pools by their own names, and what the primary answers in their place."""

from __future__ import annotations

from tests.replicas.conftest import Side, pause, put, read
from tests.servers import Replication
from tests.telemetry.recorder import Recorder

POOL = "db.client.connection.pool.name"


def test_each_replica_has_a_pool_with_a_name_and_a_fallback_has_a_reason(servers: Replication, side: Side) -> None:
    recorder = Recorder()

    async def main() -> None:
        given = {"replica_timeout": 0.3, "replica_pool_size": 3, "telemetry": recorder.telemetry()}
        async with side.open(servers, **given) as storage:
            for _ in range(3):
                await put(storage, b"measured")
            servers.await_replay()
            for _ in range(20):
                await read(storage)
            names = [f"127.0.0.1:{each.port}/postgres" for each in (servers.primary, *servers.standbys)]
            assert recorder.by("db.client.connection.max", POOL) == dict(zip(names, [10, 3, 3], strict=True))
            used = recorder.by("db.client.connection.use_time", POOL)
            assert used[names[1]] + used[names[2]] == 20
            assert recorder.by("mesh_storage.replica.fallbacks", POOL) == {}
            pause(*servers.standbys)
            await read(storage, after=await put(storage, b"elsewhere"))
            assert recorder.by("mesh_storage.replica.fallbacks", POOL, "mesh_storage.replica.reason") == {
                (names[0], "behind"): 1
            }
        assert recorder.by("db.client.connection.max", POOL) == {}

    side.run(main())
