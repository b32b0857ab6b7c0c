"""The statements that queue messages for their receivers, and that remove messages with their deliveries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import ARRAY, Interval, LargeBinary

from mesh_storage.errors import InvalidInputError
from mesh_storage.postgres.statement import Statement
from mesh_storage.repositories import checks
from mesh_storage.repositories.deliveries import MOMENT, NUMBERS, TEXTS, check_receiver, statement

KEY_LENGTH = 255
_MOST_RECEIVERS = 10_000

_TIMESTAMP = "coalesce({}, extract(epoch FROM now())::bigint)"
_NEW = f"""
    INSERT INTO mesh_messages (id, from_node, to_node, content, timestamp, queued)
    VALUES (:id, :from_node, :to_node, :content, {_TIMESTAMP.format("CAST(:timestamp AS bigint)")}, true)
    ON CONFLICT DO NOTHING RETURNING id, timestamp, created_at
"""  # noqa: S608 - our own names
# Of two that queue the same message at once, one waits for the other here and then finds it queued.
_STORED = "UPDATE mesh_messages SET queued = true WHERE id = :id AND NOT queued RETURNING id, timestamp, created_at"

# Another service may have deleted an earlier message with this id, and nobody has noticed yet: then its delivery
# becomes that of the new one, in its old place.
_INSTEAD = """
    ON CONFLICT (message_id, receiver) DO UPDATE SET
        state = CASE WHEN d.state = 'waiting' THEN d.state ELSE 'queued' END, attempts = 0,
        available_at = excluded.available_at, reason = NULL, dead_at = NULL
"""


def _send(stored: str) -> Statement:
    return statement(
        f"""
        WITH stored AS ({stored}),
        queued AS (
            INSERT INTO mesh_deliveries AS d (message_id, receiver, available_at)
            SELECT stored.id, input.receiver, {MOMENT} + :delay
            FROM stored CROSS JOIN unnest(:receivers) AS input (receiver) {_INSTEAD}
        )
        SELECT timestamp, created_at FROM stored
        """,  # noqa: S608 - our own names
        receivers=TEXTS,
        delay=Interval,
    )


def _send_keyed(stored: str) -> Statement:
    # A lane is there for as long as its key has a delivery, and is locked until the commit, so the numbers that the
    # deliveries of a key get are in the order of their commits. One that is there is written all the same: so who
    # acknowledges in a snapshot from before cannot take it for empty, but has a serialization failure. Only the xmax of
    # a row that was just inserted is 0.
    return statement(
        f"""
        WITH stored AS ({stored}),
        lanes AS (
            INSERT INTO mesh_delivery_lanes (receiver, key)
            SELECT input.receiver, CAST(:key AS text)
            FROM stored CROSS JOIN unnest(:receivers) AS input (receiver) ORDER BY input.receiver COLLATE "C"
            ON CONFLICT (receiver, key) DO UPDATE SET key = excluded.key RETURNING receiver, xmax = 0 AS is_new
        ),
        queued AS (
            INSERT INTO mesh_deliveries AS d (message_id, receiver, key, state, available_at)
            SELECT stored.id, lanes.receiver, CAST(:key AS text),
                CASE WHEN lanes.is_new THEN 'queued' ELSE 'waiting' END, {MOMENT} + :delay
            FROM stored CROSS JOIN lanes {_INSTEAD} RETURNING d.key
        )
        SELECT timestamp, created_at, (SELECT bool_or(key IS DISTINCT FROM CAST(:key AS text)) FROM queued) FROM stored
        """,  # noqa: S608 - our own names
        receivers=TEXTS,
        delay=Interval,
    )


SEND = {False: _send(_NEW), True: _send_keyed(_NEW)}
"""Stores a message and queues it, without a key or with one; returns no row if the id is taken."""
QUEUE = {False: _send(_STORED), True: _send_keyed(_STORED)}
"""The same for a message that is there already; returns no row if it was queued before."""
SEND_MANY = statement(
    f"""
    WITH stored AS (
        INSERT INTO mesh_messages (id, from_node, to_node, content, timestamp, queued)
        SELECT id, from_node, to_node, content, {_TIMESTAMP.format("timestamp")}, true
        FROM unnest(:id, :from_node, :to_node, :content, :timestamp)
            AS input (id, from_node, to_node, content, timestamp)
        ON CONFLICT DO NOTHING RETURNING id, to_node
    ),
    queued AS (
        INSERT INTO mesh_deliveries AS d (message_id, receiver, available_at)
        SELECT stored.id, stored.to_node, {MOMENT} + :delay
        FROM stored JOIN unnest(:id, :position) AS input (id, position) ON input.id = stored.id
        ORDER BY input.position {_INSTEAD}
    )
    SELECT count(*) FROM stored
    """,  # noqa: S608 - our own names
    id=TEXTS,
    from_node=TEXTS,
    to_node=TEXTS,
    content=ARRAY(LargeBinary),
    timestamp=NUMBERS,
    position=NUMBERS,
    delay=Interval,
)
QUEUE_MANY = statement(
    f"""
    WITH stored AS (
        UPDATE mesh_messages SET queued = true WHERE id = ANY(:id) AND NOT queued RETURNING id, to_node
    ),
    queued AS (
        INSERT INTO mesh_deliveries AS d (message_id, receiver, available_at)
        SELECT stored.id, stored.to_node, {MOMENT} + :delay
        FROM stored JOIN unnest(:id, :position) AS input (id, position) ON input.id = stored.id
        ORDER BY input.position {_INSTEAD}
    )
    SELECT count(*) FROM stored
    """,  # noqa: S608 - our own names
    id=TEXTS,
    position=NUMBERS,
    delay=Interval,
)
ENQUEUE = statement(
    f"""
    WITH found AS MATERIALIZED (
        SELECT id FROM mesh_messages WHERE timestamp >= :since AND NOT queued
        ORDER BY timestamp, id LIMIT :limit FOR UPDATE SKIP LOCKED
    ),
    stored AS (
        UPDATE mesh_messages SET queued = true WHERE id = ANY(ARRAY(SELECT id FROM found))
        RETURNING id, to_node, timestamp
    ),
    queued AS (
        INSERT INTO mesh_deliveries AS d (message_id, receiver, available_at)
        SELECT id, to_node, {MOMENT} FROM stored ORDER BY timestamp, id {_INSTEAD}
    )
    SELECT count(*) FROM stored
    """  # noqa: S608 - our own names
)


def _delete(condition: str) -> Statement:
    # The lanes are locked before, as by an acknowledgement. A message that was queued since the snapshot, and whose
    # deliveries are not seen therefore, is found to be so once its row is locked.
    return statement(
        f"""
        WITH lanes AS MATERIALIZED (
            SELECT lane.receiver, lane.key FROM mesh_delivery_lanes AS lane
            JOIN mesh_deliveries AS d ON d.receiver = lane.receiver AND d.key = lane.key
            WHERE d.message_id = ANY(:id) ORDER BY lane.receiver COLLATE "C", lane.key COLLATE "C" FOR UPDATE OF lane
        ),
        old AS MATERIALIZED (SELECT id, queued FROM mesh_messages WHERE id = ANY(:id)),
        deleted AS (
            DELETE FROM mesh_messages AS m USING old
            WHERE m.id = old.id AND m.queued = old.queued AND {condition} RETURNING m.id
        ),
        cancelled AS (
            DELETE FROM mesh_deliveries AS d USING deleted
            WHERE (SELECT count(*) FROM lanes) >= 0 AND d.message_id = deleted.id
            RETURNING d.receiver, d.key, d.seq, d.state
        ),
        heads AS (SELECT receiver, key, seq FROM cancelled WHERE key IS NOT NULL AND state <> 'waiting')
        SELECT (SELECT count(*) FROM deleted), array_agg(receiver), array_agg(key), array_agg(seq) FROM heads
        """,  # noqa: S608 - our own names
        id=TEXTS,
    )


# OFFSET 0 keeps the server from reading all deliveries instead of those of each message; likewise below. A dead one
# that was driven back since the snapshot is not dead any more once its row is locked.
DELETE = _delete("true")
DELETE_SETTLED = _delete(
    """
    NOT EXISTS (
        SELECT FROM mesh_deliveries AS d WHERE d.message_id = m.id AND NOT EXISTS (
            SELECT FROM mesh_deliveries AS dead
            WHERE dead.message_id = d.message_id AND dead.receiver = d.receiver AND dead.state = 'dead' FOR UPDATE
        ) OFFSET 0
    )
    """
)


def purge(condition: str, **types: Any) -> Statement:
    """Return the statement that deletes old messages without a delivery.

    A message that was queued since the snapshot is checked anew once its row is locked: `queued` is another then.
    """
    return statement(
        f"""
        WITH old AS MATERIALIZED (
            SELECT id, queued FROM mesh_messages AS m WHERE {condition}
            AND NOT EXISTS (SELECT FROM mesh_deliveries AS d WHERE d.message_id = m.id OFFSET 0)
            ORDER BY timestamp, id LIMIT :limit
        ),
        free AS MATERIALIZED (
            SELECT locked.id FROM old CROSS JOIN LATERAL (
                SELECT m.id FROM mesh_messages AS m WHERE m.id = old.id AND m.queued = old.queued
                FOR UPDATE SKIP LOCKED
            ) AS locked
        )
        DELETE FROM mesh_messages WHERE id = ANY(ARRAY(SELECT id FROM free))
        """,  # noqa: S608 - our own names
        **types,
    )


PURGE = purge("timestamp < :before")


def check_receivers(receivers: Iterable[str] | None, to_node: str) -> list[str]:
    """Return the receivers of a message, each once.

    Raises:
        InvalidInputError: There is none, or one is invalid; names the field.
    """
    if receivers is None:
        return [to_node]
    found = {check_receiver("receivers", each) for each in checks.many("receivers", receivers)}
    if not 0 < len(found) <= _MOST_RECEIVERS:
        raise InvalidInputError(f"receivers must be 1 to {_MOST_RECEIVERS} names", field="receivers")
    return sorted(found)
