"""The range of the keys that start with a prefix, in code point order; `%` and `_` are literal characters."""

from __future__ import annotations

from mesh_storage.repositories import checks

_LAST_CHARACTER = "\U0010ffff"
_SURROGATES = range(0xD800, 0xE000)


def key_range(prefix: str) -> dict[str, str]:
    """Return the bounds of the keys with a prefix, as parameters of a statement."""
    checks.text("prefix", prefix, empty=True)
    return {"start": prefix, "stop": _upper_bound(prefix)}


def _upper_bound(prefix: str) -> str:
    """Return the smallest string, in code point order, that is greater than all with this prefix."""
    stem = prefix.rstrip(_LAST_CHARACTER)
    if not stem:
        return _LAST_CHARACTER * 256  # greater than every key of up to 255 characters
    following = ord(stem[-1]) + 1
    return stem[:-1] + chr(_SURROGATES.stop if following in _SURROGATES else following)
