"""The statements that remove what has expired and what is no longer kept, each up to a number of rows."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import Interval, bindparam, text

from mesh_storage.errors import InvalidInputError
from mesh_storage.models import ConfigEntry, StateEntry
from mesh_storage.models.base import table_of
from mesh_storage.postgres.statement import Statement
from mesh_storage.repositories.queueing import purge

STEP = 5_000
"""Rows of a kind that one transaction removes at most, so that it holds nobody up."""
KEPT = timedelta(hours=1)
"""How long changes are kept for watchers, by default."""
_LONGEST = timedelta(days=36_500)


@dataclass(frozen=True, slots=True)
class Maintained:
    """What `maintain` removed."""

    expired: int = 0
    """Entries of the shared state and the runtime configuration that had expired."""
    changes: int = 0
    """Changes that watchers can no longer go back to."""
    messages: int = 0
    """Messages that were too old."""

    def __bool__(self) -> bool:
        return self != Maintained()

    def __add__(self, other: Maintained) -> Maintained:
        return Maintained(self.expired + other.expired, self.changes + other.changes, self.messages + other.messages)


def _expired(table: str) -> Statement:
    # A row that someone else has locked is being written, or removed by another process.
    return Statement(
        lambda: text(
            f"""
            DELETE FROM {table} WHERE key = ANY(ARRAY(
                SELECT key FROM {table} WHERE expires_at <= (SELECT clock_timestamp())
                ORDER BY expires_at LIMIT :limit FOR UPDATE SKIP LOCKED
            ))
            """  # noqa: S608 - our own names
        ),
        writes=True,
    )


EXPIRED = [_expired(table_of(model).name) for model in (StateEntry, ConfigEntry)]
# Whole transactions that no snapshot may still see as running, from the oldest on, up to the first one that is kept.
# The row of the epoch is locked first, so that one process at a time removes changes.
CHANGES = Statement(
    lambda: text(
        """
        WITH mine AS MATERIALIZED (SELECT id FROM mesh_changes_epoch FOR UPDATE SKIP LOCKED),
        oldest AS MATERIALIZED (
            SELECT xid, number, changed_at FROM mesh_changes
            WHERE xid < pg_snapshot_xmin(pg_current_snapshot())::text::bigint AND EXISTS (SELECT FROM mine)
            ORDER BY xid, number LIMIT :limit
        ),
        kept AS MATERIALIZED (
            SELECT xid FROM oldest WHERE changed_at > (SELECT clock_timestamp()) - :older_than ORDER BY xid LIMIT 1
        ),
        last AS MATERIALIZED (
            SELECT xid, number FROM oldest WHERE NOT EXISTS (SELECT FROM kept WHERE kept.xid <= oldest.xid)
            ORDER BY xid DESC, number DESC LIMIT 1
        ),
        gone AS (
            DELETE FROM mesh_changes
            WHERE (xid, number) <= ((SELECT xid FROM last), (SELECT number FROM last)) RETURNING xid
        )
        UPDATE mesh_changes_epoch SET compacted = (
            SELECT greatest(compacted, max(xid) + 1) FROM gone
        )
        WHERE EXISTS (SELECT FROM gone)
        RETURNING (SELECT count(*) FROM gone)
        """
    ).bindparams(bindparam("older_than", type_=Interval)),
    writes=True,
)
MESSAGES = purge("timestamp < floor(extract(epoch FROM now() - :older_than))::bigint", older_than=Interval)


def check_age(field: str, age: object) -> timedelta:
    """Check an age: a timedelta from 0 to 100 years.

    Raises:
        InvalidInputError: It is something else; names the field.
    """
    if not isinstance(age, timedelta) or not timedelta(0) <= age <= _LONGEST:
        raise InvalidInputError(f"{field} must be a timedelta from 0 to 100 years", field=field)
    return age
