"""The command line of operators: health, schema, upgrade, backup, restore, verify, psql; with defined exit codes."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import IntEnum
from functools import partial
from typing import Any, NoReturn, TypeAlias

from pydantic import SecretStr

from mesh_storage import backup, schema
from mesh_storage.backup import Progress, client_tools
from mesh_storage.backup.manifest import Manifest
from mesh_storage.embedded import server as embedded
from mesh_storage.errors import (
    ConfigurationError,
    InvalidInputError,
    MeshStorageError,
    SchemaMismatchError,
    StorageTimeoutError,
    UnavailableError,
)
from mesh_storage.health import Health
from mesh_storage.postgres import engine
from mesh_storage.postgres.server import Server, open_server
from mesh_storage.settings import Settings
from mesh_storage.storage import MeshStorage

Answer: TypeAlias = tuple["Exit", dict[str, Any], str]
"""Exit code of a command, its result as JSON fields, and the same result as text."""

_BAR_WIDTH = 30
_BAR_PAUSE_S = 0.1


class Exit(IntEnum):
    """Exit codes; 2 is argparse's for a usage error, 130 and 143 are a shell's for SIGINT and SIGTERM."""

    OK = 0
    FAILED = 1
    """Any other error; the message has the details."""
    USAGE = 2
    UNHEALTHY = 3
    """The database responds but does not accept writes."""
    SCHEMA_MISMATCH = 4
    """The schema of the database or the backup is older or newer than this version's, or missing."""
    CONFIGURATION = 5
    """A setting is invalid, or a program is missing."""
    UNAVAILABLE = 6
    """The database cannot be reached or timed out, or a disk is full."""
    INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    given = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        run: Callable[[argparse.Namespace], Answer] = given.run
        status, facts, words = run(given)
    except KeyboardInterrupt:
        return _fail(given, Exit.INTERRUPTED, "KeyboardInterrupt", "interrupted")
    except MeshStorageError as error:
        return _fail(given, _exit_of(error), type(error).__name__, str(error))
    print(json.dumps(facts) if given.json else words)  # noqa: T201
    return status


def _fail(given: argparse.Namespace, status: Exit, error: str, message: str) -> Exit:
    if given.json:
        print(json.dumps({"error": error, "message": message}))  # noqa: T201
    else:
        print(f"mesh-storage: {message}", file=sys.stderr)  # noqa: T201
    return status


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object")
    connection_options = argparse.ArgumentParser(add_help=False)
    connection_options.add_argument(
        "--url", help="database URL; put a password in MESH_STORAGE_URL, not on the command line"
    )
    parser = argparse.ArgumentParser(
        prog="mesh-storage",
        description="Administer a mesh_storage database. Settings come from the environment (MESH_STORAGE_URL, ...) "
        "and from .env.",
        epilog="Exit codes: 0 success; 1 error; 2 usage error; 3 unhealthy; 4 schema older, newer or missing; "
        "5 configuration error; 6 database unavailable; 130 interrupted.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[[argparse.Namespace, Server], Answer], words: str, *, create: bool = True
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, parents=[connection_options, common], help=words, description=words[0].upper() + words[1:]
        )
        command.set_defaults(run=partial(_on_server, run, create=create))
        return command

    add("health", _health, "check that the database responds, accepts writes and has the current schema", create=False)
    add("schema", _schema, "show the current, head and pending schema revisions", create=False)
    add("upgrade", _upgrade, "upgrade the schema to the head revision")
    backup_command = add("backup", _backup, "take a backup without blocking reads or writes", create=False)
    backup_command.add_argument("path", help="the directory to create")
    backup_command.add_argument(
        "--verify", action="store_true", help="test-restore it into a temporary server before it is renamed into place"
    )
    psql_command = add("psql", _psql, "start psql on the database", create=False)
    psql_command.add_argument("arguments", nargs="*", help="arguments of psql; put options after --")
    restore_command = add("restore", _restore, "restore a backup in one transaction")
    restore_command.add_argument("path", help="the backup directory")
    restore_command.add_argument("--overwrite", action="store_true", help="replace the rows in the tables")
    words = "verify a backup by restoring it into a temporary server"
    verify_command = commands.add_parser(
        "verify", parents=[common], help=words, description=words[0].upper() + words[1:]
    )
    verify_command.set_defaults(run=_verify)
    verify_command.add_argument("path", help="the backup directory")
    for command in (backup_command, restore_command, verify_command):
        command.add_argument(
            "--jobs", type=_jobs, default=backup.JOBS, metavar="N", help="parallel jobs (default: %(default)s)"
        )
    return parser


def _jobs(words: str) -> int:
    jobs = int(words)
    try:
        backup.check_jobs(jobs)
    except InvalidInputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return jobs


def _on_server(
    run: Callable[[argparse.Namespace, Server], Answer], given: argparse.Namespace, *, create: bool
) -> Answer:
    settings = Settings() if given.url is None else Settings(url=SecretStr(given.url))
    server = open_server(settings, create=create)
    try:
        return run(given, server)
    finally:
        server.close()


def _ask(server: Server) -> Health:
    """Check the health without upgrading an embedded database's schema, as opening a storage would."""
    with MeshStorage(Settings(), replace(server, embedded=None)) as storage:
        return storage.health()


def _health(_given: argparse.Namespace, server: Server) -> Answer:
    health = _ask(server)
    facts = {
        "ok": health.ok,
        "connected": health.connected,
        "writable": health.writable,
        "round_trip_ms": health.round_trip_ms,
        "revision": health.revision,
        "head": health.head,
        "error": None if health.error is None else type(health.error).__name__,
        "message": None if health.error is None else str(health.error),
    }
    if health.error is not None:
        return _exit_of(health.error), facts, str(health.error)
    if not health.writable:
        return Exit.UNHEALTHY, facts, "the database does not accept writes: it is a standby or read-only"
    if not health.ok:
        words = f"the schema is at revision {health.revision or 'none'}; this mesh_storage requires {health.head}"
        return Exit.SCHEMA_MISMATCH, facts, words
    return Exit.OK, facts, f"healthy: schema {health.revision}, round trip {health.round_trip_ms:.1f} ms"


def _schema(_given: argparse.Namespace, server: Server) -> Answer:
    health = _ask(server)
    if health.error is not None:
        raise health.error
    known = schema.revisions()
    current, head = health.revision, health.head
    pending = known[known.index(current) + 1 :] if current in known else known if current is None else ()
    facts = {"current": current, "head": head, "pending": list(pending)}
    words = f"current {current or 'none'}, head {head}, pending {', '.join(pending) or 'none'}"
    return Exit.OK if current == head else Exit.SCHEMA_MISMATCH, facts, words


def _upgrade(_given: argparse.Namespace, server: Server) -> Answer:
    before = _ask(server)
    if before.error is not None:
        raise before.error
    if before.revision is not None and before.revision not in schema.revisions():
        schema.check(before.revision)
    schema.upgrade_server(server)
    facts = {"before": before.revision, "current": schema.head()}
    return Exit.OK, facts, f"the schema is at revision {schema.head()} (was {before.revision or 'none'})"


def _backup(given: argparse.Namespace, server: Server) -> Answer:
    with _progress_bar() as progress:
        made = backup.backup(server, given.path, jobs=given.jobs, verify=given.verify, progress=progress)
    done = "written and verified" if given.verify else "written"
    return Exit.OK, _facts(given, made), f"{done}: {given.path} ({_summary(made)})"


def _restore(given: argparse.Namespace, server: Server) -> Answer:
    with _progress_bar() as progress:
        made = backup.restore(server, given.path, overwrite=given.overwrite, jobs=given.jobs, progress=progress)
    upgraded = "" if made.revision == schema.head() else f", upgraded to {schema.head()}"
    return Exit.OK, _facts(given, made), f"restored: {given.path} ({_summary(made)}{upgraded})"


def _psql(given: argparse.Namespace, server: Server) -> NoReturn:
    with engine.connect(server.connect) as connection:
        environment, public = client_tools.same_server(connection)
    program = shutil.which("psql") or embedded.programs() / "psql"
    signal.signal(signal.SIGINT, _ignore_interrupt)
    raise SystemExit(subprocess.call([program, f"--dbname={public}", *given.arguments], env=environment))


def _ignore_interrupt(_number: int, _frame: object) -> None:
    """Do nothing: psql receives Ctrl-C too and cancels its own query."""


def _verify(given: argparse.Namespace) -> Answer:
    with _progress_bar() as progress:
        made = backup.verify(given.path, jobs=given.jobs, progress=progress)
    return Exit.OK, _facts(given, made), f"verified: {given.path} ({_summary(made)})"


def _facts(given: argparse.Namespace, made: Manifest) -> dict[str, Any]:
    return {
        "path": given.path,
        "created": made.created.isoformat(),
        "revision": made.revision,
        "server_version": made.server_version,
        "tool_version": made.tool_version,
        "rows": made.rows,
    }


def _summary(made: Manifest) -> str:
    return f"{sum(made.rows.values()):,} rows, schema {made.revision}, taken {made.created:%Y-%m-%d %H:%M:%S %Z}"


@contextmanager
def _progress_bar() -> Generator[Callable[[Progress], None] | None]:
    """Yield a function that draws a progress bar on stderr, or None if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    drawn, step = 0.0, ""

    def draw(made: Progress) -> None:
        nonlocal drawn, step
        if made.step == step and made.done < made.total and time.monotonic() - drawn < _BAR_PAUSE_S:
            return
        drawn, step = time.monotonic(), made.step
        part = made.done / made.total if made.total else 1.0
        bar = "#" * int(part * _BAR_WIDTH)
        sys.stderr.write(f"\r\033[K{step:>5} [{bar:<{_BAR_WIDTH}}] {part:4.0%} {made.done:,}/{made.total:,}")
        sys.stderr.flush()

    try:
        yield draw
    finally:
        sys.stderr.write("\r\033[K")
        sys.stderr.flush()


def _exit_of(error: MeshStorageError) -> Exit:
    if isinstance(error, SchemaMismatchError):
        return Exit.SCHEMA_MISMATCH
    if isinstance(error, ConfigurationError):
        return Exit.CONFIGURATION
    return Exit.UNAVAILABLE if isinstance(error, UnavailableError | StorageTimeoutError) else Exit.FAILED


def _terminate(number: int, _frame: object) -> NoReturn:
    """Exit by raising an exception, so that all cleanup runs."""
    raise SystemExit(128 + number)
