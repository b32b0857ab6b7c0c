"""PostgreSQL servers of the tests' own, which can be killed, frozen, restarted, copied and promoted."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import psycopg

PASSWORD = "p@ss word'\\"  # noqa: S105 - of servers that live for a test
RAM = Path("/dev/shm")  # noqa: S108 - a directory of its own is made in it
_STANDBY = "standby"


class PostgresServer:
    """A server with a directory of its own, which asks for a password."""

    def __init__(self, programs: Path, home: Path, *options: str, port: int = 5432) -> None:
        self.port = port
        self._programs = programs
        self._home = home
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._account: dict[str, Any] = {}
        if os.geteuid() == 0:  # PostgreSQL refuses it
            known = {entry.pw_name: entry for entry in pwd.getpwall()}
            entry = known.get("postgres") or known["nobody"]
            os.chown(home, entry.pw_uid, entry.pw_gid)
            self._account = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}

    @property
    def data(self) -> Path:
        """The directory of its data."""
        return self._home / "data"

    @property
    def connect(self) -> dict[str, Any]:
        """How a superuser connects to its socket."""
        here = {"host": str(self._home), "port": self.port}
        return {**here, "user": "postgres", "password": PASSWORD, "dbname": "postgres"}

    def create(self) -> None:
        """Make new data."""
        secret = self._home / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        login = ["--username=postgres", "--auth=scram-sha-256", f"--pwfile={secret}"]
        self._run("initdb", "-D", self.data, *login, "--encoding=UTF8", "--no-locale", "--no-sync")

    def copy(self, primary: PostgresServer, name: str) -> None:
        """Make the data of a standby, which follows another server under a name."""
        source = f"host={primary.connect['host']} port={primary.port} user=postgres application_name={name}"
        arguments = ["-D", self.data, "-d", source, "-R", "--checkpoint=fast", "--no-sync"]
        self._run("pg_basebackup", *arguments, env={"PGPASSWORD": PASSWORD})

    def start(self, *options: str) -> None:
        """Start it and wait until it answers."""
        arguments = ["-D", self.data, "-k", self._home, "-p", str(self.port), "-c", "fsync=off"]
        with (self._home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", *arguments, *self._options, *options],
                cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                **self._account,
            )  # fmt: skip
        deadline = time.monotonic() + 60
        while self._status() not in ("ready", "standby"):
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.01)

    def stop(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """Stop it by a signal to its postmaster (PostgreSQL manual, 18.5), or kill all of it at once by SIGKILL."""
        if how == signal.SIGKILL:
            self.freeze()  # nothing is forked any more
        pids = self.processes() if how == signal.SIGKILL else self.processes()[:1]
        for pid in pids:
            send(pid, how)
        assert self._process is not None, "it has been started"
        self._process.wait(60)
        while any(map(_runs, pids)):  # its shared memory is in use until all have ended
            time.sleep(0.01)

    def end(self) -> None:
        """Kill it, unless it has ended."""
        if self._process is not None and self._process.poll() is None:
            self.stop(signal.SIGKILL)

    def freeze(self) -> None:
        """Let all of it stand still, as a paused machine does."""
        send(self.processes()[0], signal.SIGSTOP)
        for pid in self.processes():
            send(pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let all of it go on."""
        for pid in reversed(self.processes()):
            send(pid, signal.SIGCONT)

    def processes(self) -> list[int]:
        """Return the process ids, the postmaster's first."""
        assert self._process is not None, "it has been started"
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        return [pid, *map(int, children.split())]

    def log(self) -> str:
        """Return what it has logged last."""
        return (self._home / "log").read_text(errors="replace")[-4000:]

    def _status(self) -> str:
        """Return its status by postmaster.pid (PostgreSQL's source, utils/pidfile.h)."""
        with suppress(OSError):
            lines = (self.data / "postmaster.pid").read_text().split("\n")
            if self._process is not None and lines[0] == str(self._process.pid):
                return "".join(lines[7:8]).strip()
        return ""

    def _run(self, program: str, *arguments: object, env: dict[str, str] | None = None) -> None:
        subprocess.run(
            [self._programs / program, *map(str, arguments)], check=True, cwd="/", stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, env={**os.environ, **(env or {})}, **self._account,
        )  # fmt: skip


@contextmanager
def new_server(programs: Path, *options: str, port: int = 5432) -> Generator[PostgresServer]:
    """Yield a server in RAM without data, which is to be started in the block and ends with it."""
    home = Path(tempfile.mkdtemp(prefix="mesh_storage-test-", dir=RAM if os.access(RAM, os.W_OK) else None))
    try:
        home.chmod(0o711)
        server = PostgresServer(programs, home, *options, port=port)
        try:
            yield server
        finally:
            server.end()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def unused_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def _runs(pid: int) -> bool:
    """Return whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def send(pid: int, what: signal.Signals) -> None:
    """Send a signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, what)


class Cluster:
    """A primary and a synchronous standby, until that is promoted; it acknowledges nothing that the standby lacks."""

    def __init__(self, primary: PostgresServer, standby: PostgresServer) -> None:
        self.primary = primary
        self.standby: PostgresServer | None = standby
        self._ports = primary.port, standby.port

    def start(self) -> None:
        """Make and start both."""
        assert self.standby is not None, "it has not been promoted"
        self.primary.create()
        self.primary.start()
        self.standby.copy(self.primary, _STANDBY)
        self.standby.start()
        self.restart(signal.SIGTERM)

    def restart(self, how: signal.Signals) -> None:
        """Restart the primary."""
        self.primary.stop(how)
        names = [] if self.standby is None else ["-c", f"synchronous_standby_names={_STANDBY}"]
        self.primary.start(*names)

    def promote(self) -> None:
        """Let the standby take the place of the primary, which is dead, or frozen and then killed."""
        assert self.standby is not None, "it has not been promoted"
        old, self.primary, self.standby = self.primary, self.standby, None
        with self.session() as session:
            session.execute("SELECT pg_promote()")
        old.end()

    @contextmanager
    def session(self) -> Generator[psycopg.Connection[Any]]:
        """Yield a superuser's session on the primary."""
        with psycopg.connect(**self.primary.connect, autocommit=True) as connection:
            yield connection

    @property
    def url(self) -> str:
        """The URL of whichever of the two accepts writes."""
        hosts = ",".join(f"127.0.0.1:{port}" for port in self._ports)
        parameters = urlencode({"target_session_attrs": "read-write"})
        return f"postgresql://postgres:{quote(PASSWORD, '')}@{hosts}/postgres?{parameters}"


def _options() -> list[str]:
    parameters = {
        "listen_addresses": "127.0.0.1",
        "wal_retrieve_retry_interval": "100ms",
        "log_min_messages": "fatal",
        "max_connections": "60",
    }
    return [option for name, value in parameters.items() for option in ("-c", f"{name}={value}")]


@contextmanager
def new_cluster(programs: Path) -> Generator[Cluster]:
    """Yield a primary and a standby that run."""
    options = _options()
    with (
        new_server(programs, *options, port=unused_port()) as primary,
        new_server(programs, *options, port=unused_port()) as standby,
    ):
        cluster = Cluster(primary, standby)
        cluster.start()
        yield cluster


class Replication:
    """A primary and asynchronous standbys, any of which may be stopped, paused, promoted, or follow another."""

    def __init__(self, primary: PostgresServer, standbys: list[PostgresServer]) -> None:
        self.primary = primary
        self.standbys = standbys

    def start(self) -> None:
        """Make and start all of them."""
        self.primary.create()
        self.primary.start()
        for number, standby in enumerate(self.standbys):
            standby.copy(self.primary, f"{_STANDBY}{number}")
            standby.start()

    def promote(self, standby: PostgresServer) -> None:
        """Let a standby take the place of the primary, which is dead, or goes on beside it."""
        self.standbys.remove(standby)
        execute(standby, "SELECT pg_promote()")
        self.primary = standby

    def follow(self, standby: PostgresServer) -> None:
        """Let a standby follow the present primary."""
        place = f"host={self.primary.connect['host']} port={self.primary.port} user=postgres"
        secret = PASSWORD.replace("\\", "\\\\").replace("'", "\\'")
        conninfo = f"{place} password='{secret}' application_name={_STANDBY}"
        execute(standby, f"ALTER SYSTEM SET primary_conninfo = '{conninfo.replace(chr(39), chr(39) * 2)}'")
        execute(standby, "SELECT pg_reload_conf()")

    def url(self, *servers: PostgresServer, **parameters: str) -> str:
        """Return the URL of some servers, the primary if none is given."""
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in servers or [self.primary])
        query = f"?{urlencode(parameters)}" if parameters else ""
        return f"postgresql://postgres:{quote(PASSWORD, '')}@{hosts}/postgres{query}"

    def await_replay(self, *standbys: PostgresServer) -> None:
        """Wait until standbys have replayed what the primary has on disk."""
        [(position,)] = execute(self.primary, "SELECT pg_current_wal_flush_lsn()::text")
        for standby in standbys or self.standbys:
            deadline = time.monotonic() + 30
            while execute(standby, f"SELECT pg_last_wal_replay_lsn() < '{position}'") != [(False,)]:
                assert time.monotonic() < deadline, standby.log()
                time.sleep(0.01)


def execute(server: PostgresServer, sql: str) -> list[tuple[Any, ...]]:
    """Execute a statement as a superuser, and return its rows."""
    with psycopg.connect(**server.connect, autocommit=True) as connection:
        cursor = connection.execute(sql.encode())
        return cursor.fetchall() if cursor.description else []


@contextmanager
def new_replication(programs: Path, *options: str, standbys: int = 2) -> Generator[Replication]:
    """Yield a primary and standbys that run."""
    with ExitStack() as stack:
        servers = [
            stack.enter_context(new_server(programs, *_options(), *options, port=unused_port()))
            for _ in range(1 + standbys)
        ]
        replication = Replication(servers[0], servers[1:])
        replication.start()
        yield replication
