"""A server of the system's own PostgreSQL, something of every kind to back up, and what a database holds."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
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

PASSWORD = "p@ss word'\\"  # noqa: S105 - of servers that live for a test
SYSTEM_15 = Path("/usr/lib/postgresql/15/bin")
RAM = Path("/dev/shm")  # noqa: S108 - a directory of its own is made in it

Contents = dict[str, list[tuple[Any, ...]]]


@contextmanager
def system_server(programs: Path, *options: str, prepare: Callable[[Path], object] = lambda _: None) -> Generator[dict]:
    """Run a server of the system's own PostgreSQL, which asks for a password, and give its connect arguments."""
    home = Path(tempfile.mkdtemp(prefix="mesh_storage-test-", dir=RAM if os.access(RAM, os.W_OK) else None))
    home.chmod(0o711)
    account: dict[str, Any] = {}
    if os.geteuid() == 0:
        known = {entry.pw_name: entry for entry in pwd.getpwall()}
        entry = known.get("postgres") or known["nobody"]
        os.chown(home, entry.pw_uid, entry.pw_gid)
        account = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}

    def run(program: str, *arguments: str) -> None:
        subprocess.run(
            [programs / program, *arguments], check=True, cwd="/", stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
            **account,
        )  # fmt: skip

    secret = home / "password"
    secret.write_text(PASSWORD)
    secret.chmod(0o644)
    data = str(home / "data")
    try:
        login = ["--username=postgres", "--auth=scram-sha-256", f"--pwfile={secret}"]
        run("initdb", "-D", data, *login, "--encoding=UTF8", "--no-locale", "--no-sync")
        prepare(home / "data")
        settings = f"-k {home} -c fsync=off -c max_connections=50 {' '.join(options)}"
        run("pg_ctl", "start", "-w", "-D", data, "-l", str(home / "log"), "-o", settings)
        try:
            yield {"host": str(home), "port": 5432, "user": "postgres", "password": PASSWORD, "dbname": "postgres"}
        finally:
            run("pg_ctl", "stop", "-D", data, "-m", "immediate")
    finally:
        shutil.rmtree(home, ignore_errors=True)


def server_of(url: str) -> Server:
    return open_server(Settings(url=url))


def fill(storage: MeshStorage, *, messages: int = 50) -> None:
    """Store something of every kind, with values that are awkward in a dump."""
    with storage.begin() as uow:
        MeshFactory.create(uow=uow, name="tab\there \\ 'quoted' \"so\" ü 𐍈", description="line\nbreak\\.\n\\N")
        RouteFactory.create_batch(3, uow=uow)
        NodeFactory.create(uow=uow, description=None)
        uow.messages.store_many(MessageFactory.build(content=bytes(range(256)) * (n % 5)) for n in range(messages))
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
