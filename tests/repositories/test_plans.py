"""Shows that every statement goes by an index however full the tables are."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeAlias

import psycopg
import pytest
from sqlalchemy import text

from mesh_storage import Delivery, LogEntry, Mesh, MeshStorage, Message, Node, Route, UnitOfWork
from mesh_storage.testing import Databases

pytestmark = pytest.mark.one_server  # The plans of a distributed database are those of its shards.

Work: TypeAlias = Callable[[UnitOfWork], Any]
Executed: TypeAlias = list[tuple[bytes, Any]]
ROWS = 20_000

FILL = (
    """INSERT INTO mesh (mesh_id, mesh_name, allow_join)
       SELECT 'mesh_' || lpad(n::text, 26, '0'), 'mesh-' || n, true FROM generate_series(1, :rows) n""",
    """INSERT INTO nodes (node_id, node_name, ip_address, status, region_id)
       SELECT 'node_' || lpad(n::text, 26, '0'), 'node-' || n, '10.0.0.1',
              'STATUS_' || chr(65 + n % 26),
              'region_' || lpad((n % 40)::text, 26, '0')
       FROM generate_series(1, :rows) n""",
    """INSERT INTO routes (route_id, source_node_id, target_node_id, route_bidirectional)
       SELECT 'route_' || lpad(n::text, 26, '0'), 'node_' || lpad((n % 2000 + 1)::text, 26, '0'),
              'node_' || lpad((n % 3000 + 5000)::text, 26, '0'), n % 2 = 0
       FROM generate_series(1, :rows) n""",
    """INSERT INTO mesh_messages (id, from_node, to_node, content, timestamp, queued)
       SELECT 'msg-' || n, 'node-' || n % 100, 'node-' || n % 70, '\\x00', n, n % 5 > 0
       FROM generate_series(1, :rows) n""",
    # Each receiver has some in each state, and a key of which one is leased and others wait.
    """INSERT INTO mesh_deliveries (message_id, receiver, state, key, token, available_at)
       SELECT 'msg-' || n, 'node-' || n % 70, (ARRAY['queued', 'leased', 'waiting', 'dead'])[1 + n % 4],
              CASE WHEN n % 4 IN (1, 2) THEN 'key-' || n % 7000 END, n,
              clock_timestamp() + CASE n % 4 WHEN 1 THEN interval '1 day' ELSE interval '-1 day' END
       FROM generate_series(1, :rows) n WHERE n % 5 > 0""",
    "INSERT INTO mesh_delivery_lanes SELECT 'node-' || n % 70, 'key-' || n FROM generate_series(1, :rows) n",
    "INSERT INTO mesh_state (key, value) SELECT 'key-' || n, '\\x00' FROM generate_series(1, :rows) n",
    """INSERT INTO mesh_node_state (node_id, state)
       SELECT 'node_' || lpad(n::text, 26, '0'), '{"a": 1}' FROM generate_series(1, :rows) n""",
    "INSERT INTO mesh_consensus_log (term, index, entry) SELECT n / 100, n, '{}' FROM generate_series(1, :rows) n",
    "INSERT INTO mesh_routing_table (destination, route) SELECT 'to-' || n, '{}' FROM generate_series(1, :rows) n",
    "INSERT INTO mesh_runtime_config (key, value) SELECT 'key-' || n, '1' FROM generate_series(1, :rows) n",
    "ANALYZE",
)


@pytest.fixture(scope="module")
def url(mesh_storage_databases: Databases) -> Iterator[str]:
    """Yield the URL of a database whose tables are full."""
    with mesh_storage_databases.fresh() as made:
        with MeshStorage.open(made) as storage, storage.begin() as uow:
            for statement in FILL:
                uow.session.execute(text(statement), {"rows": ROWS} if ":rows" in statement else {})
        yield made


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> Executed:
    """Record what psycopg executes, statements and parameters."""
    execute = psycopg.Cursor.execute
    statements: Executed = []

    def recorded(cursor: Any, query: Any, params: Any = None, **options: Any) -> Any:
        statements.append((query, params))
        return execute(cursor, query, params, **options)

    monkeypatch.setattr(psycopg.Cursor, "execute", recorded)
    return statements


def id_of(kind: str, number: int) -> str:
    return f"{kind}_{number:026}"


def node(number: int) -> Node:
    return Node(id=id_of("node", number), name=f"renamed-{number}", ip_address="10.0.0.1")


def route(number: int) -> Route:
    return Route(id=id_of("route", number), source_node_id=id_of("node", 1), target_node_id=id_of("node", 2))


def message(number: int) -> Message:
    to, from_ = f"node-{number % 70}", f"node-{number % 100}"
    return Message(id=f"msg-{number}", from_node=from_, to_node=to, content=b"\0", timestamp=number)


def leases(*numbers: int) -> list[Delivery]:
    return [
        Delivery(message(number), f"node-{number % 70}", 1, token=number, leased_until=None, key=f"key-{number % 7000}")
        for number in numbers
    ]


def log(*numbers: int) -> list[LogEntry]:
    return [LogEntry(term=number // 100, index=number, entry={}) for number in numbers]


def cursor(*position: str | int) -> str:
    """Make a cursor into the middle of a listing."""
    return base64.urlsafe_b64encode(json.dumps(position).encode()).decode()


def some(stream: Iterator[Any]) -> None:
    """Read two batches of two."""
    assert len(list(itertools.islice(stream, 4))) == 4


def unkeyed(deliveries: list[Delivery]) -> list[Delivery]:
    return [replace(each, key=None) for each in deliveries]


LEASED = [n for n in range(7001, 9000, 4) if n % 5 > 0 and n % 70 == 41]
NODE, MESH, ROUTE = id_of("node", 7000), id_of("mesh", 7000), id_of("route", 7000)
FAR: dict[str, Any] = {"to_node": "node-20", "from_node": "node-30"}

DAY = timedelta(days=1)


def version(uow: UnitOfWork) -> int:
    found = uow.state.get("key-7000").version
    assert found is not None
    return found


BY_INDEX: dict[str, Work] = {
    "meshes.get": lambda uow: uow.meshes.get(MESH),
    "meshes.get_by_name": lambda uow: uow.meshes.get_by_name("mesh-7000"),
    "meshes.page": lambda uow: uow.meshes.page(),
    "meshes.page after": lambda uow: uow.meshes.page(after=cursor(MESH)),
    "meshes.add": lambda uow: uow.meshes.add(Mesh(name="new")),
    "meshes.update": lambda uow: uow.meshes.update(uow.meshes.get(MESH)),
    "meshes.set_join_key": lambda uow: uow.meshes.set_join_key(MESH, "secret"),
    "meshes.admits": lambda uow: uow.meshes.admits(MESH),
    "meshes.delete": lambda uow: uow.meshes.delete(MESH),
    "nodes.get": lambda uow: uow.nodes.get(NODE),
    "nodes.get_by_name": lambda uow: uow.nodes.get_by_name("node-7000"),
    "nodes.page": lambda uow: uow.nodes.page(),
    "nodes.page after": lambda uow: uow.nodes.page(after=cursor(NODE)),
    "nodes.page of a status": lambda uow: uow.nodes.page(status="STATUS_H"),
    "nodes.page of a status after": lambda uow: uow.nodes.page(status="STATUS_H", after=cursor(NODE)),
    "nodes.page of a region": lambda uow: uow.nodes.page(region_id=id_of("region", 7)),
    "nodes.page of both": lambda uow: uow.nodes.page(status="STATUS_H", region_id=id_of("region", 10)),
    "nodes.count of a status": lambda uow: uow.nodes.count(status="STATUS_H"),
    "nodes.count of a region": lambda uow: uow.nodes.count(region_id=id_of("region", 7)),
    "nodes.stream": lambda uow: some(uow.nodes.stream(batch_size=2)),
    "nodes.with_state": lambda uow: some(uow.nodes.with_state(batch_size=2)),
    "nodes.add": lambda uow: uow.nodes.add(Node(name="new", ip_address="10.0.0.1")),
    "nodes.update": lambda uow: uow.nodes.update(uow.nodes.get(NODE)),
    "nodes.delete": lambda uow: uow.nodes.delete(NODE),
    "routes.get": lambda uow: uow.routes.get(ROUTE),
    "routes.page": lambda uow: uow.routes.page(),
    "routes.page after": lambda uow: uow.routes.page(after=cursor(ROUTE)),
    "routes.between": lambda uow: uow.routes.between(id_of("node", 7), id_of("node", 5006)),
    "routes.for_node": lambda uow: uow.routes.for_node(id_of("node", 7)),
    "routes.add": lambda uow: uow.routes.add(route(ROWS + 1)),
    "routes.update": lambda uow: uow.routes.update(uow.routes.get(ROUTE)),
    "routes.delete": lambda uow: uow.routes.delete(ROUTE),
    "messages.get": lambda uow: uow.messages.get("msg-7000"),
    "messages.store": lambda uow: uow.messages.store(message(ROWS + 1)),
    "messages.store again": lambda uow: uow.messages.store(message(7000)),
    "messages.store_many": lambda uow: uow.messages.store_many(map(message, range(ROWS + 1, ROWS + 1000))),
    "messages.store_many again": lambda uow: uow.messages.store_many(map(message, range(7000, 7100))),
    "messages.page": lambda uow: uow.messages.page(),
    "messages.page after": lambda uow: uow.messages.page(after=cursor(7000, "msg-7000")),
    "messages.page since": lambda uow: uow.messages.page(since=7000),
    "messages.page between": lambda uow: uow.messages.page(since=7000, until=7100),
    "messages.page to": lambda uow: uow.messages.page(to_node="node-20", limit=10),
    "messages.page to, after": lambda uow: uow.messages.page(to_node="node-20", after=cursor(7000, "msg-7000")),
    "messages.page from": lambda uow: uow.messages.page(from_node="node-30", limit=10),
    "messages.page from and to": lambda uow: uow.messages.page(**FAR),
    "messages.page from and to, since": lambda uow: uow.messages.page(**FAR, since=7000),
    "messages.count to": lambda uow: uow.messages.count(to_node="node-20"),
    "messages.count from": lambda uow: uow.messages.count(from_node="node-30"),
    "messages.count from and to": lambda uow: uow.messages.count(**FAR),
    "messages.count between": lambda uow: uow.messages.count(since=7000, until=7100),
    "messages.stream to": lambda uow: some(uow.messages.stream(to_node="node-20", batch_size=2)),
    "messages.delete": lambda uow: uow.messages.delete("msg-7000"),
    "messages.delete of a key": lambda uow: uow.messages.delete("msg-7001"),
    "messages.delete_many": lambda uow: uow.messages.delete_many([f"msg-{n}" for n in range(7000, 7100)]),
    "messages.purge": lambda uow: uow.messages.purge(ROWS // 2),
    "messages.send": lambda uow: uow.messages.send(message(ROWS + 1)),
    "messages.send again": lambda uow: uow.messages.send(message(7000)),
    "messages.send of a key": lambda uow: uow.messages.send(message(ROWS + 1), key="k", receivers=["a", "b"]),
    "messages.send_many": lambda uow: uow.messages.send_many(map(message, range(ROWS + 1, ROWS + 1000))),
    "messages.send_many again": lambda uow: uow.messages.send_many(map(message, range(7000, 7100, 5))),
    "messages.enqueue": lambda uow: uow.messages.enqueue(since=7000, limit=100),
    "messages.claim": lambda uow: uow.messages.claim("node-20"),
    "messages.claim of many": lambda uow: uow.messages.claim("node-20", limit=20),
    "messages.ack": lambda uow: uow.messages.ack(unkeyed(leases(*LEASED))),
    "messages.ack of a key": lambda uow: uow.messages.ack(leases(*LEASED)),
    "messages.nack": lambda uow: uow.messages.nack(leases(*LEASED)),
    "messages.extend": lambda uow: uow.messages.extend(leases(*LEASED), DAY),
    "messages.bury": lambda uow: uow.messages.bury(leases(*LEASED), "reason"),
    "messages.dead": lambda uow: uow.messages.dead(),
    "messages.dead after": lambda uow: uow.messages.dead(after=cursor("node-20", 7)),
    "messages.dead of one": lambda uow: uow.messages.dead("node-23", limit=10),
    "messages.dead of one, after": lambda uow: uow.messages.dead("node-23", after=cursor("node-23", 7), limit=10),
    "messages.redrive": lambda uow: uow.messages.redrive("node-23"),
    "messages.redrive of some": lambda uow: uow.messages.redrive("node-23", [f"msg-{n}" for n in range(100)]),
    "messages.backlog": lambda uow: uow.messages.backlog("node-20"),
    "state.get": lambda uow: uow.state.get("key-7000"),
    "state.put": lambda uow: uow.state.put("new", b""),
    "state.put again": lambda uow: uow.state.put("key-7000", b""),
    "state.put if new": lambda uow: uow.state.put("new", b"", if_version=0),
    "state.put if": lambda uow: uow.state.put("key-7000", b"", if_version=version(uow)),
    "state.put_many": lambda uow: uow.state.put_many({f"key-{number}": b"" for number in range(7000, 7100)}, ttl=DAY),
    "state.get_many": lambda uow: uow.state.get_many(f"key-{number}" for number in range(7000, 7010)),
    "state.delete if": lambda uow: uow.state.delete("key-7000", if_version=version(uow)),
    "state.delete_prefix": lambda uow: uow.state.delete_prefix("key-70"),
    "state.touch": lambda uow: uow.state.touch("key-7000", if_version=version(uow), ttl=DAY),
    "state.check": lambda uow: uow.state.check("key-7000", version=version(uow)),
    "state.page": lambda uow: uow.state.page(),
    "state.page after": lambda uow: uow.state.page(after=cursor("key-7000")),
    "state.page of a prefix": lambda uow: uow.state.page("key-70"),
    "state.count of a prefix": lambda uow: uow.state.count("key-70"),
    "state.stream of a prefix": lambda uow: some(uow.state.stream("key-7", batch_size=2)),
    "state.delete": lambda uow: uow.state.delete("key-7000"),
    "node_states.get": lambda uow: uow.node_states.get(NODE),
    "node_states.put": lambda uow: uow.node_states.put(NODE, {}),
    "node_states.put_many": lambda uow: uow.node_states.put_many({id_of("node", n): {} for n in range(1000)}),
    "node_states.merge": lambda uow: uow.node_states.merge(NODE, {"b": 1}),
    "node_states.page": lambda uow: uow.node_states.page(),
    "node_states.page after": lambda uow: uow.node_states.page(after=cursor(NODE)),
    "node_states.delete": lambda uow: uow.node_states.delete(NODE),
    "consensus_log.append": lambda uow: uow.consensus_log.append(ROWS, ROWS + 1, {}),
    "consensus_log.append again": lambda uow: uow.consensus_log.append(70, 7000, {}),
    "consensus_log.append_many": lambda uow: uow.consensus_log.append_many(log(*range(ROWS + 1, ROWS + 1000))),
    "consensus_log.append_many again": lambda uow: uow.consensus_log.append_many(log(7000, 7001, 7002)),
    "consensus_log.get": lambda uow: uow.consensus_log.get(7000),
    "consensus_log.range": lambda uow: uow.consensus_log.range(7000, 7100),
    "consensus_log.first_index": lambda uow: uow.consensus_log.first_index(),
    "consensus_log.last_index": lambda uow: uow.consensus_log.last_index(),
    "consensus_log.last_term": lambda uow: uow.consensus_log.last_term(),
    "consensus_log.delete_range": lambda uow: uow.consensus_log.delete_range(ROWS - 10, ROWS),
    "routing_table.get": lambda uow: uow.routing_table.get("to-7000"),
    "routing_table.put": lambda uow: uow.routing_table.put("to-7000", {}),
    "routing_table.put_many": lambda uow: uow.routing_table.put_many({f"to-{n}": {} for n in range(1000)}),
    "routing_table.page after": lambda uow: uow.routing_table.page(after=cursor("to-7000")),
    "routing_table.delete": lambda uow: uow.routing_table.delete("to-7000"),
    "runtime_config.get": lambda uow: uow.runtime_config.get("key-7000"),
    "runtime_config.value": lambda uow: uow.runtime_config.value("key-7000"),
    "runtime_config.put": lambda uow: uow.runtime_config.put("key-7000", 2),
    "runtime_config.page after": lambda uow: uow.runtime_config.page(after=cursor("key-7000")),
    "runtime_config.all of a prefix": lambda uow: uow.runtime_config.all("key-70"),
    "runtime_config.delete": lambda uow: uow.runtime_config.delete("key-7000"),
}
WHOLE: dict[str, Work] = {
    "routing_table.all": lambda uow: uow.routing_table.all(),
    "runtime_config.all": lambda uow: uow.runtime_config.all(),
}


def execute(url: str, executed: Executed, work: Work) -> list[tuple[bytes, Any]]:
    """Do some work and roll it back; give what it executed."""
    with MeshStorage.open(url) as storage, storage.unit_of_work() as uow:
        uow.state.find("nothing")  # The transaction is open.
        executed.clear()
        work(uow)
        return list(executed)


def plan_of(connection: psycopg.Connection[Any], mode: str, sql: bytes, parameters: Any) -> Any:
    """Return the plan of a statement: the one for these parameters, or the generic one of a prepared statement."""
    with connection.cursor(binary=True) as cursor:
        if mode == "custom":
            cursor.execute(b"EXPLAIN (FORMAT JSON) " + sql, parameters)
        else:
            cursor.execute(sql, parameters, prepare=True)
            connection.execute("SET LOCAL plan_cache_mode = force_generic_plan")
            (prepared,) = connection.execute(
                "SELECT name, cardinality(parameter_types) FROM pg_prepared_statements"
            ).fetchall()
            arguments = f"({', '.join(['NULL'] * prepared[1])})" if prepared[1] else ""
            cursor.execute(f"EXPLAIN (FORMAT JSON) EXECUTE {prepared[0]}{arguments}".encode())
        row = cursor.fetchone()
    connection.rollback()
    assert row is not None
    return row[0][0]["Plan"]


def steps(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for inner in plan.get("Plans", ()):
        yield from steps(inner)


@pytest.mark.parametrize("mode", ["custom", "generic"])
@pytest.mark.parametrize("name", BY_INDEX)
def test_it_goes_by_an_index_and_sorts_nothing_large(url: str, executed: Executed, name: str, mode: str) -> None:
    statements = execute(url, executed, BY_INDEX[name])
    for sql, parameters in statements:
        if sql.startswith(b"LOCK"):
            continue
        with psycopg.connect(url) as connection:
            plan = plan_of(connection, mode, sql, parameters)
        for step in steps(plan):
            described = f"{sql.decode()}\n{json.dumps(plan, indent=1)}"
            assert step["Node Type"] != "Seq Scan" or step["Relation Name"] == "pg_index", described
            if (
                "Index" in step["Node Type"] and "Index Cond" not in step
            ):  # It reads one end of the index, or all of it.
                assert plan["Node Type"] in ("Limit", "ModifyTable"), described
                assert "Filter" not in step, described
            if "Sort" in step["Node Type"]:
                # PostgreSQL 15 takes a batch that is joined with itself for five times as large.
                assert max(inner["Plan Rows"] for inner in step["Plans"]) < ROWS / 2, described


@pytest.mark.parametrize("mode", ["custom", "generic"])
def test_maintenance_finds_what_is_over_by_an_index(url: str, executed: Executed, mode: str) -> None:
    for sql, parameters in execute(url, executed, lambda uow: uow.maintenance.step(DAY, DAY)):
        with psycopg.connect(url) as connection:
            plan = plan_of(connection, mode, sql, parameters)
        whole = [step["Relation Name"] for step in steps(plan) if step["Node Type"] == "Seq Scan"]
        assert set(whole) <= {"mesh_changes_epoch", "pg_index"}, json.dumps(plan, indent=1)  # a row, and few


@pytest.mark.parametrize("name", WHOLE)
def test_the_whole_is_read_in_the_order_of_its_index(url: str, executed: Executed, name: str) -> None:
    ((sql, parameters),) = execute(url, executed, WHOLE[name])
    with psycopg.connect(url) as connection:
        kinds = [step["Node Type"] for step in steps(plan_of(connection, "custom", sql, parameters))]
    assert [kind for kind in kinds if kind != "Result"] == ["Index Scan"]  # a Result is the clock


@pytest.mark.parametrize("mode", ["custom", "generic"])
def test_the_routes_that_go_are_found_in_one_pass(url: str, executed: Executed, mode: str) -> None:
    # A subplan whose rows have no room in memory would go through all of them for each route.
    given: dict[str, Any] = {f"to-{n}": {} for n in range(ROWS)}
    statements = execute(url, executed, lambda uow: uow.routing_table.replace_all(given))
    ((sql, parameters),) = [each for each in statements if each[0].startswith(b"DELETE")]
    with psycopg.connect(url) as connection:
        plan = plan_of(connection, mode, sql, parameters)
    ((kind, how),) = [(step["Node Type"], step["Join Type"]) for step in steps(plan) if "Join Type" in step]
    assert how in ("Anti", "Right Anti")
    assert kind in ("Hash Join", "Merge Join")
    assert not any("SubPlan" in step.get("Filter", "") for step in steps(plan))


NAMES = ("meshes", "nodes", "routes", "state", "runtime_config", "routing_table")


@pytest.mark.parametrize("mode", ["custom", "generic"])
@pytest.mark.parametrize("names", [["state"], NAMES], ids=["one", "all"])
def test_changes_since_a_cursor_are_found_by_indexes(
    url: str, executed: Executed, names: Sequence[str], mode: str
) -> None:
    with MeshStorage.open(url) as storage, storage.begin(read_only=True) as uow:
        cursor = uow.changes.cursor()
        executed.clear()
        uow.changes.since(cursor, names)
    ((sql, parameters),) = executed
    with psycopg.connect(url) as connection:
        plan = plan_of(connection, mode, sql, parameters)
    described = json.dumps(plan, indent=1)
    whole = {step["Relation Name"] for step in steps(plan) if step["Node Type"] == "Seq Scan"}
    assert whole <= {"mesh_changes_epoch", "pg_database"}, described  # a single row, and a few
    assert not [step for step in steps(plan) if "Hash" in step["Node Type"] and "Join" in step["Node Type"]], described
    assert plan["Total Cost"] < 100_000, described  # from there on, a server compiles it at first


def test_a_look_at_the_log_reads_only_what_is_new(url: str) -> None:
    """It costs the same however long the log is, which has one change for every row of the tables."""
    with MeshStorage.open(url) as storage, storage.unit_of_work(isolation="repeatable read") as uow:
        cursor = uow.changes.cursor()
        assert uow.changes.since(cursor, NAMES).changes == []
        read = "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables WHERE relname = 'mesh_changes'"
        assert uow.session.execute(text(read)).scalar_one() < 10
