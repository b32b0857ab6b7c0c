"""What one process knows about the database, by which it decides whether an entry of the cache is still true.

A process trusts only what it has read from the database itself. So a Redis that was flushed, that came back with old
data, or that lost what others wrote can make a read slower, but not wrong.
"""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from typing import NamedTuple

from mesh_storage.postgres.tenure import now
from mesh_storage.repositories.positions import News

_MOST_KEYS = 100_000
"""The number of changed keys that are remembered at most."""


class Slot(NamedTuple):
    """A read that can be cached: of one key, or a listing, which any change of its table may alter."""

    aggregate: str
    call: str
    arguments: tuple[str, ...]

    @property
    def key(self) -> str | None:
        """The key of the aggregate; None for a listing."""
        return self.arguments[0] if self.call == "find" else None


class Position(NamedTuple):
    """Where the snapshot of a read is in the history of a database; see repositories/positions.py."""

    history: str
    number: int


class _Look(NamedTuple):
    """A look at the database."""

    asked: float
    clock: datetime
    """The database's clock, at `asked` or a little later."""
    commit: object
    """The latest commit of this storage that it saw."""


class View:
    """What has changed, and when that was looked up; thread-safe, and never waiting for anything."""

    def __init__(self, kept: float) -> None:
        """Remember changes for at least `kept` seconds, which is how long entries live."""
        self._kept = kept
        self._lock = threading.Lock()
        self._latest = _Look(float("-inf"), datetime.max.replace(tzinfo=UTC), None)
        self._snapshot: str | None = None
        self._position = Position("", 0)
        self._begin(self._position)

    @property
    def position(self) -> Position:
        """The position up to which all changes are known."""
        return self._position

    @property
    def since(self) -> tuple[str, str | None]:
        """The history and the snapshot since which changes are to be looked up."""
        with self._lock:
            return self._position.history, self._snapshot

    def looked(self, commit: object, within: float) -> bool:
        """Return whether it was looked within so many seconds, and after the latest commit of this storage."""
        latest = self._latest
        return latest.commit is commit and now() - latest.asked <= within

    def doubt(self) -> None:
        """Let nothing be true before the next look, since somebody has read past this view."""
        with self._lock:
            self._latest = self._latest._replace(commit=None)

    def learn(self, news: News, asked: float, commit: object) -> Position:
        """Take in what has changed, and return the position of the news.

        News may overtake each other: they are about all that changed since a moment that this view knew already.

        Args:
            news: What has changed.
            asked: The time by `now()` before it was asked for.
            commit: The latest commit of this storage at that time.
        """
        position = Position(news.history, news.position)
        with self._lock:
            other = news.history != self._position.history
            overtaken = asked < self._latest.asked if other else news.position < self._position.number
            if overtaken and (other or news.changed is None):
                return position
            if other or news.changed is None:
                self._begin(position)
            for aggregate, key in news.changed or ():
                self._keys[aggregate, key] = max(news.position, self._keys.get((aggregate, key), 0))
                self._tables[aggregate] = max(news.position, self._tables.get(aggregate, 0))
            if not overtaken:
                self._position, self._snapshot = position, news.snapshot
            if asked >= self._latest.asked:
                self._latest = _Look(asked, news.now, commit)
            self._forget()
        return position

    def holds(self, slot: Slot, position: Position) -> bool:
        """Return whether what was read at a position is still true at the position of this view."""
        with self._lock:
            if slot.key is None:
                changed = self._tables.get(slot.aggregate, 0)
            else:
                changed = self._keys.get((slot.aggregate, slot.key), 0)
            history, number = self._position
            return position.history == history and max(self._floor, changed) <= position.number <= number

    def left(self, expires_at: datetime) -> float:
        """Return the seconds until something expires by the database's clock, or less."""
        latest = self._latest
        # Counted from before the question, so that the clock is never behind the database's.
        return (expires_at - latest.clock).total_seconds() - (now() - latest.asked)

    def _begin(self, position: Position) -> None:
        """Trust nothing that was read before a position, since what changed before it is not known."""
        self._position = position
        self._floor = self._next_floor = position.number
        self._next_floor_at = now() + self._kept
        self._keys: dict[tuple[str, str], int] = {}
        self._tables: dict[str, int] = {}

    def _forget(self) -> None:
        """Let nothing be true that was read long ago, so that the changes since need not be remembered."""
        if len(self._keys) > _MOST_KEYS:
            self._begin(self._position)
        elif now() >= self._next_floor_at:
            self._floor, self._next_floor = self._next_floor, self._position.number
            self._next_floor_at = now() + self._kept
            self._keys = {key: number for key, number in self._keys.items() if number > self._floor}
