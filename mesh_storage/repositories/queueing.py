"""The statements that queue messages for their receivers, and that remove messages with their deliveries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import ARRAY, BigInteger, Interval, LargeBinary, Text

from mesh_storage.errors import InvalidInputError
from mesh_storage.postgres.statement import Statement
from mesh_storage.repositories import checks
from mesh_storage.repositories.deliveries import DISTRIBUTED, MOMENT, NUMBERS, TEXTS, check_receiver, statement

KEY_LENGTH = 255
NO_SUCH_KEY = "42P10"
"""The SQLSTATE of a conflict target that is no key of the table."""
_MOST_RECEIVERS = 10_000

_TIMESTAMP = "coalesce({}, extract(epoch FROM now())::bigint)"
_NEW = f"""
    INSERT INTO mesh_messages (id, from_node, to_node, content, timestamp, queued)
    VALUES (:id, :from_node, :to_node, :content, {_TIMESTAMP.format("CAST(:timestamp AS bigint)")}, true)
    ON CONFLICT DO NOTHING RETURNING id, timestamp, created_at
"""  # noqa: S608 - our own names
# A message that goes to others than its `to_node` needs an id that is unique among all of them: a distributed database,
# where it is not, refuses this conflict target, rather than keep deliveries apart from their message.
_NEW_TO_OTHERS = _NEW.replace("ON CONFLICT", "ON CONFLICT (id)")
# Of two that queue the same message at once, one waits for the other here and then finds it queued.
_STORED = """
    UPDATE mesh_messages SET queued = true
    WHERE to_node = CAST(:to_node AS text) COLLATE "POSIX" AND id = :id AND NOT queued
    RETURNING id, timestamp, created_at
"""

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


SEND = {
    (False, False): _send(_NEW),
    (True, False): _send_keyed(_NEW),
    (False, True): _send(_NEW_TO_OTHERS),
    (True, True): _send_keyed(_NEW_TO_OTHERS),
}
"""Stores a message and queues it, without a key or with one, for its `to_node` or for others as well.

Returns no row if the id is taken.
"""
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
        UPDATE mesh_messages AS m SET queued = true
        FROM unnest(:id, :to_node, :position) AS input (id, to_node, position)
        WHERE m.id = ANY(:id) AND m.to_node = input.to_node COLLATE "POSIX" AND m.id = input.id AND NOT m.queued
        RETURNING m.id, m.to_node, input.position
    ),
    queued AS (
        INSERT INTO mesh_deliveries AS d (message_id, receiver, available_at)
        SELECT id, to_node, {MOMENT} + :delay FROM stored ORDER BY position {_INSTEAD}
    )
    SELECT count(*) FROM stored
    """,  # noqa: S608 - our own names
    id=TEXTS,
    to_node=TEXTS,
    position=NUMBERS,
    delay=Interval,
)
IS_DISTRIBUTED = statement(DISTRIBUTED, writes=False)
"""Returns whether an id is unique for each receiver only, as in a distributed database.

Citus locks no rows of several receivers, so it takes no SKIP LOCKED there.
"""


def _enqueue(found: str, stored: str) -> Statement:
    return statement(
        f"""
        WITH found AS MATERIALIZED ({found}),
        stored AS ({stored}),
        queued AS (
            INSERT INTO mesh_deliveries AS d (message_id, receiver, available_at)
            SELECT id, to_node, {MOMENT} FROM stored ORDER BY timestamp, id {_INSTEAD}
        )
        SELECT count(*) FROM stored
        """  # noqa: S608 - our own names
    )


_UNQUEUED = """
    SELECT id, to_node FROM mesh_messages WHERE timestamp >= :since AND NOT queued ORDER BY timestamp, id LIMIT :limit
"""
ENQUEUE = {
    False: _enqueue(
        f"{_UNQUEUED} FOR UPDATE SKIP LOCKED",
        """
        UPDATE mesh_messages SET queued = true WHERE id = ANY(ARRAY(SELECT id FROM found))
        RETURNING id, to_node, timestamp
        """,
    ),
    True: _enqueue(
        _UNQUEUED,
        """
        UPDATE mesh_messages AS m SET queued = true FROM found
        WHERE m.id = ANY(ARRAY(SELECT id FROM found))
        AND m.to_node = found.to_node AND m.id = found.id AND NOT m.queued
        RETURNING m.id, m.to_node, m.timestamp
        """,
    ),
}
"""Queues what never was, on one server and in a distributed database, where it waits for who has locked a message."""

# As `send` does, a lane that is there is written, which locks it until the commit; one that is made was that of a
# delivery that is gone by now, and is removed again with those that are empty.
_LANES = """
    INSERT INTO mesh_delivery_lanes (receiver, key)
    SELECT receiver, key FROM mesh_deliveries WHERE message_id = ANY(:id) AND key IS NOT NULL
    GROUP BY receiver, key ORDER BY receiver COLLATE "C", key COLLATE "C"
    ON CONFLICT (receiver, key) DO UPDATE SET key = excluded.key RETURNING receiver, key, xmax = 0 AS is_new
"""
# A message that was queued since the snapshot, and whose deliveries are not seen therefore, is found to be so once its
# row is locked. Its id comes from an array, which is looked up in an index whatever the statistics know.
_DELETED = """
    queued AS (
        DELETE FROM mesh_messages WHERE id = ANY(ARRAY(SELECT id FROM old WHERE queued)) AND queued RETURNING id
    ),
    others AS (
        DELETE FROM mesh_messages
        WHERE id = ANY(ARRAY(SELECT id FROM old WHERE NOT queued)) AND NOT queued RETURNING id
    ),
    deleted AS (SELECT id FROM queued UNION ALL SELECT id FROM others)
"""
_HEADS = "array_agg(receiver), array_agg(key), array_agg(seq) FROM heads"
DELETE = statement(
    f"""
    WITH lanes AS ({_LANES}),
    old AS MATERIALIZED (SELECT id, queued FROM mesh_messages WHERE id = ANY(:id)),
    {_DELETED},
    cancelled AS (
        DELETE FROM mesh_deliveries
        WHERE (SELECT count(*) FROM lanes) >= 0 AND message_id = ANY(ARRAY(SELECT id FROM deleted))
        RETURNING receiver, key, seq, state
    ),
    heads AS (
        SELECT receiver, key, seq FROM cancelled WHERE key IS NOT NULL AND state <> 'waiting'
        UNION ALL SELECT receiver, key, 0 FROM lanes WHERE is_new
    )
    SELECT (SELECT count(*) FROM deleted), {_HEADS}
    """,  # noqa: S608 - our own names
    id=TEXTS,
)
"""Deletes messages with their deliveries; returns how many, and the removed first ones of keys."""
# A dead delivery is written to lock it: one that was driven back since the snapshot is not dead any more then. With IN,
# the index of all dead ones does not seem to fit, which PostgreSQL 15 would read as a whole.
DELETE_UNDELIVERED = statement(
    f"""
    WITH lanes AS ({_LANES}),
    dead AS (
        UPDATE mesh_deliveries SET state = state
        WHERE (SELECT count(*) FROM lanes) >= 0 AND message_id = ANY(:id) AND state IN ('dead', '')
        RETURNING message_id, receiver
    ),
    seen AS MATERIALIZED (SELECT message_id, receiver FROM mesh_deliveries WHERE message_id = ANY(:id)),
    found AS MATERIALIZED (SELECT id, queued FROM mesh_messages WHERE id = ANY(:id)),
    old AS MATERIALIZED (
        SELECT found.* FROM found LEFT JOIN seen ON seen.message_id = found.id WHERE seen.message_id IS NULL
    ),
    {_DELETED},
    settled AS (
        SELECT seen.message_id FROM seen LEFT JOIN dead USING (message_id, receiver)
        GROUP BY seen.message_id HAVING count(*) = count(dead.receiver)
    ),
    heads AS (SELECT receiver, key, 0 AS seq FROM lanes WHERE is_new)
    SELECT (SELECT count(*) FROM deleted), ARRAY(SELECT message_id FROM settled ORDER BY message_id), {_HEADS}
    """,  # noqa: S608 - our own names
    id=TEXTS,
)
"""Deletes messages without a delivery; returns how many, and the ids of those with dead ones only, now locked."""


def purge(condition: str, **types: Any) -> dict[bool, Statement]:
    """Return the statements that delete old messages without a delivery, on one server and in a distributed database.

    They look behind a place, and return how many were deleted, how many were found, and the last of these. A message
    that was queued since the snapshot is checked anew once its row is locked: `queued` is another then.
    """
    behind = "(timestamp, id) > (:timestamp, :id)"
    counts = """
        SELECT (SELECT count(*) FROM deleted), (SELECT count(*) FROM old), last.timestamp, last.id
        FROM (SELECT) AS always LEFT JOIN (
            SELECT timestamp, id FROM old ORDER BY timestamp DESC, id DESC LIMIT 1
        ) AS last ON true
    """
    # OFFSET 0 keeps the server from reading all deliveries instead of those of each message.
    one_server = f"""
        WITH old AS MATERIALIZED (
            SELECT id, timestamp, queued FROM mesh_messages AS m WHERE {condition} AND {behind}
            AND NOT EXISTS (SELECT FROM mesh_deliveries AS d WHERE d.message_id = m.id OFFSET 0)
            ORDER BY timestamp, id LIMIT :limit
        ),
        free AS MATERIALIZED (
            SELECT locked.id FROM old CROSS JOIN LATERAL (
                SELECT m.id FROM mesh_messages AS m WHERE m.id = old.id AND m.queued = old.queued
                FOR UPDATE SKIP LOCKED
            ) AS locked
        ),
        deleted AS (DELETE FROM mesh_messages WHERE id = ANY(ARRAY(SELECT id FROM free)) RETURNING id)
        {counts}
    """  # noqa: S608 - our own names
    distributed = f"""
        WITH old AS MATERIALIZED (
            SELECT id, timestamp, to_node, queued FROM mesh_messages AS m WHERE {condition} AND {behind}
            AND NOT EXISTS (
                SELECT FROM mesh_deliveries AS d WHERE d.receiver = m.to_node AND d.message_id = m.id OFFSET 0
            )
            ORDER BY timestamp, id LIMIT :limit
        ),
        deleted AS (
            DELETE FROM mesh_messages AS m USING old
            WHERE m.id = ANY(ARRAY(SELECT id FROM old))
            AND m.to_node = old.to_node AND m.id = old.id AND m.queued = old.queued RETURNING m.id
        )
        {counts}
    """  # noqa: S608 - our own names
    types = {"timestamp": BigInteger, "id": Text, **types}
    return {False: statement(one_server, **types), True: statement(distributed, **types)}


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
