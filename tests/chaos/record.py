"""What the callers were told, how long they waited, and what is in the database afterwards."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import psycopg

TOLERANCE_S = 1.0
"""What a call may take beyond its limit."""

_FOUND = """
    SELECT split_part(id, '/', 1), count(*), bool_and(content = convert_to(split_part(id, '/', 1), 'UTF8'))
    FROM mesh_messages GROUP BY 1
    UNION ALL SELECT node_name, 1, ip_address = '10.0.0.1' FROM nodes
    UNION ALL SELECT token, 1, true
    FROM mesh_state, unnest(string_to_array(trim(convert_from(value, 'UTF8')), ' ')) AS token
"""


class Starvation:
    """How late something wakes up that does nothing else: it is the machine's fault, not the library's.

    A call that is late by as much, after its limit, is in time.
    """

    NAP_S = 0.02

    def __init__(self) -> None:
        self._late: list[tuple[float, float]] = []
        self._begun = math.inf

    def asleep(self) -> None:
        """Begin a nap."""
        self._begun = time.monotonic()

    def woken(self) -> None:
        """End it, and measure."""
        self._late.append((time.monotonic(), self._late_by_now()))
        self._begun = math.inf

    def since(self, moment: float) -> float:
        """Return the seconds by which it has been late since a moment."""
        naps = takewhile(lambda nap: nap[0] > moment, reversed(self._late))
        return self._late_by_now() + sum(late for _, late in naps)

    def _late_by_now(self) -> float:
        return max(0.0, time.monotonic() - self._begun - self.NAP_S)

    @property
    def worst(self) -> float:
        """The longest it was late."""
        return max(late for _, late in self._late)


class Record:
    """What all workers have seen."""

    def __init__(self) -> None:
        self.told = dict[str, tuple[str, int]]()
        """What became of each transaction, as its caller was told, and the number of its rows."""
        self.errors = Counter[str]()
        self.disturbances = Counter[str]()
        self.faults: list[str] = []
        """What must not happen, as far as it shows at once."""
        self.wrong = dict[str, list[str]]()
        """The transactions that do not agree with what their callers were told."""
        self.slowest = dict[str, float]()
        """The seconds beyond its limit of the slowest call of each kind."""
        self.calls = 0
        self.starvation = {"thread": Starvation(), "task": Starvation()}

    @contextmanager
    def limit(self, side: str, kind: str, seconds: float) -> Generator[None]:
        """Measure a call of a thread or a task that may take so many seconds."""
        begun = time.monotonic()
        try:
            yield
        finally:
            over = time.monotonic() - begun - seconds
            self.calls += 1
            if over > 0:
                over -= self.starvation[side].since(begun + seconds)
            self.slowest[kind] = max(over, self.slowest.get(kind, over))
            if over > TOLERANCE_S:
                self.faults.append(f"{side}: {kind} took {over:.2f} s more than its limit of {seconds:.2f} s")

    def expect_none(self, kind: str, found: list[Any]) -> None:
        """Note what should not be there."""
        if found:
            self.faults.append(f"{kind}: {found}")

    def judge(self, connection: psycopg.Connection[Any]) -> None:
        """Compare what is in the database with what the callers were told."""
        found = Counter[str]()
        altered: list[str] = []
        for token, rows, equal in connection.execute(_FOUND):
            found[token] += rows
            if not equal:
                altered.append(token)
        wrong = self.wrong = {
            "altered": altered,
            "of nobody": [token for token in found if token not in self.told],
            **{kind: [] for kind in ("lost", "doubled", "torn", "refused, but there")},
        }
        for token, (outcome, rows) in self.told.items():
            if found[token] > rows:
                wrong["doubled"].append(token)
            elif 0 < found[token] < rows:
                wrong["torn"].append(token)
            elif outcome == "acknowledged" and not found[token]:
                wrong["lost"].append(token)
            elif outcome == "no" and found[token]:
                wrong["refused, but there"].append(token)

    def figures(self, seconds: float) -> str:
        """Return the figures of a run as lines of text."""
        outcomes = Counter(outcome for outcome, _ in self.told.values())
        found = {kind: len(tokens) for kind, tokens in self.wrong.items()}
        lines = {
            "seconds": f"{seconds:.0f}",
            "calls measured": f"{self.calls}",
            "transactions": _listed(outcomes),
            "errors": _listed(self.errors),
            "disturbances": _listed(self.disturbances),
            "found": _listed(found),
            "slowest beyond its limit": ", ".join(
                f"{kind} {over:+.2f} s" for kind, over in sorted(self.slowest.items())
            ),
            "woken late": ", ".join(f"{side} {late.worst:.2f} s" for side, late in self.starvation.items()),
        }
        return "\n".join(f"{name}: {line}" for name, line in lines.items())


def _listed(counts: Any) -> str:
    return f"{sum(counts.values())} ({', '.join(f'{name} {number}' for name, number in sorted(counts.items()))})"
