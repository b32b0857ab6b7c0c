"""The queues that are compared: how each is installed, filled and drained."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from importlib import resources
from typing import Any

import psycopg

from mesh_storage import MeshStorage, Message

RECEIVER = "benchmark"
_LEASE = timedelta(minutes=5)
_CONTENT = b"x" * 128
_FILL_BY = 1_000

Drain = Callable[[], int]
"""Empties the queue, and returns how many messages there were."""


class Queue:
    """A queue; the processes that drain it get it pickled."""

    name = ""
    modules: tuple[str, ...] = ()
    """What must be installed."""
    target: float | None = None
    """How many times as fast we are to be."""
    part = 1
    """By how much fewer messages it gets than the others, since it takes long; its time is multiplied by that."""

    def install(self, connection: psycopg.Connection[Any]) -> None:
        """Create what it needs."""

    def fill(self, connection: psycopg.Connection[Any], url: str, number: int) -> None:
        """Fill it; this is not measured."""
        raise NotImplementedError

    def open(self, url: str, connect: dict[str, Any], batch: int) -> Any:
        """Return a context manager that connects, and yields what drains it."""
        raise NotImplementedError


class Ours(Queue):
    """The library: each claim and each acknowledgement is a unit of work."""

    name = "mesh_storage"

    def fill(self, connection: psycopg.Connection[Any], url: str, number: int) -> None:
        connection.execute("TRUNCATE mesh_messages, mesh_deliveries, mesh_delivery_lanes")
        prefix = str(time.time_ns())
        with MeshStorage.open(url) as storage:
            for start in range(0, number, _FILL_BY):
                with storage.begin() as uow:
                    uow.messages.send_many(
                        Message(id=f"{prefix}-{n}", from_node="a", to_node=RECEIVER, content=_CONTENT)
                        for n in range(start, min(start + _FILL_BY, number))
                    )

    @contextmanager
    def open(self, url: str, connect: dict[str, Any], batch: int) -> Generator[Drain]:
        del connect
        with MeshStorage.open(url) as storage:

            def drain() -> int:
                done = 0
                while True:
                    with storage.begin() as uow:
                        claimed = uow.messages.claim(RECEIVER, limit=batch, lease=_LEASE)
                    if not claimed:
                        return done
                    with storage.begin() as uow:
                        uow.messages.ack(claimed)
                    done += len(claimed)

            _warm_up(storage)
            yield drain


def _warm_up(storage: MeshStorage) -> None:
    """Deliver a message to a receiver of this process alone, so that all statements are compiled."""
    receiver = f"warm-up-{os.getpid()}"
    with storage.begin() as uow:
        uow.messages.send(Message(id=receiver, from_node="a", to_node=receiver, content=b""))
    for _ in range(2):
        with storage.begin() as uow:
            claimed = uow.messages.claim(receiver)
        with storage.begin() as uow:
            uow.messages.ack(claimed)


class Consuming(Ours):
    """The worker loop of the library: each message is handled in a unit of work of its own."""

    name = "mesh_storage, consume"

    @contextmanager
    def open(self, url: str, connect: dict[str, Any], batch: int) -> Generator[Drain]:
        del connect
        with MeshStorage.open(url) as storage:

            class Empty:
                """Is set once nothing is due or claimed any more."""

                done = 0
                _following = 0.0
                _set = False

                def is_set(self) -> bool:
                    if not self._set and time.monotonic() >= self._following:
                        self._following = time.monotonic() + 0.2
                        with storage.begin(read_only=True) as uow:
                            backlog = uow.messages.backlog(RECEIVER)
                        self._set = not backlog.due and not backlog.leased
                    return self._set

            _warm_up(storage)
            empty = Empty()

            def handle(_uow: object, _delivery: object) -> None:
                empty.done += 1

            def drain() -> int:
                storage.consume(RECEIVER, handle, batch=batch, lease=_LEASE, stop=empty)
                return empty.done

            yield drain


class Plain(Ours):
    """The same tables by hand: each claim and each acknowledgement is a statement that commits by itself."""

    name = "plain psycopg"

    @contextmanager
    def open(self, url: str, connect: dict[str, Any], batch: int) -> Generator[Drain]:
        del url
        claim = """
            WITH due AS MATERIALIZED (
                SELECT message_id, receiver FROM mesh_deliveries
                WHERE receiver = %s AND state IN ('queued', 'leased') AND available_at <= now()
                ORDER BY available_at, seq LIMIT %s FOR UPDATE SKIP LOCKED
            ), claimed AS (
                UPDATE mesh_deliveries AS d
                SET state = 'leased', attempts = attempts + 1, token = token + 1,
                    available_at = now() + interval '5 minutes'
                FROM due WHERE d.message_id = due.message_id AND d.receiver = due.receiver
                RETURNING d.message_id, d.token, d.attempts
            )
            SELECT m.id, m.from_node, m.to_node, m.content, m.timestamp, m.created_at, claimed.token, claimed.attempts
            FROM claimed JOIN mesh_messages AS m ON m.id = claimed.message_id
        """
        acknowledge = """
            DELETE FROM mesh_deliveries AS d USING unnest(%b::text[], %b::bigint[]) AS lease (message_id, token)
            WHERE d.receiver = %s AND d.message_id = lease.message_id AND d.token = lease.token
        """
        with (
            psycopg.connect(**connect, autocommit=True) as connection,
            connection.cursor(binary=True) as cursor,
        ):

            def drain() -> int:
                done = 0
                while rows := cursor.execute(claim, [RECEIVER, batch], prepare=True).fetchall():
                    leases = [row[0] for row in rows], [row[6] for row in rows]
                    cursor.execute(acknowledge, [*leases, RECEIVER], prepare=True)
                    done += len(rows)
                return done

            yield drain


class Pgmq(Queue):
    """PGMQ: SQL functions, called by psycopg."""

    name = "pgmq"
    modules = ("pgmq",)
    target = 2.0

    def install(self, connection: psycopg.Connection[Any]) -> None:
        if connection.execute("SELECT to_regnamespace('pgmq')").fetchone() == (None,):
            connection.execute(resources.files("pgmq.sql").joinpath("pgmq.sql").read_text().encode())
            connection.execute("SELECT pgmq.create(%s)", [RECEIVER])

    def fill(self, connection: psycopg.Connection[Any], url: str, number: int) -> None:
        del url
        connection.execute("SELECT pgmq.purge_queue(%s)", [RECEIVER])
        message = json.dumps({"content": _CONTENT.decode()})
        for start in range(0, number, _FILL_BY):
            count = min(_FILL_BY, number - start)
            connection.execute("SELECT pgmq.send_batch(%s, %s::jsonb[])", [RECEIVER, [message] * count])

    @contextmanager
    def open(self, url: str, connect: dict[str, Any], batch: int) -> Generator[Drain]:
        del url
        with psycopg.connect(**connect, autocommit=True) as connection, connection.cursor(binary=True) as cursor:

            def drain() -> int:
                done = 0
                read = "SELECT * FROM pgmq.read(%s, 300, %s)"
                while rows := cursor.execute(read, [RECEIVER, batch], prepare=True).fetchall():
                    cursor.execute("SELECT pgmq.delete(%s, %b::bigint[])", [RECEIVER, [row[0] for row in rows]])
                    done += len(rows)
                return done

            yield drain


class PgQueuer(Queue):
    """PGQueuer: its queries by its psycopg driver."""

    name = "PGQueuer"
    modules = ("pgqueuer",)
    target = 5.0

    def install(self, connection: psycopg.Connection[Any]) -> None:
        if connection.execute("SELECT to_regclass('pgqueuer')").fetchone() == (None,):
            builder = importlib.import_module("pgqueuer.adapters.persistence.qb").QueryBuilderEnvironment()
            connection.execute(builder.build_install_query(create_schema=False).encode())

    def fill(self, connection: psycopg.Connection[Any], url: str, number: int) -> None:
        del url
        connection.execute("TRUNCATE pgqueuer, pgqueuer_log")
        connection.execute(
            "INSERT INTO pgqueuer (priority, status, entrypoint, payload) "
            "SELECT 0, 'queued', %s, %s FROM generate_series(1, %s)",
            [RECEIVER, _CONTENT, number],
        )

    @contextmanager
    def open(self, url: str, connect: dict[str, Any], batch: int) -> Generator[Drain]:
        del url
        yield lambda: asyncio.run(self._drain(connect, batch))

    async def _drain(self, connect: dict[str, Any], batch: int) -> int:
        import uuid

        driver = importlib.import_module("pgqueuer.adapters.drivers.psycopg").PsycopgDriver
        queries = importlib.import_module("pgqueuer.queries")
        entrypoints = {RECEIVER: queries.EntrypointExecutionParameter(concurrency_limit=0)}
        done, manager = 0, uuid.uuid4()
        async with await psycopg.AsyncConnection.connect(**connect, autocommit=True) as connection:
            made = queries.Queries(driver(connection))
            while jobs := await made.dequeue(batch, entrypoints, manager, None, _LEASE):
                await made.log_jobs([(job, "successful", None) for job in jobs])
                done += len(jobs)
        return done


class Procrastinate(Queue):
    """Procrastinate: its job manager, which fetches jobs one by one."""

    name = "Procrastinate"
    modules = ("procrastinate",)
    part = 20

    def install(self, connection: psycopg.Connection[Any]) -> None:
        if connection.execute("SELECT to_regclass('procrastinate_jobs')").fetchone() == (None,):
            sql = resources.files("procrastinate.sql").joinpath("schema.sql").read_text()
            connection.execute(sql.encode())

    def fill(self, connection: psycopg.Connection[Any], url: str, number: int) -> None:
        del url
        connection.execute("TRUNCATE procrastinate_jobs CASCADE")
        connection.execute(
            "INSERT INTO procrastinate_jobs (queue_name, task_name, args) "
            "SELECT %s, 'task', %s::jsonb FROM generate_series(1, %s)",
            [RECEIVER, json.dumps({"content": _CONTENT.decode()}), number],
        )

    @contextmanager
    def open(self, url: str, connect: dict[str, Any], batch: int) -> Generator[Drain]:
        del url, batch
        yield lambda: asyncio.run(self._drain(connect))

    async def _drain(self, connect: dict[str, Any]) -> int:
        procrastinate = importlib.import_module("procrastinate")
        manager = importlib.import_module("procrastinate.manager").JobManager
        succeeded = importlib.import_module("procrastinate.jobs").Status.SUCCEEDED
        done = 0
        connector = procrastinate.PsycopgConnector(kwargs=connect, min_size=1, max_size=1)
        await connector.open_async()
        try:
            jobs = manager(connector)
            worker = await jobs.register_worker()
            while job := await jobs.fetch_job([RECEIVER], worker):
                await jobs.finish_job(job, succeeded, delete_job=True)
                done += 1
        finally:
            await connector.close_async()
        return done


OURS = Ours()
CONSUMING = Consuming()
PLAIN = Plain()
PEERS = (Pgmq(), PgQueuer(), Procrastinate())
