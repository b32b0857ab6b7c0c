"""Pages of a listing, and the cursors by which they follow each other."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from mesh_storage.errors import InvalidInputError
from mesh_storage.repositories import checks

T = TypeVar("T")

MAX_ROWS = 10_000
"""Rows that one page or batch may have."""

Position: TypeAlias = tuple[str | int, ...]
"""The key of a row, in the order of the listing."""


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a listing, in the order of its key."""

    items: list[T]
    """What is on this page."""
    next: str | None
    """The cursor to pass as `after` for the next page; None at the end. Its form is no promise."""


def encode(position: Position) -> str:
    """Return the cursor of a position."""
    return base64.urlsafe_b64encode(json.dumps(position).encode()).decode()


def decode(cursor: str, shape: tuple[type[str | int], ...]) -> Position:
    """Return the position of a cursor, whose values are to have these types.

    Raises:
        InvalidInputError: It is no cursor of such a listing.
    """
    try:
        values: list[Any] = json.loads(base64.b64decode(cursor, altchars=b"-_", validate=True))
        fits = isinstance(values, list) and tuple(map(type, values)) == shape
    except (TypeError, ValueError, RecursionError):
        values, fits = [], False
    if not fits:
        raise InvalidInputError("after must be the `next` of a page of this listing", field="after")
    return tuple(
        checks.text("after", value) if isinstance(value, str) else checks.integer("after", value) for value in values
    )
