"""Positions in the history of a database, and the statement that reads what changed since one.

A position is the number of transactions that have finished. Of two snapshots of one history, one sees all that the
other sees and perhaps more (PostgreSQL's source, access/transam/README, "Interlocking Transaction Begin, Transaction
End, and Snapshots"), so this number puts them in order, and two with the same number see the same. Every commit raises
it. A history ends when the database is restored, copied or fails over, and also when its server is started or recovers
from a crash, since ids of transactions may then be given anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import text

from mesh_storage.errors import ConfigurationError
from mesh_storage.postgres.statement import Row, Statement
from mesh_storage.repositories.changelog import DATABASE
from mesh_storage.schema.changes import EXPIRY, WATCHED

MOST = 10_000
"""The number of changes that are read at most; if there are more, none is."""

_AGGREGATES = {EXPIRY[table]: WATCHED[table][0] for table in EXPIRY}
"""The names of the aggregates whose expiry alone changed, by what the log says."""


class News(NamedTuple):
    """What changed in all aggregates since a snapshot, as of the moment of another one."""

    history: str
    """Stands for the history of the database."""
    position: int
    """The position of the moment."""
    snapshot: str
    """The text of the `pg_snapshot` of the moment, for the next time."""
    now: datetime
    """The database's clock."""
    changed: frozenset[tuple[str, str]] | None
    """The names of repositories and the keys that changed; None if that is not known, or too much."""


def _xid(expression: str) -> str:
    return f"CAST(CAST({expression} AS text) AS bigint)"


# What is in the log of a transaction is found by its index, as in a batch; see changelog.py.
NEWS = Statement(
    lambda: text(
        f"""
        WITH given AS MATERIALIZED (SELECT CAST(:snapshot AS pg_snapshot) AS snapshot),
        log AS MATERIALIZED (
            (SELECT aggregate, key FROM mesh_changes
                WHERE xid >= {_xid("pg_snapshot_xmax((SELECT snapshot FROM given))")} LIMIT {MOST + 1})
            UNION ALL
            SELECT finished.* FROM pg_snapshot_xip((SELECT snapshot FROM given)) AS running (xid), LATERAL (
                SELECT aggregate, key FROM mesh_changes WHERE xid = {_xid("running.xid")} LIMIT {MOST + 1}
            ) AS finished WHERE pg_visible_in_snapshot(running.xid, pg_current_snapshot()) LIMIT {MOST + 1}
        ),
        moment AS MATERIALIZED (
            SELECT CASE WHEN NOT pg_is_in_recovery() THEN md5(concat(
                    epoch, '/', {DATABASE}, '/', substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8), '/',
                    extract(epoch FROM pg_postmaster_start_time()), '/', pg_last_wal_replay_lsn()
                )) END AS history,
                {_xid("pg_snapshot_xmax(pg_current_snapshot())")}
                    - (SELECT count(*) FROM pg_snapshot_xip(pg_current_snapshot())) AS position,
                CAST(pg_current_snapshot() AS text) AS snapshot,
                clock_timestamp() AS now,
                coalesce({_xid("pg_snapshot_xmin((SELECT snapshot FROM given))")} >= compacted, false) AS kept
            FROM mesh_changes_epoch
        )
        SELECT moment.*, log.aggregate, log.key FROM moment LEFT JOIN log ON true
        """  # noqa: S608 - our own names
    ),
    writes=False,
)
"""Returns the rows from which `read` makes news, since a snapshot or, if that is NULL, only of the moment."""


def read(rows: Sequence[Row], since: str | None) -> News:
    """Return the news of the rows of `NEWS`, since a history or None.

    Raises:
        ConfigurationError: The server is a standby.
    """
    history, position, snapshot, now, kept, *_ = rows[0]
    if history is None:
        raise ConfigurationError(
            "a standby does not know which transactions are running: a cache needs the primary, "
            "with target_session_attrs=read-write in the URL if it names several hosts"
        )
    changed = None
    if kept and history == since and len(rows) <= MOST:
        logged: list[tuple[str, str]] = [row[5:] for row in rows if row[5] is not None]
        changed = frozenset((_AGGREGATES.get(aggregate, aggregate), key) for aggregate, key in logged)
    return News(history, position, snapshot, now, changed)
