"""Arrays as statement parameters, so that the SQL is the same for any number of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import ARRAY, Column, String, TableValuedAlias, Text, bindparam, func
from sqlalchemy.types import TypeEngine


def parameter_type(kind: TypeEngine[Any]) -> TypeEngine[Any]:
    """Return the type to cast a column's parameter to: text without a length, since a cast would truncate it."""
    return Text() if isinstance(kind, String) else kind


class Batch:
    """Rows with these columns, passed as one array per column."""

    def __init__(self, types: Mapping[str, TypeEngine[Any]]) -> None:
        self._kinds = {name: parameter_type(kind) for name, kind in types.items()}

    def table(self) -> TableValuedAlias:
        """Return the arrays as a table (unnest), for a statement."""
        arrays = (bindparam(name, type_=ARRAY(kind)) for name, kind in self._kinds.items())
        columns = (Column(name, kind) for name, kind in self._kinds.items())
        return func.unnest(*arrays).table_valued(*columns, name="input").render_derived()
