"""The classes that a storage is made of: telemetry puts measured ones in their place."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mesh_storage.aio.lease import AsyncLease
from mesh_storage.aio.postgres.pool import AsyncPool
from mesh_storage.aio.postgres.replicas import AsyncReplicas
from mesh_storage.aio.unit_of_work import AsyncScope
from mesh_storage.aio.watch import AsyncWatch

if TYPE_CHECKING:  # OpenTelemetry is an extra
    from mesh_storage.telemetry.observed import Observed


class AsyncParts(NamedTuple):
    """The classes of one storage, and whom they report to."""

    pool: type[AsyncPool] = AsyncPool
    scope: type[AsyncScope] = AsyncScope
    lease: type[AsyncLease] = AsyncLease
    watch: type[AsyncWatch] = AsyncWatch
    replicas: type[AsyncReplicas] = AsyncReplicas
    observed: Observed | None = None
    """What telemetry knows of the storage, which anything else may be reported to; None without telemetry."""
