"""Disturbs a primary, its sessions and its synchronous standby, one thing at a time, and once promotes the standby."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import psycopg

from tests.chaos.record import Record
from tests.servers import Cluster, send

APPLICATION = "chaos"
_VICTIM = f"SELECT pid FROM pg_stat_activity WHERE application_name = '{APPLICATION}' ORDER BY random() LIMIT 1"


class Disturber:
    """Does something to the servers at random, again and again."""

    def __init__(self, cluster: Cluster, record: Record, seed: str) -> None:
        self._cluster = cluster
        self._record = record
        self._random = random.Random(seed)
        self._kinds: dict[Callable[[], object], int] = {
            self._terminate: 6,
            self._cancel: 6,
            self._freeze_session: 4,
            self._freeze: 2,
            self._kill_session: 1,
            self._kill: 1,
            self._restart: 1,
            self._freeze_standby: 2,
            self._restart_standby: 1,
        }

    def disturb(self, seconds: float) -> None:
        """Go on for so many seconds; promote the standby in the second half."""
        end = time.monotonic() + seconds
        promotion = end - seconds * self._random.uniform(0.2, 0.5)
        while time.monotonic() < end:
            time.sleep(self._random.uniform(0.1, 1.5))
            if self._cluster.standby is not None and time.monotonic() > promotion:
                self._promote()
            else:
                self._random.choices(list(self._kinds), list(self._kinds.values()))[0]()

    def _note(self, kind: str) -> None:
        self._record.disturbances[kind] += 1

    def _victim(self) -> int | None:
        """Return the process id of some session of the library's."""
        with self._cluster.session() as session:
            found = session.execute(_VICTIM).fetchone()
        return None if found is None else int(found[0])

    def _signal(self, function: str, kind: str) -> None:
        with self._cluster.session() as session:
            for (pid,) in session.execute(_VICTIM).fetchall():
                session.execute(f"SELECT {function}(%s)".encode(), [pid])
                self._note(kind)

    def _terminate(self) -> None:
        self._signal("pg_terminate_backend", "session terminated")

    def _cancel(self) -> None:
        self._signal("pg_cancel_backend", "statement cancelled")

    def _freeze_session(self) -> None:
        if pid := self._victim():
            send(pid, signal.SIGSTOP)
            time.sleep(self._random.uniform(0.2, 3.0))
            send(pid, signal.SIGCONT)
            self._note("session frozen")

    def _kill_session(self) -> None:
        """Kill a session, after which the server restarts all by itself."""
        if pid := self._victim():
            send(pid, signal.SIGKILL)
            self._note("session killed")
            self._await_primary()

    def _await_primary(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            time.sleep(0.05)
            with suppress(psycopg.OperationalError), self._cluster.session():
                return
            assert time.monotonic() < deadline, self._cluster.primary.log()

    def _freeze(self) -> None:
        self._cluster.primary.freeze()
        time.sleep(self._random.choice([0.5, 1.0, 3.0, 9.0]))
        self._cluster.primary.thaw()
        self._note("server frozen")

    def _kill(self) -> None:
        self._cluster.restart(signal.SIGKILL)
        self._note("server killed")

    def _restart(self) -> None:
        how = self._random.choice([signal.SIGINT, signal.SIGQUIT])
        self._cluster.restart(how)
        self._note("fast restart" if how == signal.SIGINT else "immediate restart")

    def _freeze_standby(self) -> None:
        if standby := self._cluster.standby:
            standby.freeze()
            time.sleep(self._random.uniform(0.2, 4.0))
            standby.thaw()
            self._note("standby frozen")

    def _restart_standby(self) -> None:
        if standby := self._cluster.standby:
            standby.stop()
            time.sleep(self._random.uniform(0.0, 3.0))
            standby.start()
            self._note("standby restarted")

    def _promote(self) -> None:
        if self._random.random() < 0.5:
            self._cluster.primary.freeze()
            time.sleep(self._random.uniform(0.0, 5.0))
            self._note("standby promoted, primary frozen")
        else:
            self._cluster.primary.end()
            self._note("standby promoted, primary killed")
        self._cluster.promote()
