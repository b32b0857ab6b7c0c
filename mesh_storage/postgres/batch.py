"""Many rows as the parameters of one statement, whose text is the same for any number of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ARRAY, Column, String, TableValuedAlias, Text, bindparam, func
from sqlalchemy.types import TypeEngine


def parameter_type(kind: TypeEngine[Any]) -> TypeEngine[Any]:
    """Return the type that a parameter for a column is cast to: a text without a length, to which it would be cut."""
    return Text() if isinstance(kind, String) else kind


class Batch:
    """Rows of these columns: an array for each column."""

    def __init__(self, types: Mapping[str, TypeEngine[Any]]) -> None:
        self._kinds = {name: parameter_type(kind) for name, kind in types.items()}

    def table(self) -> TableValuedAlias:
        """Return the rows as a table, for a statement."""
        arrays = (bindparam(name, type_=ARRAY(kind)) for name, kind in self._kinds.items())
        columns = (Column(name, kind) for name, kind in self._kinds.items())
        return func.unnest(*arrays).table_valued(*columns, name="input").render_derived()
