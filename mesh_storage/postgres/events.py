"""SQLAlchemy's cursor events for the statements of repositories, which do not go through SQLAlchemy's execution."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import sqlalchemy

from mesh_storage.postgres.statement import Parameters


class Events:
    """Calls who listens to `before_cursor_execute` and `after_cursor_execute` of an engine, or of all engines."""

    def __init__(self, connection: sqlalchemy.Connection) -> None:
        self._connection = connection
        self._dispatch: Any = connection.engine.dispatch
        self._context = SimpleNamespace()

    @property
    def listened(self) -> bool:
        """Whether anybody listens, which is asked for each statement."""
        return bool(self._dispatch.before_cursor_execute or self._dispatch.after_cursor_execute)

    def before(self, cursor: Any, sql: bytes, parameters: Parameters | None) -> tuple[bytes, Parameters | None]:
        """Tell the listeners of a statement; return what they make of it."""
        self._context = SimpleNamespace(executemany=False)
        statement: str = sql.decode()
        for listener in self._dispatch.before_cursor_execute:
            statement, parameters = listener(self._connection, cursor, statement, parameters, self._context, False)
        return statement.encode(), parameters

    def after(self, cursor: Any, sql: bytes, parameters: Parameters | None) -> None:
        """Tell the listeners that it was executed."""
        for listener in self._dispatch.after_cursor_execute:
            listener(self._connection, cursor, sql.decode(), parameters, self._context, False)
