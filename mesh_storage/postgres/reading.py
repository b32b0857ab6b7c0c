"""What a unit of work asks of a replica, and whether one is good enough for it."""

from __future__ import annotations

import logging
import math
import random
import time
from datetime import timedelta
from typing import Literal

from mesh_storage.errors import ConflictError, InvalidInputError
from mesh_storage.postgres.characteristics import Characteristics
from mesh_storage.postgres.tenure import now
from mesh_storage.postgres.wal import Position, Standing, parse

logger = logging.getLogger("mesh_storage")

Reason = Literal["unreachable", "busy", "behind", "lagging", "promoted", "foreign", "unverified", "failed"]
"""Why the primary answers in place of a replica; docs/replicas.md says what each means."""

FRESH_S = 1.0
"""How long a session is trusted to be that of a standby that replays the log of the primary."""
_LONGEST_LAG = timedelta(days=36_525)
_MOST_SAMPLES = 100
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0
_PAUSE_RATIO = 10
_HOPELESS_S = 5.0
_LOG_EVERY_S = 60.0


class Samples:
    """Where the primary stood at some moments: a replica that has replayed all of one is no older than that.

    A replica cannot know its age by itself: the time of the last transaction that it has replayed is no measure while
    nothing is written, nor is what it has received while the primary does not reach it.
    """

    def __init__(self) -> None:
        self._kept: tuple[Standing, ...] = ()  # the newest first

    @property
    def newest(self) -> Standing | None:
        """The newest one, if any."""
        kept = self._kept
        return kept[0] if kept else None

    def add(self, standing: Standing) -> None:
        """Add one, and thin out the older ones: their distances grow with their age."""
        kept = [standing]
        for each in self._kept:
            if kept[-1].at - each.at >= (standing.at - each.at) / 8:
                kept.append(each)
        self._kept = tuple(kept[:_MOST_SAMPLES])

    def age(self, replica: Standing) -> float:
        """Return the greatest age in seconds that the data of a replica may have by now, as far as is known."""
        for each in self._kept:
            if replica.has(each.position):
                return now() - each.at
        return math.inf


class Wanted:
    """The arguments of `begin` that concern replicas."""

    def __init__(self, replica: bool, after: str | None, max_lag: timedelta | None) -> None:  # noqa: FBT001 - as given
        self._replica = replica
        self._after = after
        self._max_lag = max_lag
        self.after: Position | None = None
        """What must have been replayed."""
        self.max_age = math.inf
        """The age in seconds that the data may have."""

    def check(self, characteristics: Characteristics) -> None:
        """Validate the arguments.

        Raises:
            InvalidInputError: One is invalid; names it.
        """
        if not isinstance(self._replica, bool):
            raise InvalidInputError(
                f"replica must be True or False, not {type(self._replica).__name__}", field="replica"
            )
        for name, value in (("after", self._after), ("max_lag", self._max_lag)):
            if value is not None and not self._replica:
                raise InvalidInputError(f"{name} is for units of work with replica=True", field=name)
        if not characteristics.read_only:
            raise InvalidInputError("replica=True needs read_only=True", field="replica")
        if characteristics.isolation == "serializable":
            raise InvalidInputError(
                "a replica cannot read at 'serializable'; use 'repeatable read', or the primary", field="isolation"
            )
        if characteristics.position:
            raise InvalidInputError("position=True is for units of work on the primary", field="position")
        if self._after is not None:
            self.after = parse(self._after)
        if self._max_lag is not None:
            if not isinstance(self._max_lag, timedelta) or not timedelta(0) < self._max_lag <= _LONGEST_LAG:
                raise InvalidInputError(
                    "max_lag must be a timedelta, more than 0 and at most 100 years", field="max_lag"
                )
            self.max_age = self._max_lag.total_seconds()

    @property
    def is_demanding(self) -> bool:
        """Whether a replica may have too little of the log."""
        return self.after is not None or self.max_age < math.inf

    def judge(self, standing: Standing, samples: Samples) -> Reason | None:
        """Return why a replica is not good enough, or None if it is."""
        primary = samples.newest
        if primary is None:
            return "unverified"
        if not standing.standby:
            return "promoted"
        own, its = standing.position, primary.position
        if (own.system, standing.database) != (its.system, primary.database) or own.timeline > its.timeline:
            return "foreign"
        if self.after is not None and not standing.has(self.after):
            return "behind"
        if self.max_age < math.inf and samples.age(standing) > self.max_age:
            return "lagging"
        return None

    def is_of_another_cluster(self, samples: Samples) -> bool:
        """Return whether the position is of another cluster than the primary."""
        primary = samples.newest
        return self.after is not None and primary is not None and self.after.system != primary.position.system

    def is_met(self, primary: Standing) -> bool:
        """Return whether the primary is known to have the position."""
        return self.after is None or primary.has(self.after)

    def may_ask(self, primary: Standing) -> bool:
        """Return whether the server that the URL leads to can answer; if not, it is no primary, or not any more.

        Raises:
            InvalidInputError: The position is of another cluster.
            ConflictError: What was committed at the position is lost.
        """
        if primary.standby and self.max_age < math.inf:
            return False
        if self.after is None or self.is_met(primary):
            return True
        if primary.position.system != self.after.system:
            raise InvalidInputError("after is a position of another database cluster", field="after")
        if primary.standby or primary.position.timeline < self.after.timeline:
            return False
        raise ConflictError(
            "what was committed at this position is lost: by a failover, or by a crash soon after a relaxed commit"
        )


class Fallbacks:
    """The units of work that the primary answered in place of a replica; a reason is logged once a minute at most."""

    def __init__(self) -> None:
        self._since: dict[str, int] = {}
        self._due: dict[str, float] = {}

    def note(self, reason: Reason) -> None:
        """Note one."""
        number = self._since[reason] = self._since.get(reason, 0) + 1
        moment = time.monotonic()
        if moment >= self._due.get(reason, 0.0):
            self._due[reason] = moment + _LOG_EVERY_S
            self._since[reason] = 0
            logger.warning(
                "the primary answers in place of a replica",
                extra={"event": "replica", "reason": reason, "number": number},
            )


class Vain:
    """The wait for a replica that was in vain lately: one that is no longer would be so too."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._until = 0.0

    def note(self, seconds: float) -> None:
        """Note a wait of some seconds."""
        if not self.covers(seconds):
            self._seconds, self._until = seconds, time.monotonic() + _HOPELESS_S

    def covers(self, seconds: float) -> bool:
        """Return whether a wait of some seconds would be as much in vain."""
        return seconds <= self._seconds and time.monotonic() < self._until

    def forget(self) -> None:
        """Wait as ever, since the replica has answered or caught up."""
        self._seconds = 0.0


class Retreat:
    """How long a replica is left alone: longer after each failure, and tried by one unit of work at a time."""

    def __init__(self) -> None:
        self._pause = _FIRST_PAUSE_S
        self._until = 0.0
        self._on_trial = False
        self.behind = Vain()
        """Waits for what it had not replayed."""
        self.silent = Vain()
        """Waits for an answer, of units of work with a short timeout."""

    @property
    def rests(self) -> bool:
        """Whether it is left alone."""
        return time.monotonic() < self._until

    def admits(self) -> bool:
        """Return whether it may be tried now; after a failure, the others leave it alone until that has succeeded."""
        moment = time.monotonic()
        if moment < self._until:
            return False
        if self._until:
            self._until, self._on_trial = moment + self._pause, True
        return True

    def fail(self, seconds: float) -> None:
        """Leave it alone for a while, since it cannot be reached or is no replica; to notice that took some seconds."""
        moment = time.monotonic()
        if moment >= self._until or self._on_trial:  # else another unit of work has seen the same
            self._pause = max(self._pause, min(_LONGEST_PAUSE_S, seconds * _PAUSE_RATIO))
            self._until = moment + self._pause * (0.5 + random.random() / 2)  # noqa: S311 - not used for security
            self._pause = min(_LONGEST_PAUSE_S, self._pause * 2)
        self._on_trial = False

    def succeed(self) -> None:
        """Try it as ever, since it can be reached."""
        if self._until:
            self._pause, self._until = _FIRST_PAUSE_S, 0.0
        self.silent.forget()
