"""Calls of repositories: a span and a duration each, named by OpenTelemetry's conventions for databases."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics.export import Histogram
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy import Engine, event

from mesh_storage import (
    AlreadyExistsError,
    InvalidInputError,
    MeshStorage,
    Message,
    NotFoundError,
    UnavailableError,
    repositories,
)
from mesh_storage.postgres.server import Server
from mesh_storage.telemetry.observed import Observed
from mesh_storage.testing import MessageFactory, NodeFactory, RouteFactory
from tests.telemetry.recorder import Recorder

DURATION = "db.client.operation.duration"


def message(number: int) -> Message:
    return Message(id=f"m{number}", from_node="a", to_node="b", content=b"content")


def host_of(url: str) -> str:
    from mesh_storage.postgres.engine import parse_url

    return str(parse_url(url)["host"])


def test_a_call_is_a_span_and_a_duration_of_the_same_length(
    measured: MeshStorage, recorder: Recorder, mesh_storage_url: str
) -> None:
    with measured.begin() as uow:
        uow.messages.store(message(1))
    (span,) = recorder.spans("messages.store")
    expected = {
        "db.system.name": "postgresql",
        "db.namespace": mesh_storage_url.partition("?")[0].rpartition("/")[2],
        "db.collection.name": "mesh_messages",
        "db.operation.name": "messages.store",
        "server.address": host_of(mesh_storage_url),
    }
    assert span.name == "messages.store mesh_messages"
    assert span.kind is SpanKind.CLIENT
    assert span.status.status_code is StatusCode.UNSET
    assert dict(span.attributes or {}) == expected | {"db.query.summary": span.name}
    metric = recorder.metrics()[DURATION]
    assert metric.unit == "s"
    assert isinstance(metric.data, Histogram)
    (point,) = metric.data.data_points
    assert dict(point.attributes or {}) == expected
    assert point.explicit_bounds == (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)
    assert point.count == 1
    assert span.start_time is not None
    assert span.end_time is not None
    assert (span.end_time - span.start_time) / 1e9 == pytest.approx(point.sum, abs=2e-9)


@pytest.mark.parametrize(
    ("connect", "address", "port"),
    [
        ({"host": "db", "port": 5432}, "db", None),
        ({"host": "db", "port": "6432"}, "db", 6432),
        ({"host": "db"}, "db", None),
        ({"hostaddr": "10.0.0.1"}, "10.0.0.1", None),
        ({"host": "/run/postgresql", "port": ""}, "/run/postgresql", None),
        ({"host": "a,b"}, "a,b", None),
        ({"host": "a,b", "port": "6432"}, "a,b", 6432),
        ({"host": "a,b", "port": "6432,6432"}, "a,b", 6432),
        ({"host": "a,b", "port": "5432,6432"}, "a:5432,b:6432", None),
        ({"host": "a,b", "port": ",6432"}, "a:5432,b:6432", None),
        ({"host": "::1,b", "port": "1,2"}, "[::1]:1,b:2", None),
        ({}, None, None),
    ],
)
def test_the_server_is_named_as_it_is_configured(
    recorder: Recorder, connect: dict[str, Any], address: str | None, port: int | None
) -> None:
    observed = Observed(recorder.telemetry(), Server({**connect, "dbname": "mesh", "password": "secret"}))
    assert observed.attributes.get("server.address") == address
    assert observed.attributes.get("server.port") == port
    assert observed.attributes["db.namespace"] == "mesh"
    place = (
        f"{address or ''}{f':{port}' if port else ''}/mesh".lstrip("/") if not (address or "").startswith("/") else None
    )
    if place is not None:
        assert observed.pool_attributes == {"db.client.connection.pool.name": place}


def test_what_a_call_calls_itself_is_not_recorded_again(measured: MeshStorage, recorder: Recorder) -> None:
    with measured.begin() as uow:
        uow.state.put("k", b"v")
        uow.state.get("k")
        uow.consensus_log.append(1, 1, {})
    assert recorder.by(DURATION, "db.operation.name") == {"state.put": 1, "state.get": 1, "consensus_log.append": 1}
    assert len(recorder.spans()) == 4


def test_every_method_of_every_repository_is_measured(measured: MeshStorage) -> None:
    classes = {name: vars(repositories)[name] for name in repositories.__all__ if name.endswith("Repository")}
    assert len(classes) == 10
    with measured.begin() as uow:
        found = {
            type(repository).__name__: type(repository)
            for repository in (
                *(uow.meshes, uow.nodes, uow.routes, uow.messages, uow.state, uow.node_states),
                *(uow.consensus_log, uow.routing_table, uow.runtime_config, uow.changes),
            )
        }
    assert found.keys() == classes.keys()
    for name, class_ in classes.items():
        assert issubclass(found[name], class_)
        public = {member for member in dir(class_) if not member.startswith("_")}
        assert public
        assert public <= vars(found[name]).keys()


@pytest.mark.parametrize(("number", "size"), [(0, 0), (1, None), (3, 3)])
def test_a_batch_has_its_size(measured: MeshStorage, recorder: Recorder, number: int, size: int | None) -> None:
    messages = [message(each) for each in range(number)]
    with measured.begin() as uow:
        uow.messages.store_many(messages)
        uow.messages.store_many(messages=messages)
        uow.state.put_many({each.id: b"v" for each in messages}, ttl=None)
        uow.state.get_many([each.id for each in messages])
    sizes = [(span.attributes or {}).get("db.operation.batch.size") for span in recorder.spans()]
    # Many keys of one read are no batch, nor is a unit of work.
    assert sizes == [size, size, size, None, None]
    assert all("db.operation.batch.size" not in attributes for attributes, _ in recorder.points(DURATION))


def test_a_batch_that_nobody_can_count_before_has_no_size(measured: MeshStorage, recorder: Recorder) -> None:
    with measured.begin() as uow:
        assert uow.messages.store_many(message(each) for each in range(3)) == 3
    (span,) = recorder.spans("messages.store_many")
    assert "db.operation.batch.size" not in (span.attributes or {})


def test_a_call_on_two_tables_names_none_but_in_its_summary(measured: MeshStorage, recorder: Recorder) -> None:
    with measured.begin() as uow:
        assert list(uow.nodes.with_state()) == []
        assert uow.changes.since(None, ["state"]).changes == []
    (span,) = recorder.spans("nodes.with_state")
    assert span.name == "nodes.with_state nodes mesh_node_state"
    assert "db.collection.name" not in (span.attributes or {})
    (span,) = recorder.spans("changes")
    assert span.name == "changes.since"
    assert "db.collection.name" not in (span.attributes or {})


def test_a_call_that_fails_has_the_class_of_its_error(measured: MeshStorage, recorder: Recorder) -> None:
    with pytest.raises(AlreadyExistsError), measured.begin() as uow:
        with pytest.raises(NotFoundError):
            uow.messages.get("nobody")
        with pytest.raises(InvalidInputError):
            uow.state.put("", b"")
        NodeFactory.create(uow=uow, name="taken")
        NodeFactory.create(uow=uow, name="taken")
    assert recorder.by(DURATION, "db.operation.name", "error.type", "db.response.status_code") == {
        ("messages.get", "NotFoundError", None): 1,
        ("state.put", "InvalidInputError", None): 1,
        ("nodes.add", None, None): 1,
        ("nodes.add", "AlreadyExistsError", "23505"): 1,
    }
    spans = recorder.spans()
    assert [(span.attributes or {}).get("error.type") for span in spans] == [
        "NotFoundError", "InvalidInputError", None, "AlreadyExistsError", "AlreadyExistsError",
    ]  # fmt: skip
    for span in spans:
        failed = "error.type" in (span.attributes or {})
        assert span.status.status_code is (StatusCode.ERROR if failed else StatusCode.UNSET)
        assert span.status.description is None
        assert span.events == ()


# Streams


def test_a_stream_is_one_call_from_its_first_row_to_its_last(measured: MeshStorage, recorder: Recorder) -> None:
    with measured.begin() as uow:
        uow.messages.store_many(message(each) for each in range(5))
        rows = uow.messages.stream(batch_size=2)
        assert recorder.spans("messages.stream") == []
        next(rows)
        assert recorder.spans("messages.stream") == []
        assert len(list(rows)) == 4
        (span,) = recorder.spans("messages.stream")
    assert recorder.by(DURATION, "db.operation.name", "error.type")["messages.stream", None] == 1
    unit = recorder.spans("unit_of_work")[0]
    assert span.parent is not None
    assert unit.context is not None
    assert span.parent.span_id == unit.context.span_id


def test_a_stream_that_is_left_is_no_failure(measured: MeshStorage, recorder: Recorder) -> None:
    with measured.begin() as uow:
        uow.messages.store_many(message(each) for each in range(5))
        rows = uow.messages.stream(batch_size=2)
        next(rows)
        rows.close()
        uow.messages.stream()  # never begun, so it reads nothing
    assert recorder.by(DURATION, "db.operation.name", "error.type")["messages.stream", None] == 1
    (span,) = recorder.spans("messages.stream")
    assert span.status.status_code is StatusCode.UNSET


def test_a_stream_that_fails_says_so(measured: MeshStorage, recorder: Recorder) -> None:
    from sqlalchemy import text

    with pytest.raises(UnavailableError), measured.begin() as uow:
        uow.messages.store_many(message(each) for each in range(5))
        rows = uow.messages.stream(batch_size=2)
        next(rows)
        pid = uow.session.execute(text("SELECT pg_backend_pid()")).scalar_one()
        with measured.begin() as other:
            assert other.session.execute(text(f"SELECT pg_terminate_backend({pid}, 10000)")).scalar_one()
        list(rows)
    assert recorder.by(DURATION, "db.operation.name", "error.type")["messages.stream", "UnavailableError"] == 1
    (span,) = recorder.spans("messages.stream")
    assert span.status.status_code is StatusCode.ERROR


def test_what_the_consumer_of_a_stream_does_is_not_inside_of_it(measured: MeshStorage, recorder: Recorder) -> None:
    with measured.begin() as uow:
        uow.messages.store(message(1))
        outside = trace.get_current_span()
        for _ in uow.messages.stream():
            assert trace.get_current_span() is outside
    assert len(recorder.spans("messages.stream")) == 1


# Until they are collected


def test_nothing_is_lost_however_many_calls_there_are_between_collections(
    measured: MeshStorage, recorder: Recorder
) -> None:
    calls, threads = 700, 3

    def work(_: int) -> None:
        with measured.begin(read_only=True) as uow:
            for _ in range(calls):
                uow.state.find("k")

    observed = measured._observed
    assert observed is not None
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    assert 0 < len(observed.instruments.deferred._waiting) <= 1000 + threads
    assert recorder.by(DURATION, "db.operation.name") == {"state.find": calls * threads}
    assert recorder.by("mesh_storage.unit_of_work.duration") == {(): threads}
    assert len(observed.instruments.deferred._waiting) == 0


def test_an_exemplar_leads_to_the_span(measured: MeshStorage, recorder: Recorder) -> None:
    with measured.begin() as uow:
        uow.state.put("k", b"v")
    metrics = recorder.metrics()
    for name, start in ((DURATION, "state.put"), ("mesh_storage.unit_of_work.duration", "unit_of_work")):
        (point,) = metrics[name].data.data_points
        (span,) = recorder.spans(start)
        assert span.context is not None
        assert [exemplar.span_id for exemplar in point.exemplars] == [span.context.span_id]


# What others see


def test_spans_of_statements_are_inside_of_their_call(measured: MeshStorage, recorder: Recorder) -> None:
    """As OpenTelemetry's instrumentation of SQLAlchemy makes them: begun and ended by these two events."""
    tracer = recorder.tracer_provider.get_tracer("statements")

    def before(_c: Any, _cursor: Any, statement: str, _p: Any, context: Any, _e: bool) -> None:
        context.span = tracer.start_span(f"statement {statement.split(maxsplit=1)[0]}", kind=SpanKind.CLIENT)

    def after(_c: Any, _cursor: Any, _statement: str, _p: Any, context: Any, _e: bool) -> None:
        context.span.end()

    event.listen(Engine, "before_cursor_execute", before)
    event.listen(Engine, "after_cursor_execute", after)
    try:
        with measured.begin() as uow:
            uow.messages.store(message(1))
            RouteFactory.create(uow=uow)
    finally:
        event.remove(Engine, "before_cursor_execute", before)
        event.remove(Engine, "after_cursor_execute", after)
    calls = {span.context.span_id: span.name for span in recorder.spans() if span.context is not None}
    parents = [calls[span.parent.span_id] for span in recorder.spans("statement") if span.parent is not None]
    assert parents == [
        "messages.store mesh_messages",
        *("nodes.find nodes", "nodes.add nodes") * 2,
        "routes.add routes",
    ]


def test_no_stored_value_key_or_password_gets_out(mesh_storage_url: str, recorder: Recorder) -> None:
    canary = "canary-7f3a"
    url = mesh_storage_url.replace("://postgres@", f"://postgres:{canary}-password@", 1)
    assert canary in url
    with MeshStorage.open(url, telemetry=recorder.telemetry(statistics=True)) as storage:
        with pytest.raises(AlreadyExistsError), storage.begin() as uow:
            uow.state.put(f"{canary}-key", canary.encode())
            uow.state.get_many([f"{canary}-key"])
            uow.runtime_config.put("c", {canary: canary})
            uow.node_states.put(f"{canary}-node", {"k": canary})
            uow.consensus_log.append(1, 1, {canary: canary})
            uow.routing_table.replace_all({f"{canary}-to": {"via": canary}})
            mesh = uow.meshes.add(repositories_mesh(canary))
            uow.meshes.set_join_key(mesh.id, canary)
            assert uow.meshes.admits(mesh.id, canary)
            for missing in (uow.messages.get, uow.state.get, uow.nodes.get_by_name):
                with pytest.raises(NotFoundError):
                    missing(f"{canary}-missing")
            MessageFactory.create(uow=uow, id=f"{canary}-id", content=canary.encode())
            list(uow.messages.stream(to_node=f"{canary}-node"))
            uow.messages.store(Message(id=f"{canary}-id", from_node="a", to_node="b", content=b"another"))
        with pytest.raises(ZeroDivisionError), storage.begin() as uow:
            raise ZeroDivisionError(canary)
        seen = [str(metric.to_json()) for metric in recorder.metrics().values()]
    seen += [span.to_json() for span in recorder.spans()]
    assert len(seen) > 20
    assert [text for text in seen if canary in text] == []


def repositories_mesh(canary: str) -> Any:
    from mesh_storage import Mesh

    return Mesh(name=f"{canary}-name", description=canary, allow_join=True)
