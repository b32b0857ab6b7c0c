"""A collection that keeps nothing alive, for what observable instruments look at."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Living(Generic[T]):
    """What was added and still exists; unlike a WeakSet, it may be added to while another thread iterates."""

    def __init__(self) -> None:
        self._references: dict[weakref.ref[T], None] = {}

    def add(self, thing: T) -> None:
        """Add something, which must be hashable."""
        self._references[weakref.ref(thing, self._references.pop)] = None

    def __iter__(self) -> Iterator[T]:
        """Yield what still exists."""
        for reference in list(self._references):
            thing = reference()
            if thing is not None:
                yield thing
