"""Old messages are removed step by step, each at the cost of what it removes, and none is missed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from sqlalchemy import text

from mesh_storage import MeshStorage, MeshStorageError, Message, UnitOfWork
from mesh_storage.repositories import removal

ROWS = 2_000
STEP = 100


def message(number: int, timestamp: int) -> Message:
    return Message(id=f"m-{number:04}", from_node="a", to_node="b", content=b"", timestamp=timestamp)


def store(storage: MeshStorage, *timestamps: int) -> None:
    with storage.begin() as uow:
        uow.messages.store_many(message(number, timestamp) for number, timestamp in enumerate(timestamps))


def entries_read(uow: UnitOfWork) -> int:
    """Return how many index entries of messages and deliveries this transaction has read."""
    query = """
        SELECT sum(pg_stat_get_xact_tuples_returned(indexrelid))::bigint FROM pg_index
        WHERE indrelid IN ('mesh_messages'::regclass, 'mesh_deliveries'::regclass)
    """
    return int(uow.session.execute(text(query)).scalar_one())


@pytest.mark.parametrize("timestamps", [range(ROWS), [5] * ROWS], ids=["in time", "at one time"])
@pytest.mark.parametrize("kept", ["removed rows", "deliveries"])
def test_a_step_does_not_read_again_what_those_before_it_have_passed(
    storage: MeshStorage, mesh_storage_url: str, timestamps: list[int], kept: str
) -> None:
    if kept == "deliveries":
        with storage.begin() as uow:
            uow.messages.send_many(message(5000 + number, timestamp) for number, timestamp in enumerate(timestamps))
    store(storage, *timestamps)
    with psycopg.connect(mesh_storage_url) as holder:
        holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        holder.execute("SELECT FROM mesh_messages")  # so that nothing can remove the entries
        costs: list[int] = []
        for _ in range(ROWS // STEP):
            with storage.begin() as uow:
                before = entries_read(uow)
                assert uow.messages.purge(ROWS, limit=STEP) == STEP
                costs.append(entries_read(uow) - before)
    assert costs[-1] <= 2 * costs[0]
    with storage.begin() as uow:
        assert uow.messages.purge(ROWS, limit=STEP) == 0


def test_what_was_committed_late_is_removed_all_the_same(storage: MeshStorage) -> None:
    store(storage, *range(100, 110))
    with storage.begin() as uow:
        assert uow.messages.purge(105, limit=3) == 3
    with storage.begin() as uow:
        uow.messages.store(message(50, 1))
    with storage.begin() as uow:
        assert uow.messages.purge(105, limit=3) == 3
        assert sorted(found.timestamp for found in uow.messages.stream()) == [*range(105, 110)]
        assert uow.messages.purge(105, limit=3) == 0


@pytest.mark.parametrize("by", ["rollback", "savepoint", "commit"])
def test_what_was_not_committed_is_the_oldest_again(storage: MeshStorage, by: str) -> None:
    store(storage, *range(100, 110))
    with storage.unit_of_work() as uow:
        if by == "savepoint":
            with suppress(ZeroDivisionError), uow.savepoint():
                assert uow.messages.purge(200, limit=3) == 3
                raise ZeroDivisionError
        else:
            assert uow.messages.purge(200, limit=3) == 3
        if by == "commit":
            uow.session.execute(text("CREATE TEMPORARY TABLE deferred (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)"))
            uow.session.execute(text("INSERT INTO deferred VALUES (1), (1)"))
            with pytest.raises(MeshStorageError):
                uow.commit()
    with storage.begin() as uow:
        assert uow.messages.purge(200, limit=1) == 1
        assert uow.messages.find("m-0000") is None


def test_after_a_while_it_begins_with_the_oldest_again(storage: MeshStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    store(storage, *range(100, 110))
    with storage.begin() as uow:
        assert uow.messages.purge(200, limit=3) == 3
        uow.messages.store(message(50, 1))
        monkeypatch.setattr("mesh_storage.postgres.floors.time", Later())
        assert uow.messages.purge(200, limit=1) == 1
        assert uow.messages.find("m-0050") is None


class Later:
    """The time of a minute later."""

    def __getattr__(self, name: str) -> Callable[[], float]:
        import time

        call: Any = getattr(time, name)
        return lambda: call() + 60.0


def test_maintain_removes_all_steps(storage: MeshStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal, "STEP", 7)
    store(storage, *[5] * 50, *range(10, 40))
    with storage.begin() as uow:
        uow.messages.send(message(5000, 3))
    assert storage.maintain(messages_older_than=timedelta(0)).messages == 80
    with storage.begin() as uow:
        assert [found.id for found in uow.messages.stream()] == ["m-5000"]
