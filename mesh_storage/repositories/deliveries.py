"""Deliveries of messages: what a receiver gets, and the statements by which it claims and settles them."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import ARRAY, BigInteger, DateTime, Interval, Text, bindparam, text

from mesh_storage.errors import InvalidInputError
from mesh_storage.models import Message
from mesh_storage.models.base import table_of
from mesh_storage.postgres.statement import Row, Statement
from mesh_storage.repositories import checks
from mesh_storage.repositories.aggregates import Aggregate

LEASE = timedelta(seconds=30)
"""How long a lease lasts by default."""
MOST_ATTEMPTS = 1_000_000
_RECEIVER_LENGTH = 64
_REASON_LENGTH = 10_000
_LONGEST = timedelta(days=36_500)
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 300.0


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message on its way to one receiver, as it was when it was claimed or listed."""

    message: Message
    """What is delivered."""
    receiver: str
    """Whom it is for."""
    attempts: int
    """How often it was claimed, this time included."""
    token: int
    """Identifies the lease; larger for each later claim of this delivery."""
    leased_until: datetime | None
    """When the lease is over, by the database's clock; None if it is dead."""
    key: str | None = None
    """Those of one key are delivered one at a time, in the order of sending; None if the order does not matter."""
    reason: str | None = None
    """Why it was set aside as dead."""
    dead_at: datetime | None = None
    """When it was set aside, by the database's clock."""


@dataclass(frozen=True, slots=True)
class Backlog:
    """How many deliveries are open for one receiver, or for all."""

    due: int
    """Those that a claim would return now."""
    leased: int
    """Those that are claimed, with a lease that is not over."""
    delayed: int
    """Those that are due later: sent with a delay, or to be tried again."""
    waiting: int
    """Those behind another one of their key."""
    dead: int
    """Those that were set aside."""
    oldest_due: timedelta | None
    """For how long the first of them has been due; None if none is."""
    held: tuple[str, ...]
    """The keys whose first message failed, so that the others wait until it is tried again or, if it is dead, driven
    back or deleted: up to 1,000, in the order of sending."""


# Not now(), which is the start of the transaction. As a subquery it is evaluated once, and Citus accepts it in UPDATE.
MOMENT = "(SELECT clock_timestamp())"
TEXTS = ARRAY(Text)
NUMBERS = ARRAY(BigInteger)
MESSAGES = Aggregate(Message)
_DELIVERY = ("receiver", "attempts", "token", "available_at", "key", "reason", "dead_at", "state", "message_id", "seq")
_MESSAGE_ID = _DELIVERY.index("message_id")
_DELIVERY_COLUMNS = ", ".join(f"d.{name}" for name in _DELIVERY)
_MESSAGE_COLUMNS = ", ".join(f"m.{column.name}" for column in table_of(Message).columns)


def statement(sql: str, *, writes: bool = True, **types: Any) -> Statement:
    """Return a statement of this text, with the types of those parameters that need one."""
    return Statement(
        lambda: text(sql).bindparams(*[bindparam(name, type_=kind) for name, kind in types.items()]), writes=writes
    )


# The longest due first. What another has claimed since the snapshot is checked anew once its row is locked, and is not
# due any more. A token is the time in microseconds, but larger than the one before it, so it only grows for a delivery,
# also across a restore or a failover. What was claimed too often is set aside instead. All times come from the SELECT:
# Citus accepts only immutable functions within CASE and greatest() of an UPDATE. The message is joined by its receiver,
# so that all is in one shard; `MESSAGES_OF` has those that were sent to others than their `to_node`. On one server an
# index by the receiver must not serve, which would be read as a whole for each message; with this collation none does:
# an adopted column may have "C", but hardly its other name.
CLAIM = statement(
    f"""
    WITH due AS MATERIALIZED (
        SELECT message_id, available_at AS due_at, {MOMENT} AS moment, {MOMENT} + :lease AS leased_until,
            (extract(epoch FROM {MOMENT}) * 1000000)::bigint AS number
        FROM mesh_deliveries
        WHERE receiver = :receiver AND state IN ('queued', 'leased')
        AND available_at >= :floor AND available_at <= {MOMENT}
        ORDER BY available_at, seq LIMIT :limit FOR UPDATE SKIP LOCKED
    ), claimed AS (
        UPDATE mesh_deliveries AS d SET
            state = CASE WHEN attempts < :max_attempts THEN 'leased' ELSE 'dead' END,
            attempts = CASE WHEN attempts < :max_attempts THEN attempts + 1 ELSE attempts END,
            token = greatest(token + 1, due.number),
            available_at = due.leased_until,
            reason = CASE WHEN attempts >= :max_attempts
                THEN 'not acknowledged in ' || CAST(attempts AS text) || ' claims' END,
            dead_at = CASE WHEN attempts >= :max_attempts THEN due.moment END
        FROM due WHERE d.receiver = :receiver AND d.message_id = due.message_id
        RETURNING {_DELIVERY_COLUMNS}, due.due_at
    )
    SELECT {_DELIVERY_COLUMNS}, {_MESSAGE_COLUMNS}, d.due_at
    FROM claimed AS d LEFT JOIN mesh_messages AS m
    ON m.to_node = CAST(:receiver AS text) COLLATE "POSIX" AND m.id = d.message_id
    ORDER BY d.due_at, d.seq
    """,  # noqa: S608 - our own names
    floor=DateTime(timezone=True),
    lease=Interval,
)
DISTRIBUTED = "SELECT indnkeyatts > 1 FROM pg_index WHERE indrelid = 'mesh_messages'::regclass AND indisprimary"
"""Selects whether an id is unique for each receiver only, as in a distributed database."""
MESSAGES_OF = statement(
    f"""
    WITH key (by_receiver) AS MATERIALIZED ({DISTRIBUTED})
    SELECT key.by_receiver, {_MESSAGE_COLUMNS} FROM mesh_messages AS m CROSS JOIN key WHERE m.id = ANY(:id)
    """,  # noqa: S608 - our own names
    writes=False,
    id=TEXTS,
)
"""Messages by id, which a row of `CLAIM` or `DEAD` lacks if its receiver is not the message's `to_node`, or if the
message was stored anew since the snapshot. Each says whether it is its `to_node`'s alone."""
_LEASES: dict[str, Any] = {"message_id": TEXTS, "token": NUMBERS}
_LEASED = "unnest(:message_id, :token) AS lease (message_id, token)"
_SAME = "d.receiver = :receiver AND d.message_id = lease.message_id AND d.token = lease.token"
_HELD = f"{_SAME} AND d.state = 'leased' AND d.available_at > {MOMENT}"
ACK = statement(f"DELETE FROM mesh_deliveries AS d USING {_LEASED} WHERE {_HELD}", **_LEASES)  # noqa: S608 - our own names


def _remove(condition: str) -> Statement:
    # The lanes are locked before: whoever was sending to one has committed by the time of the next statement.
    return statement(
        f"""
        WITH lanes AS MATERIALIZED (
            SELECT key FROM mesh_delivery_lanes WHERE receiver = :receiver AND key = ANY(:key)
            ORDER BY key COLLATE "C" FOR UPDATE
        )
        DELETE FROM mesh_deliveries AS d USING {_LEASED} WHERE (SELECT count(*) FROM lanes) >= 0 AND {condition}
        RETURNING d.receiver, d.key, d.seq, d.state
        """,  # noqa: S608 - our own names
        **_LEASES,
        key=TEXTS,
    )


ACK_KEYED = _remove(_HELD)
DROP = _remove(_SAME)
"""Removes what was just claimed although its message is gone, also if that was once too often."""


# Looks for what follows the removed first message of a key behind its place, since dead index entries lie before it. It
# is written also if it does not wait: so who sees it in a snapshot from before it was removed has a serialization
# failure, rather than keep the lane of an empty key.
def _advance(lanes: str, *, lane: str, following: str, **types: Any) -> Statement:
    return statement(
        f"""
        WITH lane AS MATERIALIZED (SELECT * FROM {lanes}),
        following AS MATERIALIZED (
            SELECT head.receiver, head.key, head.message_id, {MOMENT} AS moment FROM lane CROSS JOIN LATERAL (
                SELECT d.receiver, d.key, d.message_id FROM mesh_deliveries AS d
                WHERE d.receiver = {lane} AND d.key = lane.key AND d.seq > lane.seq ORDER BY d.seq LIMIT 1
            ) AS head
        ), promoted AS (
            UPDATE mesh_deliveries AS d SET
                state = CASE WHEN d.state = 'waiting' THEN 'queued' ELSE d.state END,
                available_at = CASE WHEN d.state = 'waiting' THEN greatest(d.available_at, following.moment)
                    ELSE d.available_at END
            FROM following WHERE d.receiver = {following} AND d.message_id = following.message_id
        )
        DELETE FROM mesh_delivery_lanes AS emptied USING lane
        WHERE emptied.receiver = {lane} AND emptied.key = lane.key AND NOT EXISTS (
            SELECT FROM following WHERE following.receiver = emptied.receiver AND following.key = emptied.key
        )
        """,  # noqa: S608 - our own names
        key=TEXTS,
        seq=NUMBERS,
        **types,
    )


ADVANCE = _advance("unnest(:key, :seq) AS input (key, seq)", lane=":receiver", following=":receiver")
ADVANCE_SEVERAL = _advance(
    "unnest(:receiver, :key, :seq) AS input (receiver, key, seq)",
    lane="lane.receiver",
    following="following.receiver",
    receiver=TEXTS,
)
"""The same for keys of several receivers, which a distributed database refuses."""
NACK = statement(
    f"""
    UPDATE mesh_deliveries AS d SET state = 'queued', available_at = lease.due_at FROM (
        SELECT message_id, token, {MOMENT} + delay AS due_at
        FROM unnest(:message_id, :token, :delay) AS given (message_id, token, delay)
    ) AS lease WHERE {_HELD}
    """,  # noqa: S608 - our own names
    **_LEASES,
    delay=ARRAY(Interval),
)
EXTEND = statement(
    f"""
    UPDATE mesh_deliveries AS d SET available_at = {MOMENT} + :lease FROM {_LEASED} WHERE {_HELD}
    RETURNING d.message_id, d.token, d.available_at
    """,  # noqa: S608 - our own names
    **_LEASES,
    lease=Interval,
)
BURY = statement(
    f"""
    UPDATE mesh_deliveries AS d SET state = 'dead', reason = :reason, dead_at = {MOMENT}
    FROM {_LEASED} WHERE {_HELD}
    """,  # noqa: S608 - our own names
    **_LEASES,
)
_REDRIVE = f"""
    UPDATE mesh_deliveries SET state = 'queued', attempts = 0, available_at = {MOMENT}, reason = NULL, dead_at = NULL
    WHERE receiver = :receiver AND state = 'dead'
"""  # noqa: S608 - our own names
REDRIVE_ALL = statement(_REDRIVE)
REDRIVE = statement(f"{_REDRIVE} AND message_id = ANY(:message_id)", message_id=TEXTS)
_DEAD = f"""
    SELECT {_DELIVERY_COLUMNS}, {_MESSAGE_COLUMNS} FROM mesh_deliveries AS d
    LEFT JOIN mesh_messages AS m ON m.to_node = d.receiver COLLATE "POSIX" AND m.id = d.message_id
    WHERE d.state = 'dead'
"""  # noqa: S608 - our own names
DEAD = statement(f"{_DEAD} AND d.receiver = :receiver AND d.seq > :seq ORDER BY d.seq LIMIT :limit", writes=False)
DEAD_OF_ALL = statement(
    f"{_DEAD} AND (d.receiver, d.seq) > (:receiver, :seq) ORDER BY d.receiver, d.seq LIMIT :limit", writes=False
)


def _backlog(condition: str) -> Statement:
    # One part for each index. The time comes from a CTE, since Citus pushes down no subquery beside an aggregate.
    return statement(
        f"""
        WITH clock AS MATERIALIZED (SELECT clock_timestamp() AS moment),
        active AS MATERIALIZED (
            SELECT count(*) FILTER (WHERE available_at <= moment) AS due,
                count(*) FILTER (WHERE state = 'leased' AND available_at > moment) AS leased,
                count(*) FILTER (WHERE state = 'queued' AND available_at > moment) AS delayed,
                min(available_at) FILTER (WHERE available_at <= moment) AS oldest
            FROM mesh_deliveries, clock WHERE {condition} AND state IN ('queued', 'leased')
        ),
        waiting AS MATERIALIZED (
            SELECT count(*) AS number FROM mesh_deliveries WHERE {condition} AND key IS NOT NULL AND state = 'waiting'
        ),
        dead AS MATERIALIZED (SELECT count(*) AS number FROM mesh_deliveries WHERE {condition} AND state = 'dead'),
        held AS MATERIALIZED (
            SELECT seq, key FROM mesh_deliveries, clock WHERE {condition} AND key IS NOT NULL
            AND (state = 'dead' OR state = 'queued' AND attempts > 0 AND available_at > moment)
            ORDER BY seq LIMIT 1000
        )
        SELECT active.due, active.leased, active.delayed, clock.moment - active.oldest, waiting.number, dead.number,
            ARRAY(SELECT key FROM held ORDER BY seq)
        FROM active, waiting, dead, clock
        """,  # noqa: S608 - our own names
        writes=False,
    )


BACKLOG = _backlog("receiver = :receiver")
BACKLOG_OF_ALL = _backlog("true")


class Claimed(NamedTuple):
    """What a row of `CLAIM` is."""

    delivery: Delivery
    due_at: datetime
    outcome: str
    """`leased`, `dead`, or `gone` if somebody deleted the message beside this library."""


def claimed(row: Row) -> Claimed:
    """Read a row of `CLAIM`."""
    made = delivery(row)
    lost = row[len(_DELIVERY)] is None
    return Claimed(made, row[-1], "gone" if lost else row[_DELIVERY.index("state")])


def delivery(row: Row) -> Delivery:
    """Read a row that begins with the columns of a delivery and of its message."""
    receiver, attempts, token, available_at, key, reason, dead_at, state, message_id, _ = row[: len(_DELIVERY)]
    end = len(_DELIVERY) + len(MESSAGES.names)
    values = row[len(_DELIVERY) : end]
    message = MESSAGES.load.of_values((message_id, *values[1:]))
    return Delivery(message, receiver, attempts, token, None if state == "dead" else available_at, key, reason, dead_at)


def lacking(rows: Iterable[Row]) -> list[str]:
    """Return the ids of the messages that rows of deliveries came without."""
    return sorted({row[_MESSAGE_ID] for row in rows if row[len(_DELIVERY)] is None})


def completed(rows: Iterable[Row], messages: Iterable[Row]) -> list[Row]:
    """Add messages of `MESSAGES_OF` to those rows of deliveries that came without."""
    begin, end = len(_DELIVERY), len(_DELIVERY) + len(MESSAGES.names)
    to_node = MESSAGES.names.index("to_node")
    found = {(message[0], message[to_node] if by_receiver else None): message for by_receiver, *message in messages}

    def complete(row: Row) -> Row:
        key = row[_MESSAGE_ID]
        message = row[begin:end] if has_message(row) else found.get((key, row[0])) or found.get((key, None))
        return row if message is None else (*row[:begin], *message, *row[end:])

    return [complete(row) for row in rows]


def has_message(row: Row) -> bool:
    """Return whether the message of a delivery is there."""
    return row[len(_DELIVERY)] is not None


def place(row: Row) -> tuple[str, int]:
    """Return the place of a row among the dead ones."""
    return row[0], row[len(_DELIVERY) - 1]


def backlog(row: Row) -> Backlog:
    """Read the row of a backlog."""
    due, leased, delayed, oldest, waiting, dead, held = row
    return Backlog(due, leased, delayed, waiting, dead, oldest, tuple(held))


def by_receiver(deliveries: Iterable[Delivery]) -> dict[str, list[Delivery]]:
    """Group deliveries by receiver, all in the order in which rows are locked, without repetitions.

    Raises:
        InvalidInputError: They are not deliveries.
    """
    found: dict[str, dict[tuple[str, int], Delivery]] = {}
    for each in checks.many("deliveries", deliveries):
        if not isinstance(each, Delivery):
            raise InvalidInputError(f"a Delivery is required, not {type(each).__name__}", field="deliveries")
        found.setdefault(each.receiver, {})[each.message.id, each.token] = each
    return {receiver: [group[key] for key in sorted(group)] for receiver, group in sorted(found.items())}


def leases(deliveries: list[Delivery]) -> dict[str, object]:
    """Return the parameters that identify the leases of one receiver."""
    return {
        "receiver": deliveries[0].receiver,
        "message_id": [each.message.id for each in deliveries],
        "token": [each.token for each in deliveries],
    }


def back_off(attempts: int) -> timedelta:
    """Return how long to wait after so many attempts: twice as long each time, with jitter, at most 5 minutes.

    M. Brooker, "Exponential Backoff And Jitter".
    """
    longest = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(max(attempts, 1) - 1, 20))
    return timedelta(seconds=longest * (0.5 + random.random() / 2))  # noqa: S311 - not used for security


def check_receiver(field: str, receiver: object) -> str:
    """Check the name of a receiver.

    Raises:
        InvalidInputError: It is none; names the field.
    """
    return checks.text(field, receiver, _RECEIVER_LENGTH)


def check_reason(reason: object) -> str:
    """Check the reason for which a delivery is set aside.

    Raises:
        InvalidInputError: It is not text of up to 10,000 characters.
    """
    return checks.text("reason", reason, _REASON_LENGTH)


def check_lease(lease: object) -> timedelta:
    """Check the length of a lease.

    Raises:
        InvalidInputError: It is not a timedelta of more than 0, up to 100 years.
    """
    if not isinstance(lease, timedelta) or not timedelta(0) < lease <= _LONGEST:
        raise InvalidInputError("lease must be a timedelta of more than 0, up to 100 years", field="lease")
    return lease


def check_delay(delay: object) -> timedelta:
    """Check a delay, and return it; None is none.

    Raises:
        InvalidInputError: It is not a timedelta from 0 to 100 years.
    """
    if delay is None:
        return timedelta(0)
    if not isinstance(delay, timedelta) or not timedelta(0) <= delay <= _LONGEST:
        raise InvalidInputError("delay must be None or a timedelta from 0 to 100 years", field="delay")
    return delay
