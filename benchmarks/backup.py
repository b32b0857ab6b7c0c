"""Backup and restore of a million messages, compared with plain pg_dump and pg_restore on the same server.

python benchmarks/backup.py [--rows N] [--size BYTES] [--jobs N] [--repeat N]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from psycopg import sql

from mesh_storage import backup, schema
from mesh_storage.backup import client_tools
from mesh_storage.embedded.server import EmbeddedServer
from mesh_storage.postgres import engine
from mesh_storage.postgres.server import Server

FILL = """
    INSERT INTO mesh_messages (id, from_node, to_node, content, timestamp)
    SELECT 'msg-' || n, 'node-' || n %% 50, 'node-' || n %% 47, substring(bytes FROM 1 FOR %s), 1700000000 + n
    FROM generate_series(1, %s) AS n,
    LATERAL (SELECT decode(string_agg(md5(n::text || part), ''), 'hex') AS bytes
             FROM generate_series(0, %s / 16) AS part) AS made
"""


def plain_backup(connect: dict[str, Any], path: Path, jobs: int) -> None:
    run("pg_dump", connect, "--format=directory", f"--jobs={jobs}", f"--file={path}")


def plain_restore(connect: dict[str, Any], path: Path, *options: str) -> None:
    run("pg_restore", connect, f"--dbname={connect['dbname']}", "--exit-on-error", *options, str(path))


def run(program: str, connect: dict[str, Any], *arguments: str) -> None:
    where = {"PGHOST": connect["host"], "PGPORT": str(connect["port"]), "PGUSER": connect["user"]}
    tools = client_tools.find(18)
    environment = os.environ | where | {"PGDATABASE": connect["dbname"]}
    subprocess.run([tools.directory / program, *arguments], env=environment, check=True)


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=backup.JOBS)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mesh_storage-benchmark-") as name:
        home = Path(name)
        embedded = EmbeddedServer.open(home / "server")  # on disk, with default durability
        try:
            measure(given, home, {**embedded.connect_arguments, "dbname": "postgres", "options": ""})
        finally:
            embedded.close()


def measure(given: argparse.Namespace, home: Path, connect: dict[str, Any]) -> None:
    def fresh(database: str) -> dict[str, Any]:
        with engine.connect(connect) as admin:
            admin.execute(sql.SQL("DROP DATABASE IF EXISTS {}").format(sql.Identifier(database)))
            admin.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0").format(sql.Identifier(database)))
            admin.execute("CHECKPOINT")
        return {**connect, "dbname": database}

    source = Server(fresh("source"))
    schema.upgrade_server(source)
    with engine.connect(source.connect) as connection:
        connection.execute(FILL, [given.size, given.rows, given.size])
        connection.execute("VACUUM ANALYZE mesh_messages")
    jobs, times = given.jobs, dict[str, list[float]]()
    for _ in range(given.repeat):
        ours, plain = home / "ours", home / "plain"
        for path in (ours, plain):
            shutil.rmtree(path, ignore_errors=True)
        works: dict[str, Callable[[], object]] = {
            "backup, plain": partial(plain_backup, source.connect, plain, jobs),
            "backup, ours": partial(backup.backup, source, ours, jobs=jobs),
        }
        for what, work in works.items():
            times.setdefault(what, []).append(timed(work))
        target = fresh("target")
        times.setdefault(f"restore, plain -j {jobs}", []).append(
            timed(partial(plain_restore, target, plain, f"--jobs={jobs}"))
        )
        target = fresh("target")
        times.setdefault("restore, plain, one transaction", []).append(
            timed(partial(plain_restore, target, plain, "--single-transaction"))
        )
        server = Server(fresh("target"))
        times.setdefault("restore, ours", []).append(timed(partial(backup.restore, server, ours, jobs=jobs)))
    middle = {what: statistics.median(measured) for what, measured in times.items()}
    print(
        f"{given.rows:,} messages of {given.size} bytes, jobs {jobs}, {os.cpu_count()} CPUs, median of {given.repeat}"
    )
    for what, seconds in middle.items():
        print(f"{what:32} {seconds:7.2f} s   ({', '.join(f'{second:.2f}' for second in times[what])})")
    print(f"backup ratio                     {middle['backup, ours'] / middle['backup, plain']:.2f}")
    for plain_name in (f"restore, plain -j {jobs}", "restore, plain, one transaction"):
        print(f"ratio to {plain_name:31} {middle['restore, ours'] / middle[plain_name]:.2f}")


if __name__ == "__main__":
    main()
