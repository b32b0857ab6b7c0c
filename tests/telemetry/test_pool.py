"""The pool: its connections and waits, named by OpenTelemetry's conventions for connection pools."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from opentelemetry.sdk.metrics.export import Histogram, Sum
from pydantic import SecretStr

from mesh_storage import MeshStorage, Settings, StorageTimeoutError, UnavailableError
from tests.processes import eventually
from tests.telemetry.recorder import Recorder

POOL = "db.client.connection."
NAME = "db.client.connection.pool.name"


def opened(url: str, recorder: Recorder, **settings: Any) -> MeshStorage:
    return MeshStorage.open(settings=Settings(url=SecretStr(url), **settings), telemetry=recorder.telemetry())


def test_names_kinds_and_units_are_those_of_the_conventions(mesh_storage_url: str, recorder: Recorder) -> None:
    with opened(mesh_storage_url, recorder, pool_size=1, pool_timeout=0.02) as storage:
        with storage.begin(), pytest.raises(UnavailableError), storage.begin():
            pass
        found = {name: metric for name, metric in recorder.metrics().items() if name.startswith(POOL)}
    sums = {
        name.removeprefix(POOL): (metric.unit, metric.data.is_monotonic)
        for name, metric in found.items()
        if isinstance(metric.data, Sum)
    }
    assert sums == {
        "count": ("{connection}", False),
        "max": ("{connection}", False),
        "pending_requests": ("{request}", False),
        "timeouts": ("{timeout}", True),
    }
    histograms = {
        name.removeprefix(POOL): metric.unit for name, metric in found.items() if isinstance(metric.data, Histogram)
    }
    assert histograms == {"create_time": "s", "wait_time": "s", "use_time": "s"}
    for metric in found.values():
        for point in metric.data.data_points:
            extra = {"db.client.connection.state"} if metric.name == f"{POOL}count" else set()
            assert set(point.attributes or {}) == {NAME} | extra


def test_connections_are_counted_by_state(mesh_storage_url: str, recorder: Recorder) -> None:
    def counts() -> dict[str, int]:
        return recorder.by(f"{POOL}count", f"{POOL}state")

    with opened(mesh_storage_url, recorder, pool_size=3) as storage:
        assert counts() == {"idle": 0, "used": 0}
        with storage.begin():
            assert counts() == {"idle": 0, "used": 1}
            with storage.begin():
                assert counts() == {"idle": 0, "used": 2}
            assert counts() == {"idle": 1, "used": 1}
        assert counts() == {"idle": 2, "used": 0}
        assert recorder.by(f"{POOL}max", NAME).popitem()[1] == 3


def test_who_waits_is_counted_while_it_waits(mesh_storage_url: str, recorder: Recorder) -> None:
    def pending() -> int:
        ((_, number),) = recorder.points(f"{POOL}pending_requests")
        return int(number)

    def wait(storage: MeshStorage) -> None:
        with storage.begin():
            pass

    with opened(mesh_storage_url, recorder, pool_size=1) as storage:
        with storage.begin():
            assert pending() == 0
            threads = [threading.Thread(target=wait, args=[storage]) for _ in range(2)]
            for thread in threads:
                thread.start()
            assert eventually(lambda: pending() == 2)
        for thread in threads:
            thread.join()
        assert pending() == 0


def test_a_wait_in_vain_is_a_timeout_whoever_limits_it(mesh_storage_url: str, recorder: Recorder) -> None:
    with opened(mesh_storage_url, recorder, pool_size=1, pool_timeout=0.05) as storage:
        assert recorder.points(f"{POOL}timeouts") == []
        with storage.begin():
            with pytest.raises(UnavailableError), storage.begin():
                pass
            with pytest.raises(StorageTimeoutError), storage.begin(timeout=0.01):
                pass
        ((_, number),) = recorder.points(f"{POOL}timeouts")
        assert number == 2
        ((_, waits),) = recorder.points(f"{POOL}wait_time")
        assert waits == 1  # those that got one


def test_times_are_those_between_the_steps_of_a_connection(mesh_storage_url: str, recorder: Recorder) -> None:
    def sums() -> dict[str, tuple[int, float]]:
        metrics = recorder.metrics()
        made = {}
        for name in ("create_time", "wait_time", "use_time"):
            (point,) = metrics[f"{POOL}{name}"].data.data_points
            made[name] = (point.count, point.sum)  # type: ignore[union-attr]
        return made

    release = threading.Event()
    with opened(mesh_storage_url, recorder, pool_size=1) as storage:
        with storage.begin():
            pass
        first = sums()
        assert {name: count for name, (count, _) in first.items()} == {
            "create_time": 1, "wait_time": 1, "use_time": 1,
        }  # fmt: skip
        assert first["create_time"][1] <= first["wait_time"][1]  # it waited for a new connection

        def hold() -> None:
            with storage.begin():
                held.set()
                release.wait(20)

        held = threading.Event()
        holder = threading.Thread(target=hold)
        holder.start()
        assert held.wait(20)
        threading.Timer(0.3, release.set).start()
        with storage.begin():
            pass
        holder.join()
        second = sums()
    assert second["create_time"] == first["create_time"]
    assert second["wait_time"][0] == second["use_time"][0] == 3
    assert second["wait_time"][1] - first["wait_time"][1] > 0.2
    assert second["use_time"][1] - first["use_time"][1] > 0.2


def test_two_storages_of_one_provider_are_two_pools_until_they_are_closed(
    mesh_storage_url: str, recorder: Recorder
) -> None:
    from mesh_storage.testing import databases

    telemetry = recorder.telemetry()
    with databases() as made, made.fresh() as other:
        with MeshStorage.open(mesh_storage_url, telemetry=telemetry):
            with MeshStorage.open(other, telemetry=telemetry):
                assert len(recorder.by(f"{POOL}max", NAME)) == 2
            assert len(recorder.by(f"{POOL}max", NAME)) == 1
        assert recorder.points(f"{POOL}max") == []
