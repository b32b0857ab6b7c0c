"""Support for a service's own tests: pytest fixtures for a fresh, real database per test, and factories of aggregates.

Put `pytest_plugins = ["mesh_storage.testing"]` into the top-level `conftest.py`. Then `mesh_storage` is an open storage
and `mesh_storage_url` the URL of its database. The databases are created from a template database on a temporary server
in RAM, or on the server of `MESH_STORAGE_TEST_URL` (as a role with CREATEDB). With `MESH_STORAGE_TEST_DISTRIBUTE=1`,
each is distributed on this server alone, which must have Citus (as a superuser).
"""

from __future__ import annotations

import inspect
import itertools
import os
import re
import secrets
import time
from collections.abc import Coroutine, Generator, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, overload
from urllib.parse import quote, urlencode

import factory
import psycopg
import pytest
from psycopg import sql

from mesh_storage import MeshStorage, schema
from mesh_storage.embedded.server import EmbeddedServer
from mesh_storage.errors import ConfigurationError, UnavailableError
from mesh_storage.models import (
    ConfigEntry,
    LogEntry,
    Mesh,
    Message,
    Node,
    NodeState,
    Route,
    RoutingEntry,
    StateEntry,
)
from mesh_storage.models.base import new_id
from mesh_storage.postgres import engine
from mesh_storage.postgres.server import Server
from mesh_storage.schema import distribution
from mesh_storage.unit_of_work import UnitOfWork

if TYPE_CHECKING:  # mesh_storage.aio needs an extra
    from typing_extensions import TypeIs

    from mesh_storage.aio import AsyncUnitOfWork

M = TypeVar("M")

_NAMES = "mesh_storage_test_"
_NUMBER = re.compile("[0-9a-f]{12}")
_VACATING_TIMEOUT_S = 30.0
_ENDING_TIMEOUT_S = 1.0
_ONE_NODE = (
    "CREATE EXTENSION IF NOT EXISTS citus",
    "SELECT citus_set_coordinator_host('localhost', current_setting('port')::int)",
    "SELECT citus_set_node_property('localhost', current_setting('port')::int, 'shouldhaveshards', true)",
)
# One at a time, since Citus gives its replication slots the same names in every database. "mesh_tst" as a number.
_TURN = int.from_bytes(b"mesh_tst")
_MARKED = "SELECT (classid::bigint << 32) | objid::bigint FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1"
_FOUND = "SELECT datname FROM pg_database WHERE starts_with(datname, %s) AND pg_get_userbyid(datdba) = current_user"
_OTHERS = """
    SELECT pid, usename, application_name FROM pg_stat_activity
    WHERE datname = %s
    AND (coalesce(backend_type, 'client backend') = 'client backend' OR starts_with(backend_type, 'Citus'))
"""


class Databases:
    """Creates databases on one server, from a template database that has the schema.

    As long as it is open, it holds an advisory lock on the number in the names of its databases. What a run without its
    lock has left, because it was killed, is dropped by the next one.
    """

    def __init__(self, connect: dict[str, Any], *, distribute: bool = False) -> None:
        """Initialize with the arguments of a connection, and whether to distribute what has the schema by Citus."""
        self._connect = {"client_encoding": "UTF8", **connect}
        self._distributes = distribute
        self._admin = engine.connect(self._connect)
        # Random rather than a process id, since several machines may share a server.
        mark = secrets.randbits(48)
        self._prefix = f"{_NAMES}{mark:012x}"
        self._numbers = itertools.count(1)
        self._template = f"{self._prefix}_template"
        self._admin.execute("SELECT pg_advisory_lock(%s)", [mark])
        # Copying files is faster, but takes two checkpoints, which nobody else on a server of their own should notice.
        throw_away = self._admin.execute("SHOW fsync").fetchone() == ("off",)
        self._strategy = "FILE_COPY" if throw_away else "WAL_LOG"
        try:
            self._drop_stale()
            self._execute("CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8'", self._template)
            schema.upgrade_server(Server({**self._connect, "dbname": self._template}))
            if distribute:
                self._distribute(self._template)
            self._vacate_template()
        except BaseException:
            with suppress(psycopg.Error):
                self.close()
            raise

    @contextmanager
    def fresh(self, *, with_schema: bool = True) -> Generator[str]:
        """Create a database for a block and yield its URL; drop it afterwards, even with sessions connected."""
        name = f"{self._prefix}_{next(self._numbers)}"
        template = self._template if with_schema else "template0"
        self._execute(f"CREATE DATABASE {{}} TEMPLATE {{}} STRATEGY {self._strategy}", name, template)
        try:
            if self._distributes:  # which a copy does not have of its template
                self._execute(f"ALTER DATABASE {{}} {distribution.SEQUENTIAL}", name)
            yield self._url(name)
        finally:
            # Without sessions, since FORCE looks only every 100 ms whether those that it has terminated are gone.
            self._end_sessions(name, timeout=_ENDING_TIMEOUT_S)
            self._execute("DROP DATABASE {} WITH (FORCE)", name)

    def _distribute(self, name: str) -> None:
        """Distribute a database over one server, which is its coordinator and its worker."""
        server = Server({**self._connect, "dbname": name})
        with engine.connect(server.connect) as connection:
            for statement in _ONE_NODE:
                connection.execute(statement)
        with self._admin.transaction():
            self._admin.execute("SELECT pg_advisory_xact_lock(%s)", [_TURN])
            distribution.distribute_server(server, apply=True)
        with engine.connect(server.connect) as connection:  # so that nothing is removed later, in each copy
            connection.execute("CALL citus_cleanup_orphaned_resources()")

    def close(self) -> None:
        """Drop the template database."""
        with self._admin:
            self._execute("DROP DATABASE IF EXISTS {} WITH (FORCE)", self._template)

    def _drop_stale(self) -> None:
        marks = {mark for (mark,) in self._admin.execute(_MARKED)}
        for (name,) in self._admin.execute(_FOUND, [_NAMES]).fetchall():
            number = name.removeprefix(_NAMES).partition("_")[0]
            if _NUMBER.fullmatch(number) and int(number, 16) not in marks:
                with suppress(psycopg.Error):  # somebody who may not be disconnected uses it
                    self._execute("DROP DATABASE IF EXISTS {} WITH (FORCE)", name)

    def _vacate_template(self) -> None:
        """Keep monitors and the like out of the template, which cannot be copied while anybody is connected to it."""
        self._execute("ALTER DATABASE {} WITH ALLOW_CONNECTIONS false", self._template)
        if others := self._end_sessions(self._template, timeout=_VACATING_TIMEOUT_S):
            listed = ", ".join(f"{name!r} of {user}" for _, user, name in others)
            raise UnavailableError(f"the template database {self._template} stays in use by {listed}")

    def _end_sessions(self, database: str, *, timeout: float) -> list[tuple[int, str, str]]:
        """Terminate the sessions of a database, and return those that are still there after the timeout."""
        deadline = time.monotonic() + timeout
        while others := self._admin.execute(_OTHERS, [database]).fetchall():
            if time.monotonic() > deadline:
                return others
            for pid, _, _ in others:
                with suppress(psycopg.errors.InsufficientPrivilege):
                    self._admin.execute("SELECT pg_terminate_backend(%s)", [pid])
            time.sleep(0.002)
        return []

    def _execute(self, statement: str, *names: str) -> None:
        template: Any = statement  # psycopg's type is LiteralString, which all callers pass
        self._admin.execute(sql.SQL(template).format(*map(sql.Identifier, names)))

    def _url(self, name: str) -> str:
        parameters = {**self._connect}
        user, password = quote(str(parameters.pop("user", "")), ""), parameters.pop("password", None)
        login = f"{user}:{quote(str(password), '')}@" if password else f"{user}@" if user else ""
        parameters.pop("dbname", None)
        for setting, nothing in {"application_name": "", "connect_timeout": "0", "options": ""}.items():
            if parameters.get(setting) == nothing:
                del parameters[setting]
        query = urlencode(parameters, quote_via=quote)  # libpq does not decode "+" as a space
        return f"postgresql://{login}/{quote(name, '')}?{query}"


@contextmanager
def databases() -> Generator[Databases]:
    """Yield the factory of databases, on a temporary server or the one of `MESH_STORAGE_TEST_URL`."""
    with _server() as connect:
        made = Databases(connect, distribute=os.environ.get("MESH_STORAGE_TEST_DISTRIBUTE") == "1")
        try:
            yield made
        finally:
            made.close()


@contextmanager
def _server() -> Generator[dict[str, Any]]:
    url = os.environ.get("MESH_STORAGE_TEST_URL")
    if url:
        try:
            connect = engine.parse_url(url)
        except ConfigurationError as error:
            raise ConfigurationError(f"MESH_STORAGE_TEST_URL: {error}") from None
        yield connect
        return
    server = EmbeddedServer.throw_away()
    try:
        yield {**server.connect_arguments, "dbname": "postgres"}
    finally:
        server.close()


@pytest.fixture(scope="session")
def mesh_storage_databases() -> Iterator[Databases]:
    """Yield the factory of databases, for the whole test session."""
    with databases() as made:
        yield made


@pytest.fixture
def mesh_storage_url(mesh_storage_databases: Databases) -> Iterator[str]:
    """Yield the URL of a new database that has the schema."""
    with mesh_storage_databases.fresh() as url:
        yield url


@pytest.fixture
def mesh_storage(mesh_storage_url: str) -> Iterator[MeshStorage]:
    """Yield a storage opened on a new database."""
    with MeshStorage.open(mesh_storage_url) as storage:
        yield storage


Steps: TypeAlias = Generator[Any, Any, Any]
"""Repository calls, sync or asyncio: each is yielded, and its result is sent back."""


class AggregateFactory(factory.Factory[M]):
    """Builds aggregates: `build()` in memory, `create(uow=uow)` stored through the unit of work.

    With an `AsyncUnitOfWork`, await `create` and `create_batch`.
    """

    @overload
    @classmethod
    def create(cls, *, uow: UnitOfWork, **attributes: Any) -> M: ...
    @overload
    @classmethod
    def create(cls, *, uow: AsyncUnitOfWork, **attributes: Any) -> Coroutine[Any, Any, M]: ...
    @classmethod
    def create(cls, *, uow: UnitOfWork | AsyncUnitOfWork, **attributes: Any) -> M | Coroutine[Any, Any, M]:
        """Build an aggregate and store it."""
        made: M | Coroutine[Any, Any, M] = super().create(uow=uow, **attributes)
        return made

    @overload
    @classmethod
    def create_batch(cls, size: int, *, uow: UnitOfWork, **attributes: Any) -> list[M]: ...
    @overload
    @classmethod
    def create_batch(cls, size: int, *, uow: AsyncUnitOfWork, **attributes: Any) -> Coroutine[Any, Any, list[M]]: ...
    @classmethod
    def create_batch(
        cls, size: int, *, uow: UnitOfWork | AsyncUnitOfWork, **attributes: Any
    ) -> list[M] | Coroutine[Any, Any, list[M]]:
        """Build aggregates and store them."""
        if _is_async(uow):
            return cls._create_in_turn(size, uow, attributes)
        return [cls.create(uow=uow, **attributes) for _ in range(size)]

    @classmethod
    async def _create_in_turn(cls, size: int, uow: AsyncUnitOfWork, attributes: dict[str, Any]) -> list[M]:
        return [await cls.create(uow=uow, **attributes) for _ in range(size)]

    @classmethod
    def _create(
        cls, model_class: type[M], *args: Any, uow: UnitOfWork | AsyncUnitOfWork, **kwargs: Any
    ) -> M | Coroutine[Any, Any, M]:
        steps = cls.store(uow, model_class(*args, **kwargs))
        made: M | Coroutine[Any, Any, M] = _take_async(steps) if _is_async(uow) else _take(steps)
        return made

    @classmethod
    def _build(cls, model_class: type[M], *args: Any, uow: object = None, **kwargs: Any) -> M:
        del uow
        return model_class(*args, **kwargs)

    @classmethod
    def store(cls, uow: Any, entity: M) -> Steps:
        """Store an aggregate through its repository."""
        raise NotImplementedError


def _is_async(uow: UnitOfWork | AsyncUnitOfWork) -> TypeIs[AsyncUnitOfWork]:
    return inspect.iscoroutinefunction(uow.commit)


def _take(steps: Steps) -> Any:
    result = None
    try:
        while True:
            result = steps.send(result)
    except StopIteration as end:
        return end.value


async def _take_async(steps: Steps) -> Any:
    result = None
    try:
        while True:
            result = await steps.send(result)
    except StopIteration as end:
        return end.value


class MeshFactory(AggregateFactory[Mesh]):
    """Builds meshes."""

    class Meta:  # factory_boy's options
        model = Mesh

    name = factory.Sequence(lambda n: f"mesh-{n}")
    description = "a mesh"
    allow_join = True

    @classmethod
    def store(cls, uow: Any, entity: Mesh) -> Steps:
        """Add the mesh."""
        return (yield uow.meshes.add(entity))


class NodeFactory(AggregateFactory[Node]):
    """Builds nodes."""

    class Meta:  # factory_boy's options
        model = Node

    name = factory.Sequence(lambda n: f"node-{n}")
    ip_address = factory.Sequence(lambda n: f"10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}")
    port = 8443

    @classmethod
    def store(cls, uow: Any, entity: Node) -> Steps:
        """Add the node."""
        return (yield uow.nodes.add(entity))


class RouteFactory(AggregateFactory[Route]):
    """Builds routes; `create` also creates the nodes at both ends unless they exist."""

    class Meta:  # factory_boy's options
        model = Route

    source_node_id = factory.LazyFunction(lambda: new_id("node"))
    target_node_id = factory.LazyFunction(lambda: new_id("node"))
    bidirectional = True
    latency_ms = 10
    bandwidth_mbps = 1000
    cost = 100

    @classmethod
    def store(cls, uow: Any, entity: Route) -> Steps:
        """Add the route, and its nodes if they do not exist."""
        for node_id in (entity.source_node_id, entity.target_node_id):
            if (yield uow.nodes.find(node_id)) is None:
                yield uow.nodes.add(NodeFactory.build(id=node_id))
        return (yield uow.routes.add(entity))


class MessageFactory(AggregateFactory[Message]):
    """Builds messages."""

    class Meta:  # factory_boy's options
        model = Message

    id = factory.LazyFunction(lambda: new_id("msg"))
    from_node = "node-a"
    to_node = "node-b"
    content = factory.Sequence(lambda n: f"message {n}".encode())
    timestamp = factory.Sequence(lambda n: 1_700_000_000 + n)

    @classmethod
    def store(cls, uow: Any, entity: Message) -> Steps:
        """Store the message."""
        return (yield uow.messages.store(entity))


class StateEntryFactory(AggregateFactory[StateEntry]):
    """Builds entries of the shared state."""

    class Meta:  # factory_boy's options
        model = StateEntry

    key = factory.Sequence(lambda n: f"key-{n}")
    value = factory.Sequence(lambda n: f"value {n}".encode())

    @classmethod
    def store(cls, uow: Any, entity: StateEntry) -> Steps:
        """Put the entry."""
        return (yield uow.state.put(entity.key, entity.value))


class NodeStateFactory(AggregateFactory[NodeState]):
    """Builds node states."""

    class Meta:  # factory_boy's options
        model = NodeState

    node_id = factory.LazyFunction(lambda: new_id("node"))
    state = factory.Sequence(lambda n: {"status": "active", "connections": n})

    @classmethod
    def store(cls, uow: Any, entity: NodeState) -> Steps:
        """Put the state."""
        return (yield uow.node_states.put(entity.node_id, entity.state))


class LogEntryFactory(AggregateFactory[LogEntry]):
    """Builds entries of the consensus log with indexes from 1; `create` appends after the last entry."""

    class Meta:  # factory_boy's options
        model = LogEntry

    term = 1
    index = factory.Sequence(lambda n: n + 1)
    entry = factory.LazyAttribute(lambda made: {"command": "set", "key": f"key-{made.index}"})

    @classmethod
    def store(cls, uow: Any, entity: LogEntry) -> Steps:
        """Append the entry after the last one, whatever its own index."""
        last_index = yield uow.consensus_log.last_index()
        return (yield uow.consensus_log.append(entity.term, last_index + 1, entity.entry))


class RoutingEntryFactory(AggregateFactory[RoutingEntry]):
    """Builds entries of the routing table."""

    class Meta:  # factory_boy's options
        model = RoutingEntry

    destination = factory.Sequence(lambda n: f"destination-{n}")
    route = factory.LazyFunction(lambda: {"next_hop": "node-a", "latency_ms": 10})

    @classmethod
    def store(cls, uow: Any, entity: RoutingEntry) -> Steps:
        """Put the route."""
        return (yield uow.routing_table.put(entity.destination, entity.route))


class ConfigEntryFactory(AggregateFactory[ConfigEntry]):
    """Builds entries of the runtime configuration."""

    class Meta:  # factory_boy's options
        model = ConfigEntry

    key = factory.Sequence(lambda n: f"setting.{n}")
    value = factory.Sequence(lambda n: n)

    @classmethod
    def store(cls, uow: Any, entity: ConfigEntry) -> Steps:
        """Put the setting."""
        return (yield uow.runtime_config.put(entity.key, entity.value))
