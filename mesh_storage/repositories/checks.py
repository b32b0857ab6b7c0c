"""Validation of column values before they are sent; errors name the field."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, TypeVar

from sqlalchemy import BigInteger, Boolean, Column, DateTime, Integer, LargeBinary, Numeric, String

from mesh_storage.errors import InvalidInputError
from mesh_storage.postgres.jsonb import check_text

T = TypeVar("T")

INT64_MAX = 2**63 - 1
INT64_MIN = -(2**63)
_INT32_MAX = 2**31 - 1

# Maximum digits of numeric before and after the decimal point (PostgreSQL manual, 8.1).
_NUMERIC_DIGITS = 131_072
_NUMERIC_SCALE = 16_383

_CONTENT_BYTES = 2**28
_ID_LENGTH = 255
"""Longer than any id."""
_ULID = re.compile(r"[a-z]{2,10}_[0-9A-HJKMNP-TV-Z]{26}\Z")


def text(field: str, value: object, limit: int | None = None, *, empty: bool = False) -> str:
    """Check a string of 1 (0 if `empty`) to `limit` characters."""
    if not isinstance(value, str):
        raise InvalidInputError(f"{field} must be a str, not {type(value).__name__}", field=field)
    if not value and not empty:
        raise InvalidInputError(f"{field} must not be empty", field=field)
    if limit is not None and len(value) > limit:
        raise InvalidInputError(f"{field} has {len(value)} characters; {limit} is the limit", field=field)
    check_text(value, field)
    return value


def integer(field: str, value: object, low: int = INT64_MIN, high: int = INT64_MAX) -> int:
    """Check an integer from `low` to `high`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidInputError(f"{field} must be an int, not {type(value).__name__}", field=field)
    if not low <= value <= high:
        raise InvalidInputError(f"{field} must be from {low} to {high}", field=field)
    return value


def content(field: str, value: object) -> bytes:
    """Check bytes of up to 256 MiB: pg_dump writes them as hex, and its lines are limited to 1 GB."""
    if not isinstance(value, bytes):
        raise InvalidInputError(f"{field} must be bytes, not {type(value).__name__}", field=field)
    if len(value) > _CONTENT_BYTES:
        raise InvalidInputError(f"{field} has {len(value)} bytes; {_CONTENT_BYTES} is the limit", field=field)
    return value


def ulid(field: str, value: object) -> str:
    """Check a prefixed ULID."""
    if not _ULID.match(text(field, value)):
        raise InvalidInputError(f"{field} must be a prefix, '_' and a ULID of 26 characters", field=field)
    return str(value)


def number(field: str, value: object) -> Decimal:
    """Check a non-negative number; a float keeps its exact decimal value."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
        raise InvalidInputError(f"{field} must be a Decimal, int or float, not {type(value).__name__}", field=field)
    decimal = Decimal(value)
    if not decimal.is_finite() or decimal < 0:
        raise InvalidInputError(f"{field} must be a finite number, 0 or more", field=field)
    _, digits, exponent = decimal.as_tuple()
    if len(digits) + int(exponent) > _NUMERIC_DIGITS or -int(exponent) > _NUMERIC_SCALE:
        raise InvalidInputError(f"{field} has more digits than PostgreSQL's numeric type can store", field=field)
    return decimal


def time(field: str, value: object) -> datetime:
    """Check a timezone-aware datetime."""
    if not isinstance(value, datetime):
        raise InvalidInputError(f"{field} must be a datetime, not {type(value).__name__}", field=field)
    if value.utcoffset() is None:
        raise InvalidInputError(f"{field} must have a time zone", field=field)
    try:
        moment = value.astimezone(UTC)
    except OverflowError:
        raise InvalidInputError(f"{field} is outside the years 1 to 9999 in UTC", field=field) from None
    # psycopg may adapt an instance of a subclass differently.
    return moment if type(moment) is datetime else datetime.combine(moment.date(), moment.time(), UTC)


def seconds(field: str, value: object, longest: float) -> float:
    """Check a number of seconds, more than 0 and at most `longest`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= longest:
        raise InvalidInputError(
            f"{field} must be a number of seconds, more than 0 and at most {longest:g}", field=field
        )
    return value


def flag(field: str, value: object) -> bool:
    """Check a bool."""
    if not isinstance(value, bool):
        raise InvalidInputError(f"{field} must be a bool, not {type(value).__name__}", field=field)
    return value


def many(field: str, values: Iterable[T]) -> list[T]:
    """Check an iterable, and return it as a list."""
    if not isinstance(values, Iterable) or isinstance(values, (str, bytes)):
        raise InvalidInputError(f"{field} must be an iterable, not {type(values).__name__}", field=field)
    return list(values)


class Check:
    """The check of a column: of a single value, or of the values of many rows."""

    def __init__(self, one: Callable[[Any], Any], plain: Callable[[list[Any]], bool] | None = None) -> None:
        """Initialize with the check of one value, and a fast test of whether many values can be sent unchanged."""
        self._one = one
        self._plain = plain

    def __call__(self, value: object) -> Any:
        """Return a value as it is sent.

        Raises:
            InvalidInputError: The value cannot be stored; names the field.
        """
        return self._one(value)

    def column(self, values: list[Any]) -> list[Any]:
        """Return many values as they are sent; raises as for a single value."""
        if self._plain is not None and values and self._plain(values):
            return values
        return [self._one(value) for value in values]

    def optional(self) -> Check:
        """Return a check that also accepts None."""
        one, plain = self._one, self._plain

        def plain_or_none(values: list[Any]) -> bool:
            missing = values.count(None)
            return missing == len(values) or (not missing and plain is not None and plain(values))

        return Check(lambda value: None if value is None else one(value), plain_or_none)


def whole(field: str, low: int, high: int = INT64_MAX) -> Check:
    """Return a check of integers from `low` to `high`."""
    return Check(
        lambda value: integer(field, value, low, high),
        lambda values: _all_are(int, values) and low <= min(values) and max(values) <= high,
    )


def of_column(field: str, column: Column[Any]) -> Check:
    """Return the check for a column's type."""
    kind = column.type
    if isinstance(kind, LargeBinary):
        return Check(
            lambda value: content(field, value),
            lambda values: _all_are(bytes, values) and max(map(len, values)) <= _CONTENT_BYTES,
        )
    if isinstance(kind, DateTime):
        return Check(lambda value: time(field, value))
    if isinstance(kind, Boolean):
        return Check(lambda value: flag(field, value), lambda values: _all_are(bool, values))
    if isinstance(kind, Integer):
        return whole(field, INT64_MIN) if isinstance(kind, BigInteger) else whole(field, 0, _INT32_MAX)
    if isinstance(kind, Numeric):
        return Check(
            lambda value: number(field, value),
            lambda values: _all_are(int, values) and min(values) >= 0 and max(values) <= INT64_MAX,
        )
    assert isinstance(kind, String), kind
    if column.info.get("ulid"):
        return Check(
            lambda value: ulid(field, value), lambda values: _all_are(str, values) and all(map(_ULID.match, values))
        )
    limit, empty = kind.length, not column.info.get("not_empty")
    return Check(
        lambda value: text(field, value, limit, empty=empty), lambda values: _plain_texts(values, limit, empty=empty)
    )


def of_key(field: str, column: Column[Any]) -> Check:
    """Return the check of a key to look up: a string that is not a ULID is simply not found."""
    if column.info.get("ulid"):
        return Check(lambda value: text(field, value, _ID_LENGTH))
    return of_column(field, column)


def _all_are(kind: type, values: list[Any]) -> bool:
    return set(map(type, values)) == {kind}


def _plain_texts(values: list[Any], limit: int | None, *, empty: bool) -> bool:
    """Return whether all are ASCII strings within the limits, using only C functions, so that many cost little."""
    if not _all_are(str, values) or not (empty or all(values)):
        return False
    if limit is not None and max(map(len, values)) > limit:
        return False
    together = "".join(values)
    return together.isascii() and "\0" not in together
