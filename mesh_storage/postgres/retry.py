"""The retry policy of `run`: when to retry, and how long to wait."""

from __future__ import annotations

import inspect
import logging
import random
import time
from collections.abc import Mapping

from mesh_storage.errors import InvalidInputError, MeshStorageError

logger = logging.getLogger("mesh_storage")

_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 2.0
_LONGEST_S = 365 * 86_400


class Retry:
    """The attempts of one `run`, limited by number or by time."""

    def __init__(self, work: object, attempts: int, within: float | None, timeout: float | None) -> None:
        """Validate and store the arguments of `run`.

        Raises:
            InvalidInputError: An argument is invalid; names it.
        """
        if not callable(work):
            raise InvalidInputError(
                f"work must be a function that takes a unit of work, not {type(work).__name__}", field="work"
            )
        if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
            raise InvalidInputError("attempts must be an int, 1 or more", field="attempts")
        if within is not None and (
            isinstance(within, bool) or not isinstance(within, (int, float)) or not 0 < within <= _LONGEST_S
        ):
            raise InvalidInputError(
                f"within must be a number of seconds, more than 0 and at most {_LONGEST_S} (a year)", field="within"
            )
        self.work = work
        self.made = 0
        """The number of attempts that failed."""
        self.reason = ""
        """The class of the error of the last one."""
        self._attempts = attempts
        self._timeout = timeout
        self._end = None if within is None else time.monotonic() + within
        self._in_doubt = False

    def timeout(self) -> float | None:
        """Return the timeout of the next attempt: the caller's, or the remaining time if shorter."""
        if self._end is None:
            return self._timeout
        left = max(0.001, self._end - time.monotonic())
        return left if self._timeout is None else min(left, self._timeout)

    def pause(self, error: MeshStorageError) -> float | None:
        """Return the seconds to wait before the next attempt, or None to give up.

        Once the outcome of an attempt is unknown, no later failure says that nothing was committed.

        Exponential backoff with up to half of each delay random, so that conflicting transactions do not collide again
        (M. Brooker, "Exponential Backoff And Jitter").
        """
        self.made += 1
        self.reason = type(error).__name__  # not the error itself, whose traceback leads back here
        if error.committed == "no" and self._in_doubt:
            error.committed = "unknown"
        self._in_doubt = error.committed == "unknown"
        if not error.retryable or (self._end is None and self.made >= self._attempts):
            return None
        longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(self.made - 1, 10))
        seconds = longest * (0.5 + random.random() / 2)  # noqa: S311 - not used for security
        if self._end is not None and time.monotonic() + seconds >= self._end:
            return None
        logger.info(
            "retrying",
            extra={
                "event": "retry",
                "attempt": self.made,
                "error": type(error).__name__,
                "sqlstate": error.sqlstate,
                "pause_s": round(seconds, 3),
            },
        )
        return seconds


def log_if_slow(seconds: float, threshold: float, uow: object, calls: Mapping[str, int] | None) -> None:
    """Log a unit of work that took longer than the threshold in seconds, and where it was opened; 0 disables the log.

    Repositories are created on first use, so those that exist are those that were used: nothing needs to be recorded
    for units of work that are not slow. Calls are known only to telemetry.
    """
    if 0 < threshold <= seconds:
        place = _place()
        used = [name.removeprefix("_") for name in vars(uow) if name != "_connection"]
        logger.warning(
            "slow unit of work: %.3f s, opened at %s, used %s",
            seconds,
            place,
            ", ".join(used if calls is None else _counted(calls)) or "nothing",
            extra={
                "event": "slow_unit_of_work",
                "duration_s": round(seconds, 3),
                "opened_at": place,
                "repositories": used,
                "calls": calls,
            },
        )


def _counted(calls: Mapping[str, int]) -> list[str]:
    return [name if number == 1 else f"{name} ({number} times)" for name, number in calls.items()]


def _place() -> str:
    """Return the file and line of the innermost caller that is not ours, which is where its `with` stands."""
    frame = inspect.currentframe()
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in (
        "mesh_storage",
        "contextlib",
    ):
        frame = frame.f_back
    return "an unknown place" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"
