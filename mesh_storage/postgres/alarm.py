"""What is to be done at a moment, while the caller's thread waits for the server.

One thread does it for all, and only while there is anything: a thread for each would cost more than a statement.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

logger = logging.getLogger("mesh_storage")


class Alarm(Protocol):
    """What will be done at a moment, unless it is called off."""

    def cancel(self) -> None:
        """Call it off; afterwards it is done, or will never be."""
        ...


class _Clock:
    def __init__(self) -> None:
        self._alarms: set[_ThreadAlarm] = set()
        self._changed = threading.Condition()
        self._running = False
        self._next = math.inf

    def set(self, alarm: _ThreadAlarm) -> None:
        with self._changed:
            if not self._running:
                threading.Thread(target=self._run, name="mesh_storage alarms", daemon=True).start()
                self._running = True
            self._alarms.add(alarm)
            if alarm.moment < self._next:
                self._changed.notify()

    def unset(self, alarm: _ThreadAlarm) -> None:
        with self._changed:
            # The thread is not woken for that: it sees it at the moment for which it waits anyway.
            self._alarms.discard(alarm)

    def _run(self) -> None:
        with self._changed:
            try:
                while self._alarms:
                    self._next = min(alarm.moment for alarm in self._alarms)
                    self._changed.wait(max(0.0, self._next - time.monotonic()))
                    now = time.monotonic()
                    for alarm in [alarm for alarm in self._alarms if alarm.moment <= now]:
                        self._alarms.discard(alarm)
                        try:
                            alarm.action()
                        except Exception:  # The others must have their turn.
                            logger.exception("an alarm failed")
            finally:
                self._running = False
                self._next = math.inf


class _ThreadAlarm:
    def __init__(self, clock: _Clock, moment: float, action: Callable[[], None]) -> None:
        self.moment = moment
        self.action = action
        self._clock = clock
        clock.set(self)

    def cancel(self) -> None:
        self._clock.unset(self)


def at(moment: float, action: Callable[[], None]) -> Alarm:
    """Do something quick at a moment of `time.monotonic()`, in a thread of the library's own."""
    return _ThreadAlarm(_clock, moment, action)


def _after_fork_in_child() -> None:
    """Begin anew: the thread is the parent's, and so are the alarms."""
    global _clock  # noqa: PLW0603 - what a fork leaves behind can only be replaced
    _clock = _Clock()


_clock = _Clock()
os.register_at_fork(after_in_child=_after_fork_in_child)
