"""Units of work: a span and a duration each, with the outcome, the attempt and the calls."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psycopg
import pytest
from opentelemetry import trace
from opentelemetry.trace import SpanKind, StatusCode
from pydantic import SecretStr

from mesh_storage import MeshStorage, SerializationError, Settings, UnavailableError, UnitOfWork
from mesh_storage.postgres.driver import Driver
from tests.telemetry.recorder import Recorder

DURATION = "mesh_storage.unit_of_work.duration"


def outcomes(recorder: Recorder) -> dict[tuple[str, str | None], int]:
    return recorder.by(DURATION, "mesh_storage.outcome", "error.type")


def test_a_unit_of_work_is_a_span_around_those_of_its_calls(measured: MeshStorage, recorder: Recorder) -> None:
    outer = recorder.tracer_provider.get_tracer("test")
    with outer.start_as_current_span("request") as request, measured.begin() as uow:
        uow.state.put("k", b"v")
        with outer.start_as_current_span("own"):
            uow.state.get("k")
    put, get, own, unit, _ = recorder.spans()
    assert [span.name for span in (put, get, own, unit)] == [
        "state.put mesh_state", "state.get mesh_state", "own", "unit_of_work",
    ]  # fmt: skip
    assert unit.kind is SpanKind.INTERNAL
    assert put.context is not None
    assert own.context is not None
    assert unit.context is not None
    parents = [span.parent.span_id if span.parent else None for span in (put, get, own, unit)]
    inside = unit.context.span_id
    assert parents == [inside, own.context.span_id, inside, request.get_span_context().span_id]
    attributes = dict(unit.attributes or {})
    assert attributes.pop("db.client.connection.pool.name")
    assert attributes == {"mesh_storage.attempt": 1, "mesh_storage.outcome": "committed"}
    assert not trace.get_current_span().is_recording()


def test_the_outcome_is_what_became_of_it(
    measured: MeshStorage, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with measured.begin() as uow:
        uow.state.put("a", b"v")
    with measured.unit_of_work() as uow:
        uow.state.put("b", b"v")
    with measured.unit_of_work() as uow:
        uow.state.put("c", b"v")
        uow.commit()
    with pytest.raises(ZeroDivisionError), measured.begin() as uow:
        raise ZeroDivisionError
    with lost_commit(monkeypatch), pytest.raises(UnavailableError), measured.begin() as uow:
        uow.state.put("d", b"v")
    assert outcomes(recorder) == {
        ("committed", None): 2,
        ("rolled_back", None): 1,
        ("rolled_back", "ZeroDivisionError"): 1,
        ("unknown", "UnavailableError"): 1,
    }
    assert recorder.metrics()[DURATION].unit == "s"
    spans = recorder.spans("unit_of_work")
    assert [span.status.status_code for span in spans] == [StatusCode.UNSET] * 3 + [StatusCode.ERROR] * 2
    assert [(span.attributes or {})["mesh_storage.outcome"] for span in spans] == [
        "committed", "rolled_back", "committed", "rolled_back", "unknown",
    ]  # fmt: skip


@contextmanager
def lost_commit(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def lose(driver: Driver) -> None:
        driver.connection.pgconn.finish()
        raise psycopg.OperationalError("the connection is lost")

    with monkeypatch.context() as patch:
        patch.setattr(Driver, "commit", lose)
        yield


def test_an_interrupted_commit_has_an_unknown_outcome(
    measured: MeshStorage, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_driver: Driver) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Driver, "commit", interrupt)
        with pytest.raises(KeyboardInterrupt), measured.begin() as uow:
            uow.state.put("k", b"v")
    assert outcomes(recorder) == {("unknown", "KeyboardInterrupt"): 1}


def test_one_that_gets_no_connection_is_rolled_back(mesh_storage_url: str, recorder: Recorder) -> None:
    settings = Settings(url=SecretStr(mesh_storage_url), pool_size=1, pool_timeout=0.05)
    with MeshStorage.open(settings=settings, telemetry=recorder.telemetry()) as storage, storage.begin():
        with pytest.raises(UnavailableError), storage.begin():
            pass
        assert outcomes(recorder) == {("rolled_back", "UnavailableError"): 1}
        (span,) = recorder.spans("unit_of_work")
        assert trace.get_current_span() is not span


def test_each_attempt_of_run_is_one_that_names_the_function(measured: MeshStorage, recorder: Recorder) -> None:
    failures = [SerializationError(sqlstate="40001"), UnavailableError(), SerializationError()]

    def elect(uow: UnitOfWork) -> str:
        uow.state.put("leader", b"a")
        if failures:
            raise failures.pop()
        return "done"

    assert measured.run(elect) == "done"
    spans = recorder.spans("unit_of_work")
    assert {span.name for span in spans} == {f"unit_of_work {elect.__qualname__}"}
    assert [(span.attributes or {})["mesh_storage.attempt"] for span in spans] == [1, 2, 3, 4]
    assert (spans[2].attributes or {})["db.response.status_code"] == "40001"
    assert recorder.by("mesh_storage.unit_of_work.retries", "error.type") == {
        "SerializationError": 2, "UnavailableError": 1,
    }  # fmt: skip
    assert outcomes(recorder) == {
        ("committed", None): 1, ("rolled_back", "SerializationError"): 2, ("rolled_back", "UnavailableError"): 1,
    }  # fmt: skip


def test_a_unit_of_work_may_end_in_another_thread(
    measured: MeshStorage, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    """As the dependencies of some frameworks do."""
    scope = measured.begin()
    with ThreadPoolExecutor(1) as one:
        uow = one.submit(scope.__enter__).result()
        one.submit(uow.state.put, "k", b"v").result()
    with ThreadPoolExecutor(1) as another:
        another.submit(scope.__exit__, None, None, None).result()
    assert outcomes(recorder) == {("committed", None): 1}
    assert not trace.get_current_span().is_recording()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_one_that_is_not_sampled_records_no_spans_but_metrics(mesh_storage_url: str, recorder: Recorder) -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

    from mesh_storage import Telemetry

    telemetry = Telemetry(recorder.meter_provider, TracerProvider(sampler=ALWAYS_OFF))
    with MeshStorage.open(mesh_storage_url, telemetry=telemetry) as storage, storage.begin() as uow:
        uow.state.put("k", b"v")
    assert recorder.by("db.client.operation.duration", "db.operation.name") == {"state.put": 1}


def test_the_record_of_a_slow_one_names_its_calls(
    mesh_storage_url: str, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(url=SecretStr(mesh_storage_url), slow_unit_of_work=1e-9)
    with MeshStorage.open(settings=settings, telemetry=recorder.telemetry()) as storage, storage.begin() as uow:
        uow.state.put("a", b"v")
        uow.state.put("b", b"v")
        list(uow.messages.stream())
    (record,) = [each for each in caplog.records if getattr(each, "event", None) == "slow_unit_of_work"]
    assert vars(record)["calls"] == {"state.put": 2, "messages.stream": 1}
    assert vars(record)["repositories"] == ["state", "messages"]
    assert record.getMessage().endswith("used state.put (2 times), messages.stream")
    caplog.clear()
    with MeshStorage.open(settings=settings) as storage, storage.begin() as uow:
        uow.state.put("a", b"v")
    (record,) = [each for each in caplog.records if getattr(each, "event", None) == "slow_unit_of_work"]
    assert vars(record)["calls"] is None
    assert record.getMessage().endswith("used state")
