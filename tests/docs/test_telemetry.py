"""The metrics of the documents are those that are emitted: in the table, and in the queries of the dashboard."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import Histogram, InMemoryMetricReader, Metric, Sum
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from mesh_storage import AlreadyExistsError, MeshStorage, SerializationError, Settings, Telemetry, UnavailableError
from mesh_storage.telemetry.statistics import Gauge, Statistics
from mesh_storage.testing import Databases, NodeFactory
from tests.processes import eventually

DOCS = Path(__file__).parents[2] / "docs"
DASHBOARD: dict[str, Any] = json.loads((DOCS / "telemetry-dashboard.json").read_text())
ROW = re.compile(r"^\| `([a-z_.]+)` \| (\w+), (\S+) \| ([^|]*) \| ([^|]+) \|$", re.MULTILINE)
NAME = re.compile(r"\b(?:db_client|mesh_storage)_\w+")
MATCHER = re.compile(r"(\w+) *(?:=~|!=|=) *\"")
GROUPED = re.compile(r"\b(?:by|label_values) ?\(([^)]*)\)")
COLUMN = re.compile(r"{{(\w+)}}")


class Emitted:
    """All metrics of a storage to which everything has happened, as they are and as Prometheus gets them."""

    def __init__(self, metrics: dict[str, Metric], registry: CollectorRegistry) -> None:
        self.metrics = metrics
        self.labels: dict[str, set[str]] = {}
        for family in registry.collect():
            for sample in family.samples:
                if family.name != "target":
                    self.labels.setdefault(sample.name, set()).update(sample.labels)

    def attributes(self, name: str) -> set[str]:
        return {key for point in self.metrics[name].data.data_points for key in point.attributes or {}}


@pytest.fixture(scope="module")
def emitted(mesh_storage_databases: Databases) -> Iterator[Emitted]:
    registry, memory = CollectorRegistry(), InMemoryMetricReader()
    telemetry = Telemetry(MeterProvider([PrometheusMetricReader(registry=registry), memory]))
    failures: list[Exception] = [SerializationError(sqlstate="40001")]

    def work(uow: Any) -> None:
        uow.state.put("k", b"v")
        if failures:
            raise failures.pop()

    def take(_statistics: Statistics, gauge: Gauge) -> list[tuple[str | None, float]]:
        return [("label" if gauge.attribute else None, 1.0)]

    with pytest.MonkeyPatch.context() as patch, mesh_storage_databases.fresh() as url:
        patch.setattr(Statistics, "take", take)  # not every server has standbys, or was updated
        settings = Settings(url=SecretStr(url), pool_size=1, pool_timeout=0.05)
        with MeshStorage.open(settings=settings, telemetry=telemetry) as storage:
            storage.run(work)
            with storage.begin(), pytest.raises(UnavailableError), storage.begin():
                pass
            with pytest.raises(AlreadyExistsError), storage.begin() as uow:
                NodeFactory.create_batch(2, uow=uow, name="taken")
            assert storage._observed is not None
            storage._observed.count_cache_lookup("state.get", hit=True)
            storage._observed.count_delivery_failure(ValueError(), "dead")
            storage._replicas.fall_back("behind")
            with storage.lease("leader", b"a", ttl=timedelta(seconds=0.3)) as lease:
                with psycopg.connect(url, autocommit=True) as raw:
                    raw.execute("DELETE FROM mesh_state")
                assert eventually(lambda: not lease.held)
                batches = storage.watch("state")
                next(batches)
                collected = memory.get_metrics_data()
                assert collected is not None
                metrics = {
                    metric.name: metric
                    for resource in collected.resource_metrics
                    for scope in resource.scope_metrics
                    for metric in scope.metrics
                    if scope.scope.name == "mesh_storage"
                }
                yield Emitted(metrics, registry)


def kind(metric: Metric) -> str:
    if isinstance(metric.data, Sum):
        return "counter" if metric.data.is_monotonic else "updowncounter"
    return "histogram" if isinstance(metric.data, Histogram) else "gauge"


def test_the_table_has_every_metric_with_its_attributes(emitted: Emitted) -> None:
    rows = {row[0]: row[1:4] for row in ROW.findall((DOCS / "telemetry.md").read_text())}
    assert rows.keys() == emitted.metrics.keys()
    for name, metric in emitted.metrics.items():
        documented_kind, unit, attributes = rows[name]
        assert (documented_kind, unit) == (kind(metric), metric.unit), name
        documented = set(re.findall(r"`([\w.]+)`", attributes)) - {"server.port"}  # there is none with the default port
        assert documented == emitted.attributes(name), name


def queries() -> list[str]:
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
    return panels + [each["definition"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query"]


def labels(query: str) -> set[str]:
    """Return the labels that a query names; the first argument of `label_values` is a metric."""
    listed = [label.strip() for group in GROUPED.findall(query) for label in group.split(",")]
    return {*listed[query.startswith("label_values") :], *MATCHER.findall(query)}


def test_the_dashboard_queries_what_is_emitted_and_all_of_it(emitted: Emitted) -> None:
    asked: set[str] = set()
    for query in queries():
        samples = {name for name in NAME.findall(query) if name in emitted.labels}
        assert samples, query
        wanted = labels(query)
        for sample in samples:
            assert wanted <= emitted.labels[sample] | {"le"}, query
        # What looks like a name of ours is a metric or one of its labels.
        assert set(NAME.findall(query)) <= samples | wanted, query
        asked |= samples
    families = {re.sub(r"_(bucket|count|sum|created|total)$", "", name) for name in emitted.labels}
    assert {re.sub(r"_(bucket|count|sum|total)$", "", name) for name in asked} == families


def test_a_legend_names_what_its_query_groups_by() -> None:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            assert set(COLUMN.findall(target["legendFormat"])) <= labels(target["expr"]), target


def test_a_wrong_name_would_be_seen(emitted: Emitted) -> None:
    assert "db_client_operation_duration_seconds_count" in emitted.labels
    assert "db_client_operation_duration_count" not in emitted.labels
    assert labels('sum by (a, b) (rate(x{c=~"d", e!="f"}[1m]))') == {"a", "b", "c", "e"}


def test_panels_have_places_and_queries_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 20
    covered: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & covered, panel["title"]
        assert place["x"] + place["w"] <= 24
        covered |= cells
