"""The open savepoints of a unit of work, and which of its writes each of them would undo."""

from __future__ import annotations

from mesh_storage.errors import MeshStorageError
from mesh_storage.models.base import Writes


class Savepoints:
    """A stack of savepoints; at its bottom is the transaction."""

    def __init__(self) -> None:
        self._writes: Writes | None = None
        self._outer: list[Writes] = []

    @property
    def writes(self) -> Writes:
        """The writes since the last commit, rollback or savepoint."""
        if self._writes is None:
            self._writes = Writes()
        return self._writes

    @property
    def are_open(self) -> bool:
        """Whether a savepoint is open."""
        return bool(self._outer)

    def check_none_open(self) -> None:
        """Raise if a savepoint is open, within which the transaction cannot be ended.

        Raises:
            MeshStorageError: A savepoint is open.
        """
        if self._outer:
            raise MeshStorageError(
                "a unit of work cannot be committed or rolled back inside a savepoint() block; leave the block first"
            )

    def push(self) -> None:
        """Begin a savepoint."""
        self._outer.append(self.writes)
        self._writes = Writes(self.writes)

    def pop(self) -> None:
        """End the innermost savepoint."""
        self._writes = self._outer.pop()

    def committed(self) -> None:
        """Forget the writes, which stand for good."""
        self._writes = None

    def rolled_back(self) -> None:
        """Undo the writes."""
        if self._writes is not None:
            self._writes.undo()
            self._writes = None
