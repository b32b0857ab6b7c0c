"""Rows in a temporary file, so that a large result is read at once but is never in memory as a whole."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from mesh_storage.postgres.statement import Row

_IN_MEMORY_BYTES = 2**22


class Spool:
    """The parts of a result, which are written once and then read; small ones stay in memory."""

    def __init__(self) -> None:
        # Without a name in the file system from the beginning on, so that nobody else can open it.
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES)  # noqa: SIM115 - closed by this context manager
        self._parts = 0

    def append(self, rows: list[Row]) -> None:
        """Write a part."""
        pickle.dump(rows, self._file, pickle.HIGHEST_PROTOCOL)
        self._parts += 1

    def __iter__(self) -> Iterator[list[Row]]:
        """Yield the parts."""
        self._file.seek(0)
        for _ in range(self._parts):
            yield pickle.load(self._file)  # noqa: S301 - written by this process

    def __len__(self) -> int:
        return self._parts

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
