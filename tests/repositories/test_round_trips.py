"""Pins what each call costs on the wire, in round trips and in statements, by libpq's own trace, on either API.

A machine may be slow or busy; a round trip too many is one on every machine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import pytest
from sqlalchemy import text

from mesh_storage import ConfigEntry, LogEntry, Mesh, MeshStorage, Message, Node, Route, StateEntry, UnitOfWork
from mesh_storage.aio.postgres.timed import AsyncTimedConnection
from mesh_storage.postgres.timed import TimedConnection
from mesh_storage.testing import Databases
from tests.contract.conftest import Open, opener

Work: TypeAlias = Callable[[UnitOfWork], Any]
REPOSITORIES = (
    *("meshes", "nodes", "routes"),
    *("messages", "state", "node_states", "consensus_log", "routing_table", "runtime_config", "changes"),
)
ANSWER = rb"\tB\t\d+\t(?:ReadyForQuery|CopyInResponse)\b"
STATEMENT = rb"\tF\t\d+\t(?:Query|Execute)\b"


class Cost(NamedTuple):
    """How often the server is waited for, and how many statements it executes."""

    round_trips: int
    statements: int


class Wire:
    """What goes over the connections that were made since it is there."""

    def __init__(self, trace: IO[bytes]) -> None:
        self._trace = trace
        self._connections: list[Any] = []

    def follow(self, connection: Any) -> None:
        self._connections.append(connection)
        connection.pgconn.trace(self._trace.fileno())

    def cost(self) -> Cost:
        """Return the cost so far: the server says ReadyForQuery once a round trip, but asks for rows to copy."""
        for connection in self._connections:
            connection.pgconn.untrace()  # This is what flushes the trace.
            connection.pgconn.trace(self._trace.fileno())
        traced = Path(self._trace.name).read_bytes()
        return Cost(len(re.findall(ANSWER, traced)), len(re.findall(STATEMENT, traced)))

    def cost_of(self, work: Callable[[], Any]) -> Cost:
        before = self.cost()
        work()
        after = self.cost()
        return Cost(after.round_trips - before.round_trips, after.statements - before.statements)


def id_of(kind: str, number: int) -> str:
    return f"{kind}_{number:026}"


def node(number: int) -> Node:
    return Node(id=id_of("node", number), name=f"node-{number}", ip_address="10.0.0.1")


def route(number: int) -> Route:
    ends = {"source_node_id": id_of("node", 1), "target_node_id": id_of("node", 2)}
    return Route(id=id_of("route", number), **ends)


def mesh(number: int) -> Mesh:
    return Mesh(id=id_of("mesh", number), name=f"mesh-{number}")


def message(number: int, to: str = "b") -> Message:
    return Message(id=f"msg-{number}", from_node="a", to_node=to, content=b"1", timestamp=number)


def fill(uow: UnitOfWork) -> None:
    """Store three of each."""
    uow.meshes.add_many(map(mesh, (1, 2, 3)))
    uow.nodes.add_many(map(node, (1, 2, 3)))
    uow.routes.add_many(map(route, (1, 2, 3)))
    uow.messages.store_many(map(message, (1, 2, 3)))
    uow.messages.send(message(1005, "queue"))
    for number in (1006, 1007):
        uow.messages.send(message(number, "keyed"), key="k")
    for key in "abc":
        uow.state.put(key, b"1")
        uow.runtime_config.put(key, 1)
    uow.node_states.put_many({"a": {}, "b": {}, "c": {}})
    uow.routing_table.put_many({"a": {}, "b": {}, "c": {}})
    uow.consensus_log.append_many([(1, index, "x") for index in (1, 2, 3)])


def version(entry: StateEntry | ConfigEntry) -> int:
    assert entry.version is not None
    return entry.version


def bury(uow: UnitOfWork) -> list[str]:
    """Set a message aside, and return its id."""
    deliveries = uow.messages.claim("queue")
    uow.messages.bury(deliveries, "reason")
    return [each.message.id for each in deliveries]


def send_to_many(uow: UnitOfWork) -> str:
    """Send a message of a key to many receivers, and return its id."""
    return uow.messages.send(message(4), key="k", receivers=[f"receiver-{number}" for number in range(9)]).id


DAY = timedelta(days=1)
ONE = Cost(1, 1)
TWO = Cost(2, 2)  # The first call makes what the second one needs.
COPY = Cost(4, 3)  # It asks for the time and the versions, and the server for the rows.
MESH, NODE, ROUTE = id_of("mesh", 1), id_of("node", 1), id_of("route", 1)

# A method, and behind it the case where it costs something else in another one. A stream costs one for each batch, and
# one more where the last batch was full.
METHODS: dict[str, tuple[Work, Cost]] = {
    "meshes.add": (lambda uow: uow.meshes.add(mesh(4)), ONE),
    "meshes.add_many": (lambda uow: uow.meshes.add_many(map(mesh, range(4, 400))), COPY),
    "meshes.admits": (lambda uow: uow.meshes.admits(MESH), ONE),
    "meshes.count": (lambda uow: uow.meshes.count(), ONE),
    "meshes.delete": (lambda uow: uow.meshes.delete(MESH), ONE),
    "meshes.find": (lambda uow: uow.meshes.find(MESH), ONE),
    "meshes.get": (lambda uow: uow.meshes.get(MESH), ONE),
    "meshes.get_by_name": (lambda uow: uow.meshes.get_by_name("mesh-1"), ONE),
    "meshes.page": (lambda uow: uow.meshes.page(), ONE),
    "meshes.set_join_key": (lambda uow: uow.meshes.set_join_key(MESH, "secret"), ONE),
    "meshes.stream": (lambda uow: list(uow.meshes.stream()), ONE),
    "meshes.stream in batches": (lambda uow: list(uow.meshes.stream(batch_size=2)), Cost(2, 2)),
    "meshes.stream in full batches": (lambda uow: list(uow.meshes.stream(batch_size=3)), Cost(2, 2)),
    "meshes.update": (lambda uow: uow.meshes.update(uow.meshes.get(MESH)), TWO),
    "nodes.add": (lambda uow: uow.nodes.add(node(4)), ONE),
    "nodes.add_many": (lambda uow: uow.nodes.add_many(map(node, range(4, 400))), COPY),
    "nodes.count": (lambda uow: uow.nodes.count(status="STATUS_ACTIVE"), ONE),
    "nodes.delete": (lambda uow: uow.nodes.delete(NODE), ONE),
    "nodes.find": (lambda uow: uow.nodes.find(NODE), ONE),
    "nodes.get": (lambda uow: uow.nodes.get(NODE), ONE),
    "nodes.get_by_name": (lambda uow: uow.nodes.get_by_name("node-1"), ONE),
    "nodes.page": (lambda uow: uow.nodes.page(), ONE),
    "nodes.stream": (lambda uow: list(uow.nodes.stream()), ONE),
    "nodes.update": (lambda uow: uow.nodes.update(uow.nodes.get(NODE)), TWO),
    "nodes.with_state": (lambda uow: list(uow.nodes.with_state()), ONE),
    "routes.add": (lambda uow: uow.routes.add(route(4)), ONE),
    "routes.add_many": (lambda uow: uow.routes.add_many(map(route, range(4, 400))), COPY),
    "routes.between": (lambda uow: uow.routes.between(NODE, id_of("node", 2)), ONE),
    "routes.count": (lambda uow: uow.routes.count(), ONE),
    "routes.delete": (lambda uow: uow.routes.delete(ROUTE), ONE),
    "routes.find": (lambda uow: uow.routes.find(ROUTE), ONE),
    "routes.for_node": (lambda uow: uow.routes.for_node(NODE), ONE),
    "routes.get": (lambda uow: uow.routes.get(ROUTE), ONE),
    "routes.page": (lambda uow: uow.routes.page(), ONE),
    "routes.stream": (lambda uow: list(uow.routes.stream()), ONE),
    "routes.update": (lambda uow: uow.routes.update(uow.routes.get(ROUTE)), TWO),
    "messages.count": (lambda uow: uow.messages.count(to_node="b"), ONE),
    "messages.delete": (lambda uow: uow.messages.delete("msg-1"), ONE),
    "messages.delete of a key of many receivers": (lambda uow: uow.messages.delete(send_to_many(uow)), Cost(4, 4)),
    "messages.ack": (lambda uow: uow.messages.ack(uow.messages.claim("queue")), TWO),
    "messages.ack of a key": (lambda uow: uow.messages.ack(uow.messages.claim("keyed")), Cost(3, 3)),
    "messages.backlog": (lambda uow: uow.messages.backlog(), ONE),
    "messages.backlog of a receiver": (lambda uow: uow.messages.backlog("queue"), ONE),
    "messages.bury": (lambda uow: uow.messages.bury(uow.messages.claim("queue"), "reason"), TWO),
    "messages.claim": (lambda uow: uow.messages.claim("queue"), ONE),
    "messages.claim of many": (lambda uow: uow.messages.claim("queue", limit=100), ONE),
    "messages.dead": (lambda uow: uow.messages.dead(), ONE),
    "messages.dead of a receiver": (lambda uow: uow.messages.dead("queue"), ONE),
    "messages.delete_many": (lambda uow: uow.messages.delete_many(["msg-1", "msg-2"]), ONE),
    "messages.delete_many of dead ones": (lambda uow: uow.messages.delete_many(bury(uow)), Cost(4, 4)),
    "messages.enqueue": (lambda uow: uow.messages.enqueue(since=0), TWO),
    "messages.extend": (lambda uow: uow.messages.extend(uow.messages.claim("queue"), DAY), TWO),
    "messages.find": (lambda uow: uow.messages.find("msg-1"), ONE),
    "messages.get": (lambda uow: uow.messages.get("msg-1"), ONE),
    "messages.nack": (lambda uow: uow.messages.nack(uow.messages.claim("queue")), TWO),
    "messages.page": (lambda uow: uow.messages.page(to_node="b", since=1), ONE),
    "messages.page of all": (lambda uow: uow.messages.page(since=1), ONE),
    "messages.purge": (lambda uow: uow.messages.purge(1000), TWO),
    "messages.redrive": (lambda uow: uow.messages.redrive("queue"), ONE),
    "messages.send": (lambda uow: uow.messages.send(message(4)), ONE),
    "messages.send again": (lambda uow: uow.messages.send(message(1005, "queue")), TWO),
    "messages.send of what was stored": (lambda uow: uow.messages.send(message(1)), Cost(3, 3)),
    "messages.send of a key": (lambda uow: uow.messages.send(message(4), key="k"), ONE),
    "messages.send to others": (lambda uow: uow.messages.send(message(4), key="k", receivers=["a", "b"]), ONE),
    "messages.send_many": (lambda uow: uow.messages.send_many(map(message, range(8, 400))), ONE),
    "messages.send_many again": (lambda uow: uow.messages.send_many(map(message, range(4))), Cost(3, 3)),
    "messages.store": (lambda uow: uow.messages.store(message(4)), ONE),
    "messages.store again": (lambda uow: uow.messages.store(message(1)), Cost(2, 2)),
    "messages.store_many": (lambda uow: uow.messages.store_many(map(message, range(4, 400))), ONE),
    "messages.store_many again": (lambda uow: uow.messages.store_many(map(message, range(400))), Cost(2, 2)),
    "messages.stream": (lambda uow: list(uow.messages.stream()), ONE),
    "state.count": (lambda uow: uow.state.count("a"), ONE),
    "state.delete": (lambda uow: uow.state.delete("a"), ONE),
    "state.find": (lambda uow: uow.state.find("a"), ONE),
    "state.get": (lambda uow: uow.state.get("a"), ONE),
    "state.page": (lambda uow: uow.state.page("a"), ONE),
    "state.put": (lambda uow: uow.state.put("a", b"2"), ONE),
    "state.stream": (lambda uow: list(uow.state.stream("a")), ONE),
    "state.put if new": (lambda uow: uow.state.put("d", b"2", if_version=0), ONE),
    "state.put_many": (lambda uow: uow.state.put_many({str(n): b"" for n in range(400)}, ttl=DAY), ONE),
    "state.get_many": (lambda uow: uow.state.get_many(map(str, range(400))), ONE),
    "state.delete_prefix": (lambda uow: uow.state.delete_prefix(""), ONE),
    "state.touch": (lambda uow: uow.state.touch("a", if_version=version(uow.state.get("a")), ttl=DAY), TWO),
    "state.check": (lambda uow: uow.state.check("a", version=version(uow.state.get("a"))), TWO),
    "node_states.count": (lambda uow: uow.node_states.count(), ONE),
    "node_states.delete": (lambda uow: uow.node_states.delete("a"), ONE),
    "node_states.find": (lambda uow: uow.node_states.find("a"), ONE),
    "node_states.get": (lambda uow: uow.node_states.get("a"), ONE),
    "node_states.merge": (lambda uow: uow.node_states.merge("a", {"b": 1}), ONE),
    "node_states.page": (lambda uow: uow.node_states.page(), ONE),
    "node_states.put": (lambda uow: uow.node_states.put("a", {}), ONE),
    "node_states.put_many": (lambda uow: uow.node_states.put_many({str(n): n for n in range(400)}), ONE),
    "node_states.stale": (lambda uow: uow.node_states.stale(timedelta(days=1)), ONE),
    "node_states.stream": (lambda uow: list(uow.node_states.stream()), ONE),
    "changes.cursor": (lambda uow: uow.changes.cursor(), ONE),
    "changes.since": (lambda uow: uow.changes.since(None, ["nodes", "state"]), ONE),
    "changes.since a cursor": (lambda uow: uow.changes.since(uow.changes.cursor(), ["state"], "a"), TWO),
    "consensus_log.append": (lambda uow: uow.consensus_log.append(1, 4, "x"), ONE),
    "consensus_log.append again": (lambda uow: uow.consensus_log.append(1, 3, "x"), Cost(4, 4)),
    "consensus_log.append_many": (
        lambda uow: uow.consensus_log.append_many([LogEntry(term=1, index=n, entry={}) for n in range(4, 400)]),
        ONE,
    ),
    "consensus_log.append_many again": (
        lambda uow: uow.consensus_log.append_many([(1, 2, "x"), (1, 3, "x")]),
        Cost(3, 3),
    ),
    "consensus_log.count": (lambda uow: uow.consensus_log.count(), ONE),
    "consensus_log.delete_range": (lambda uow: uow.consensus_log.delete_range(2, 3), Cost(4, 4)),
    "consensus_log.find": (lambda uow: uow.consensus_log.find(1), ONE),
    "consensus_log.first_index": (lambda uow: uow.consensus_log.first_index(), ONE),
    "consensus_log.get": (lambda uow: uow.consensus_log.get(1), ONE),
    "consensus_log.last_index": (lambda uow: uow.consensus_log.last_index(), ONE),
    "consensus_log.last_term": (lambda uow: uow.consensus_log.last_term(), ONE),
    "consensus_log.range": (lambda uow: uow.consensus_log.range(1, 3), ONE),
    "routing_table.all": (lambda uow: uow.routing_table.all(), ONE),
    "routing_table.count": (lambda uow: uow.routing_table.count(), ONE),
    "routing_table.delete": (lambda uow: uow.routing_table.delete("a"), ONE),
    "routing_table.find": (lambda uow: uow.routing_table.find("a"), ONE),
    "routing_table.get": (lambda uow: uow.routing_table.get("a"), ONE),
    "routing_table.page": (lambda uow: uow.routing_table.page(), ONE),
    "routing_table.put": (lambda uow: uow.routing_table.put("a", {}), ONE),
    "routing_table.put_many": (lambda uow: uow.routing_table.put_many({str(n): n for n in range(400)}), ONE),
    "routing_table.replace_all": (lambda uow: uow.routing_table.replace_all({"a": 1, "d": 2}), Cost(3, 3)),
    "routing_table.replace_all by nothing": (lambda uow: uow.routing_table.replace_all({}), Cost(2, 2)),
    "routing_table.stream": (lambda uow: list(uow.routing_table.stream()), ONE),
    "runtime_config.put_many": (lambda uow: uow.runtime_config.put_many({str(n): n for n in range(400)}), ONE),
    "runtime_config.get_many": (lambda uow: uow.runtime_config.get_many(["a", "b"]), ONE),
    "runtime_config.delete_prefix": (lambda uow: uow.runtime_config.delete_prefix("a"), ONE),
    "runtime_config.touch": (
        lambda uow: uow.runtime_config.touch("a", if_version=version(uow.runtime_config.get("a")), ttl=DAY),
        TWO,
    ),
    "runtime_config.all": (lambda uow: uow.runtime_config.all("a"), ONE),
    "runtime_config.count": (lambda uow: uow.runtime_config.count(), ONE),
    "runtime_config.delete": (lambda uow: uow.runtime_config.delete("a"), ONE),
    "runtime_config.find": (lambda uow: uow.runtime_config.find("a"), ONE),
    "runtime_config.get": (lambda uow: uow.runtime_config.get("a"), ONE),
    "runtime_config.page": (lambda uow: uow.runtime_config.page(), ONE),
    "runtime_config.put": (lambda uow: uow.runtime_config.put("a", 2), ONE),
    "runtime_config.stream": (lambda uow: list(uow.runtime_config.stream()), ONE),
    "runtime_config.value": (lambda uow: uow.runtime_config.value("nothing", 1), ONE),
}


def put(uow: UnitOfWork) -> None:
    uow.state.put("a", b"2")


def find(uow: UnitOfWork) -> None:
    uow.state.find("a")


def nothing(_uow: UnitOfWork) -> None:
    pass


def put_in_a_savepoint(uow: UnitOfWork) -> None:
    with uow.savepoint():
        put(uow)


def put_in_a_savepoint_that_raises(uow: UnitOfWork) -> None:
    with suppress(ZeroDivisionError), uow.savepoint():
        put(uow)
        raise ZeroDivisionError


def put_twice(uow: UnitOfWork) -> None:
    put(uow)
    uow.commit()
    put(uow)


def put_in_vain(uow: UnitOfWork) -> None:
    put(uow)
    uow.rollback()


def use_the_session(uow: UnitOfWork) -> None:
    uow.session.execute(text("SELECT 1"))


# How the unit of work is opened, what is done in it, and what both cost with the commit at the end.
UNITS: dict[str, tuple[dict[str, Any], Work, Cost]] = {
    "of nothing": ({}, nothing, Cost(0, 0)),
    "of nothing, read-only": ({"read_only": True}, nothing, Cost(0, 0)),
    "writing": ({}, put, Cost(3, 3)),
    "writing twice": ({}, put_twice, Cost(6, 6)),
    "rolled back": ({}, put_in_vain, Cost(3, 3)),
    "read-only": ({"read_only": True}, find, Cost(1, 1)),
    "read-only, of one snapshot": ({"read_only": True, "isolation": "repeatable read"}, find, Cost(3, 3)),
    "relaxed": ({"durability": "relaxed"}, put, Cost(4, 4)),
    "repeatable read": ({"isolation": "repeatable read"}, put, Cost(3, 3)),
    "serializable": ({"isolation": "serializable"}, put, Cost(3, 3)),
    "with a timeout": ({"timeout": 600}, put, Cost(3, 3)),
    "read-only, with a timeout": ({"read_only": True, "timeout": 600}, find, Cost(1, 1)),
    "with a savepoint": ({}, put_in_a_savepoint, Cost(5, 5)),
    "with a savepoint that raises": ({}, put_in_a_savepoint_that_raises, Cost(5, 5)),
    "with a session": ({}, use_the_session, Cost(4, 4)),  # The last one brings the session back to where it began.
    "read-only, with a session": ({"read_only": True}, use_the_session, Cost(4, 4)),
}
# With transaction_pooling a transaction begins with its parameters, in the round trip of its BEGIN, and so all is the
# same but for those that need no transaction otherwise; and there is no session to bring back.
POOLED = {
    "read-only": Cost(3, 3),
    "read-only, with a timeout": Cost(3, 3),
    "with a session": Cost(3, 3),
    "read-only, with a session": Cost(3, 3),
}


@pytest.fixture(scope="module")
def url(mesh_storage_databases: Databases) -> Iterator[str]:
    """Yield the URL of a database that holds three of each; what a test does to it is rolled back or harmless."""
    with mesh_storage_databases.fresh() as made:
        with MeshStorage.open(made) as storage, storage.begin() as uow:
            fill(uow)
        yield made


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Wire]:
    """Trace the connections that are made."""
    connect, connect_async = TimedConnection.connect, AsyncTimedConnection.connect

    def followed(*args: Any, **options: Any) -> Any:
        connection = connect(*args, **options)
        made.follow(connection)
        return connection

    async def followed_async(*args: Any, **options: Any) -> Any:
        connection = await connect_async(*args, **options)
        made.follow(connection)
        return connection

    monkeypatch.setattr(TimedConnection, "connect", followed)
    monkeypatch.setattr(AsyncTimedConnection, "connect", followed_async)
    with (tmp_path / "trace").open("wb", buffering=0) as trace:
        made = Wire(trace)
        yield made


class Opener:
    """Opens storages of one API, for a pooler or not."""

    def __init__(self, opens: Open, url: str, *, pooled: bool) -> None:
        self._opens, self._url, self.pooled = opens, url, pooled

    @contextmanager
    def storage(self) -> Generator[MeshStorage]:
        """Yield one that has its connection and has prepared nothing: psycopg does at a statement's sixth time."""
        with self._opens(self._url, pool_size=1, transaction_pooling=self.pooled) as storage:
            with storage.begin(timeout=600) as uow:  # It asks once a connection what limits the session has.
                uow.routes.count()
            yield storage


@pytest.fixture(params=["sync", "asyncio", "sync, pooled", "asyncio, pooled"])
def opened(request: pytest.FixtureRequest, wire: Wire, url: str) -> Iterator[Opener]:
    """Yield what opens storages on which the wire has an eye."""
    del wire  # It must be there before.
    api, _, pooled = request.param.partition(", ")
    with opener(api) as opens:
        yield Opener(opens, url, pooled=bool(pooled))


def test_every_public_method_of_every_repository_is_in_the_table(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        there = {
            f"{repository}.{method}"
            for repository in REPOSITORIES
            for method in dir(getattr(uow, repository))
            if not method.startswith("_")
        }
    assert {name.partition(" ")[0] for name in METHODS} == there
    members = {name for name in dir(UnitOfWork) if not name.startswith("_")}
    assert members - {"session", "commit", "rollback", "savepoint", "maintenance", "position"} == set(REPOSITORIES)


@pytest.mark.one_server  # since one method is refused
def test_a_method_costs_this_much(opened: Opener, wire: Wire) -> None:
    costs = {}
    for name, (work, _) in METHODS.items():
        with opened.storage() as storage, storage.unit_of_work() as uow:
            uow.routes.count()  # The transaction has begun.
            costs[name] = wire.cost_of(partial(work, uow))
    assert costs == {name: cost for name, (_, cost) in METHODS.items()}


def test_a_unit_of_work_costs_this_much(opened: Opener, wire: Wire) -> None:
    def unit(storage: MeshStorage, how: dict[str, Any], work: Work) -> None:
        with storage.begin(**how) as uow:
            work(uow)

    costs = {}
    for name, (how, work, _) in UNITS.items():
        with opened.storage() as storage:
            costs[name] = wire.cost_of(partial(unit, storage, how, work))
    assert costs == {name: cost for name, (*_, cost) in UNITS.items()} | (POOLED if opened.pooled else {})


@pytest.mark.one_server  # where health() asks no workers
def test_run_and_health_cost_this_much(opened: Opener, wire: Wire) -> None:
    with opened.storage() as storage:
        assert wire.cost_of(partial(storage.run, put)) == Cost(3, 3)
        assert wire.cost_of(storage.health) == (Cost(6, 6) if opened.pooled else Cost(4, 4))


def test_to_prepare_a_statement_costs_one_round_trip_once(opened: Opener, wire: Wire) -> None:
    with opened.storage() as storage, storage.begin() as uow:
        uow.routes.count()
        trips = [wire.cost_of(partial(put, uow)).round_trips for _ in range(10)]
    assert trips == [1] * 10 if opened.pooled else [1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
