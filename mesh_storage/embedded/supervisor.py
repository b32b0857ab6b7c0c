"""The process that runs a bundled PostgreSQL for as long as some process uses it.

Started by embedded.py as a script of its own, so it needs the standard library only. Each user holds a connection to
its control socket, which ends with the process however that dies. When the last one is gone, the server stops. When the
server dies while it has users, it is started again and recovers what was committed.
"""

from __future__ import annotations

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
RESTARTS_IN_A_ROW = 120
"""After a crash, the processes of the old server may take their time to end, and hold its shared memory meanwhile."""
FIRST_USER_TIMEOUT_S = 10.0
PORT = 5432
"""The name of the socket, whatever PGPORT says."""
STATUS_LINE = 7
"""Where postmaster.pid says whether the server is ready (PostgreSQL's source, utils/pidfile.h)."""


class Supervisor:
    """One server, its users, and what is to be left behind."""

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
        self.recovering = False
        self.crashes = 0
        self.selector = selectors.DefaultSelector()
        self.wakeup = socket.socketpair()

    def run(self) -> None:
        """Serve until the last user is gone."""
        listener = self._listen()
        wakeup_read, wakeup_write = self.wakeup  # For as long as this process lives: signals come to its end.
        wakeup_read.setblocking(False)
        wakeup_write.setblocking(False)
        signal.set_wakeup_fd(wakeup_write.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _wake_up)
        signal.signal(signal.SIGTERM, _end)
        self.selector.register(listener, selectors.EVENT_READ)
        self.selector.register(wakeup_read, selectors.EVENT_READ)
        self._create()
        self._start()
        patience = time.monotonic() + FIRST_USER_TIMEOUT_S
        while self.users or (self.last is None and time.monotonic() < patience):
            waiting = self.server is not None and not self.ready
            for key, _ in self.selector.select(0.02 if waiting else 1.0):
                if key.fileobj is listener:
                    self._welcome(listener)
                elif key.fileobj is wakeup_read:
                    with suppress(BlockingIOError):
                        wakeup_read.recv(4096)
                else:
                    self._part(key.fileobj)
            self._watch()
        listener.close()

    def stop(self) -> None:
        """Stop the server and remove what is not to stay."""
        if self.server is not None and self.server.poll() is None:
            # SIGINT is the fast shutdown (PostgreSQL manual, 18.5); a throw-away server has nothing to save.
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
        listener = socket.socket(socket.AF_UNIX)
        path = self.sockets / "control"
        listener.bind(str(path))
        listener.listen(128)
        pointer = self.home / "control"
        temporary = pointer.with_name("control.new")
        temporary.write_text(str(path))
        temporary.replace(pointer)
        return listener

    def _create(self) -> None:
        """Make the cluster under another name first, so that a half-made one is never taken for a whole one."""
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
        _, words = self._program("initdb", *options, "--pgdata", str(unfinished), output=subprocess.PIPE).communicate()
        if not (unfinished / "PG_VERSION").exists():
            self.failure = f"initdb failed: {words.decode(errors='replace').strip()[-2000:]}"
        else:
            unfinished.replace(self.data)

    def _start(self) -> None:
        if self.failure:
            return
        self._stop_orphan()
        self.ready = False
        parameters = [option for parameter in self.parameters for option in ("-c", parameter)]
        with (self.home / "server.log").open("ab") as log:
            self.server = self._program(
                "postgres",
                "-D",
                str(self.data),
                "-k",
                str(self.sockets),
                "-p",
                str(PORT),
                *parameters,
                output=log.fileno(),
            )

    def _stop_orphan(self) -> None:
        """Stop a server whose supervisor was killed; two cannot run on one cluster."""
        try:
            process = int((self.data / "postmaster.pid").read_text().split("\n", 1)[0])
            command = Path(f"/proc/{process}/cmdline").read_bytes()
        except (OSError, ValueError):
            return
        if str(self.data).encode() in command:
            self._program("pg_ctl", "stop", "-D", str(self.data), "-m", "fast", "-w", output=subprocess.DEVNULL).wait()

    def _program(self, name: str, *arguments: str, output: int) -> subprocess.Popen[bytes]:
        """Start one of PostgreSQL's programs under the account for the server."""
        return subprocess.Popen(
            [str(self.programs / name), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output if name == "postgres" else subprocess.DEVNULL,
            stderr=output,
            cwd="/",
            user=self.user,
            group=self.group,
            extra_groups=None if self.user is None else [],
        )

    def _watch(self) -> None:
        """See whether the server has become ready, or has died."""
        if self.server is None:
            return
        if self.server.poll() is not None:
            self.crashes += 1
            if self.crashes >= (RESTARTS_IN_A_ROW if self.recovering else CRASHES_IN_A_ROW):
                self.failure = f"the server ends as soon as it starts; see {self.home / 'server.log'}"
                self.server = None
                self._tell_all()
                return
            time.sleep(min(0.1 * self.crashes, 0.5))
            self._start()
        elif not self.ready:
            with suppress(OSError):
                status = (self.data / "postmaster.pid").read_text().split("\n")
                if status[0] == str(self.server.pid) and status[STATUS_LINE : STATUS_LINE + 1] == ["ready   "]:
                    self.ready = self.recovering = True
                    self.crashes = 0
                    self._tell_all()

    def _welcome(self, listener: socket.socket) -> None:
        user, _ = listener.accept()
        self.users.add(user)
        self.selector.register(user, selectors.EVENT_READ)
        if self.ready or self.failure:
            self._tell(user)

    def _part(self, user: Any) -> None:
        with suppress(OSError):
            if user.recv(1):
                return
        self.selector.unregister(user)
        self.users.discard(user)
        if self.users:
            user.close()
        else:
            self.last = user  # Left open until this process ends, so that the last user can wait for that.

    def _tell_all(self) -> None:
        for user in self.users:
            self._tell(user)

    def _tell(self, user: socket.socket) -> None:
        with suppress(OSError):
            user.sendall((self.failure or "ready").encode() + b"\n")


def _wake_up(_number: int, _frame: object) -> None:
    """Do nothing: the signal has ended the wait already."""


def _end(_number: int, _frame: object) -> None:
    sys.exit()


def main() -> None:
    """Run in the background with the configuration that embedded.py gives as the first argument."""
    if os.fork():
        os._exit(0)
    supervisor = Supervisor(json.loads(sys.argv[1]))
    try:
        supervisor.run()
    finally:
        supervisor.stop()


if __name__ == "__main__":
    main()
