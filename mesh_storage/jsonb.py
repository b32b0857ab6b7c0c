"""How a JSON value gets into jsonb and out again equal, or is refused.

PostgreSQL keeps the numbers of jsonb as numeric (manual, 8.14): exact, but without an exponent, so that 1e308 would
come back as an integer and lose its type. Such floats are written out with a fraction, which numeric preserves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

from pydantic_core import from_json

from mesh_storage.errors import InvalidInputError
from mesh_storage.models.base import JSON

MAX_DEPTH = 200
"""How deep lists and dicts may be nested: what the fast parser of pydantic-core reads back."""

_EXPONENT_FROM = 1e16
"""From here on, repr() and so JSON write a float with an exponent."""

_encode_sorted = json.JSONEncoder(sort_keys=True).encode
_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def dumps(value: JSON, field: str = "value") -> str:
    """Write a JSON value as text for jsonb.

    Raises:
        InvalidInputError: The value, or one inside it, is none that JSON has or jsonb keeps: NaN, an infinity, a key
            that is no str, a tuple, a set, NUL or a lone surrogate in a text, an integer of over 4,300 digits, or
            nesting deeper than `MAX_DEPTH`.
    """
    exponents = _check(value, field, MAX_DEPTH)
    try:
        return _spell_out(value) if exponents else _encode(value)
    except ValueError:  # The interpreter's own limit on the digits of an integer.
        raise InvalidInputError(f"{field} holds an integer of too many digits", field=field) from None


def same(one: JSON, other: JSON) -> bool:
    """Say whether two JSON values are equal and of one type: 1, 1.0 and true are equal for Python alone."""
    return _encode_sorted(one) == _encode_sorted(other)


def loads(text: str | bytes) -> JSON:
    """Read the text of a jsonb value."""
    try:
        return from_json(text)
    except ValueError:
        return json.loads(text)  # Others may have stored what is nested deeper.


def _check(value: JSON, field: str, depth: int) -> bool:
    """Refuse what JSON does not have; say whether a float needs to be written without its exponent."""
    kind: type[object] = value.__class__
    if kind is str:
        check_text(value, field)
        return False
    if kind is int or kind is bool or value is None:
        return False
    if kind is float:
        if not math.isfinite(value):
            raise InvalidInputError(f"{field} holds {value}, which JSON does not have", field=field)
        return bool(abs(value) >= _EXPONENT_FROM) or (not value and math.copysign(1, value) < 0)
    if depth == 0:
        raise InvalidInputError(f"{field} is nested deeper than {MAX_DEPTH} levels", field=field)
    exponents = False
    if issubclass(kind, dict):
        _check_keys(value, field)
        members: Iterable[JSON] = value.values()
    elif issubclass(kind, list):
        members = value
    elif issubclass(kind, str):
        check_text(value, field)
        return False
    else:
        raise InvalidInputError(f"{field} holds a {kind.__name__}, which is no JSON value", field=field)
    for member in members:
        exponents |= _check(member, field, depth - 1)
    return exponents


def _check_keys(value: dict[Any, JSON], field: str) -> None:
    for key in value:
        if not isinstance(key, str):
            raise InvalidInputError(f"{field} has a key of type {type(key).__name__}; JSON takes str", field=field)
        check_text(key, field)


def check_text(value: str, field: str) -> None:
    """Refuse a text that PostgreSQL cannot keep (manual, 8.3 and 8.14): one with NUL or a lone surrogate."""
    if "\0" in value:
        raise InvalidInputError(f"{field} holds NUL, which PostgreSQL cannot store in a text", field=field)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidInputError(f"{field} holds a lone surrogate, which is no valid Unicode", field=field) from None


def _spell_out(value: JSON) -> str:
    kind: type[object] = value.__class__
    if issubclass(kind, dict):
        members: dict[str, JSON] = value
        return "{" + ",".join(f"{_encode(key)}:{_spell_out(member)}" for key, member in members.items()) + "}"
    if issubclass(kind, list):
        elements: list[JSON] = value
        return "[" + ",".join(map(_spell_out, elements)) + "]"
    if isinstance(value, float) and not value:
        return "0.0"  # numeric has no negative zero
    if isinstance(value, float) and abs(value) >= _EXPONENT_FROM:
        return format(Decimal(repr(value)), "f") + ".0"
    return _encode(value)
