"""The command line for operators: health, schema, upgrade, backup, restore, verify, psql; exit codes for scripts.

It imports nothing heavy, so that `--help` answers at once; what the commands do is in `commands`.
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
_SHELLS = ("bash", "zsh", "tcsh", "fish", "powershell")


class Exit(IntEnum):
    """The exit codes; 2 is argparse's for a wrong command line, 130 and 143 are a shell's for Ctrl-C and SIGTERM."""

    OK = 0
    FAILED = 1
    """Anything else: the message says what."""
    USAGE = 2
    UNHEALTHY = 3
    """The database answers but takes no writes."""
    SCHEMA_MISMATCH = 4
    """The schema of the database or of the backup is behind, ahead or not there."""
    CONFIGURATION = 5
    """A setting is wrong, or a program is missing."""
    UNAVAILABLE = 6
    """The database cannot be reached, does not answer in time, or a disk is full."""
    INTERRUPTED = 130
    TERMINATED = 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, and give its exit code."""
    line = parser()
    given = line.parse_args(arguments)
    if given.url is not None and not given.on_server:
        line.error(f"{given.command} asks no database: leave out --url")
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
    """Make the parser of the command line; `directories` is what completes the name of a directory."""
    everywhere = argparse.ArgumentParser(add_help=False)
    reaching = argparse.ArgumentParser(add_help=False)
    made = argparse.ArgumentParser(
        prog="mesh-storage",
        description="Look after a database of mesh_storage. Settings come from the environment (MESH_STORAGE_URL, ...) "
        "and from .env.",
        epilog="Exit codes: 0 done; 1 failed; 2 wrong command line; 3 unhealthy; 4 schema behind, ahead or not there; "
        "5 configuration; 6 unavailable; 130 interrupted; 143 terminated.",
    )
    made.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    # Both stand before the command or behind it, where no default may take the place of what stood before.
    where = "where the database is; a password is safer in MESH_STORAGE_URL"
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

    add("health", "say whether the database answers, takes writes and has the right schema")
    add("schema", "show the revision of the database, the newest, and those pending")
    add("upgrade", "bring the schema up to date")
    taking = add("backup", "write a backup while the traffic goes on")
    taking.add_argument("--verify", action="store_true", help="restore it into a throw-away server before it counts")
    asking = add("psql", "start psql on the database")
    asking.add_argument("arguments", nargs="*", help="for psql; options go behind --")
    giving = add("restore", "restore a backup, all or nothing")
    giving.add_argument("--overwrite", action="store_true", help="replace what the tables hold")
    proving = add("verify", "prove a backup by restoring it into a throw-away server", on_server=False)
    for command in (taking, giving, proving):
        path = command.add_argument("path", help=f"the directory {'to make' if command is taking else 'of the backup'}")
        if directories is not None:
            vars(path)["complete"] = directories
        command.add_argument("--jobs", type=_jobs, default=_JOBS, metavar="N", help="processes at once (%(default)s)")
    completing = add("completion", "print a script by which a shell completes this command line", on_server=False)
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


def _terminate(number: int, _frame: object) -> NoReturn:
    """End as by an exception, so that nothing is left behind."""
    raise SystemExit(128 + number)
