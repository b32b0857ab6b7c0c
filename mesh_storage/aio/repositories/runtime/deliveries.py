"""The receiving side of messages: claimed under a lease, then acknowledged, given back or set aside."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import groupby
from operator import itemgetter

from mesh_storage.aio.repositories.base import AsyncKeyedRepository, AsyncListing
from mesh_storage.errors import ConflictError
from mesh_storage.models import Message
from mesh_storage.postgres.floors import BEGINNING
from mesh_storage.postgres.statement import Parameters, Row, Statement
from mesh_storage.repositories import checks
from mesh_storage.repositories import deliveries as sql
from mesh_storage.repositories.deliveries import LEASE, Backlog, Claimed, Delivery
from mesh_storage.repositories.pages import MAX_ROWS, Page, Position


class AsyncDeliveryRepository(AsyncKeyedRepository[Message]):
    """The deliveries of messages, each to one receiver."""

    async def claim(
        self, receiver: str, *, limit: int = 1, lease: timedelta = LEASE, max_attempts: int = 10
    ) -> list[Delivery]:
        """Claim up to `limit` (at most 10,000) deliveries that are due, those that have been due for longest first.

        From the commit on, nobody else gets them until the lease is over. One that was claimed `max_attempts` times and
        never acknowledged is set aside as dead instead.

        Raises:
            InvalidInputError: An argument is invalid; names it.
        """
        parameters = {
            "receiver": sql.check_receiver("receiver", receiver),
            "lease": sql.check_lease(lease),
            "max_attempts": checks.integer("max_attempts", max_attempts, 1, sql.MOST_ATTEMPTS),
        }
        left = checks.integer("limit", limit, 1, MAX_ROWS)
        floors = self._connection.driver.floors
        claimed: list[Delivery] = []
        while left:
            begun = floors.of(receiver)
            rows = await self._with_messages(sql.CLAIM, {**parameters, "limit": left, "floor": begun})
            found = [sql.claimed(row) for row in rows]
            if found:
                floors.note(receiver, found[0].due_at, begun)
            claimed += await self._leased(found)
            if len(rows) < left:
                if begun == BEGINNING:
                    break
                floors.forget(receiver)
            left = limit - len(claimed)
        return claimed

    async def ack(self, deliveries: Iterable[Delivery]) -> None:
        """Acknowledge deliveries, which are then done; in the unit of work of their effects, so that these happen once.

        Raises:
            ConflictError: A lease was lost: it is over, or another has claimed it since. The unit of work can only be
                rolled back.
            InvalidInputError: They are not deliveries.
        """
        for group in sql.by_receiver(deliveries).values():
            self._check_held(await self._acknowledge(group), group)

    async def nack(self, deliveries: Iterable[Delivery], *, delay: timedelta | None = None) -> None:
        """Give deliveries back, to be delivered again after a delay.

        Without one, they wait for 1 s after the first attempt, twice as long after each further one and at most 5
        minutes, minus up to half of that at random.

        Raises:
            ConflictError: A lease was lost, as for `ack`.
            InvalidInputError: An argument is invalid; names it.
        """
        fixed = None if delay is None else sql.check_delay(delay)
        for group in sql.by_receiver(deliveries).values():
            delays = [sql.back_off(each.attempts) if fixed is None else fixed for each in group]
            await self._settle(sql.NACK, group, delay=delays)

    async def extend(self, deliveries: Iterable[Delivery], lease: timedelta) -> list[Delivery]:
        """Let the leases of deliveries last for `lease` from now, and return the deliveries with their new end.

        Raises:
            ConflictError: A lease was lost, as for `ack`.
            InvalidInputError: An argument is invalid; names it.
        """
        extended: list[Delivery] = []
        for group in sql.by_receiver(deliveries).values():
            held = await self._extend(group, sql.check_lease(lease))
            self._check_held(len(held), group)
            extended += held
        return extended

    async def bury(self, deliveries: Iterable[Delivery], reason: str) -> None:
        """Set deliveries aside as dead, for a reason of up to 10,000 characters; a key stays held by one.

        Raises:
            ConflictError: A lease was lost, as for `ack`.
            InvalidInputError: An argument is invalid; names it.
        """
        for group in sql.by_receiver(deliveries).values():
            await self._settle(sql.BURY, group, reason=sql.check_reason(reason))

    async def dead(self, receiver: str | None = None, *, after: str | None = None, limit: int = 100) -> Page[Delivery]:
        """Return up to `limit` (at most 10,000) dead deliveries, by receiver and in the order of sending."""
        if receiver is not None:
            sql.check_receiver("receiver", receiver)

        async def fetch(position: Position | None, number: int) -> list[Row]:
            name, seq = ("", 0) if position is None else position
            found: list[Row] = []
            while (left := number - len(found)) > 0:
                parameters = {"receiver": receiver or name, "seq": seq, "limit": left}
                rows = await self._with_messages(sql.DEAD if receiver else sql.DEAD_OF_ALL, parameters)
                found += filter(sql.has_message, rows)
                if len(rows) < left:
                    break
                name, seq = sql.place(rows[-1])
            return found

        return await AsyncListing(fetch, lambda rows: map(sql.delivery, rows), sql.place, (str, int)).page(after, limit)

    async def redrive(self, receiver: str, ids: Iterable[str] | None = None) -> int:
        """Queue dead deliveries of a receiver anew, with no attempt made: all, or those of some messages.

        Returns how many there were.
        """
        parameters: dict[str, object] = {"receiver": sql.check_receiver("receiver", receiver)}
        if ids is None:
            return await self._connection.execute(sql.REDRIVE_ALL, parameters)
        parameters["message_id"] = self._aggregate.check_key.column(checks.many("ids", ids))
        return await self._connection.execute(sql.REDRIVE, parameters)

    async def backlog(self, receiver: str | None = None) -> Backlog:
        """Count the deliveries of a receiver, or of all, that are not acknowledged yet."""
        parameters = {} if receiver is None else {"receiver": sql.check_receiver("receiver", receiver)}
        row = await self._connection.fetch_one(sql.BACKLOG_OF_ALL if receiver is None else sql.BACKLOG, parameters)
        assert row is not None, "the statement always returns one row"
        return sql.backlog(row)

    async def _with_messages(self, statement: Statement, parameters: Parameters) -> list[Row]:
        """Return deliveries with their messages, those to others than their `to_node` by a second statement."""
        rows = await self._connection.fetch_all(statement, parameters)
        if lacking := sql.lacking(rows):
            rows = sql.completed(rows, await self._connection.fetch_all(sql.MESSAGES_OF, {"id": lacking}))
        return rows

    async def _leased(self, found: list[Claimed]) -> list[Delivery]:
        """Return what was claimed, without what was set aside; remove that whose message is gone."""
        for group in sql.by_receiver(each.delivery for each in found if each.outcome == "gone").values():
            await self._remove(sql.DROP, group)
        return [each.delivery for each in found if each.outcome == "leased"]

    async def _acknowledge(self, group: list[Delivery]) -> int:
        """Remove deliveries of one receiver whose leases are held, and return how many these were."""
        if all(each.key is None for each in group):
            return await self._connection.execute(sql.ACK, sql.leases(group))
        return await self._remove(sql.ACK_KEYED, group)

    async def _remove(self, statement: Statement, group: list[Delivery]) -> int:
        """Remove deliveries of one receiver, let the next of their keys follow, and return how many these were."""
        keys = sorted({each.key for each in group if each.key is not None})
        rows = await self._connection.fetch_all(statement, {**sql.leases(group), "key": keys})
        await self._advance([(receiver, key, seq) for receiver, key, seq, _ in rows if key is not None])
        return len(rows)

    async def _advance(self, heads: list[tuple[str, str, int]]) -> None:
        """Let the next message of each key follow the removed first one; its lane is locked."""
        for receiver, group in groupby(sorted(heads), itemgetter(0)):
            _, keys, numbers = zip(*group, strict=True)
            parameters = {"receiver": receiver, "key": list(keys), "seq": list(numbers)}
            await self._connection.execute(sql.ADVANCE, parameters)

    async def _extend(self, group: list[Delivery], lease: timedelta) -> list[Delivery]:
        """Extend those leases of one receiver that are held, and return them."""
        rows = await self._connection.fetch_all(sql.EXTEND, {**sql.leases(group), "lease": lease})
        ends: dict[tuple[str, int], datetime] = {(message_id, token): end for message_id, token, end in rows}
        leases = ((each, ends.get((each.message.id, each.token))) for each in group)
        return [replace(each, leased_until=end) for each, end in leases if end is not None]

    async def _settle(self, statement: Statement, group: list[Delivery], **parameters: object) -> None:
        self._check_held(await self._connection.execute(statement, {**sql.leases(group), **parameters}), group)

    def _check_held(self, held: int, group: list[Delivery]) -> None:
        if held < len(group):
            raise self._connection.fail(
                ConflictError(
                    f"{len(group) - held} of {len(group)} leases were lost: they are over, or another has claimed the "
                    "deliveries since"
                )
            )
