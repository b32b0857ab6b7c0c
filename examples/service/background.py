"""What the service does on its own: follow its configuration, carry messages, lead in its turn, and tidy up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

from mesh_storage import Batch, CompactedError, ConfigEntry, MeshStorageError
from mesh_storage.aio import AsyncLease, AsyncMeshStorage
from service.alerts import update_alerts
from service.arrivals import QUEUE, carry
from service.routing import best_routes

logger = logging.getLogger("service")

LEASE = "service.leader"
PREFIX = "service."
_SILENT_AFTER_S = 5.0
_LONGEST_SILENCE_S = 86_400.0
_TTL = timedelta(seconds=5)
_LOOK_EVERY_S = 0.5
_MAINTAIN_EVERY_S = 60.0
_PAUSE_S = 1.0
_WORKERS = 2
_MOST_ATTEMPTS = 4
"""A message that finds no route is tried again for some seconds; then an operator has to look at it."""
_HANDOVER = timedelta(seconds=10)
"""How long the message in the hands of a process that was killed waits for another one."""


class Config:
    """The settings that may be changed at run time: entries of the runtime configuration, followed by `follow`."""

    def __init__(self) -> None:
        self.silent_after_s = _SILENT_AFTER_S
        """A node that has not reported for so many seconds has fallen silent."""

    async def follow(self, storage: AsyncMeshStorage) -> None:
        """Take each change of the entries whose keys start with `service.`."""
        while True:
            try:
                async for batch in storage.watch("runtime_config", prefix=PREFIX):
                    self._take(batch)
            except CompactedError:  # as after a failover: begin anew with what is there
                self.silent_after_s = _SILENT_AFTER_S
            else:
                return

    def _take(self, batch: Batch) -> None:
        for change in batch.changes:
            value = change.entry.value if isinstance(change.entry, ConfigEntry) else None
            if change.key == f"{PREFIX}silent_after_s":
                # What somebody wrote by mistake must not end the service.
                if not isinstance(value, (int, float)) or not 0 < value <= _LONGEST_SILENCE_S:
                    value = _SILENT_AFTER_S
                self.silent_after_s = float(value)
                logger.info("a node falls silent after %g s", self.silent_after_s)


@asynccontextmanager
async def running(*works: Coroutine[Any, Any, None], on_failure: Callable[[], None]) -> AsyncGenerator[None, None]:
    """Let some work go on in the background of a block; if it fails for good, that is logged and `on_failure` called.

    At the end of the block a worker finishes the message in hand.
    """

    def look_at(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.critical("work in the background failed for good", exc_info=error)
            on_failure()

    tasks = [asyncio.create_task(work) for work in works]
    for task in tasks:
        task.add_done_callback(look_at)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def workers(storage: AsyncMeshStorage) -> list[Coroutine[Any, Any, None]]:
    """Return what carries the messages, together with the workers of all other processes."""
    return [storage.consume(QUEUE, carry, lease=_HANDOVER, max_attempts=_MOST_ATTEMPTS) for _ in range(_WORKERS)]


async def stand_for_leader(storage: AsyncMeshStorage, name: str, config: Config) -> None:
    """Lead whenever no other process does."""
    while True:
        async with storage.lease(LEASE, name.encode(), ttl=_TTL) as lease:
            logger.info("%s leads", name)
            try:
                async with asyncio.TaskGroup() as group:
                    routes = group.create_task(compute_routes(storage, lease))
                    await watch_over_nodes(storage, lease, config)
                    routes.cancel()
            except* MeshStorageError as errors:
                logger.warning("%s no longer leads: %s", name, errors.exceptions[0])
        await asyncio.sleep(_PAUSE_S)


async def compute_routes(storage: AsyncMeshStorage, lease: AsyncLease) -> None:
    """Compute the routing table anew after each change of the routes."""
    async for batch in storage.watch("routes"):
        if not batch.more:
            async with storage.begin() as uow:
                await uow.state.check(LEASE, version=lease.token)  # refused if another leads by now
                await uow.routing_table.replace_all(best_routes([route async for route in uow.routes.stream()]))


async def watch_over_nodes(storage: AsyncMeshStorage, lease: AsyncLease, config: Config) -> None:
    """Open and end the alerts of the nodes, as long as this process leads."""
    while lease.held:
        async with storage.begin() as uow:
            await uow.state.check(LEASE, version=lease.token)
            silent = await uow.node_states.stale(timedelta(seconds=config.silent_after_s))
            await update_alerts(uow, {state.node_id for state in silent})
        await asyncio.sleep(_LOOK_EVERY_S)


async def maintain(storage: AsyncMeshStorage) -> None:
    """Remove what has expired and what is no longer kept, every minute."""
    while True:
        try:
            await storage.maintain(messages_older_than=timedelta(days=7))
        except MeshStorageError as error:  # the next time will do
            logger.warning("not tidied up: %s", error)
        await asyncio.sleep(_MAINTAIN_EVERY_S)
