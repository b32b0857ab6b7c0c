"""Leases that are held and lost, how far watchers lag, and what a cache answers."""

from __future__ import annotations

import threading
from datetime import timedelta

import psycopg
import pytest

from mesh_storage import Delivery, MeshStorage, SerializationError, UnitOfWork
from mesh_storage.models.base import new_id
from mesh_storage.testing import MessageFactory
from tests.processes import eventually
from tests.telemetry.recorder import Recorder

LONG = timedelta(minutes=1)


def test_a_lease_is_counted_by_name_while_it_is_held(measured: MeshStorage, recorder: Recorder) -> None:
    def held() -> dict[str, int]:
        return recorder.by("mesh_storage.lease.held", "mesh_storage.lease.name")

    assert held() == {}
    with measured.lease("leader", b"a", ttl=LONG) as leader:
        assert held() == {"leader": 1}
        with measured.lease("other", b"a", ttl=LONG) as other:
            assert held() == {"leader": 1, "other": 1}
        assert held() == {"leader": 1, "other": 0}
    assert held() == {"leader": 0, "other": 0}
    del leader, other
    assert held() == {}
    assert recorder.points("mesh_storage.lease.lost") == []


def test_a_lost_lease_is_counted_by_the_reason(
    measured: MeshStorage, recorder: Recorder, mesh_storage_url: str
) -> None:
    with measured.lease("leader", b"a", ttl=timedelta(seconds=0.3)) as lease:
        with psycopg.connect(mesh_storage_url, autocommit=True) as raw:
            raw.execute("DELETE FROM mesh_state")
        assert eventually(lambda: not lease.held)
        assert eventually(lambda: recorder.points("mesh_storage.lease.lost") != [])
        assert recorder.by("mesh_storage.lease.held", "mesh_storage.lease.name") == {"leader": 0}
    ((attributes, number),) = recorder.points("mesh_storage.lease.lost")
    assert number == 1
    assert attributes["mesh_storage.lease.name"] == "leader"
    assert attributes["mesh_storage.lease.reason"] == "taken"


def test_a_watcher_lags_for_as_long_as_it_takes_no_batch(measured: MeshStorage, recorder: Recorder) -> None:
    def lags() -> dict[str, float]:
        return recorder.by("mesh_storage.watch.lag", "mesh_storage.watch.aggregates")

    batches = measured.watch("state", "runtime_config", "state", poll=0.01)
    assert lags() == {}  # not begun
    next(batches)
    first = lags()["runtime_config,state"]
    with measured.begin() as uow:
        uow.state.put("a", b"v")
    threading.Event().wait(0.3)
    assert lags()["runtime_config,state"] > first + 0.3
    next(batches)
    with measured.begin() as uow:
        uow.state.put("b", b"v")
    next(batches)
    late = lags()["runtime_config,state"]
    assert late < first + 0.3
    batches.close()
    del batches
    assert lags() == {}


def test_a_watcher_of_a_storage_that_is_closed_is_gone(mesh_storage_url: str, recorder: Recorder) -> None:
    with MeshStorage.open(mesh_storage_url, telemetry=recorder.telemetry()) as storage:
        batches = storage.watch("nodes")
        next(batches)
        assert len(recorder.points("mesh_storage.watch.lag")) == 1
    assert recorder.points("mesh_storage.watch.lag") == []
    assert list(batches) == []


def test_hits_and_misses_of_a_cache_are_counted(measured: MeshStorage, recorder: Recorder, redis_url: str) -> None:
    with measured.begin() as uow:
        uow.state.put("a", b"v")
    with measured.cached(redis_url) as cached:
        for _ in range(3):
            cached.state.get("a")
        assert cached.meshes.find(new_id("mesh")) is None
    assert recorder.by("mesh_storage.cache.lookups", "db.operation.name", "mesh_storage.cache.result") == {
        ("state.find", "miss"): 1,
        ("state.find", "hit"): 2,
        ("meshes.find", "miss"): 1,
    }


def test_failed_deliveries_are_counted_by_what_becomes_of_them(measured: MeshStorage, recorder: Recorder) -> None:
    with measured.begin() as uow:
        uow.messages.send_many([MessageFactory.build(id=name, to_node="a") for name in ("good", "bad")])
    stop, failed = threading.Event(), 0

    def handle(_uow: UnitOfWork, delivery: Delivery) -> None:
        nonlocal failed
        if delivery.message.id == "bad":
            failed += 1
            if failed == 2:
                stop.set()
            raise SerializationError(sqlstate="40001") if failed == 1 else ValueError("it is bad")

    measured.consume("a", handle, poll=0.01, max_attempts=2, stop=stop)
    attributes = ("error.type", "mesh_storage.delivery.outcome")
    assert recorder.by("mesh_storage.delivery.failures", *attributes) == {
        ("SerializationError", "retried"): 1,
        ("ValueError", "dead"): 1,
    }
    assert recorder.by("db.client.operation.duration", "db.operation.name")["messages.ack"] == 1


@pytest.mark.parametrize("closed", [True, False])
def test_a_lost_lease_of_a_closed_storage(mesh_storage_url: str, recorder: Recorder, closed: bool) -> None:
    with MeshStorage.open(mesh_storage_url, telemetry=recorder.telemetry()) as storage:
        with storage.lease("leader", b"a", ttl=timedelta(seconds=0.3)):
            if closed:
                storage.close()
                assert eventually(lambda: recorder.points("mesh_storage.lease.lost") != [])
        lost = recorder.by("mesh_storage.lease.lost", "mesh_storage.lease.reason")
    assert lost == ({"closed": 1} if closed else {})
