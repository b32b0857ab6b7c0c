"""MeshStorage: opens the storage and its units of work."""

from __future__ import annotations

import inspect
import logging
import os
import time
import weakref
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from mesh_storage import health, schema
from mesh_storage.cache.cached import Cached
from mesh_storage.consumer import Consumer
from mesh_storage.errors import (
    ClosedError,
    ConfigurationError,
    InvalidInputError,
    MeshStorageError,
)
from mesh_storage.health import Health
from mesh_storage.lease import Lease
from mesh_storage.parts import Parts
from mesh_storage.postgres.characteristics import Characteristics, Durability, Isolation
from mesh_storage.postgres.concurrency import in_person
from mesh_storage.postgres.pool import Pool, check_open
from mesh_storage.postgres.reading import Wanted
from mesh_storage.postgres.replicas import Reading
from mesh_storage.postgres.retry import Retry
from mesh_storage.postgres.server import Server, open_server
from mesh_storage.postgres.tenure import now
from mesh_storage.postgres.wal import STANDING, Standing, standing
from mesh_storage.repositories.changelog import Batch
from mesh_storage.repositories.consuming import Stop, Terms
from mesh_storage.repositories.deliveries import LEASE, Delivery
from mesh_storage.repositories.removal import KEPT, Maintained, check_age
from mesh_storage.settings import Settings, settings_of
from mesh_storage.telemetry import Telemetry
from mesh_storage.unit_of_work import UnitOfWork

if TYPE_CHECKING:  # not imported at run time, so that only a backup pays for it
    from mesh_storage.backup import Report
    from mesh_storage.backup.manifest import Manifest

logger = logging.getLogger("mesh_storage")

T = TypeVar("T")


class MeshStorage:
    """A connection pool for one database, and the units of work that use it.

    Thread-safe: share one instance per process. It reconnects by itself after a server restart and in a forked child.
    """

    def __init__(self, settings: Settings, server: Server, telemetry: Telemetry | None = None) -> None:
        """Use `open` instead, which locates the server and checks its schema."""
        self._settings = settings
        self._server = server
        parts = Parts()
        if telemetry is not None:
            from mesh_storage.telemetry.measured import measured

            parts = measured(telemetry, server)
        self._pool = parts.pool(settings, server)
        self._scope, self._lease, self._watch, _, self._observed = parts[1:]
        self._replicas = parts.replicas(self._pool, settings, server)
        self._caches: list[Cached] = []
        self._finalizer = weakref.finalize(self, server.close)

    @classmethod
    def open(
        cls, url: str | None = None, *, settings: Settings | None = None, telemetry: Telemetry | None = None
    ) -> Self:
        """Open the storage at a URL, from settings, or from the environment and `.env`.

        With `embedded:` and `memory:` the schema is deployed; on a server it must already exist. With `telemetry`,
        OpenTelemetry gets spans and metrics of what the storage does.

        Raises:
            ConfigurationError: A setting is missing or invalid; the message names it.
            SchemaMismatchError: The schema is older or newer than this version of mesh_storage requires.
            UnavailableError: The database cannot be reached.
        """
        settings = choose_settings(url, settings)
        check_telemetry(telemetry)
        server = open_server(settings)
        try:
            schema.ensure(server)
            storage = cls(settings, server, telemetry)
        except BaseException:
            server.close()
            raise
        logger.info("storage opened", extra={"event": "open", "server": server.kind, "pool_size": settings.pool_size})
        return storage

    def unit_of_work(
        self,
        *,
        read_only: bool = False,
        isolation: Isolation | None = None,
        durability: Durability = "strict",
        timeout: float | None = None,
        replica: bool = False,
        after: str | None = None,
        max_lag: timedelta | None = None,
        position: bool = False,
    ) -> AbstractContextManager[UnitOfWork]:
        """Open a unit of work, which is rolled back at the end of the block unless `commit()` was called.

        Args:
            read_only: Reject writes with `InvalidInputError`; faster, since READ COMMITTED reads need no transaction.
            isolation: "repeatable read" or "serializable" (PostgreSQL manual, 13.2) instead of "read committed".
            durability: "relaxed" commits asynchronously (manual, 30.4): a server crash may lose the transactions of the
                last three times `wal_writer_delay`, but never part of one.
            timeout: Seconds for the whole unit of work, including waits for a connection and locks and the commit; at
                most a year.
            replica: Read from a replica of `replica_url`, with `read_only=True`; where none is good enough within
                `replica_timeout`, or there is none, the primary answers. docs/replicas.md says more.
            after: A position, of `position()` or `uow.position`, that the replica must have replayed.
            max_lag: How old what is read may be when the unit of work begins.
            position: Let `uow.position` tell where a commit is, at the cost of one more round trip.

        Raises:
            ConflictError: What was committed at the position `after` is lost.
            UnavailableError: No connection became available within `pool_timeout` or `connect_timeout`.
            StorageTimeoutError: The timeout expired.
            ClosedError: The storage was closed.
        """
        characteristics = Characteristics(read_only, isolation, durability, timeout, position)
        pool: Pool | Reading = self._pool
        if replica is not False or after is not None or max_lag is not None:
            pool = Reading(self._replicas, Wanted(replica, after, max_lag))
        return self._scope(self, pool, characteristics, self._settings.slow_unit_of_work, commits=False)

    def begin(
        self,
        *,
        read_only: bool = False,
        isolation: Isolation | None = None,
        durability: Durability = "strict",
        timeout: float | None = None,
        replica: bool = False,
        after: str | None = None,
        max_lag: timedelta | None = None,
        position: bool = False,
    ) -> AbstractContextManager[UnitOfWork]:
        """Open a unit of work that is committed at the end of the block, or rolled back if the block raises.

        The arguments and errors are those of `unit_of_work`.
        """
        characteristics = Characteristics(read_only, isolation, durability, timeout, position)
        pool: Pool | Reading = self._pool
        if replica is not False or after is not None or max_lag is not None:
            pool = Reading(self._replicas, Wanted(replica, after, max_lag))
        return self._scope(self, pool, characteristics, self._settings.slow_unit_of_work, commits=True)

    def run(
        self,
        work: Callable[[UnitOfWork], T],
        *,
        attempts: int = 5,
        within: float | None = None,
        read_only: bool = False,
        isolation: Isolation | None = None,
        durability: Durability = "strict",
        timeout: float | None = None,
        replica: bool = False,
        after: str | None = None,
        max_lag: timedelta | None = None,
    ) -> T:
        """Call `work` with a unit of work, commit, and return its result; retry after a retryable error.

        Each attempt gets a new unit of work with its own `timeout`; the delays between them grow, with jitter, from 20
        ms to 2 s. With `within`, attempts continue for that many seconds instead of `attempts` times, for example
        across a failover; no attempt outlasts that time. If the connection is lost during a commit, the outcome is
        unknown (`.committed` of the error is `unknown`) and `work` is retried, so it should be idempotent, as the
        repositories' `store`, `put` and `append` are. A transaction committed locally, without waiting for its
        synchronous standby, is not retried. After an error on a replica, the primary is next.

        Raises:
            InvalidInputError: An argument is invalid; `work` is a coroutine function, or returns a coroutine, which
                is for `AsyncMeshStorage`.
            MeshStorageError: The error of the last attempt, or one that is not retryable.
        """
        retry = Retry(work, attempts, within, timeout)
        if inspect.iscoroutinefunction(work):
            raise InvalidInputError(
                "work is a coroutine function: pass a plain function, or use AsyncMeshStorage", field="work"
            )
        pool: Pool | Reading = self._pool
        while True:
            if replica is not False or after is not None or max_lag is not None:
                pool = Reading(self._replicas, Wanted(replica, after, max_lag), failed_before=retry.made > 0)
            try:
                with self._scope(
                    self,
                    pool,
                    Characteristics(read_only, isolation, durability, retry.timeout()),
                    self._settings.slow_unit_of_work,
                    commits=True,
                    retry=retry,
                ) as uow:
                    result = in_person(work, uow)
            except MeshStorageError as error:
                pause = retry.pause(error)
                if pause is None:
                    raise
                time.sleep(pause)
            else:
                return result

    def position(self) -> str:
        """Return where the primary stands: everything that is visible there by now comes before it.

        It is for `after` of units of work on replicas, also of other processes. It waits for no connection of the pool.

        Raises:
            ConfigurationError: The server is a standby.
            UnavailableError: The database could not be reached.
            ClosedError: The storage was closed.
        """
        return self._replicas.position()

    def lease(self, name: str, holder: bytes, *, ttl: timedelta, wait: float | None = None) -> Lease:
        """Return the lease of a name, which `with` acquires, a thread renews, and the end of the block gives back.

        It is an entry of the shared state, with the name as its key and the holder as its value. One process at a time
        has it. It waits for no connection of the pool: when all are in use, it makes one of its own.

        Args:
            name: The name (1 to 255 characters).
            holder: Who holds it, for others to see, of up to 256 MiB.
            ttl: How long it lasts without a renewal, from 0.1 s to 100 years; it is renewed every third of that.
            wait: Seconds to wait for it, at most a year: 0 for one attempt, None for no limit. Outages are waited out.

        Raises:
            ConflictError: Another had it until the end of the wait; see `holder`.
            InvalidInputError: An argument is invalid; names it.
            UnavailableError: The database could not be reached at the end of the wait.
            StorageTimeoutError: The server did not respond in time at the end of the wait.
            ClosedError: The storage was closed.
        """
        return self._lease(self, self._pool, name, holder, ttl=ttl, wait=wait)

    def watch(
        self, *aggregates: str, prefix: str = "", after: str | None = None, poll: float = 0.25
    ) -> Generator[Batch, None, None]:
        """Yield what changes in some repositories, in batches, until the storage is closed or the caller stops.

        A batch holds the last change of every key that changed since the one before, as of one moment: whole
        transactions, nothing lost, nothing twice, whoever wrote; a transaction that stays open delays no other. The
        first one holds all that is there, unless there is a cursor to go on from. One of more than 1,000 changes comes
        in parts, of which all but the last have `more` and the cursor of before. Without a change, an empty batch
        brings a new cursor every 5 minutes. Outages of the server are waited out.

        Args:
            aggregates: `meshes`, `nodes`, `routes`, `state`, `runtime_config` or `routing_table`, one or more.
            prefix: Only keys that start with it.
            after: The cursor of a batch, also of another process, to go on after it.
            poll: Seconds between two looks, at most 60; a connection of the pool is in use only during one.

        Raises:
            CompactedError: The changes since the cursor are no longer kept, or it is from before a restore, a TRUNCATE
                or a failover; begin anew without it.
            ConfigurationError: The server is a standby, or a privilege is missing.
            StorageTimeoutError: To read a batch took longer than `statement_timeout`.
            InvalidInputError: An argument is invalid.
            ClosedError: The storage was closed before.
        """
        check_open(closed=self._pool.closed)
        return self._watch(self, self._pool, aggregates, prefix=prefix, after=after, poll=poll).batches()

    def cached(self, redis_url: str, *, max_age: float = 60.0, poll: float = 0.25) -> Cached:
        """Return repositories that are read through a cache in Redis, for reads only; docs/caching.md says more.

        What this storage has committed is seen by the next read, and what others have, at the latest `poll` + 0.1 s
        later. If Redis is away, the database answers. The cache is closed with the storage, or by its `close`.

        Args:
            redis_url: Where Redis is, as `redis://`, `rediss://` or `unix://`, with the parameters of redis-py.
            max_age: Seconds that an entry lives, and for which entries are trusted while the database cannot be
                reached; at most a day.
            poll: Seconds between two looks at what has changed; at most 60.

        Raises:
            ConfigurationError: The extra `redis` is not installed, or the URL is invalid.
            InvalidInputError: An argument is invalid; names it.
            ClosedError: The storage was closed.
        """
        check_open(closed=self._pool.closed)
        made = Cached(self, self._pool, self._observed, redis_url, max_age=max_age, poll=poll)
        self._caches = [*(cache for cache in self._caches if not cache.closed), made]
        return made

    def consume(
        self,
        receiver: str,
        handle: Callable[[UnitOfWork, Delivery], object],
        *,
        batch: int = 1,
        lease: timedelta = LEASE,
        poll: float = 0.25,
        max_attempts: int = 10,
        stop: Stop | None = None,
    ) -> None:
        """Handle the deliveries of a receiver as they come, until `stop` is set or the storage is closed.

        `handle` is called with a unit of work and the delivery, which is acknowledged in the same commit, so what it
        does there happens once. If it raises, the unit of work is rolled back, a record is logged, and the delivery is
        tried again: at once after a retryable error of the database, else later, as by `messages.nack`; after
        `max_attempts` it is set aside as dead, and the error is the reason. Leases are extended for as long as `handle`
        runs, by a thread that needs no connection of the pool. Outages of the server are waited out. Several may
        consume from one receiver: threads, tasks, processes and machines.

        Args:
            receiver: Whose deliveries.
            handle: What to do with one; it must not settle the delivery itself.
            batch: How many are claimed at a time, at most 10,000; they are handled one by one.
            lease: How long nobody else gets one if this process dies, from 0.1 s to 100 years.
            poll: Seconds until the next look when nothing is due, at most 60.
            max_attempts: How often one is tried, from 1 to 1,000,000.
            stop: An `Event` that ends it after the delivery in hand; the others of a batch are given back.

        Raises:
            InvalidInputError: An argument is invalid; `handle` is a coroutine function, which is for
                `AsyncMeshStorage`.
            MeshStorageError: A claim failed for a reason that does not pass, such as a missing privilege.
            ClosedError: The storage was closed before.
        """
        check_open(closed=self._pool.closed)
        terms = Terms(receiver, batch, lease, poll, max_attempts, stop)
        if (
            not callable(handle)
            or inspect.iscoroutinefunction(handle)
            or inspect.iscoroutinefunction(getattr(handle, "__call__", None))  # noqa: B004 - what is called, not whether it can be
        ):
            raise InvalidInputError(
                "handle must be a plain function; for a coroutine function, use AsyncMeshStorage", field="handle"
            )
        Consumer(
            self,
            self._pool,
            handle,
            terms,
            scope=self._scope,
            observed=self._observed,
            slow=self._settings.slow_unit_of_work,
        ).run()

    def health(self) -> Health:
        """Check that the database responds, accepts writes and has the current schema; takes at most 2 s.

        It waits for no connection of the pool: when all are in use, it makes one of its own.

        Raises:
            ClosedError: The storage was closed.
        """
        replicas = list(self._replicas)
        if not replicas:
            return self._check_primary()[0]
        with ThreadPoolExecutor(len(replicas)) as executor:  # one that does not answer holds up no other
            asked = [executor.submit(each.check, health.TIMEOUT_S) for each in replicas]
            found, primary = self._check_primary()
            checked = [
                health.of_replica(each.address, answer.result(), primary)
                for each, answer in zip(replicas, asked, strict=True)
            ]
        return replace(found, replicas=tuple(checked))

    def _check_primary(self) -> tuple[Health, Standing | None]:
        pool = {"pool_size": self._pool.size, "pool_in_use": self._pool.in_use}
        primary: Standing | None = None
        try:
            connection = self._pool.acquire(Characteristics(read_only=True, timeout=health.TIMEOUT_S), beside=True)
            try:
                begun = time.perf_counter()
                row = connection.fetch_one(health.READ_ONLY)
                round_trip_ms = (time.perf_counter() - begun) * 1000
                revision, unclear = None, None
                missing: tuple[str, ...] = ()
                silent: tuple[str, ...] = ()
                try:
                    if len(self._replicas):
                        primary = standing(connection.ask(STANDING), now())
                    revision, missing = connection.perform(schema.examine, connection.driver.sqlalchemy)
                    if row is not None and row[1]:
                        silent = tuple(name for (name,) in connection.fetch_all(health.WORKERS))
                except MeshStorageError as error:
                    unclear = error
            finally:
                self._pool.release(connection)
            return (
                health.answered(row, revision, missing, unclear, silent, round_trip_ms=round_trip_ms, **pool),
                primary,
            )
        except ClosedError:
            raise
        except MeshStorageError as error:
            return health.unreachable(error, **pool), None

    def maintain(
        self, *, changes_older_than: timedelta = KEPT, messages_older_than: timedelta | None = None
    ) -> Maintained:
        """Remove what has expired and what is no longer kept, in short transactions, and return how much it was.

        Several processes may do it at once; call it regularly, for example every minute.

        Args:
            changes_older_than: The age from which changes are no longer kept for watchers.
            messages_older_than: The age from which messages are removed, by their timestamp; none are if None.

        Raises:
            InvalidInputError: An age is not a timedelta from 0 to 100 years.
        """
        check_age("changes_older_than", changes_older_than)
        if messages_older_than is not None:
            check_age("messages_older_than", messages_older_than)
        made = Maintained()
        while True:
            with self.begin() as uow:
                removed = uow.maintenance.step(changes_older_than, messages_older_than)
            made += removed
            if not removed:
                return made

    def backup(
        self,
        path: str | os.PathLike[str],
        *,
        jobs: int = 4,
        verify: bool = False,
        progress: Report | None = None,
    ) -> Manifest:
        """Write a consistent backup of all tables to a path, without blocking units of work.

        The arguments and errors are those of `mesh_storage.backup.backup`.

        Raises:
            ClosedError: The storage was closed.
        """
        check_open(closed=self._pool.closed)
        from mesh_storage import backup

        return backup.backup(self._server, path, jobs=jobs, verify=verify, progress=progress)

    def restore(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        jobs: int = 4,
        progress: Report | None = None,
    ) -> Manifest:
        """Restore a backup in one transaction, into empty tables or, with `overwrite`, replacing their rows.

        The arguments and errors are those of `mesh_storage.backup.restore`.

        Raises:
            ClosedError: The storage was closed.
        """
        check_open(closed=self._pool.closed)
        from mesh_storage import backup

        try:
            return backup.restore(self._server, path, overwrite=overwrite, jobs=jobs, progress=progress)
        finally:
            self._pool.commits.note()

    def close(self) -> None:
        """Close the connections, those in use when their unit of work ends; a bundled server stops immediately."""
        if self._pool.closed:
            return
        for cache in self._caches:
            cache.close()
        self._pool.close()
        self._replicas.close()
        self._finalizer()
        logger.info("storage closed", extra={"event": "close", "server": self._server.kind})

    def __repr__(self) -> str:
        """Say where it is, how much of the pool is in use, and whether it is closed."""
        pool = self._pool
        return describe(self, self._server, size=pool.size, in_use=pool.in_use, closed=pool.closed)

    def __enter__(self) -> Self:
        """Return the storage."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the storage."""
        self.close()


def choose_settings(url: str | None, settings: Settings | None) -> Settings:
    """Return the settings given, or those of a URL, or those of the environment."""
    if url is not None and settings is not None:
        raise ConfigurationError("pass either url or settings, not both")
    if settings is None:
        return settings_of(url)
    if not isinstance(settings, Settings):
        raise InvalidInputError(f"settings must be Settings, not {type(settings).__name__}", field="settings")
    return settings


def check_telemetry(telemetry: Telemetry | None) -> None:
    """Raise unless it is what `open` takes.

    Raises:
        InvalidInputError: It is not.
    """
    if telemetry is not None and not isinstance(telemetry, Telemetry):
        raise InvalidInputError(f"telemetry must be Telemetry, not {type(telemetry).__name__}", field="telemetry")


def describe(storage: object, server: Server, *, size: int, in_use: int, closed: bool) -> str:
    """Return the `repr` of a storage."""
    use = "closed" if closed else f"open, {in_use} of {size} connections in use"
    return f"<{type(storage).__name__} on {server.kind} {server.address}: {use}>"
