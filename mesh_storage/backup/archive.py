"""The archive of a backup: the SQL that pg_restore makes of it, and how that is run in a transaction of ours."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO

import psycopg

from mesh_storage.backup import client_tools
from mesh_storage.backup.catalog import Connection
from mesh_storage.errors import InvalidInputError

# Less than the pipe from pg_restore holds, so that it can go on while a block is on its way to the server.
_BLOCK = 1 << 16
_REPORT = 1 << 20
"""How many bytes of rows there are between two reports."""
# An entry's line in the list of an archive: dump id; catalog and object id, kind, schema, names, owner.
_INDEX = re.compile(r"\d+; \d+ \d+ (?:INDEX|(?:FK )?CONSTRAINT) ")
_ATTACHED = re.compile(r"\d+; \d+ \d+ (?:TRIGGER|RULE|POLICY|ROW SECURITY) ")
_FOREIGN_KEY = re.compile(r"\d+; \d+ \d+ FK CONSTRAINT \S+ \S+ (\S+) ")
# The comment that begins an entry in the SQL.
_BEGIN = b"-- Name: "
_BEGIN_INDEX = re.compile(rb"-- Name: .*; Type: (?:INDEX|(?:FK )?CONSTRAINT); ")
# What only psql understands.
_FOR_PSQL = re.compile(rb"\\(?:un)?restrict ")
# At the head of the SQL; pg_restore knows more settings than an older server.
_SETTING = re.compile(rb"SET (\w+) = ")


def entries(program: Path, dump: Path, *, without: Collection[str]) -> list[str]:
    """List the entries of an archive, without the foreign keys named and what other systems put onto the tables."""
    with client_tools.output([program, "--list", dump], path=dump) as listing:
        lines = listing.read().decode().splitlines(keepends=True)

    def wanted(line: str) -> bool:
        foreign_key = _FOREIGN_KEY.match(line)
        return not _ATTACHED.match(line) and not (foreign_key and foreign_key[1] in without)

    return [line for line in lines if wanted(line)]


def load(
    connection: Connection, program: Path, dump: Path, wanted: list[str], report: Callable[[str, int, int], None]
) -> None:
    """Run the SQL of the wanted entries, and report the rows copied (of 0, for it knows no total) and indexes built."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as chosen:
        chosen.writelines(wanted)
        chosen.flush()
        options = [f"--use-list={chosen.name}", "--no-owner", "--no-privileges", "--no-tablespaces", "--file=-"]
        with client_tools.output([program, *options, dump], path=dump) as script:
            _Script(connection, report, sum(_INDEX.match(line) is not None for line in wanted)).run(script)


class _Script:
    """The SQL of an archive, run entry by entry in the transaction of a connection."""

    def __init__(self, connection: Connection, report: Callable[[str, int, int], None], indexes: int) -> None:
        self._connection = connection
        self._report = report
        self._loaded = 0
        self._indexes, self._built = indexes, 0
        self._entry: list[bytes] = []
        self._settings = {name for (name,) in connection.execute("SELECT name FROM pg_settings")}

    def run(self, script: IO[bytes]) -> None:
        """Run it to its end."""
        for line in script:
            if line.startswith(_BEGIN):
                self._execute()
                self._entry.append(line)
            elif line.startswith(b"COPY ") and line.endswith(b" FROM stdin;\n"):
                self._execute()
                self._copy(line, script)
            elif not self._for_others(line):
                self._entry.append(line)
        self._execute()

    def _for_others(self, line: bytes) -> bool:
        """Whether a line is for psql, or at the head of the SQL and for a server that has this setting."""
        in_entry = self._entry and self._entry[0].startswith(_BEGIN)
        setting = None if in_entry else _SETTING.match(line)
        return bool(_FOR_PSQL.match(line) or (setting and setting[1].decode() not in self._settings))

    def _execute(self) -> None:
        entry, self._entry = b"".join(self._entry), []
        if not entry:
            return
        self._connection.execute(entry)
        if _BEGIN_INDEX.match(entry):
            self._built += 1
            self._report("index", self._built, self._indexes)

    def _copy(self, statement: bytes, script: IO[bytes]) -> None:
        """Pass on the rows up to the line that ends them; no row looks like it, for a backslash is doubled there."""
        block, size, unreported = list[bytes](), 0, 0
        with self._connection.cursor() as cursor, cursor.copy(statement) as copy:
            for row in iter(script.readline, b"\\.\n"):
                if not row:
                    raise InvalidInputError("the rows of the backup end too early", field="path")
                block.append(row)
                size += len(row)
                if size > _BLOCK:
                    self._send(copy, block)
                    unreported += size
                    block, size = list[bytes](), 0
                if unreported > _REPORT:
                    self._report("load", self._loaded, 0)
                    unreported = 0
            self._send(copy, block)
        self._report("load", self._loaded, 0)

    def _send(self, copy: psycopg.Copy, block: list[bytes]) -> None:
        copy.write(b"".join(block))
        self._loaded += len(block)
