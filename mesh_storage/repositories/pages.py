"""Pages of a listing, and the cursors that link them."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from mesh_storage.errors import InvalidInputError
from mesh_storage.repositories import checks

T = TypeVar("T")

MAX_ROWS = 10_000
"""Maximum number of rows per page or batch."""

Position: TypeAlias = tuple[str | int, ...]
"""The sort key of a row."""


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A page of a listing, in key order."""

    items: list[T]
    """What is on this page."""
    next: str | None
    """The cursor to pass as `after` for the next page; None on the last page. Its format is opaque."""


def encode(position: Position) -> str:
    """Return the cursor for a position."""
    return base64.urlsafe_b64encode(json.dumps(position).encode()).decode()


def decode(cursor: str, shape: tuple[type[str | int], ...]) -> Position:
    """Return the position of a cursor, whose values must have these types.

    Raises:
        InvalidInputError: It is not a cursor of this listing.
    """
    try:
        values: list[Any] = json.loads(base64.b64decode(cursor, altchars=b"-_", validate=True))
        fits = isinstance(values, list) and tuple(map(type, values)) == shape
    except (TypeError, ValueError, RecursionError):
        values, fits = [], False
    if not fits:
        raise InvalidInputError("after must be the `next` attribute of a page of this listing", field="after")
    return tuple(
        checks.text("after", value) if isinstance(value, str) else checks.integer("after", value) for value in values
    )
