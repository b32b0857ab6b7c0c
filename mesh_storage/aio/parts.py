"""The classes that a storage is made of: telemetry puts measured ones in their place."""

from __future__ import annotations

from typing import NamedTuple

from mesh_storage.aio.lease import AsyncLease
from mesh_storage.aio.postgres.pool import AsyncPool
from mesh_storage.aio.unit_of_work import AsyncScope
from mesh_storage.aio.watch import AsyncWatch


class AsyncParts(NamedTuple):
    """The classes of one storage."""

    pool: type[AsyncPool] = AsyncPool
    scope: type[AsyncScope] = AsyncScope
    lease: type[AsyncLease] = AsyncLease
    watch: type[AsyncWatch] = AsyncWatch
