"""SQLAlchemy's cursor events for the statements of repositories, which bypass SQLAlchemy's execution."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import sqlalchemy

from mesh_storage.postgres.statement import Parameters


class Events:
    """Invokes the `before_cursor_execute` and `after_cursor_execute` listeners of an engine or of all engines."""

    def __init__(self, connection: sqlalchemy.Connection) -> None:
        self._connection = connection
        self._dispatch: Any = connection.engine.dispatch
        self._context = SimpleNamespace()

    @property
    def listened(self) -> bool:
        """Whether there are listeners; checked for each statement."""
        return bool(self._dispatch.before_cursor_execute or self._dispatch.after_cursor_execute)

    def before(self, cursor: Any, sql: bytes, parameters: Parameters | None) -> tuple[bytes, Parameters | None]:
        """Invoke the listeners before a statement, and return the statement and parameters as they modified them."""
        self._context = SimpleNamespace(executemany=False)
        statement: str = sql.decode()
        for listener in self._dispatch.before_cursor_execute:
            statement, parameters = listener(self._connection, cursor, statement, parameters, self._context, False)
        return statement.encode(), parameters

    def after(self, cursor: Any, sql: bytes, parameters: Parameters | None) -> None:
        """Invoke the listeners after a statement."""
        for listener in self._dispatch.after_cursor_execute:
            listener(self._connection, cursor, sql.decode(), parameters, self._context, False)
