"""Many rows as the parameters of one statement, whose text is the same for any number of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import (
    ARRAY,
    Column,
    ColumnElement,
    Integer,
    String,
    TableValuedAlias,
    Text,
    bindparam,
    cast,
    func,
    literal_column,
)
from sqlalchemy.types import TypeEngine


def parameter_type(kind: TypeEngine[Any]) -> TypeEngine[Any]:
    """Return the type that a parameter for a column is cast to: a text without a length, to which it would be cut."""
    return Text() if isinstance(kind, String) else kind


class Batch:
    """Rows of these columns: an array for each column, but one text for a column of texts or whole numbers.

    psycopg makes an array element by element, in Python; a text of many it only copies, which costs a tenth.
    """

    def __init__(self, types: Mapping[str, TypeEngine[Any]]) -> None:
        self._kinds = {name: parameter_type(kind) for name, kind in types.items()}

    def table(self) -> TableValuedAlias:
        """Return the rows as a table, for a statement."""
        arrays = (_array(name, kind) for name, kind in self._kinds.items())
        columns = (Column(name, kind) for name, kind in self._kinds.items())
        return func.unnest(*arrays).table_valued(*columns, name="input").render_derived()

    def parameters(self, columns: Mapping[str, list[Any]]) -> dict[str, Any]:
        """Return the parameters for the values of each column."""
        return {name: _parameter(kind, columns[name]) for name, kind in self._kinds.items()}


# ASCII's separators of units and of records, which hardly any text has.
_USUAL_MARKS = ("\x1f", "\x1e")


def _parameter(kind: TypeEngine[Any], values: list[Any]) -> Any:
    if isinstance(kind, Text):
        return _packed(values, *_marks(values))
    if isinstance(kind, Integer):
        return _packed([None if value is None else int.__repr__(value) for value in values], *_USUAL_MARKS)
    return values


def _packed(values: list[str | None], end: str, none: str) -> str:
    """Write texts one behind the other; the first two characters say what ends each, and what stands for None."""
    units = [none if value is None else value for value in values]
    return f"{end}{none}{end.join([*units, '', ''])}"


def _marks(values: list[str | None]) -> tuple[str, str]:
    """Choose two characters that are in none of the texts."""
    together = "".join(filter(None, values))
    if not any(mark in together for mark in _USUAL_MARKS):
        return _USUAL_MARKS
    used = set(together)
    unused = (mark for mark in map(chr, range(1, 0x10FFFF)) if mark not in used and mark.isprintable())
    return next(unused), next(unused)


def _array(name: str, kind: TypeEngine[Any]) -> ColumnElement[Any]:
    if isinstance(kind, Text):
        return _unpacked(bindparam(name, type_=kind))
    if isinstance(kind, Integer):
        return cast(_unpacked(bindparam(name, type_=Text)), ARRAY(kind))
    return bindparam(name, type_=ARRAY(kind))


def _unpacked(packed: ColumnElement[str]) -> ColumnElement[Any]:
    """Return the array of the texts (PostgreSQL manual, 9.4 and 9.19)."""
    one, two, three = literal_column("1", Integer), literal_column("2", Integer), literal_column("3", Integer)
    end, none = func.left(packed, one), func.substr(packed, two, one)
    units = func.string_to_array(func.substr(packed, three), end, none)
    # Two more, since PostgreSQL makes no text of an empty one, so that one empty text would be the same as none.
    return func.trim_array(units, two, type_=ARRAY(Text))
