"""SQL statements that are built and compiled once, since doing so per call would cost more than executing them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache, cached_property
from typing import Any

import sqlalchemy
from sqlalchemy.engine import make_url
from sqlalchemy.sql import Executable
from sqlalchemy.sql.elements import CompilerElement

Row = tuple[Any, ...]
Parameters = Mapping[str, Any]

# In text format, psycopg would escape each array element with a regular expression, at four times the cost of binary.
_ARRAY_PARAMETER = re.compile(r"%\((\w+)\)s(::[^,)%]*?\[\])")


@cache
def _dialect() -> sqlalchemy.Dialect:
    return make_url("postgresql+psycopg://").get_dialect()()


class Statement:
    """A SQL statement from SQLAlchemy Core elements, built and compiled on first use."""

    def __init__(self, build: Callable[[], Executable], *, writes: bool | None = None) -> None:
        """Initialize with a builder; `writes` is inferred, except for a SELECT with a data-modifying CTE."""
        self._build = build
        self._writes = writes

    @cached_property
    def _element(self) -> Executable:
        return self._build()

    @cached_property
    def writes(self) -> bool:
        """Whether the statement writes."""
        return not isinstance(self._element, sqlalchemy.SelectBase) if self._writes is None else self._writes

    @cached_property
    def changes_versions(self) -> bool:
        """Whether it may write rows that have a version; assumed of text, which does not say what it writes."""
        table = getattr(self._element, "table", None)
        return self.writes and (table is None or "version" in table.c)

    @cached_property
    def sql(self) -> bytes:
        """The SQL with psycopg's named placeholders."""
        assert isinstance(self._element, CompilerElement)
        compiled = self._element.compile(dialect=_dialect())
        fixed = [name for name, value in (compiled.params or {}).items() if value is not None]
        assert not fixed, f"make {fixed} a named parameter or a literal of the statement"
        return _ARRAY_PARAMETER.sub(r"%(\1)b\2", str(compiled)).encode()
