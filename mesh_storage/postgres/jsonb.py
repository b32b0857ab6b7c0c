"""JSON values to and from jsonb, preserving equality or rejecting the value.

PostgreSQL stores the numbers of jsonb as numeric (manual, 8.14): exact, but without an exponent, so that 1e308 would be
read back as an integer. Such floats are written with a fraction, which numeric preserves.
"""

from __future__ import annotations

import json
import marshal
import math
from collections.abc import Generator, Iterable, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import psycopg
from psycopg.pq import Format
from pydantic_core import from_json, to_json

from mesh_storage.errors import InvalidInputError, MeshStorageError
from mesh_storage.models.base import JSON

MAX_DEPTH = 200
"""Maximum nesting depth of lists and dicts: the limit of pydantic-core's fast parser."""

_READ_AT_ONCE = 2**18
"""Maximum characters of text decoded in one batch."""

_EXPONENT_FROM = 1e16
"""Floats from this value on are written with an exponent by repr() and json."""

_INTEGER_LIMIT = 10**4300
"""Integers from this value on exceed Python's limit (docs, "Integer string conversion length limitation")."""

_sorted = json.JSONEncoder(sort_keys=True).encode


class Written(NamedTuple):
    """JSON values as text for jsonb, and the values decoded from it, which share no object with the original."""

    texts: list[str]
    values: list[JSON]


def dumps(value: JSON, field: str = "value") -> str:
    """Encode a JSON value as text for jsonb.

    Raises:
        InvalidInputError: The value, or one inside it, cannot be represented in JSON or jsonb: NaN, an infinity, a key
            that is not a str, a tuple, a set, a string with NUL or a lone surrogate, an integer of over 4,300 digits,
            or nesting deeper than `MAX_DEPTH`.
    """
    return write([value], field).texts[0]


def write(values: list[JSON], field: str = "value") -> Written:
    """Encode many JSON values, each as a separate text, and decode them again; raises as `dumps`."""
    written = _write_plain(values)
    if written is not None:
        return written
    texts = list(map(_spell_out if _check(values, field, MAX_DEPTH) else _encode, values))
    return Written(texts, loads_all(texts))


def _write_plain(values: list[JSON]) -> Written | None:
    """Encode values that decode to equal ones, which proves them valid at less cost than checking each.

    Returns None if a check is needed: a value is not equal, is of a subclass, or may be changed by jsonb.
    """
    try:
        marshal.dumps(values)  # rejects all but built-in types, so that no code of the caller runs
        texts = list(map(_encode, values))
        together = f"[{','.join(texts)}]"
        found: list[JSON] = from_json(together, allow_inf_nan=False)
    except ValueError:
        return None
    if found != values or any(mark in together for mark in _KEPT_IN_ANOTHER_WAY):
        return None
    return Written(texts, found)


def same(one: JSON, other: JSON) -> bool:
    """Return whether two JSON values are equal and of the same type: in Python, 1, 1.0 and True are equal."""
    # Compare first: an integer stored by another service may be too long to be encoded.
    return one == other and _sorted(one) == _sorted(other)


def loads(text: str | bytes) -> JSON:
    """Decode the text of a jsonb value, even one stored by others that `dumps` would reject.

    Raises:
        MeshStorageError: It is nested too deep for Python.
    """
    try:
        return from_json(text)
    except ValueError:
        try:
            return json.loads(text, parse_int=_integer)
        except RecursionError:
            raise MeshStorageError("a JSON value stored by another service is nested too deep to be decoded") from None


def loads_all(texts: Sequence[str]) -> list[JSON]:
    """Decode many texts at once, in a third of the time; raises as for one."""
    try:
        values: list[JSON] = from_json(f"[{','.join(texts)}]")
    except ValueError:
        return list(map(loads, texts))
    return values


def register(cursor: psycopg.Cursor[Any] | psycopg.AsyncCursor[Any]) -> None:
    """Register a loader on a cursor with binary results that returns jsonb undecoded, for `read_all`.

    psycopg would call a function for each value, which takes twice the time of decoding it.
    """
    text_loader = psycopg.adapters.get_loader(psycopg.adapters.types["text"].oid, Format.BINARY)
    assert text_loader is not None, "psycopg has a loader for text"
    cursor.adapters.register_loader("jsonb", text_loader)


def read_all(received: Iterable[str]) -> Generator[JSON]:
    """Yield the decoded values of many binary jsonb values, each a version byte and text; raises as `loads`.

    They are decoded lazily in batches, so that few are in memory in both forms.
    """
    texts: list[str] = []
    size = 0
    for value in received:
        texts.append(value[1:])
        size += len(value)
        if size > _READ_AT_ONCE:
            yield from loads_all(texts)
            texts, size = [], 0
    yield from loads_all(texts)


def _integer(digits: str) -> int:
    """Convert an integer of any length: Decimal is exempt from Python's limit."""
    return int(Decimal(digits))


def _check(values: Iterable[JSON], field: str, depth: int) -> bool:
    """Check values for JSON; return whether a float must be written without an exponent."""
    exponents = False
    for value in values:
        kind = _kind(value)
        if kind is str:
            check_text(value, field)
        elif kind is int:
            if not -_INTEGER_LIMIT < value < _INTEGER_LIMIT:
                raise InvalidInputError(f"{field} contains an integer with too many digits", field=field)
        elif kind is float:
            if not math.isfinite(value):
                raise InvalidInputError(f"{field} contains {value}, which is not a JSON value", field=field)
            exponents |= abs(value) >= _EXPONENT_FROM or (not value and math.copysign(1, value) < 0)
        elif kind is not bool and value is not None:
            exponents |= _check(_members(value, kind, field, depth), field, depth - 1)
    return exponents


def _kind(value: JSON) -> type[object]:
    """Return the type of a value; a subclass of str, dict or list counts as its base."""
    own: type[object] = value.__class__
    return next((kind for kind in _KINDS if issubclass(own, kind)), own)


_KINDS: tuple[type[object], ...] = (str, dict, list)


def _members(value: JSON, kind: type[object], field: str, depth: int) -> Iterable[JSON]:
    """Return the members of a list or dict, after checking its keys."""
    if kind not in (dict, list):
        raise InvalidInputError(f"{field} contains a {kind.__name__}, which is not a JSON value", field=field)
    if depth == 0:
        raise InvalidInputError(f"{field} is nested deeper than {MAX_DEPTH} levels", field=field)
    members: Iterable[JSON] = value
    if kind is list:
        return members
    for key in members:
        if not isinstance(key, str):
            raise InvalidInputError(f"{field} has a key of type {type(key).__name__}; JSON requires str", field=field)
        check_text(key, field)
    named: dict[str, JSON] = value
    return named.values()


def check_text(value: str, field: str) -> None:
    """Reject a string with NUL or a lone surrogate, which PostgreSQL cannot store (manual, 8.3 and 8.14)."""
    if "\0" in value:
        raise InvalidInputError(f"{field} contains NUL, which PostgreSQL cannot store in text", field=field)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidInputError(
                f"{field} contains a lone surrogate, which is not valid Unicode", field=field
            ) from None


def _spell_out(value: JSON) -> str:
    kind = _kind(value)
    if kind is dict:
        members: dict[str, JSON] = value
        return "{" + ",".join(f"{_encode(key)}:{_spell_out(member)}" for key, member in members.items()) + "}"
    if kind is list:
        elements: list[JSON] = value
        return "[" + ",".join(map(_spell_out, elements)) + "]"
    if kind is float and not value:
        return "0.0"  # numeric has no negative zero
    if kind is float and abs(value) >= _EXPONENT_FROM:
        return format(Decimal(repr(value)), "f") + ".0"
    return _encode(value)


def _encode(value: JSON) -> str:
    return to_json(value).decode()


# NUL, negative zero, and an exponent of 16 or more, as written by this version of pydantic-core.
_KEPT_IN_ANOTHER_WAY = (r"\u0000", "-0.0,", "-0.0]", "-0.0}", _encode(1e16).strip("0123456789."))
