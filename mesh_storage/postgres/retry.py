"""How `run` waits before it does failed work again."""

from __future__ import annotations

import logging
import random

from mesh_storage.errors import InvalidInputError, MeshStorageError

logger = logging.getLogger("mesh_storage")

_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 2.0


def check_attempts(attempts: int) -> None:
    """Refuse a number of attempts below 1."""
    if attempts < 1:
        raise InvalidInputError("attempts must be 1 or more", field="attempts")


def pause(error: MeshStorageError, attempt: int) -> float:
    """Choose the seconds to wait after a failed attempt (from 1 on): twice as long each time, half of it by chance.

    The chance keeps those that got in each other's way from doing so again (M. Brooker, "Exponential Backoff And
    Jitter").
    """
    longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** (attempt - 1))
    seconds = longest * (0.5 + random.random() / 2)  # noqa: S311 - no secret depends on it
    logger.info(
        "retrying",
        extra={
            "event": "retry",
            "attempt": attempt,
            "error": type(error).__name__,
            "sqlstate": error.sqlstate,
            "pause_s": round(seconds, 3),
        },
    )
    return seconds


def log_if_slow(seconds: float, limit: float) -> None:
    """Leave a record of a unit of work that took long; a limit of 0 is none."""
    if 0 < limit <= seconds:
        logger.warning(
            "slow unit of work: %.3f s", seconds, extra={"event": "slow_unit_of_work", "duration_s": round(seconds, 3)}
        )
