"""The repository of messages: stored once by id, listed in time order, and queued for their receivers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from datetime import timedelta
from operator import itemgetter, lt
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Column,
    ColumnElement,
    Text,
    bindparam,
    cast,
    collate,
    func,
    literal_column,
    select,
    tuple_,
)
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.dml import ReturningInsert

from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.repositories.base import AsyncListing
from mesh_storage.aio.repositories.maintenance import AsyncMaintenance
from mesh_storage.aio.repositories.runtime.deliveries import AsyncDeliveryRepository
from mesh_storage.errors import (
    AlreadyExistsError,
    ConflictError,
    InvalidInputError,
    MeshStorageError,
    NotFoundError,
)
from mesh_storage.models import Message
from mesh_storage.models.base import mark_written
from mesh_storage.postgres.batch import Batch
from mesh_storage.postgres.statement import Row, Statement
from mesh_storage.repositories import checks, queueing
from mesh_storage.repositories.aggregates import LIMIT
from mesh_storage.repositories.deliveries import ADVANCE_SEVERAL, check_delay
from mesh_storage.repositories.deliveries import MESSAGES as _MESSAGES
from mesh_storage.repositories.pages import MAX_ROWS, Page, Position

_TABLE = _MESSAGES.table
_COLUMNS: list[Column[Any]] = [_TABLE.c.id, _TABLE.c.from_node, _TABLE.c.to_node, _TABLE.c.content, _TABLE.c.timestamp]
_BATCH = Batch({column.name: column.type for column in _COLUMNS})
_CHECKS = {column.name: checks.of_column(f"Message.{column.name}", column) for column in _COLUMNS}
_CHECKS["timestamp"] = _CHECKS["timestamp"].optional()
_QUEUED = _MESSAGES.names.index("queued")


def _or_now(timestamp: ColumnElement[Any]) -> ColumnElement[Any]:
    return func.coalesce(timestamp, cast(func.extract("epoch", func.now()), BigInteger))


def _store() -> ReturningInsert[Any]:
    values: dict[Column[Any], ColumnElement[Any]] = {column: bindparam(column.name) for column in _COLUMNS}
    values[_TABLE.c.timestamp] = _or_now(bindparam("timestamp", type_=BigInteger))
    times: list[Column[Any]] = [_TABLE.c.timestamp, _TABLE.c.created_at]
    return insert(_TABLE).values(values).on_conflict_do_nothing().returning(*times)


def _store_many() -> ReturningInsert[Any]:
    rows = _BATCH.table()
    values = [*(rows.c[column.name] for column in _COLUMNS[:-1]), _or_now(rows.c.timestamp)]
    stored = insert(_TABLE).from_select(_COLUMNS, select(*values)).on_conflict_do_nothing()
    return stored.returning(literal_column("1"))


_STORE = Statement(_store)
# Rows are counted by what is returned: of an INSERT ... SELECT, Citus reports the number selected.
_STORE_MANY = Statement(_store_many)
# By receiver as well, since in a distributed database others may have messages of the same id.
_SELECT_STORED = Statement(
    lambda: select(_TABLE).where(
        _TABLE.c.to_node == collate(bindparam("to_node", type_=Text), "POSIX"), _TABLE.c.id == bindparam("id")
    )
)
_SELECT_MANY = Statement(lambda: select(_TABLE).where(_TABLE.c.id == func.any(bindparam("ids", type_=ARRAY(Text)))))


class _Traffic:
    """The statements that list all messages, or those to a node, from a node, or between two nodes."""

    def __init__(self, *ends: Column[Any]) -> None:
        self._ends = ends
        by_time = (_TABLE.c.timestamp, _TABLE.c.id)
        self.page = Statement(lambda: select(_TABLE).where(*self._within()).order_by(*by_time).limit(LIMIT))
        self.count = Statement(lambda: select(func.count()).select_from(_TABLE).where(*self._within()))

    def _within(self) -> Iterable[ColumnElement[bool]]:
        yield from (end == bindparam(end.name) for end in self._ends)
        start = tuple_(bindparam("time", type_=BigInteger), bindparam("id", type_=Text))
        yield tuple_(_TABLE.c.timestamp, _TABLE.c.id) > start
        yield _TABLE.c.timestamp <= bindparam("last", type_=BigInteger)


_TRAFFIC = {
    (False, False): _Traffic(),
    (True, False): _Traffic(_TABLE.c.to_node),
    (False, True): _Traffic(_TABLE.c.from_node),
    (True, True): _Traffic(_TABLE.c.from_node, _TABLE.c.to_node),
}


class AsyncMessageRepository(AsyncDeliveryRepository):
    """The repository of messages, and of their deliveries."""

    def __init__(self, connection: AsyncUnitOfWorkConnection) -> None:
        super().__init__(connection, _MESSAGES)

    async def store(self, message: Message) -> Message:
        """Store a message and return it with its `timestamp` and `created_at`; storing the same again has no effect.

        A message without a timestamp gets the time of the database's clock.

        Raises:
            AlreadyExistsError: A different message has this id.
            InvalidInputError: A value is invalid; names the field.
        """
        await self._store_by(_STORE, None, message)
        return message

    async def store_many(self, messages: Iterable[Message]) -> int:
        """Store many messages in one statement and return the number of new ones.

        Raises:
            AlreadyExistsError: A different message has one of the ids; the unit of work can only be rolled back.
            InvalidInputError: A value is invalid; names the field. Nothing was stored.
        """
        columns = _in_order(_columns(messages))
        if not columns["id"]:
            return 0
        stored = len(await self._connection.fetch_all(_STORE_MANY, columns))
        if stored < len(columns["id"]):
            await self._check_same(columns)
        return stored

    async def send(
        self,
        message: Message,
        *,
        delay: timedelta | None = None,
        key: str | None = None,
        receivers: Iterable[str] | None = None,
    ) -> Message:
        """Store a message and queue it for its receivers, in the same commit; sending the same again has no effect.

        A message that is there already is queued unless it was before, whatever became of its deliveries.

        Args:
            message: The message, as for `store`.
            delay: How long after now it is due; it is at once if None.
            key: Messages of one key (1 to 255 characters) go to a receiver one at a time, in the order of sending: a
                message that is delayed, fails or is dead holds up the others of its key. Two units of work that send
                to the same key and receiver wait for one another.
            receivers: To whom, one delivery each; to its `to_node` if None. In a distributed database, nobody else.

        Raises:
            AlreadyExistsError: A different message has this id.
            ConflictError: An earlier message with this id was deleted beside this library, and its delivery, which
                nobody has claimed since, has another key. The unit of work can only be rolled back.
            InvalidInputError: A value is invalid; names the field.
        """
        (given,) = _MESSAGES.attributes("message", [message])
        parameters: dict[str, object] = {
            "delay": check_delay(delay),
            "receivers": queueing.check_receivers(receivers, _CHECKS["to_node"](given.get("to_node"))),
        }
        if key is not None:
            parameters["key"] = checks.text("key", key, queueing.KEY_LENGTH)
        keyed, to_others = key is not None, parameters["receivers"] != [given.get("to_node")]
        try:
            await self._store_by(queueing.SEND[keyed, to_others], queueing.QUEUE[keyed], message, **parameters)
        except MeshStorageError as error:
            if to_others and error.sqlstate == queueing.NO_SUCH_KEY:
                raise InvalidInputError(
                    "in a distributed database, a message is for its to_node only: send one to each receiver",
                    field="receivers",
                    sqlstate=error.sqlstate,
                ) from error
            raise
        return message

    async def send_many(self, messages: Iterable[Message], *, delay: timedelta | None = None) -> int:
        """Store many messages and queue each for its `to_node`, in one statement and in the order given.

        Returns the number of those queued: the others were before.

        Raises:
            AlreadyExistsError: A different message has one of the ids; the unit of work can only be rolled back.
            InvalidInputError: A value is invalid; names the field. Nothing was stored.
        """
        given = _columns(messages)
        columns = _in_order(given)
        if not columns["id"]:
            return 0
        places = {key: place for place, key in reversed(list(enumerate(given["id"])))}
        parameters = {"position": [places[key] for key in columns["id"]], "delay": check_delay(delay)}
        queued = 0
        for _ in range(3):  # what is there may be deleted before it is queued
            queued += int(await self._fetch_value(queueing.SEND_MANY, **columns, **parameters))
            if queued == len(columns["id"]):
                return queued
            found = await self._check_same(columns)
            left = sum(not row[_QUEUED] for row in found)
            receivers = {"id": columns["id"], "to_node": columns["to_node"]}
            again = int(await self._fetch_value(queueing.QUEUE_MANY, **receivers, **parameters)) if left else 0
            queued += again
            if len(found) == len(columns["id"]) and again == left:
                return queued
        raise ConflictError("some of the messages are being stored and deleted concurrently", retryable=True)

    async def enqueue(self, *, since: int, limit: int = 10_000) -> int:
        """Queue up to `limit` stored messages that never were, each for its `to_node`, and return their number.

        The oldest come first, from the Unix time `since` in seconds on; call it until it returns 0. It is for messages
        that `store` or another service wrote, and needs the privilege UPDATE on the messages.
        """
        parameters = {"since": checks.integer("since", since), "limit": checks.integer("limit", limit, 1, MAX_ROWS)}
        return int(await self._fetch_value(queueing.ENQUEUE[await self._is_distributed()], **parameters))

    async def delete(self, key: str) -> None:
        """Delete the message with this id and its deliveries, open ones as well: an `ack` of one fails then.

        Raises:
            NotFoundError: There is none.
        """
        checked = [self._aggregate.check_key(key)]
        # One that is queued meanwhile is not deleted at first, since its deliveries are not seen.
        if not await self._delete(checked) and not await self._delete(checked):
            raise NotFoundError(self._aggregate.name, key)

    async def delete_many(self, ids: Iterable[str]) -> int:
        """Delete those messages with these ids that have no open delivery, dead ones included, and return how many."""
        checked = sorted(set(self._aggregate.check_key.column(checks.many("ids", ids))))
        row = await self._connection.fetch_one(queueing.DELETE_UNDELIVERED, {"id": checked})
        assert row is not None, "the statement always returns one row"
        deleted, settled, *heads = row
        await self._follow(heads)
        return int(deleted) + (await self._delete(settled) if settled else 0)

    async def purge(self, before: int, *, limit: int = 10_000) -> int:
        """Delete up to `limit` messages from before a Unix time in seconds, the oldest first, and return their number.

        Those with a delivery stay, with a dead one as well.
        """
        before, limit = checks.integer("before", before), checks.integer("limit", limit, 1, MAX_ROWS)
        return await AsyncMaintenance(self._connection).remove_messages(queueing.PURGE, limit, before=before)

    async def page(
        self,
        *,
        to_node: str | None = None,
        from_node: str | None = None,
        since: int | None = None,
        until: int | None = None,
        after: str | None = None,
        limit: int = 100,
    ) -> Page[Message]:
        """Return up to `limit` (at most 10,000) messages in time order, starting after the cursor `after`.

        `since` (inclusive) and `until` (exclusive) are Unix times in seconds.
        """
        return await self._by_time(to_node, from_node, since, until).page(after, limit)

    def stream(
        self,
        *,
        to_node: str | None = None,
        from_node: str | None = None,
        since: int | None = None,
        until: int | None = None,
        batch_size: int = 1000,
    ) -> AsyncGenerator[Message, None]:
        """Yield all messages in time order, with at most `batch_size` in memory.

        `since` (inclusive) and `until` (exclusive) are Unix times in seconds.
        """
        return self._by_time(to_node, from_node, since, until).stream(batch_size)

    async def count(
        self,
        *,
        to_node: str | None = None,
        from_node: str | None = None,
        since: int | None = None,
        until: int | None = None,
    ) -> int:
        """Return the exact number of messages, which takes an index scan over all that are counted.

        `since` (inclusive) and `until` (exclusive) are Unix times in seconds.
        """
        traffic, parameters = _traffic(to_node, from_node, since, until)
        return int(await self._fetch_value(traffic.count, **parameters))

    async def _store_by(
        self, store: Statement, store_again: Statement | None, message: Message, **parameters: object
    ) -> None:
        """Store a message by a statement, and what is there already and the same by another one."""
        (given,) = _MESSAGES.attributes("message", [message])
        values = {name: check(given.get(name)) for name, check in _CHECKS.items()}
        key = {"to_node": values["to_node"], "id": values["id"]}
        for _ in range(3):  # the conflicting row may be deleted before it is read
            row = await self._connection.fetch_one(store, {**values, **parameters})
            if row is None:
                there = await self._connection.fetch_one(_SELECT_STORED, key)
                if there is None:
                    if await self.find(message.id) is not None and not await self._is_distributed():
                        raise AlreadyExistsError(f"a different message with id {message.id!r} exists")
                    continue
                found = _MESSAGES.load.of_values(there)
                if not _same(found, values):
                    raise AlreadyExistsError(f"a different message with id {message.id!r} exists")
                if store_again is None or there[_QUEUED]:
                    row = (found.timestamp, found.created_at)
                else:
                    row = await self._connection.fetch_one(store_again, {**key, **parameters})
                    if row is None:  # queued or deleted meanwhile
                        continue
            timestamp, created_at, *under_another_key = row
            if any(under_another_key):
                raise self._connection.fail(
                    ConflictError(
                        f"an earlier message with id {message.id!r} was deleted beside this library, and its delivery "
                        "has another key"
                    )
                )
            given.update(timestamp=timestamp, created_at=created_at)
            mark_written(message, self._connection.writes)
            return
        raise ConflictError(f"message {message.id!r} is being stored and deleted concurrently", retryable=True)

    async def _check_same(self, columns: dict[str, list[Any]]) -> list[Row]:
        """Return the rows that are there, after a check that each is the same as the message given."""
        by_id = dict(zip(columns["id"], zip(*columns.values(), strict=True), strict=True))
        others: set[str] = set()
        same: list[Row] = []
        rows = await self._connection.fetch_all(_SELECT_MANY, {"ids": list(by_id)})
        for row, found in zip(rows, _MESSAGES.load.many(rows), strict=True):
            values = dict(zip(_CHECKS, by_id[found.id], strict=True))
            if found.to_node != values["to_node"]:
                others.add(found.id)
            elif _same(found, values):
                same.append(row)
            else:
                raise self._connection.fail(AlreadyExistsError(f"a different message with id {found.id!r} exists"))
        others.difference_update(row[0] for row in same)
        if others and not await self._is_distributed():
            raise self._connection.fail(AlreadyExistsError(f"a different message with id {min(others)!r} exists"))
        return same

    async def _delete(self, ids: list[str]) -> int:
        row = await self._connection.fetch_one(queueing.DELETE, {"id": ids})
        assert row is not None, "the statement always returns one row"
        deleted, *heads = row
        await self._follow(heads)
        return int(deleted)

    async def _follow(self, heads: list[Any]) -> None:
        """Let the next message of each key follow, of several receivers at once where one server has them all."""
        receivers, keys, numbers = heads
        if receivers is None:
            return
        if len(set(receivers)) > 1 and not await self._is_distributed():
            parameters = {"receiver": receivers, "key": keys, "seq": numbers}
            await self._connection.execute(ADVANCE_SEVERAL, parameters)
        else:
            await self._advance(list(zip(receivers, keys, numbers, strict=True)))

    async def _is_distributed(self) -> bool:
        return bool(await self._fetch_value(queueing.IS_DISTRIBUTED))

    def _by_time(
        self, to_node: str | None, from_node: str | None, since: int | None, until: int | None
    ) -> AsyncListing[Message]:
        traffic, parameters = _traffic(to_node, from_node, since, until)

        async def fetch(after: Position | None, limit: int) -> list[Row]:
            start = {} if after is None or after[0] < parameters["time"] else {"time": after[0], "id": after[1]}
            return await self._connection.fetch_all(traffic.page, {**parameters, **start, "limit": limit})

        return AsyncListing(fetch, _MESSAGES.load.many, itemgetter(_MESSAGES.names.index("timestamp"), 0), (int, str))


def _columns(messages: Iterable[Message]) -> dict[str, list[Any]]:
    given = _MESSAGES.attributes("message", messages)
    return {name: check.column([instance.get(name) for instance in given]) for name, check in _CHECKS.items()}


def _in_order(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Deduplicate messages and sort them by id, so that concurrent stores cannot deadlock.

    Raises:
        AlreadyExistsError: Two different messages have the same id.
    """
    if all(map(lt, columns["id"], columns["id"][1:])):
        return columns
    rows = sorted(zip(*columns.values(), strict=True), key=itemgetter(0))
    by_id = {row[0]: row for row in rows}
    if len(by_id) < len(rows):
        for row in rows:
            if row != by_id[row[0]]:
                raise AlreadyExistsError(f"two different messages have the id {row[0]!r}")
    return dict(zip(columns, map(list, zip(*by_id.values(), strict=True)), strict=True))


def _same(found: Message, values: dict[str, Any]) -> bool:
    return all(
        getattr(found, name) == value for name, value in values.items() if value is not None or name != "timestamp"
    )


def _traffic(
    to_node: str | None, from_node: str | None, since: int | None, until: int | None
) -> tuple[_Traffic, dict[str, Any]]:
    """Return the statements for a filter and their parameters; ids are never empty, so ('since', '') sorts first."""
    parameters: dict[str, Any] = {
        "time": checks.INT64_MIN if since is None else checks.integer("since", since),
        "id": "",
        "last": checks.INT64_MAX if until is None else checks.integer("until", until) - 1,
    }
    if parameters["last"] < checks.INT64_MIN:  # an empty range below the smallest bigint
        parameters |= {"time": checks.INT64_MAX, "last": checks.INT64_MIN}
    for name, node in (("to_node", to_node), ("from_node", from_node)):
        if node is not None:
            parameters[name] = checks.text(name, node, 64)
    return _TRAFFIC[to_node is not None, from_node is not None], parameters
