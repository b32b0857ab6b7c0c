"""The Go service goes on writing while its database is taken over: nothing it says fails or waits for long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import psycopg
import pytest

from mesh_storage import schema
from tests.schema import legacy

pytestmark = pytest.mark.slow

MESSAGES = 1_000_000
SUM = "count(*), sum(hashtext((id, from_node, to_node, content, timestamp, created_at)::text))"
WRITERS = 2
LONGEST_WAIT_S = 1.0
"""How long a statement may take beyond its normal time."""


class Writer(threading.Thread):
    """Says all statements of the Go service over and over, and measures each."""

    def __init__(self, url: str, number: int) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.number = number
        self.ends = threading.Event()
        self.rounds = 0
        self.longest = [0.0] * len(legacy.STATEMENTS)
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            with psycopg.connect(self.url, autocommit=True, prepare_threshold=2) as connection:
                while not self.ends.is_set():
                    for position in range(len(legacy.STATEMENTS)):
                        # Each writer has numbers of its own.
                        sql, parameters = legacy.statement(position, self.rounds * WRITERS + self.number)
                        began = time.perf_counter()
                        connection.execute(sql.encode(), parameters)
                        self.longest[position] = max(self.longest[position], time.perf_counter() - began)
                    self.rounds += 1
        except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
            self.failure = error

    def forget(self) -> list[float]:
        """Return the longest time of each statement so far, and begin anew."""
        longest, self.longest = self.longest, [0.0] * len(legacy.STATEMENTS)
        return longest


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.timeout(600)
def test_a_million_messages_are_taken_over_while_writers_go_on(
    legacy_url: str,
    connection: legacy.Connection,
    record_property: Callable[[str, object], None],
) -> None:
    connection.execute(
        "INSERT INTO mesh_messages SELECT 'old-' || n, 'node-' || n %% 97, 'node-' || n %% 89, "
        "decode(repeat(md5(n::text), 16), 'hex'), n / 10 FROM generate_series(1, %s) AS n",
        [MESSAGES],
    )
    connection.execute(
        "INSERT INTO mesh_consensus_log SELECT 1 + n / 1000, 10 + n, '{}' FROM generate_series(1, 50000) AS n"
    )
    connection.execute("ANALYZE")
    before = connection.execute(f"SELECT {SUM} FROM mesh_messages").fetchone()
    # A service beside them that locks tables for a while, as one does that does much in one transaction.
    ends = threading.Event()
    transactions = 0

    def long_transactions() -> None:
        nonlocal transactions
        with psycopg.connect(legacy_url) as other:
            while not ends.wait(0.05):
                other.execute("UPDATE nodes SET port = port WHERE node_name = 'by the defaults'")
                other.execute("SELECT count(*) FROM routes")
                other.execute("INSERT INTO mesh_messages VALUES ('long', 'a', 'b', '', 1) ON CONFLICT DO NOTHING")
                ends.wait(0.15)
                other.execute("UPDATE mesh SET status = status WHERE mesh_name = 'mesh'")
                other.commit()
                transactions += 1

    long = threading.Thread(target=long_transactions, daemon=True)
    writers = [Writer(legacy_url, number) for number in range(WRITERS)]
    for thread in (long, *writers):
        thread.start()
    began = time.monotonic()
    until(lambda: min(writer.rounds for writer in writers) > 100 and time.monotonic() - began > 2)
    normal = [max(times) for times in zip(*(writer.forget() for writer in writers), strict=True)]
    rounds, others = sum(writer.rounds for writer in writers), transactions
    began = time.monotonic()
    schema.upgrade(legacy_url)
    took = time.monotonic() - began
    ends.set()
    for writer in writers:
        writer.ends.set()
    for thread in (long, *writers):
        thread.join(60)
        assert not thread.is_alive()
    assert [writer.failure for writer in writers] == [None] * WRITERS
    assert transactions > others
    assert sum(writer.rounds for writer in writers) > rounds + 10
    longest = [max(times) for times in zip(*(writer.longest for writer in writers), strict=True)]
    waits = [during - usual for during, usual in zip(longest, normal, strict=True)]
    record_property("longest_wait_ms", round(max(waits) * 1000))
    print(
        f"upgrade {took:.1f} s; longest statement before {max(normal) * 1000:.0f} ms, "
        f"during {max(longest) * 1000:.0f} ms; "
        f"longest wait beyond normal {max(waits) * 1000:.0f} ms; {sum(w.rounds for w in writers) - rounds} rounds"
    )
    assert max(waits) < LONGEST_WAIT_S, legacy.STATEMENTS[waits.index(max(waits))][0]
    after = connection.execute(f"SELECT {SUM} FROM mesh_messages WHERE id NOT LIKE 'go-%' AND id <> 'long'").fetchone()
    assert after == before
    logged = connection.execute(
        "SELECT count(*) FROM mesh_consensus_log WHERE index >= %s AND term = 9000000", [legacy.FIRST_LOG_INDEX]
    ).fetchone()
    assert logged == (sum(writer.rounds for writer in writers),)


def test_a_writer_that_holds_its_locks_for_long_makes_only_the_migration_wait(
    legacy_url: str, connection: legacy.Connection
) -> None:
    """Everyone who queues up behind the migration would wait as long as it does."""
    migrating = threading.Thread(target=schema.upgrade, args=[legacy_url], daemon=True)
    longest = 0.0
    with psycopg.connect(legacy_url) as holder:
        holder.execute("SELECT count(*) FROM mesh, nodes, mesh_messages")
        migrating.start()
        began = time.monotonic()
        tries = set()
        while time.monotonic() - began < 4:
            started = time.perf_counter()
            connection.execute("INSERT INTO mesh_messages VALUES ('x', 'a', 'b', '', 1) ON CONFLICT DO NOTHING")
            connection.execute("UPDATE nodes SET port = port")
            longest = max(longest, time.perf_counter() - started)
            tries |= set(
                connection.execute(
                    "SELECT virtualtransaction FROM pg_locks WHERE NOT granted AND mode = 'AccessExclusiveLock'"
                ).fetchall()
            )
        assert migrating.is_alive()
        assert len(tries) > 1
        assert not legacy.exists(connection, "mesh_consensus_log_stale")
        holder.rollback()
    migrating.join(60)
    assert not migrating.is_alive()
    assert legacy.exists(connection, "mesh_consensus_log_stale")
    assert longest < LONGEST_WAIT_S
