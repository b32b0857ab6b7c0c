"""The archive of a backup: the SQL that pg_restore generates from it, and its execution in our transaction."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psycopg

from mesh_storage.backup import client_tools, refill
from mesh_storage.backup.catalog import Connection
from mesh_storage.errors import ConfigurationError, InvalidInputError
from mesh_storage.schema import changes

logger = logging.getLogger("mesh_storage")

# Less than the capacity of the pipe from pg_restore, so that it can continue while a block is sent to the server.
_BLOCK = 1 << 16
_REPORT = 1 << 20
"""Bytes of rows between two progress reports."""
# A line of pg_restore's list: dump id; catalog OID and OID, type, schema, names, owner.
_INDEX = re.compile(r"\d+; \d+ \d+ (?:INDEX|(?:FK )?CONSTRAINT) ")
_ATTACHED = re.compile(r"\d+; \d+ \d+ (?:TRIGGER|RULE|POLICY|ROW SECURITY) ")
_FOREIGN_KEY = re.compile(r"\d+; \d+ \d+ FK CONSTRAINT \S+ \S+ (\S+) ")
# The comment at the start of each entry in the SQL.
_BEGIN = b"-- Name: "
_BEGIN_INDEX = re.compile(rb"-- Name: .*; Type: (?:INDEX|(?:FK )?CONSTRAINT); ")
# Commands of psql only.
_FOR_PSQL = re.compile(rb"\\(?:un)?restrict ")
_BEGIN_TABLE = re.compile(rb"-- Name: .*; Type: TABLE; ")
_COMPRESSION = re.compile(rb"ALTER TABLE ONLY .* ALTER COLUMN .* SET COMPRESSION lz4;$")
_COPY = re.compile(rb"COPY (\S+|.*?\"\S*) \((.*)\) FROM stdin;$")
_NAME = re.compile(rb'"(?:[^"]|"")*"|[^\s,"]+')
# SQLSTATEs meaning that the server lacks something a definition needs: an object, function, table, schema, extension
# file, build option, setting or encoding. Names from the PostgreSQL manual, appendix A.
_LACKING = frozenset(
    code.sqlstate
    for code in (
        psycopg.errors.UndefinedObject,
        psycopg.errors.UndefinedFunction,
        psycopg.errors.UndefinedTable,
        psycopg.errors.UndefinedParameter,
        psycopg.errors.InvalidSchemaName,
        psycopg.errors.InvalidParameterValue,
        psycopg.errors.FeatureNotSupported,
        psycopg.errors.UndefinedFile,
        psycopg.errors.SyntaxError,
        psycopg.errors.CharacterNotInRepertoire,
        psycopg.errors.UntranslatableCharacter,
    )
)
# At the top of the SQL; pg_restore knows more settings than an older server.
_SETTING = re.compile(rb"SET (\w+) = ")


@dataclass(frozen=True, slots=True)
class Selection:
    """The selection of entries to restore."""

    without: Collection[str] = ()
    """The foreign keys to skip."""
    made: Collection[str] | None = None
    """The tables, by qualified name, that the archive creates; None for all."""
    filled: Mapping[str, str] = field(default_factory=dict[str, str])
    """The existing tables that it fills: their names here, by their names in the archive."""


def entries(program: Path, dump: Path, selection: Selection) -> list[str]:
    """Return the selected entries of an archive's list, without objects that other systems added to the tables."""
    with client_tools.output([program, "--list", dump], path=dump) as listing:
        lines = listing.read().decode().splitlines(keepends=True)

    def wanted(line: str) -> bool:
        foreign_key = _FOREIGN_KEY.match(line)
        return not _ATTACHED.match(line) and not (foreign_key and foreign_key[1] in selection.without)

    def on_made_table(line: str) -> bool:
        return selection.made is None or any(f" {table.rpartition('.')[2]} " in line for table in selection.made)

    attached = [line for line in lines if _ATTACHED.match(line) and on_made_table(line)]
    left_out = [
        line.split(" ", 3)[3].rsplit(" ", 1)[0] for line in attached if line.split()[-2] not in changes.TRIGGERS
    ]
    if left_out:
        logger.warning(
            "skipped, since other systems added it to the tables: %s",
            ", ".join(left_out),
            extra={"event": "restore", "left_out": left_out},
        )
    return [line for line in lines if wanted(line)]


def load(
    connection: Connection,
    program: Path,
    dump: Path,
    selection: Selection,
    report: Callable[[str, int, int], None],
) -> None:
    """Run the SQL of the selected entries; report the rows copied (of 0, the total being unknown) and indexes built.

    Raises:
        ConfigurationError: The server lacks something a definition needs, such as an extension.
        ConflictError: The rows do not fit into an existing table.
    """
    wanted = entries(program, dump, selection)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8") as chosen:
        chosen.writelines(wanted)
        chosen.flush()
        options = [f"--use-list={chosen.name}", "--no-owner", "--no-privileges", "--no-tablespaces", "--file=-"]
        with client_tools.output([program, *options, dump], path=dump) as script:
            indexes = sum(_INDEX.match(line) is not None for line in wanted)
            _Script(connection, selection, report, indexes).run(script)


@contextmanager
def surroundings() -> Generator[None]:
    """Translate errors that mean the server lacks something the backup needs, as opposed to a broken backup.

    Raises:
        ConfigurationError: In place of the server's error.
    """
    try:
        yield
    except psycopg.Error as error:
        if error.sqlstate not in _LACKING:
            raise
        raise ConfigurationError(
            f"this server lacks something that the backup needs: PostgreSQL reports {error.diag.message_primary!r} "
            f"(SQLSTATE {error.sqlstate}); install or create it first, or restore on a server that has it",
            sqlstate=error.sqlstate,
        ) from error


class _Script:
    """The SQL of an archive, executed entry by entry in the transaction of a connection."""

    def __init__(
        self, connection: Connection, selection: Selection, report: Callable[[str, int, int], None], indexes: int
    ) -> None:
        self._connection = connection
        self._made = None if selection.made is None else [name.encode() for name in selection.made]
        self._filled = {name.encode(): here for name, here in selection.filled.items()}
        self._report = report
        self._loaded = 0
        self._indexes, self._built = indexes, 0
        self._entry: list[bytes] = []
        self._settings = {name for (name,) in connection.execute("SELECT name FROM pg_settings")}
        query = "SELECT 'lz4' = ANY(enumvals) FROM pg_settings WHERE name = 'default_toast_compression'"
        self._lz4 = connection.execute(query).fetchone() == (True,)

    def run(self, script: IO[bytes]) -> None:
        """Execute the whole script."""
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
        """Return whether a line is for psql only, or uses a setting or compression method that this server lacks."""
        if _FOR_PSQL.match(line):
            return True
        if self._entry and self._entry[0].startswith(_BEGIN):
            if self._lz4 or not _COMPRESSION.match(line) or not _BEGIN_TABLE.match(self._entry[0]):
                return False
            logger.warning(
                "this server does not support lz4; values are compressed with pglz", extra={"event": "restore"}
            )
            return True
        setting = _SETTING.match(line)
        return setting is not None and setting[1].decode() not in self._settings

    def _execute(self) -> None:
        entry, self._entry = b"".join(self._entry), []
        if not entry or (self._made is not None and entry.startswith(_BEGIN) and not self._makes(entry)):
            return
        with surroundings():
            self._connection.execute(entry)
        if self._made is None and _BEGIN_INDEX.match(entry):
            self._built += 1
            self._report("index", self._built, self._indexes)

    def _makes(self, entry: bytes) -> bool:
        """Return whether an entry belongs to a table to be created."""
        return any(re.search(rb"(?<![\w.\"])" + re.escape(name) + rb"(?![\w\"])", entry) for name in self._made or ())

    def _copy(self, statement: bytes, script: IO[bytes]) -> None:
        """Copy the rows of a table, if it is selected."""
        header = _COPY.match(statement)
        if header is None:
            raise InvalidInputError("the format of the rows in the backup is unknown", field="path")
        table = header[1]
        rows = iter(script.readline, b"\\.\n")
        if table in self._filled:
            here = self._filled[table]
            refill.check_columns(self._connection, here, [_unquoted(name) for name in _NAME.findall(header[2])])
            statement = b"COPY %s (%s) FROM stdin;" % (here.encode(), header[2])
        elif self._made is not None and table not in self._made:
            for row in rows:
                _check_more(row)
            return
        with refill.fitting(table.decode()) if table in self._filled else nullcontext(), surroundings():
            self._pass_on(statement, rows)
        self._report("load", self._loaded, 0)

    def _pass_on(self, statement: bytes, rows: Iterator[bytes]) -> None:
        """Send rows up to the end-of-data line, which no row can equal, since COPY doubles backslashes."""
        block, size, unreported = list[bytes](), 0, 0
        with self._connection.cursor() as cursor, cursor.copy(statement) as copy:
            for row in rows:
                _check_more(row)
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

    def _send(self, copy: psycopg.Copy, block: list[bytes]) -> None:
        copy.write(b"".join(block))
        self._loaded += len(block)


def _check_more(row: bytes) -> None:
    if not row:
        raise InvalidInputError("the rows of the backup end prematurely", field="path")


def _unquoted(name: bytes) -> str:
    words = name.decode()
    return words[1:-1].replace('""', '"') if words.startswith('"') else words
