"""The manifest of a backup: its origin, its expected contents, and the checksums of its files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from mesh_storage.backup.client_tools import major, path_error
from mesh_storage.errors import InvalidInputError, NotFoundError

FORMAT = 1
_NAME = "manifest.json"


class Manifest(BaseModel):
    """The manifest of a backup, stored next to its dump."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    """The version of the backup format."""
    created: datetime
    """The time of its snapshot, by the database's clock."""
    revision: str
    """The schema revision."""
    namespace: str
    """The PostgreSQL schema of the tables, usually `public`."""
    server_version: str
    tool_version: str
    """The version of pg_dump."""
    size: int
    """The total size of the tables and indexes in the database, in bytes."""
    rows: dict[str, int]
    """The number of rows of each table."""
    definitions: dict[str, str]
    """The definitions of the domains and functions that the tables need."""
    references: dict[str, str]
    """The foreign keys to other systems' tables, with those tables."""
    files: dict[str, str] = {}
    """The SHA-256 of each file, by its path in the backup."""
    sha256: str = ""
    """The SHA-256 of the rest of this manifest."""

    @property
    def tool_major(self) -> int:
        """The major version of pg_dump; pg_restore must be as new."""
        return major(self.tool_version)

    @classmethod
    def read(cls, backup: Path) -> Self:
        """Read the manifest of a backup.

        Raises:
            NotFoundError: No backup was found.
            InvalidInputError: It cannot be read, was altered, or has a newer format than this code supports.
        """
        try:
            words: dict[str, Any] = json.loads((backup / _NAME).read_bytes())
            if words["format"] != FORMAT:
                raise _damaged(backup, f"its format is {words['format']}; this mesh_storage supports format {FORMAT}")
            manifest = cls.model_validate(words)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError("Backup", str(backup)) from None
        except OSError as error:
            raise path_error(backup, error) from error
        except (ValidationError, TypeError, KeyError, UnicodeDecodeError, json.JSONDecodeError):
            raise _damaged(backup, "its manifest was altered") from None
        if manifest.sha256 != _own_checksum(manifest):
            raise _damaged(backup, "its manifest was altered")
        return manifest

    def write(self, backup: Path, progress: Callable[[int, int], None]) -> Self:
        """Add the checksums of a backup's files to the manifest, and write it next to them."""
        names, files = sorted(_files(backup)), dict[str, str]()
        for name in names:
            files[name] = _checksum(backup / name)
            progress(len(files), len(names))
        listed = self.model_copy(update={"files": files})
        complete = listed.model_copy(update={"sha256": _own_checksum(listed)})
        with (backup / _NAME).open("x", encoding="utf-8") as file:
            file.write(complete.model_dump_json(indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return complete

    def verify_files(self, backup: Path, progress: Callable[[int, int], None]) -> None:
        """Compare the files of a backup with their checksums.

        Raises:
            InvalidInputError: A file is missing, unexpected, unreadable, truncated or altered.
        """
        try:
            names = set(_files(backup)) - {_NAME}
            if names != self.files.keys():
                different = ", ".join(sorted(names ^ self.files.keys()))
                raise _damaged(backup, f"files are missing or were added: {different}")
            for number, name in enumerate(sorted(names), 1):
                if _checksum(backup / name) != self.files[name]:
                    raise _damaged(backup, f"the file {name} was truncated or altered")
                progress(number, len(names))
        except OSError as error:
            raise path_error(backup, error) from error


def _own_checksum(manifest: Manifest) -> str:
    rest = manifest.model_copy(update={"sha256": ""}).model_dump_json()
    return hashlib.sha256(rest.encode()).hexdigest()


def _files(backup: Path) -> Iterator[str]:
    return (str(path.relative_to(backup)) for path in backup.rglob("*") if not path.is_dir())


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(backup: Path, reason: str) -> InvalidInputError:
    return InvalidInputError(f"the backup {str(backup)!r} cannot be used: {reason}", field="path")
