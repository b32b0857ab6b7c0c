"""How a JSON value gets into jsonb and out again equal, or is refused.

PostgreSQL keeps the numbers of jsonb as numeric (manual, 8.14): exact, but without an exponent, so that 1e308 would
come back as an integer and lose its type. Such floats are written out with a fraction, which numeric preserves.
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
"""How deep lists and dicts may be nested: what the fast parser of pydantic-core reads back."""

_READ_AT_ONCE = 2**18
"""Characters of many texts that are read in one go."""

_EXPONENT_FROM = 1e16
"""From here on, repr() and so JSON write a float with an exponent."""

_INTEGER_LIMIT = 10**4300
"""From here on, Python refuses to read an integer (docs, "Integer string conversion length limitation")."""

_sorted = json.JSONEncoder(sort_keys=True).encode


class Written(NamedTuple):
    """JSON values as texts for jsonb, and what is read back of these, which shares nothing with what was given."""

    texts: list[str]
    values: list[JSON]


def dumps(value: JSON, field: str = "value") -> str:
    """Write a JSON value as text for jsonb.

    Raises:
        InvalidInputError: The value, or one inside it, is none that JSON has or jsonb keeps: NaN, an infinity, a key
            that is no str, a tuple, a set, NUL or a lone surrogate in a text, an integer of over 4,300 digits, or
            nesting deeper than `MAX_DEPTH`.
    """
    return write([value], field).texts[0]


def write(values: list[JSON], field: str = "value") -> Written:
    """Write many JSON values, each as a text of its own, and read them back; raises as `dumps`."""
    written = _write_plain(values)
    if written is not None:
        return written
    texts = list(map(_spell_out if _check(values, field, MAX_DEPTH) else _encode, values))
    return Written(texts, loads_all(texts))


def _write_plain(values: list[JSON]) -> Written | None:
    """Write values that are read back equal: such are JSON, and to look at each one would cost more than that.

    Gives None where one needs that look: it is not equal, is of a subclass, or jsonb may keep it in another way.
    """
    try:
        marshal.dumps(values)  # refuses all but Python's own types, so that nothing of the caller's is called
        texts = list(map(_encode, values))
        together = f"[{','.join(texts)}]"
        found: list[JSON] = from_json(together, allow_inf_nan=False)
    except ValueError:
        return None
    if found != values or any(mark in together for mark in _KEPT_IN_ANOTHER_WAY):
        return None
    return Written(texts, found)


def same(one: JSON, other: JSON) -> bool:
    """Return whether two JSON values are equal and of one type: 1, 1.0 and true are equal for Python alone."""
    # Other values are seen to be so first: an integer of another service's may be too long to be written.
    return one == other and _sorted(one) == _sorted(other)


def loads(text: str | bytes) -> JSON:
    """Read the text of a jsonb value, also where others have stored what `dumps` refuses.

    Raises:
        MeshStorageError: It is nested so deep that Python has no room for it.
    """
    try:
        return from_json(text)
    except ValueError:
        try:
            return json.loads(text, parse_int=_integer)
        except RecursionError:
            raise MeshStorageError("a JSON value of another service's is nested too deep to be read") from None


def loads_all(texts: Sequence[str]) -> list[JSON]:
    """Read many texts at once, which takes a third of the time; raises as for one."""
    try:
        values: list[JSON] = from_json(f"[{','.join(texts)}]")
    except ValueError:
        return list(map(loads, texts))
    return values


def register(cursor: psycopg.Cursor[Any] | psycopg.AsyncCursor[Any]) -> None:
    """Let a cursor with binary results give jsonb as it comes, for `read_all`.

    psycopg would call a function for each value, which costs twice what it takes to read it.
    """
    text_loader = psycopg.adapters.get_loader(psycopg.adapters.types["text"].oid, Format.BINARY)
    assert text_loader is not None, "psycopg reads texts"
    cursor.adapters.register_loader("jsonb", text_loader)


def read_all(received: Iterable[str]) -> Generator[JSON]:
    """Read many values as they came, each a byte for the version of the format and the text; raises as `loads`.

    They are read as they are asked for, some at once, so that few are in memory in both forms.
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
    """Read an integer of any length: a decimal is not under Python's limit."""
    return int(Decimal(digits))


def _check(values: Iterable[JSON], field: str, depth: int) -> bool:
    """Refuse what JSON does not have; say whether a float needs to be written without its exponent."""
    exponents = False
    for value in values:
        kind = _kind(value)
        if kind is str:
            check_text(value, field)
        elif kind is int:
            if not -_INTEGER_LIMIT < value < _INTEGER_LIMIT:
                raise InvalidInputError(f"{field} holds an integer of too many digits", field=field)
        elif kind is float:
            if not math.isfinite(value):
                raise InvalidInputError(f"{field} holds {value}, which JSON does not have", field=field)
            exponents |= abs(value) >= _EXPONENT_FROM or (not value and math.copysign(1, value) < 0)
        elif kind is not bool and value is not None:
            exponents |= _check(_members(value, kind, field, depth), field, depth - 1)
    return exponents


def _kind(value: JSON) -> type[object]:
    """Return the type of a value; what is of a subclass of str, dict or list counts as one of these."""
    own: type[object] = value.__class__
    return next((kind for kind in _KINDS if issubclass(own, kind)), own)


_KINDS: tuple[type[object], ...] = (str, dict, list)


def _members(value: JSON, kind: type[object], field: str, depth: int) -> Iterable[JSON]:
    """Return what a list or dict holds, its keys checked."""
    if kind not in (dict, list):
        raise InvalidInputError(f"{field} holds a {kind.__name__}, which is no JSON value", field=field)
    if depth == 0:
        raise InvalidInputError(f"{field} is nested deeper than {MAX_DEPTH} levels", field=field)
    members: Iterable[JSON] = value
    if kind is list:
        return members
    for key in members:
        if not isinstance(key, str):
            raise InvalidInputError(f"{field} has a key of type {type(key).__name__}; JSON takes str", field=field)
        check_text(key, field)
    named: dict[str, JSON] = value
    return named.values()


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


# NUL, the negative zero, and an exponent of 16 or more as it is written by this version of pydantic-core.
_KEPT_IN_ANOTHER_WAY = (r"\u0000", "-0.0,", "-0.0]", "-0.0}", _encode(1e16).strip("0123456789."))
