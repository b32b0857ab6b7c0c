"""The terms on which a worker consumes deliveries: its arguments, and what a failure leads to."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from mesh_storage.errors import InvalidInputError, MeshStorageError
from mesh_storage.repositories import checks
from mesh_storage.repositories.deliveries import MOST_ATTEMPTS, check_lease, check_receiver
from mesh_storage.repositories.pages import MAX_ROWS

_SHORTEST_LEASE = timedelta(seconds=0.1)
_LONGEST_POLL_S = 60.0
_REASON_LENGTH = 1_000


class Stop(Protocol):
    """What ends a worker once it is set: an `Event` of threading, multiprocessing or asyncio."""

    def is_set(self) -> bool:
        """Return whether it is set."""
        ...


@dataclass(frozen=True, slots=True)
class Terms:
    """The arguments of `consume`, checked."""

    receiver: str
    batch: int
    lease: timedelta
    poll: float
    max_attempts: int
    stop: Stop | None

    def __post_init__(self) -> None:
        """Check the arguments.

        Raises:
            InvalidInputError: One is invalid; names it.
        """
        check_receiver("receiver", self.receiver)
        checks.integer("batch", self.batch, 1, MAX_ROWS)
        if check_lease(self.lease) < _SHORTEST_LEASE:
            raise InvalidInputError("lease must be at least 0.1 s, so that there is time to extend it", field="lease")
        poll: object = self.poll
        if isinstance(poll, bool) or not isinstance(poll, (int, float)) or not 0 < poll <= _LONGEST_POLL_S:
            raise InvalidInputError(
                f"poll must be a number of seconds, more than 0 and at most {_LONGEST_POLL_S:g}", field="poll"
            )
        checks.integer("max_attempts", self.max_attempts, 1, MOST_ATTEMPTS)
        if self.stop is not None and not callable(getattr(self.stop, "is_set", None)):
            raise InvalidInputError("stop must be an Event", field="stop")

    @property
    def stopped(self) -> bool:
        """Whether the worker is to end."""
        return self.stop is not None and self.stop.is_set()

    def is_last(self, attempts: int) -> bool:
        """Return whether a delivery that failed in this attempt is set aside."""
        return attempts >= self.max_attempts


def delay_after(failure: Exception) -> timedelta | None:
    """Return the delay after a failure: none if the database says that it may be tried again, else the default."""
    return timedelta(0) if isinstance(failure, MeshStorageError) and failure.retryable else None


def reason_of(failure: Exception) -> str:
    """Return the reason for which a delivery is set aside: the error and its text, as far as it can be stored."""
    try:
        text = str(failure)
    except Exception:  # noqa: BLE001 - an error that cannot say what it is must not end the worker
        text = "no text"
    said = f"{type(failure).__name__}: {text}".replace("\0", "")
    return said.encode("utf-8", "replace").decode()[:_REASON_LENGTH]
