"""A process that stands for election again and again, and writes down when it held the lease; see test_lease.py.

Times are of CLOCK_MONOTONIC, which all processes of a machine share. What is written down was true: a holder saw
`held` at some moment between the two times.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import NamedTuple

from mesh_storage import Lease, MeshStorage, MeshStorageError, UnavailableError

NAME = "leader"
PAUSE_S = 0.002


class Sight(NamedTuple):
    """The lease was seen to be held between two moments."""

    token: int
    before: float
    after: float


class Term(NamedTuple):
    """The time for which one holder is known to have held the lease, which may have been longer."""

    token: int
    start: float
    end: float


def watch(lease: Lease, seen: Callable[[Sight], object], seconds: float, work: Callable[[], object]) -> None:
    """Report that a lease is held, for as long as it is."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        before = time.monotonic()
        held = lease.held
        after = time.monotonic()
        if not held:
            return
        seen(Sight(lease.token, before, after))
        work()
        time.sleep(PAUSE_S)


def terms(sights: Iterable[Sight]) -> list[Term]:
    """Return the terms in the order of their tokens."""
    found: dict[int, Term] = {}
    for token, before, after in sights:
        start = found[token].start if token in found else after
        found[token] = Term(token, start, before)
    return sorted(found.values())


def fenced(storage: MeshStorage, lease: Lease) -> bool:
    """Write as the holder; return whether somebody with a larger token wrote before."""
    try:
        with storage.begin(timeout=5) as uow:
            uow.state.check(NAME, version=lease.token)
            last = uow.state.find("last token")
            uow.state.put("last token", b"%d" % lease.token)
            return last is not None and int(last.value) > lease.token
    except MeshStorageError:  # overtaken, or the server is away
        return False


def stand(
    storage: MeshStorage,
    ttl: timedelta,
    seen: Callable[[Sight], object],
    chance: random.Random,
    seconds: float | None = None,
) -> None:
    """Stand for election once, and lead for a while, which is by chance unless given."""
    holder = b"%d" % os.getpid()
    with storage.lease(NAME, holder, ttl=ttl, wait=60) as lease:

        def work() -> None:
            if chance.random() < 0.05 and fenced(storage, lease):
                raise AssertionError("a late write was not refused")

        watch(lease, seen, chance.uniform(0, 4) * ttl.total_seconds() if seconds is None else seconds, work)


def wrong_clock() -> None:
    """Let the wall clock of this process jump."""
    right = time.time
    time.time = lambda: right() + random.choice((-1e6, -1, 0, 1, 1e6))


def opened(url: str) -> MeshStorage:
    """Open the storage, as soon as its server is there."""
    while True:
        try:
            return MeshStorage.open(url)
        except UnavailableError:
            time.sleep(0.05)


def main(url: str, path: str, ttl: str, seconds: str = "") -> None:
    wrong_clock()
    chance = random.Random()
    storage = opened(url)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)  # this one is ready

    def seen(sight: Sight) -> None:
        os.write(file, f"{sight.token} {sight.before!r} {sight.after!r}\n".encode())

    while True:
        try:
            stand(storage, timedelta(seconds=float(ttl)), seen, chance, float(seconds) if seconds else None)
        except MeshStorageError:
            time.sleep(0.05)
        except BaseException as error:
            os.write(file, f"{error!r}\n".encode())
            raise


if __name__ == "__main__":
    main(*sys.argv[1:])
