"""The command line of operators: its parser and its exit codes.

Nothing heavy is imported until a command runs, so that `--help` and `--version` answer at once; `commands` runs them.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from enum import IntEnum
from typing import NoReturn

from mesh_storage import __version__

_JOBS = 4
_CHANGES_S = 3600
_CENTURY_S = 3_153_600_000
_SHELLS = ("bash", "zsh", "tcsh", "fish", "powershell")


class Exit(IntEnum):
    """The exit codes; 2 is argparse's for a usage error, 130 and 143 are a shell's for Ctrl-C and SIGTERM."""

    OK = 0
    FAILED = 1
    """Any other error; see the message."""
    USAGE = 2
    UNHEALTHY = 3
    """The database responds but does not accept writes."""
    SCHEMA_MISMATCH = 4
    """The schema of the database or backup is older or newer than required, or missing."""
    CONFIGURATION = 5
    """A setting is invalid, or a program is missing."""
    UNAVAILABLE = 6
    """The database cannot be reached or does not respond in time, or a disk is full."""
    INTERRUPTED = 130
    TERMINATED = 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    line = parser()
    given = line.parse_args(arguments)
    if given.url is not None and not given.on_server:
        line.error(f"{given.command} does not use a database; omit --url")
    import json

    from mesh_storage.cli import commands
    from mesh_storage.errors import MeshStorageError

    def fail(status: Exit, error: str, message: str) -> Exit:
        if given.json:
            print(json.dumps({"error": error, "message": message}))  # noqa: T201
        else:
            print(f"mesh-storage: {message}", file=sys.stderr)  # noqa: T201
        return status

    signal.signal(signal.SIGTERM, _terminate)
    try:
        status, facts, words = commands.run(given)
    except KeyboardInterrupt:
        return fail(Exit.INTERRUPTED, "KeyboardInterrupt", "interrupted")
    except MeshStorageError as error:
        return fail(commands.exit_of(error), type(error).__name__, str(error))
    print(json.dumps(facts) if given.json else words)  # noqa: T201
    return status


def parser(*, directories: object = None) -> argparse.ArgumentParser:
    """Return the parser; `directories` is what shtab completes the path of a directory with."""
    everywhere = argparse.ArgumentParser(add_help=False)
    reaching = argparse.ArgumentParser(add_help=False)
    made = argparse.ArgumentParser(
        prog="mesh-storage",
        description="Operate a mesh_storage database. Settings come from the environment (MESH_STORAGE_URL, ...) "
        "and from .env.",
        epilog="Exit codes: 0 success; 1 error; 2 usage error; 3 unhealthy; 4 schema older, newer or missing; "
        "5 configuration error; 6 database unavailable; 130 interrupted; 143 terminated.",
    )
    made.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    # Both are accepted before and after the command, where a default would override what was given before.
    where = "database URL; put a password in MESH_STORAGE_URL, not on the command line"
    made.add_argument("--url", help=where)
    reaching.add_argument("--url", default=argparse.SUPPRESS, help=where)
    for place, default in ((made, False), (everywhere, argparse.SUPPRESS)):
        place.add_argument("--json", action="store_true", default=default, help="print one JSON object")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, words: str, *, on_server: bool = True) -> argparse.ArgumentParser:
        parents = [reaching, everywhere] if on_server else [everywhere]
        command = commands.add_parser(name, parents=parents, help=words, description=words[0].upper() + words[1:])
        command.set_defaults(on_server=on_server)
        return command

    add("health", "check that the database responds, accepts writes and has the current schema")
    add("schema", "show the current, head and pending schema revisions")
    add("upgrade", "upgrade the schema to the head revision")
    granting = add("roles", "print what to grant to the roles of a service and of a reader, or grant it")
    granting.add_argument("--service", metavar="NAME", help="a role that uses the repositories")
    granting.add_argument("--reader", metavar="NAME", help="a role that reads, and takes backups")
    granting.add_argument("--apply", action="store_true", help="grant it, all or nothing, as the owner of the tables")
    spreading = add("distribute", "distribute what grows over the workers of Citus, beside other sessions")
    spreading.add_argument("--dry-run", action="store_true", help="only show what it changes, lacks and does")
    keeping = add("maintain", "remove what has expired and what is no longer kept, in steps that hold nobody up")
    keeping.add_argument("--every", type=_interval, metavar="SECONDS", help="stay, and repeat it after so many seconds")
    keeping.add_argument(
        "--changes-older-than",
        type=_seconds,
        default=_CHANGES_S,
        metavar="SECONDS",
        help="age of the changes that are no longer kept for watchers (%(default)s)",
    )
    keeping.add_argument(
        "--messages-older-than",
        type=_seconds,
        metavar="SECONDS",
        help="age of the messages to remove; none if not given",
    )
    taking = add("backup", "take a backup without blocking reads or writes")
    taking.add_argument(
        "--verify", action="store_true", help="test-restore it into a temporary server before it is renamed into place"
    )
    asking = add("psql", "start psql on the database")
    asking.add_argument("arguments", nargs="*", help="arguments of psql; put options after --")
    giving = add("restore", "restore a backup in one transaction")
    giving.add_argument("--overwrite", action="store_true", help="replace the rows in the tables")
    proving = add("verify", "verify a backup by restoring it into a temporary server", on_server=False)
    for command in (taking, giving, proving):
        path = command.add_argument(
            "path", help=f"the directory {'to create' if command is taking else 'of the backup'}"
        )
        if directories is not None:
            vars(path)["complete"] = directories
        command.add_argument(
            "--jobs", type=_jobs, default=_JOBS, metavar="N", help="number of parallel processes (%(default)s)"
        )
    completing = add("completion", "print a completion script for a shell", on_server=False)
    completing.add_argument("shell", choices=_SHELLS)
    return made


def _jobs(words: str) -> int:
    from mesh_storage import backup
    from mesh_storage.errors import InvalidInputError

    jobs = int(words)
    try:
        backup.check_jobs(jobs)
    except InvalidInputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return jobs


def _seconds(words: str) -> float:
    seconds = float(words)
    if not 0 <= seconds <= _CENTURY_S:
        raise argparse.ArgumentTypeError(f"must be from 0 to {_CENTURY_S}")
    return seconds


def _interval(words: str) -> float:
    seconds = _seconds(words)
    if not seconds:
        raise argparse.ArgumentTypeError("must be more than 0, or the database would have no rest")
    return seconds


def _terminate(number: int, _frame: object) -> NoReturn:
    """Exit by an exception, so that everything is cleaned up."""
    raise SystemExit(128 + number)
