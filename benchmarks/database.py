"""The database under test: a bundled PostgreSQL on disk with default durability, with filled tables."""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import psycopg
from psycopg.types.json import set_json_loads
from pydantic_core import from_json

from mesh_storage import MeshStorage, schema
from mesh_storage.embedded.server import EmbeddedServer
from mesh_storage.postgres.server import Server

MOST_OTHER_ROWS = 1_000_000
"""Beyond this, only the number of messages grows."""

_FILL_MESSAGES = """
    INSERT INTO mesh_messages (id, from_node, to_node, content, timestamp)
    SELECT 'msg-' || n, 'node-' || n % 100, 'node-' || n % 70, decode(repeat(md5(n::text), 4), 'hex'), 1700000000 + n
    FROM generate_series(1, {rows}) AS n
"""
_FILL_OTHERS = (
    """INSERT INTO mesh_state (key, value)
       SELECT 'key-' || n, decode(md5(n::text), 'hex') FROM generate_series(1, {rows}) AS n""",
    """INSERT INTO mesh_node_state (node_id, state)
       SELECT 'node-' || n, '{{"load": 0.25, "status": "active"}}' FROM generate_series(1, {rows}) AS n""",
    """INSERT INTO mesh_consensus_log (term, index, entry)
       SELECT 1 + n / 1000, n, jsonb_build_object('op', 'set', 'key', 'key-' || n, 'value', n)
       FROM generate_series(1, {rows}) AS n""",
    """INSERT INTO mesh_routing_table (destination, route)
       SELECT 'dest-' || n, jsonb_build_object('via', 'node-' || n % 70, 'cost', n % 100, 'hops', '["a", "b"]'::jsonb)
       FROM generate_series(1, {rows}) AS n""",
)
_TABLES = (
    "mesh, nodes, routes, mesh_messages, mesh_state, mesh_node_state, mesh_consensus_log, mesh_routing_table,"
    " mesh_runtime_config"
)


@dataclass
class Database:
    """A storage on its own server, and how to connect to the same database without the library."""

    storage: MeshStorage
    url: str
    connect_arguments: dict[str, Any]
    rows: int = 0
    """Number of rows in each runtime table."""

    @contextmanager
    def connection(self, *, autocommit: bool = False) -> Generator[psycopg.Connection[Any]]:
        """Connect with plain psycopg, using the fastest installed JSON parser."""
        with psycopg.connect(**self.connect_arguments, autocommit=autocommit) as connection:
            set_json_loads(from_json, connection)
            yield connection

    @contextmanager
    def without_triggers(self) -> Generator[MeshStorage]:
        """Open a storage on another database of the server, whose state is written without triggers."""
        connect = {**self.connect_arguments, "dbname": "without_triggers"}
        with self.connection(autocommit=True) as admin:
            admin.execute("CREATE DATABASE without_triggers TEMPLATE template0 ENCODING 'UTF8'")
            try:
                schema.upgrade_server(Server(connect))
                with psycopg.connect(**connect) as connection:
                    connection.execute("ALTER TABLE mesh_state DISABLE TRIGGER USER")
                address = urlencode({name: connect[name] for name in ("host", "port", "user")}, quote_via=quote)
                with MeshStorage.open(f"postgresql:///without_triggers?{address}") as storage:
                    yield storage
            finally:
                admin.execute("DROP DATABASE without_triggers WITH (FORCE)")

    def set(self, parameters: Iterable[str]) -> None:
        """Set storage parameters of tables, each given as `TABLE:NAME=VALUE`."""
        with self.connection(autocommit=True) as connection:
            for table, _, parameter in (each.partition(":") for each in parameters):
                connection.execute(f"ALTER TABLE {table} SET ({parameter})")

    def fill(self, rows: int) -> None:
        """Empty all tables, and fill those of the runtime layer with rows numbered from 1."""
        with self.connection(autocommit=True) as connection:
            connection.execute(f"TRUNCATE {_TABLES}")
            connection.execute(_FILL_MESSAGES.format(rows=rows))
            for statement in _FILL_OTHERS:
                connection.execute(statement.format(rows=min(rows, MOST_OTHER_ROWS)))
            connection.execute("VACUUM ANALYZE")
            connection.execute("CHECKPOINT")
        self.rows = rows


@contextmanager
def durable_database(parameters: Iterable[str] = ()) -> Generator[Database]:
    """Create a database with durable commits, and remove it afterwards.

    The server has the parameters given as `NAME=VALUE`.
    """
    with tempfile.TemporaryDirectory(prefix="mesh_storage-benchmark-") as name:
        path = Path(name) / "postgresql"
        EmbeddedServer.open(path).close()
        with (path / "data" / "postgresql.auto.conf").open("a") as configuration:
            configuration.writelines(f"{each}\n" for each in parameters)
        server = EmbeddedServer.open(path)
        try:
            url = f"embedded:{path}"
            with MeshStorage.open(url) as storage:
                arguments = {**server.connect_arguments, "options": "-c timezone=UTC"}
                yield Database(storage, url, arguments)
        finally:
            server.close()
