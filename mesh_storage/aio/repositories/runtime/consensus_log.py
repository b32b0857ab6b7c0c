"""The repository of the Raft log (Ongaro and Ousterhout, "In Search of an Understandable Consensus Algorithm", 5.3).

Indexes are unique and without gaps, and terms never decrease. The unique index of the table decides between two appends
at one index, and an append requires its predecessor, so no lock is needed for either. Deleting a predecessor locks the
table against appends until the transaction ends; the first append to an empty log is serialized as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, Text, bindparam, cast, delete, desc, func, literal_column, select, text
from sqlalchemy.dialects.postgresql import JSONB, Insert, insert
from sqlalchemy.sql.dml import ReturningInsert

from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.repositories.base import AsyncRepository
from mesh_storage.errors import ConflictError, InvalidInputError
from mesh_storage.models import JSON, LogEntry
from mesh_storage.postgres import jsonb
from mesh_storage.postgres.batch import Batch
from mesh_storage.postgres.statement import Statement
from mesh_storage.repositories import checks
from mesh_storage.repositories.aggregates import Aggregate, Rows

_LOG = Aggregate(LogEntry)
_TABLE = _LOG.table
_TERM, _INDEX, _ENTRY, _CREATED_AT = _TABLE.columns

_BATCH = Batch({"term": BigInteger(), "index": BigInteger(), "entry": Text()})
_CHECK_TERM, _CHECK_INDEX = checks.whole("LogEntry.term", 0), checks.whole("LogEntry.index", 1)


def _last() -> Rows:
    return select(_TERM, _INDEX).order_by(desc(_INDEX)).limit(literal_column("1"))


def _new_rows() -> Rows:
    rows = _BATCH.table()
    return select(rows.c.term, rows.c.index, cast(rows.c.entry, JSONB))


def _insert(rows: Rows) -> Insert:
    return insert(_TABLE).from_select([_TERM, _INDEX, _ENTRY], rows).on_conflict_do_nothing()


def _extend() -> Insert:
    last = _last().subquery("last")
    is_before = select(last.c.index).where(
        last.c.index == bindparam("previous_index", type_=BigInteger),
        last.c.term <= bindparam("highest_term", type_=BigInteger),
    )
    return _insert(_new_rows().where(is_before.exists()))


def _extend_by_one() -> ReturningInsert[Any]:
    last = _last().subquery("last")
    term, index = bindparam("term", type_=BigInteger), bindparam("index", type_=BigInteger)
    row = select(term, index, bindparam("entry", type_=JSONB)).select_from(last)
    return _insert(row.where(last.c.index == index - literal_column("1"), last.c.term <= term)).returning(_CREATED_AT)


_GET = Statement(lambda: select(_TABLE).where(_INDEX == bindparam("index")))
_RANGE = Statement(lambda: select(_TABLE).where(_INDEX.between(bindparam("start"), bindparam("end"))).order_by(_INDEX))
_FIRST = Statement(lambda: select(_TERM, _INDEX).order_by(_INDEX).limit(literal_column("1")))
_LAST = Statement(_last)
_LOCK = Statement(lambda: text("LOCK TABLE mesh_consensus_log IN SHARE ROW EXCLUSIVE MODE"))
# An advisory lock, since a transaction that has tried to append already holds a lock on the table, and two that both
# want a stronger one would deadlock. "mesh_log" as a number.
_LOCK_BEGINNING = Statement(
    lambda: select(func.pg_advisory_xact_lock(literal_column(str(int.from_bytes(b"mesh_log"))))), writes=True
)
_HOLD = Statement(
    lambda: select(_INDEX).where(_INDEX == bindparam("index")).with_for_update(key_share=True, read=True), writes=True
)
_DELETE = Statement(lambda: delete(_TABLE).where(_INDEX.between(bindparam("start"), bindparam("end"))))
_BEGIN = Statement(lambda: _insert(_new_rows()))
_EXTEND = Statement(_extend)
_EXTEND_BY_ONE = Statement(_extend_by_one)


class _New(NamedTuple):
    """New entries with consecutive indexes, as columns."""

    terms: list[int]
    indexes: list[int]
    texts: list[str]
    """The entries as JSON text."""

    @property
    def first_index(self) -> int:
        """Return the lowest index."""
        return self.indexes[0]

    def arrays(self) -> dict[str, Any]:
        """Return the statement parameters for the rows."""
        return {"term": self.terms, "index": self.indexes, "entry": self.texts}

    def after(self, index: int) -> _New:
        """Return the entries with higher indexes."""
        there = max(0, index + 1 - self.first_index)
        return _New(self.terms[there:], self.indexes[there:], self.texts[there:])


class AsyncConsensusLogRepository(AsyncRepository[LogEntry]):
    """The repository of the consensus log."""

    def __init__(self, connection: AsyncUnitOfWorkConnection) -> None:
        super().__init__(connection, _LOG)

    async def append(self, term: int, index: int, entry: JSON) -> LogEntry:
        """Append an entry after the last index; appending the same entry again has no effect.

        Terms start at 0, indexes at 1; both end at 2**63 - 1. An empty log may start at any index.

        Raises:
            ConflictError: This index holds a different entry, the index leaves a gap, or the term is lower than the
                last.
        """
        _CHECK_TERM(term)
        _CHECK_INDEX(index)
        [sent], [stored] = jsonb.write([entry], "LogEntry.entry")
        await self._hold(index - 1)
        row = await self._connection.fetch_one(_EXTEND_BY_ONE, {"term": term, "index": index, "entry": sent})
        if row is not None:
            return self._aggregate.load.of_values((term, index, stored, row[0]))
        await self._append_slowly(_New([term], [index], [sent]))
        return await self.get(index)

    async def append_many(self, entries: Iterable[LogEntry | tuple[int, int, JSON]]) -> None:
        """Append entries, or (term, index, entry) tuples, with consecutive indexes; existing ones must be identical.

        Raises:
            ConflictError: As for `append`; after a concurrent append, the unit of work can only be rolled back.
        """
        given = checks.many("entries", entries)
        if not given:
            return
        terms, indexes, values = map(list, zip(*map(_parts, given), strict=True))
        _CHECK_TERM.column(terms)
        _CHECK_INDEX.column(indexes)
        new = _New(terms, indexes, jsonb.write(values, "LogEntry.entry").texts)
        if indexes != list(range(indexes[0], indexes[0] + len(indexes))) or terms != sorted(terms):
            _check_order(new)
        await self._hold(new.first_index - 1)
        if not await self._extend(new):
            await self._append_slowly(new)

    async def find(self, index: int) -> LogEntry | None:
        """Return the entry at this index, or None."""
        return await self._fetch_one(_GET, index=checks.integer("LogEntry.index", index))

    async def get(self, index: int) -> LogEntry:
        """Return the entry at this index.

        Raises:
            NotFoundError: There is none.
        """
        return self._get(index, await self.find(index))

    async def range(self, start: int, end: int) -> list[LogEntry]:
        """Return the existing entries from index `start` to index `end`, inclusive, in index order."""
        return await self._fetch_all(_RANGE, start=checks.integer("start", start), end=checks.integer("end", end))

    async def first_index(self) -> int:
        """Return the lowest index, or 0 for an empty log."""
        return (await self._end(_FIRST))[1]

    async def last_index(self) -> int:
        """Return the highest index, or 0 for an empty log."""
        return (await self._end(_LAST))[1]

    async def last_term(self) -> int:
        """Return the term of the entry with the highest index, or 0 for an empty log."""
        return (await self._end(_LAST))[0]

    async def delete_range(self, start: int, end: int) -> int:
        """Delete the entries from index `start` to index `end`, inclusive, and return their number.

        The range must be a prefix of the log (after a snapshot) or a suffix (after a conflict); it may extend beyond
        the log. Concurrent appends wait until this unit of work ends.

        Raises:
            InvalidInputError: The range would leave a gap.
        """
        checks.integer("start", start)
        checks.integer("end", end)
        self._connection.check_sees_present()
        await self._connection.execute(_LOCK)
        first, last = await self.first_index(), await self.last_index()
        if start > end or end < first or start > last:
            return 0
        if start > first and end < last:
            raise InvalidInputError(
                f"the log has indexes {first} to {last}; deleting a range from the middle would leave a gap",
                field="start",
            )
        return await self._connection.execute(_DELETE, {"start": start, "end": end})

    async def count(self) -> int:
        """Return the number of entries."""
        return int(await self._fetch_value(self._aggregate.count))

    async def _hold(self, index: int) -> None:
        """With a snapshot, lock the predecessor of an append against deletion; fail if it was deleted already."""
        if self._connection.has_snapshot:
            await self._connection.fetch_one(_HOLD, {"index": index})

    async def _end(self, statement: Statement) -> tuple[int, int]:
        row = await self._connection.fetch_one(statement)
        return (0, 0) if row is None else (row[0], row[1])

    async def _extend(self, new: _New) -> bool:
        """Insert after the last entry; return whether the last entry was the predecessor."""
        predecessor = {"previous_index": new.first_index - 1, "highest_term": new.terms[0]}
        stored = await self._connection.execute(_EXTEND, new.arrays() | predecessor)
        if 0 < stored < len(new.indexes):
            # A concurrent append took some of the indexes, and our remaining entries may follow it.
            raise self._connection.fail(
                ConflictError("another transaction appended to the log concurrently", retryable=True)
            )
        return stored > 0

    async def _append_slowly(self, new: _New) -> None:
        """Append to an empty log or over existing entries, or raise the conflict."""
        for _ in range(3):  # others may append between the SELECT and the INSERT
            if await self._append_after_last(new):
                return
        raise ConflictError("other transactions keep appending to the log", retryable=True)

    async def _append_after_last(self, new: _New) -> bool:
        last_term, last_index = await self._end(_LAST)
        if not last_index:
            if self._connection.has_snapshot:
                raise InvalidInputError(
                    "the first entry of a log must be appended in a 'read committed' unit of work, that is, without "
                    "isolation=",
                    field="isolation",
                )
            await self._connection.execute(_LOCK_BEGINNING)
            last_term, last_index = await self._end(_LAST)
            if not last_index:
                await self._connection.execute(_BEGIN, new.arrays())
                return True
        if new.first_index > last_index + 1:
            raise ConflictError(f"index {new.first_index} leaves a gap: the last index is {last_index}")
        stored = {entry.index: entry for entry in await self.range(new.first_index, new.indexes[-1])}
        for term, index, text_ in zip(*new, strict=True):
            if index > last_index:
                break
            there = stored.get(index)
            if there is None:
                raise ConflictError(f"index {index} is before the first entry of the log")
            if there.term != term or not jsonb.same(there.entry, jsonb.loads(text_)):
                raise ConflictError(f"index {index} holds a different entry, of term {there.term}")
        rest = new.after(last_index)
        if rest.indexes and rest.terms[0] < last_term:
            raise ConflictError(f"term {rest.terms[0]} is lower than the term {last_term} of the last entry")
        return not rest.indexes or await self._extend(rest)


def _parts(entry: LogEntry | tuple[int, int, JSON]) -> tuple[Any, Any, JSON]:
    if isinstance(entry, LogEntry):
        attributes = vars(entry)  # nothing to load, and instrumented access is five times slower
        return attributes.get("term"), attributes.get("index"), attributes.get("entry")
    if isinstance(entry, tuple) and len(entry) == 3:  # noqa: PLR2004 - term, index, entry
        return entry
    raise InvalidInputError(
        f"each entry must be a LogEntry or (term, index, entry), not {type(entry).__name__}", field="entries"
    )


def _check_order(new: _New) -> None:
    for (term, index), (next_term, next_index) in pairwise(zip(new.terms, new.indexes, strict=True)):
        if next_index != index + 1:
            raise ConflictError(f"index {next_index} does not follow index {index}")
        if next_term < term:
            raise ConflictError(f"term {next_term} at index {next_index} is lower than the preceding term {term}")
