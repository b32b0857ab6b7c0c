"""The log of changes: what a batch is, the cursors, and the statements that read what changed since one.

A cursor is a snapshot of PostgreSQL (manual, 9.27, "Transaction ID and Snapshot Information"). What it did not see and
the snapshot of a statement sees, is the batch of that statement: the transactions that began after the cursor, by the
index on `xid`, and those that were running then, one by one by the same index. So nothing is lost, nothing comes twice,
and a transaction that stays open delays no other. See schema/changes.py for how the log is written.

A server that crashes forgets the ids of transactions that it had not written to disk, for example of one that was just
rolled back, and gives them to others. So a cursor sees only ids below the latest one that is known to be on disk.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeAlias

from sqlalchemy import DateTime, text

from mesh_storage.errors import CompactedError, ConfigurationError, InvalidInputError
from mesh_storage.models import ConfigEntry, Mesh, Node, Route, RoutingEntry, StateEntry
from mesh_storage.postgres import timestamps
from mesh_storage.postgres.statement import Row, Statement
from mesh_storage.repositories import checks
from mesh_storage.repositories.aggregates import Aggregate

Entry: TypeAlias = Mesh | Node | Route | StateEntry | ConfigEntry | RoutingEntry

AGGREGATES: dict[str, Aggregate[Any]] = {
    "meshes": Aggregate(Mesh),
    "nodes": Aggregate(Node),
    "routes": Aggregate(Route),
    "state": Aggregate(StateEntry),
    "runtime_config": Aggregate(ConfigEntry),
    "routing_table": Aggregate(RoutingEntry),
}
"""What can be watched, by the names of the repositories."""
BEGINNING = "0"
"""The cursor from before everything, the same as none."""

_CURSOR = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.([0-9A-F]{8})\.(\d{1,20}:\d{1,20}:[\d,]*)")
_FIRST_XID = 3
_XID_LIMIT = 2**63
_XIDS = 2**32
"""The number of transaction ids before they begin anew, with a zero that is none."""


class Change(NamedTuple):
    """The last change of a key in a batch."""

    aggregate: str
    """The name of the repository, such as `state`."""
    key: str
    """The key of the aggregate: its id, key or destination."""
    version: int
    """The version of the row, or the number of its deletion, which is larger."""
    entry: Entry | None
    """The aggregate at the moment of the batch; None if it was deleted or had expired."""


@dataclass(frozen=True, slots=True)
class Batch:
    """All keys that changed since a cursor, each with its last change, as of one moment."""

    changes: list[Change]
    """In the order in which the keys changed last."""
    cursor: str
    """Where to go on after this batch. Its format is opaque."""
    more: bool = False
    """Whether further parts of the same batch follow, as `watch` splits a large one; `cursor` is then still the one
    before all of it."""


class Cursor(NamedTuple):
    """A moment in the history of one database."""

    epoch: str
    timeline: str
    """That of the write-ahead log: after a failover, transaction ids may mean other transactions."""
    xmin: int
    xmax: int
    running: tuple[int, ...]
    ahead: tuple[int, int] | None = None
    """Where `xmax` may go as soon as the write-ahead log is on disk up to a position; not part of the text."""

    @property
    def snapshot(self) -> str:
        """The text of the `pg_snapshot`."""
        return f"{self.xmin}:{self.xmax}:{','.join(map(str, self.running))}"

    def __str__(self) -> str:
        return f"{self.epoch}.{self.timeline}.{self.snapshot}"


def decode(field: str, cursor: object) -> Cursor | None:
    """Return the position of a cursor; None is before everything.

    Raises:
        InvalidInputError: It is not a cursor.
    """
    if cursor is None or cursor == BEGINNING:
        return None
    found = _CURSOR.fullmatch(cursor) if isinstance(cursor, str) and cursor.isascii() else None
    read = _read(*found.groups()) if found else None
    if read is None or str(read) != cursor or not _is_snapshot(read):
        raise InvalidInputError(f"{field} must be None or the cursor of a batch", field=field)
    return read


def parameters(since: Cursor | None, prefix: dict[str, str], limit: int | None) -> dict[str, object]:
    """Return the parameters of the statements of a `Selection`; without a limit, all is read."""
    return {**prefix, "limit": limit, "snapshot": None if since is None else since.snapshot}


def _is_snapshot(cursor: Cursor) -> bool:
    """Return whether PostgreSQL accepts the snapshot, of which it checks the same."""
    if not 0 < cursor.xmin <= cursor.xmax < _XID_LIMIT or not cursor.xmin % _XIDS or not cursor.xmax % _XIDS:
        return False
    running = cursor.running
    return not running or (
        list(running) == sorted(set(running)) and running[0] >= cursor.xmin and running[-1] < cursor.xmax
    )


def _read(epoch: str, timeline: str, snapshot: str) -> Cursor:
    xmin, xmax, running = snapshot.split(":")
    return Cursor(epoch, timeline, int(xmin), int(xmax), tuple(int(xid) for xid in running.split(",") if xid))


def position(row: Row, since: Cursor | None = None) -> Cursor:
    """Return the cursor of a row of `MOMENT`, if it can follow an earlier one.

    Raises:
        CompactedError: The changes since the earlier cursor are no longer kept, or it is from another history.
        ConfigurationError: The server is a standby.
    """
    moment = _Moment(*row)
    if moment.timeline is None:
        raise ConfigurationError(
            "a standby does not know which transactions are running: watch the primary, "
            "with target_session_attrs=read-write in the URL if it names several hosts"
        )
    now = _read(moment.epoch, moment.timeline, moment.snapshot)
    if since is not None and (
        (since.epoch, since.timeline) != (now.epoch, now.timeline)
        or since.xmin < moment.compacted
        or since.xmax > now.xmax
    ):
        raise CompactedError
    running = set(now.running)
    if moment.own is not None:
        # A snapshot counts its own transaction as finished, but what that writes from now on comes later.
        running.add(moment.own)
    xmax = min(now.xmax, _on_disk(moment, now, since))
    return now._replace(
        xmin=min(now.xmin, xmax),
        xmax=xmax,
        running=tuple(sorted(xid for xid in running if xid < xmax)),
        ahead=(now.xmax, moment.inserted),
    )


def _on_disk(moment: _Moment, now: Cursor, since: Cursor | None) -> int:
    """Return an id that is above all that the cursor must have seen, and below which none is ever used anew.

    The latest change is on disk, since others see a transaction only when its commit is (unless it is asynchronous).
    """
    if moment.flushed >= moment.inserted:
        return now.xmax
    known = [_FIRST_XID, moment.compacted]
    if moment.latest is not None:
        known.append(moment.latest + 1)
    if since is not None:
        known.append(since.xmax)
        if since.ahead is not None and moment.flushed >= since.ahead[1]:
            known.append(since.ahead[0])
    return max(known)


class _Moment(NamedTuple):
    """The row from which `position` makes a cursor."""

    epoch: str
    timeline: str | None
    compacted: int
    snapshot: str
    own: int | None
    written: bool
    inserted: int
    flushed: int
    latest: int | None


_NAMES = ", ".join(f"'{name}'" for name in AGGREGATES)


def _moment(latest: str) -> str:
    """Return the SQL of a `_Moment`, with the expression for the id of the latest change."""
    return f"""
        SELECT CAST(CAST(md5(concat(epoch, {DATABASE})) AS uuid) AS text) AS epoch,
            CASE WHEN NOT pg_is_in_recovery() THEN substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)
            END AS timeline,
            compacted,
            CAST(pg_current_snapshot() AS text) AS snapshot,
            {_number("pg_current_xact_id_if_assigned()")} AS own,
            EXISTS (
                SELECT FROM mesh_changes
                WHERE xid = {_number("pg_current_xact_id_if_assigned()")} AND aggregate IN ({_NAMES})
            ) AS written,
            CASE WHEN NOT pg_is_in_recovery() THEN {_lsn("insert")} END AS inserted,
            CASE WHEN NOT pg_is_in_recovery() THEN {_lsn("flush")} END AS flushed,
            {latest} AS latest
        FROM mesh_changes_epoch
    """  # noqa: S608 - our own names


# A copy of the database has the epoch of the original, but transaction ids of its own.
DATABASE = """
    (SELECT system_identifier FROM pg_control_system()), '/',
    (SELECT oid FROM pg_database WHERE datname = current_database())
"""
"""What is listed in SQL to tell one database from all others."""


def _number(xid: str) -> str:
    return f"CAST(CAST({xid} AS text) AS bigint)"


def _lsn(kind: str) -> str:
    return f"CAST(pg_wal_lsn_diff(pg_current_wal_{kind}_lsn(), '0/0') AS bigint)"


_LATEST = "(SELECT xid FROM mesh_changes ORDER BY xid DESC LIMIT 1)"
# Not the end of the index, where the many changes of a transaction that is still running may be.
_LATEST_READ = f"""greatest(
    (SELECT max(xid) FROM log),
    (SELECT xid FROM mesh_changes WHERE xid < {_number("pg_snapshot_xmin(pg_current_snapshot())")}
        ORDER BY xid DESC LIMIT 1)
)"""  # noqa: S608 - our own names
_COLUMNS_OF_MOMENT = len(_Moment._fields)
MOMENT = Statement(lambda: text(_moment(_LATEST)), writes=False)
"""Returns the row from which `position` makes a cursor."""
WHOLE = 1000
"""The number of changes up to which a batch is read as a whole."""
PART = 250
"""The number of changes in a part of a larger one.

Of so few objects, most are gone before Python's garbage collector has seen them twice; parts of 1,000 take half as much
CPU again.
"""


class Selection:
    """Some aggregates, and the statements that read their changes."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._columns: dict[str, slice] = {}
        """Where the columns of each aggregate are in a row of changes, after its name, key and version."""
        end = 3
        for name in names:
            self._columns[name] = slice(end, end + len(AGGREGATES[name].table.columns))
            end = self._columns[name].stop
        self._changed = Statement(lambda: text(self._whole(self._log(limited=True), _LAST, _LATEST_READ)), writes=False)
        self._present = Statement(lambda: text(self._whole(self._tables(limited=True), _ALL, _LATEST)), writes=False)
        self._stream_changed = Statement(lambda: text(self._streamed(self._log(limited=False), _LAST)), writes=False)
        self._stream_present = Statement(lambda: text(self._streamed(self._tables(limited=False), _ALL)), writes=False)

    def whole(self, since: Cursor | None) -> Statement:
        """Return the statement that reads a whole batch, or only its moment if there are `limit` changes or more."""
        return self._present if since is None else self._changed

    def streamed(self, since: Cursor | None) -> Statement:
        """Return the statement that reads a batch of any size, for `stream`."""
        return self._stream_present if since is None else self._stream_changed

    def read(self, rows: Sequence[Row], since: Cursor | None) -> tuple[Cursor, int, list[Row]]:
        """Return the cursor, the number of changes in the log, and the rows of `changes`, from those of `whole`.

        Raises:
            CompactedError: As `position`; ConfigurationError likewise.
            InvalidInputError: The transaction itself changed what can be watched, which others may never see.
        """
        end = _COLUMNS_OF_MOMENT
        moment, number, first = rows[0][:end], rows[0][end], rows[0][end + 1]
        now = position(moment, since)
        if _Moment(*moment).written:
            raise InvalidInputError(
                "since() must come before the changes of its own unit of work, which are in no batch before they are "
                "committed",
                field="cursor",
            )
        return now, number, [] if first is None else [row[end + 1 :] for row in rows]

    def changes(self, rows: Sequence[Row]) -> list[Change]:
        """Return the changes of the rows of a batch."""
        entries: list[Entry | None] = [None] * len(rows)
        for name, columns in self._columns.items():
            # The key comes first, and is NULL where there is no entry.
            there = [n for n, row in enumerate(rows) if row[0] == name and row[columns.start] is not None]
            for n, entry in zip(there, AGGREGATES[name].load.many([rows[n][columns] for n in there]), strict=True):
                entries[n] = entry
        return [Change(row[0], row[1], row[2], entry) for row, entry in zip(rows, entries, strict=True)]

    def _whole(self, log: str, changed: str, latest: str) -> str:
        """Return the SQL of a batch with its moment, which costs little if there is nothing, however full the tables.

        It is planned once, since the parameters behind `given` tell the planner nothing.
        """
        return f"""
            WITH clock AS MATERIALIZED (SELECT clock_timestamp() AS now), given AS MATERIALIZED ({_GIVEN}),
            log AS MATERIALIZED ({log}), moment AS MATERIALIZED ({_moment(latest)})
            SELECT moment.*, (SELECT count(*) FROM log), batch.* FROM moment LEFT JOIN LATERAL (
                {self._batch(changed)}
                WHERE coalesce((SELECT count(*) FROM log) < (SELECT most FROM given), true) OFFSET 0
            ) AS batch ON true ORDER BY batch.number
        """  # noqa: S608 - our own names

    def _streamed(self, log: str, changed: str) -> str:
        """Return the SQL of a batch of any size, of which only numbers and keys are sorted, so rows come soon."""
        return f"""
            WITH clock AS MATERIALIZED (SELECT clock_timestamp() AS now), log AS NOT MATERIALIZED ({log})
            {self._batch(changed)} ORDER BY changed.number
        """

    def _batch(self, changed: str) -> str:
        """Return the SQL of the changes, each with its entry, found by its key: the planner unfolds no OFFSET."""
        version = f"coalesce({', '.join(f'{name}.version' for name in self._columns)}, changed.number) AS version"
        lists = ", ".join(["changed.aggregate, changed.key", version, *map(_readable, self._columns), "changed.number"])
        entries = " ".join(map(_entry, self._columns))
        return f"SELECT {lists} FROM ({changed} ORDER BY number OFFSET 0) AS changed {entries}"  # noqa: S608 - our own names

    def _log(self, *, limited: bool) -> str:
        """Return the SQL of the changes that a snapshot did not see: later ones, and those of running transactions."""
        snapshot, start, stop, limit = _parameters(limited=limited)
        names = ", ".join(f"'{name}'" for name in self._columns)
        wanted = f"""aggregate IN ({names}) AND key COLLATE "C" >= {start} AND key COLLATE "C" < {stop}"""
        ordered = f"ORDER BY xid, number {limit}" if limited else ""
        # Of transactions that are still running, nothing is even looked for: it may be much.
        return f"""
            (SELECT xid, aggregate, key, number FROM mesh_changes
                WHERE xid >= {_number(f"pg_snapshot_xmax({snapshot})")} AND {wanted} {ordered})
            UNION ALL
            SELECT finished.* FROM pg_snapshot_xip({snapshot}) AS running (xid), LATERAL (
                SELECT xid, aggregate, key, number FROM mesh_changes
                WHERE xid = {_number("running.xid")} AND {wanted} {ordered}
            ) AS finished WHERE pg_visible_in_snapshot(running.xid, pg_current_snapshot()) {limit}
        """  # noqa: S608 - our own names

    def _tables(self, *, limited: bool) -> str:
        """Return the SQL of all that is there, as if it had just been logged."""
        _, start, stop, limit = _parameters(limited=limited)
        present = " UNION ALL ".join(
            f"""
            SELECT '{name}' AS aggregate, CAST({_key(name)} AS text) AS key, {name}.version AS number
            FROM {_table(name)}
            WHERE {_key(name)} COLLATE "C" >= {start} AND {_key(name)} COLLATE "C" < {stop} AND {_live(name)}
            """  # noqa: S608 - our own names
            for name in self._columns
        )
        return f"{present} {limit}"


_GIVEN = """
    SELECT CAST(:snapshot AS pg_snapshot) AS snapshot, CAST(:start AS text) AS start, CAST(:stop AS text) AS stop,
        CAST(:limit AS bigint) AS most
"""
# Keys differ, which aggregates rarely do, so that they are sorted by the key first.
_LAST = "SELECT aggregate, key, max(number) AS number FROM log GROUP BY key, aggregate"
_ALL = "SELECT aggregate, key, number FROM log"


def _parameters(*, limited: bool) -> tuple[str, str, str, str]:
    """Return the snapshot, the bounds of the keys and the limit; without a limit the planner may know them."""
    if limited:
        return (
            "(SELECT snapshot FROM given)",
            "(SELECT start FROM given)",
            "(SELECT stop FROM given)",
            "LIMIT (SELECT most FROM given)",
        )
    return "CAST(:snapshot AS pg_snapshot)", ":start", ":stop", ""


def _table(name: str) -> str:
    return f"{AGGREGATES[name].table.name} AS {name}"


def _key(name: str) -> str:
    return f"{name}.{AGGREGATES[name].table.primary_key.columns[0].name}"


def _list(name: str) -> str:
    return ", ".join(f"{name}.{column.name}" for column in AGGREGATES[name].table.columns)


def _readable(name: str) -> str:
    columns = AGGREGATES[name].table.columns
    listed = ((f"{name}.{column.name}", isinstance(column.type, DateTime)) for column in columns)
    return ", ".join(timestamps.nearest(column) if is_time else column for column, is_time in listed)


def _entry(name: str) -> str:
    return f"""
        LEFT JOIN LATERAL (
            SELECT {_list(name)} FROM {_table(name)}
            WHERE changed.aggregate = '{name}' AND {_key(name)} = changed.key AND {_live(name)} OFFSET 0
        ) AS {name} ON true
    """  # noqa: S608 - our own names


def _live(name: str) -> str:
    if "expires_at" not in AGGREGATES[name].table.c:
        return "true"
    return f"({name}.expires_at IS NULL OR {name}.expires_at > (SELECT now FROM clock))"  # noqa: S608 - our own name


@cache
def _selection(names: tuple[str, ...]) -> Selection:
    return Selection(names)


def select(aggregates: Iterable[str]) -> Selection:
    """Return the statements for some aggregates, by the names of their repositories.

    Raises:
        InvalidInputError: There is none, or one cannot be watched.
    """
    given = checks.many("aggregates", aggregates)
    unknown = [name for name in given if not isinstance(name, str) or name not in AGGREGATES]
    if unknown or not given:
        names = ", ".join(AGGREGATES)
        raise InvalidInputError(f"aggregates must be one or more of {names}; not {unknown}", field="aggregates")
    return _selection(tuple(name for name in AGGREGATES if name in given))
