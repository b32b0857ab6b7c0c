"""The commands of `mesh-storage`; imported only when one runs."""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any, NoReturn, TypeAlias

from mesh_storage import backup, schema
from mesh_storage.backup import Progress, client_tools
from mesh_storage.backup.manifest import Manifest
from mesh_storage.cli import Exit
from mesh_storage.cli import parser as command_line
from mesh_storage.embedded import server as embedded
from mesh_storage.errors import (
    ConfigurationError,
    MeshStorageError,
    SchemaMismatchError,
    StorageTimeoutError,
    UnavailableError,
)
from mesh_storage.health import Health, ReplicaHealth
from mesh_storage.postgres import engine
from mesh_storage.postgres.server import Server, open_server
from mesh_storage.schema import distribution, roles
from mesh_storage.settings import Settings, settings_of
from mesh_storage.storage import MeshStorage

Answer: TypeAlias = tuple["Exit", dict[str, Any], str]
"""Exit code of a command, its result as JSON fields, and the same result as text."""

_BAR_WIDTH = 30
_BAR_PAUSE_S = 0.1


def run(given: argparse.Namespace) -> Answer:
    """Run the command.

    Raises:
        MeshStorageError: It failed; `exit_of` has the exit code.
    """
    without_server = {"verify": _verify, "completion": _completion}.get(given.command)
    if without_server is not None:
        return without_server(given)
    server = open_server(settings_of(given.url), create=given.command in ("upgrade", "restore"))
    try:
        return _ON_SERVER[given.command](given, server)
    finally:
        server.close()


def exit_of(error: MeshStorageError) -> Exit:
    """Return the exit code for an error."""
    if isinstance(error, SchemaMismatchError):
        return Exit.SCHEMA_MISMATCH
    if isinstance(error, ConfigurationError):
        return Exit.CONFIGURATION
    return Exit.UNAVAILABLE if isinstance(error, UnavailableError | StorageTimeoutError) else Exit.FAILED


def _ask(server: Server) -> Health:
    """Check without deploying a schema, which opening a storage may do."""
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
        "missing_privileges": list(health.missing_privileges),
        "silent_workers": list(health.silent_workers),
        "replicas": [_replica(each) for each in health.replicas],
        "error": None,
        "message": None,
    }
    lacking = f"this role lacks {'; '.join(health.missing_privileges)} (see Roles and grants in docs/operations.md)"
    error = health.error
    if error is None and not health.writable:
        words = "the database does not accept writes: it is a standby, or read-only"
        return Exit.UNHEALTHY, {**facts, "message": words}, words
    try:
        if error is not None:
            raise error
        schema.check(health.revision)
        if health.silent_workers:
            raise UnavailableError(f"workers do not answer: {', '.join(health.silent_workers)}")
        if not health.ok:
            raise ConfigurationError(lacking)
    except MeshStorageError as wrong:
        return exit_of(wrong), {**facts, "error": type(wrong).__name__, "message": str(wrong)}, str(wrong)
    words = f"healthy: schema {health.revision}, answered in {health.round_trip_ms:.1f} ms"
    for each in health.replicas:
        lag = "lag unknown" if each.lag_bytes is None else f"{each.lag_bytes} bytes behind"
        words += f"; replica {each.address}: {each.error or lag}"
    return Exit.OK, facts, f"{words}; {lacking}" if health.missing_privileges else words


def _replica(health: ReplicaHealth) -> dict[str, object]:
    return {
        "address": health.address,
        "connected": health.connected,
        "lag_bytes": health.lag_bytes,
        "lag_s": None if health.lag is None else health.lag.total_seconds(),
        "error": None if health.error is None else type(health.error).__name__,
    }


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
    return Exit.OK, facts, f"the schema is at {schema.head()} (it was at {before.revision or 'none'})"


def _roles(given: argparse.Namespace, server: Server) -> Answer:
    statements = roles.grants_on(server, service=given.service, reader=given.reader, apply=given.apply)
    names = " and ".join(name for name in (given.service, given.reader) if name is not None)
    words = f"granted to {names}" if given.apply else "".join(f"{each};\n" for each in statements).rstrip()
    return Exit.OK, {"applied": given.apply, "statements": list(statements)}, words


def _distribute(given: argparse.Namespace, server: Server) -> Answer:
    planned = distribution.distribute_server(server, apply=False)
    facts = {"applied": not given.dry_run, **asdict(planned)}
    parts = {"changes": planned.changes, "lacking": planned.lacking, "statements": planned.statements}
    words = "\n".join(f"{name}:\n" + "".join(f"  {each}\n" for each in part) for name, part in parts.items() if part)
    words = words.rstrip() or "nothing is left to do"
    if given.dry_run:
        return Exit.CONFIGURATION if planned.lacking else Exit.OK, facts, words
    if not given.json:
        print(words, flush=True)  # noqa: T201
    distribution.distribute_server(server, apply=True)
    return Exit.OK, facts, f"distributed: {', '.join(distribution.COLUMNS)}"


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


def _maintain(given: argparse.Namespace, server: Server) -> Answer:
    """Remove what is to be removed, once, or with `--every` until a signal; an outage or a lock then ends nothing."""
    messages = None if given.messages_older_than is None else timedelta(seconds=given.messages_older_than)
    with MeshStorage(Settings(), replace(server, embedded=None)) as storage:
        while True:
            try:
                made = storage.maintain(
                    changes_older_than=timedelta(seconds=given.changes_older_than), messages_older_than=messages
                )
            except MeshStorageError as error:
                if given.every is None or not (error.retryable or isinstance(error, StorageTimeoutError)):
                    raise
                print(f"mesh-storage: {error}", file=sys.stderr)  # noqa: T201
            else:
                words = f"removed: {made.expired:,} expired, {made.changes:,} changes, {made.messages:,} messages"
                if given.every is None:
                    return Exit.OK, asdict(made), words
                print(json.dumps(asdict(made)) if given.json else words, flush=True)  # noqa: T201
            time.sleep(given.every)


def _psql(given: argparse.Namespace, server: Server) -> NoReturn:
    with engine.connect(server.connect) as connection:
        environment, public = client_tools.same_server(connection)
    program = shutil.which("psql") or embedded.programs() / "psql"
    signal.signal(signal.SIGINT, _leave_to_psql)
    raise SystemExit(subprocess.call([program, f"--dbname={public}", *given.arguments], env=environment))


def _leave_to_psql(_number: int, _frame: object) -> None:
    """Ignore Ctrl-C, which psql receives as well and handles itself."""


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
    """Draw a progress bar on stderr if it is a terminal, and remove it at the end."""
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


def _completion(given: argparse.Namespace) -> Answer:
    try:
        import shtab
    except ImportError as error:
        raise ConfigurationError("completion needs the extra completion: install mesh-storage[completion]") from error
    script = shtab.complete(command_line(directories=shtab.DIRECTORY), shell=given.shell)
    return Exit.OK, {"shell": given.shell, "script": script}, script


_ON_SERVER: dict[str, Callable[[argparse.Namespace, Server], Answer]] = {
    "health": _health,
    "schema": _schema,
    "upgrade": _upgrade,
    "roles": _roles,
    "distribute": _distribute,
    "maintain": _maintain,
    "backup": _backup,
    "restore": _restore,
    "psql": _psql,
}
