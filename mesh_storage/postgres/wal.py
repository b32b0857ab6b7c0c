"""Positions in the write-ahead log: how servers are asked for theirs, and when one has reached another.

A position names the cluster, the timeline and the byte (PostgreSQL manual, 25.3.6 and 28): that a server has a byte of
one timeline says nothing about the same byte of a timeline that has branched off before it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from mesh_storage.errors import InvalidInputError
from mesh_storage.postgres.statement import Row

_TEXT = re.compile(r"(-?[0-9]{1,20})/([0-9]{1,10})/([0-9]{1,20})")

# The insert position, since an asynchronous commit is visible before it is flushed. After a full page it is behind the
# header of the next one, which a standby does not count as replayed (access/xlog.c, XLogBytePosToRecPtr).
STANDING = b"""
    SELECT standby, system_identifier, database,
        CASE WHEN standby THEN replayed_timeline ELSE ('x' || substr(pg_walfile_name(lsn), 1, 8))::bit(32)::int END,
        (lsn - '0/0')::int8 - CASE
            WHEN standby THEN 0
            WHEN (pg_walfile_name_offset(lsn)).file_offset = 40 THEN 40
            WHEN (pg_walfile_name_offset(lsn)).file_offset % current_setting('wal_block_size')::int = 24 THEN 24
            ELSE 0
        END,
        CASE WHEN NOT standby THEN (pg_current_wal_flush_lsn() - '0/0')::int8 END,
        current_setting('synchronous_commit') <> 'off',
        CASE WHEN standby THEN pg_last_xact_replay_timestamp() ELSE clock_timestamp() END
    FROM (
        SELECT standby, system_identifier,
            (SELECT oid FROM pg_database WHERE datname = current_database())::int8 AS database,
            greatest(
                checkpoint.timeline_id, min_recovery_end_timeline, (SELECT received_tli FROM pg_stat_wal_receiver)
            ) AS replayed_timeline,
            CASE WHEN standby THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END AS lsn
        FROM (SELECT pg_is_in_recovery() AS standby OFFSET 0) AS role,
            pg_control_system(), pg_control_checkpoint() AS checkpoint, pg_control_recovery()
        OFFSET 0
    ) AS server
"""
"""Asks a server all that `Standing` holds; it reads the control file three times.

The timeline of a standby is the latest that is known to be its own. Without the privileges of `pg_read_all_stats`, the
receiver does not tell its own, and it becomes known at the next restart point.
"""
REPLAYED = b"SELECT pg_is_in_recovery(), (pg_last_wal_replay_lsn() - '0/0')::int8"
"""Asks a standby for what may have changed since; at the cost of `SELECT 1`."""


class Position(NamedTuple):
    """A place in the write-ahead log of a cluster."""

    system: int
    """The cluster's `system_identifier`, which its standbys share; negative if it was made after 2037."""
    timeline: int
    lsn: int
    """The number of the byte."""

    def __str__(self) -> str:
        return f"{self.system}/{self.timeline}/{self.lsn}"


class Standing(NamedTuple):
    """Where a server stands, as one of its sessions has seen it."""

    standby: bool
    """Whether it is in recovery, that is, replays the log of another server."""
    database: int
    """The object id of the database of the session."""
    position: Position
    """What it has replayed, or written if it is no standby."""
    flushed: int | None
    """What it has on disk, if it is no standby."""
    commits_wait: bool
    """Whether commits of the session wait until they are on disk, unless they are relaxed."""
    clock: object
    """The time of the last transaction that a standby has replayed, or of a primary's clock."""
    at: float
    """When it was asked all of it, by `tenure.now()`."""

    @property
    def committed(self) -> Position:
        """The position of what has been committed, with the wait for the disk that the session has for it.

        What others are about to write comes after it: that may reach a standby late, or be lost by a crash.
        """
        if self.flushed is None or not self.commits_wait:
            return self.position
        return self.position._replace(lsn=min(self.position.lsn, self.flushed))

    def on_timeline(self, known: int) -> Standing:
        """Return it with the latest timeline, of which an earlier one was known; a server returns to none."""
        return self._replace(position=self.position._replace(timeline=max(self.position.timeline, known)))

    def has(self, position: Position) -> bool:
        """Return whether it has what was committed at a position."""
        own = self.position
        return own.system == position.system and own.timeline >= position.timeline and own.lsn >= position.lsn


def standing(row: Row, asked: float) -> Standing:
    """Return the standing of a server from its answer to `STANDING`."""
    standby, system, database, timeline, lsn, flushed, commits_wait, clock = row
    return Standing(standby, database, Position(system, timeline or 0, lsn or 0), flushed, commits_wait, clock, asked)


def replayed(before: Standing, row: Row) -> Standing:
    """Return the standing of a server from an earlier one, and its answer to `REPLAYED`."""
    standby, lsn = row
    return before._replace(standby=standby, position=before.position._replace(lsn=lsn or 0))


def parse(text: object) -> Position:
    """Return the position of a text.

    Raises:
        InvalidInputError: It is none.
    """
    found = _TEXT.fullmatch(text) if isinstance(text, str) else None
    if found is None or str(read := Position(*map(int, found.groups()))) != text:
        raise InvalidInputError("after must be a position: of storage.position(), or of uow.position", field="after")
    return read
