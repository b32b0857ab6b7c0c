"""A server of the system's own PostgreSQL, something of every kind to back up, and what a database holds."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from psycopg import sql

from mesh_storage import MeshStorage
from mesh_storage.postgres import engine
from mesh_storage.postgres.server import Server, open_server
from mesh_storage.schema import tables
from mesh_storage.settings import Settings
from mesh_storage.testing import (
    ConfigEntryFactory,
    LogEntryFactory,
    MeshFactory,
    MessageFactory,
    NodeFactory,
    NodeStateFactory,
    RouteFactory,
    RoutingEntryFactory,
    StateEntryFactory,
)
from tests.servers import new_server

SYSTEM_15 = Path("/usr/lib/postgresql/15/bin")

Contents = dict[str, list[tuple[Any, ...]]]


@contextmanager
def system_server(programs: Path, *options: str, prepare: Callable[[Path], object] = lambda _: None) -> Generator[dict]:
    """Run a server of the system's own PostgreSQL, which asks for a password, and give its connect arguments."""
    with new_server(programs, "-c", "max_connections=50", *shlex.split(" ".join(options))) as server:
        server.create()
        prepare(server.data)
        server.start()
        yield server.connect


def server_of(url: str) -> Server:
    return open_server(Settings(url=url))


def fill(storage: MeshStorage, *, messages: int = 50) -> None:
    """Store something of every kind, with values that are awkward in a dump."""
    with storage.begin() as uow:
        MeshFactory.create(uow=uow, name="tab\there \\ 'quoted' \"so\" ü 𐍈", description="line\nbreak\\.\n\\N")
        RouteFactory.create_batch(3, uow=uow)
        NodeFactory.create(uow=uow, description=None)
        built = [MessageFactory.build(content=bytes(range(256)) * (n % 5)) for n in range(messages)]
        uow.messages.store_many(built)
        for message in built[:3]:
            uow.messages.send(message, key="tab\there \\ ü", receivers=["a", message.to_node])
        uow.messages.bury(uow.messages.claim("a"), "it says \\.\n")
        StateEntryFactory.create(uow=uow, value=b"\\.\n")
        StateEntryFactory.create(uow=uow, value=b"")
        NodeStateFactory.create_batch(3, uow=uow, state={"nested": [1.5, None, {"deep": "\\.\n\x7f"}]})
        LogEntryFactory.create_batch(3, uow=uow)
        RoutingEntryFactory.create_batch(3, uow=uow)
        ConfigEntryFactory.create(uow=uow, value="-- Name: x; Type: INDEX; Schema: public\nCOPY x FROM stdin;\n\\.\n")
        uow.session.connection().exec_driver_sql(
            "INSERT INTO mesh_consensus_log_stale (term, index, entry) VALUES (1, 99, '{}')"
        )


def run(server: Server, *statements: str) -> None:
    with engine.connect(server.connect) as connection:
        for statement in statements:
            connection.execute(statement.encode())


def contents(server: Server) -> Contents:
    """Read everything that the tables of a database hold."""
    with engine.connect(server.connect) as connection:
        location = tables.locate(tables.by_psycopg(connection))
        found: Contents = {}
        for table in location.tables:
            query = sql.SQL("SELECT * FROM ONLY {} AS t ORDER BY t::text").format(
                sql.Identifier(location.namespace, table)
            )
            found[table] = connection.execute(query).fetchall()
        return found


SHAPE = """
    SELECT c.relname, c.relkind::text, i.indexrelid::regclass::text, pg_get_indexdef(i.indexrelid), i.indisvalid
    FROM pg_class AS c LEFT JOIN pg_index AS i ON i.indrelid = c.oid WHERE relnamespace = 'public'::regnamespace
    AND relkind = 'r'
    UNION ALL
    SELECT conrelid::regclass::text, conname, contype::text, pg_get_constraintdef(oid), convalidated FROM pg_constraint
    WHERE connamespace = 'public'::regnamespace AND conrelid <> 0
    UNION ALL
    SELECT attrelid::regclass::text, attname, format_type(atttypid, atttypmod), pg_get_expr(adbin, adrelid), attnotnull
    FROM pg_attribute JOIN pg_class AS c ON c.oid = attrelid
    LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum
    WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND attnum > 0 AND NOT attisdropped
    ORDER BY 1, 2, 3
"""


def shape(server: Server) -> list[tuple[Any, ...]]:
    """Read the columns, indexes and constraints of all tables of a database."""
    with engine.connect(server.connect) as connection:
        return connection.execute(SHAPE).fetchall()
