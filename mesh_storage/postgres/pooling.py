"""Support for poolers that assign a session per transaction (PgBouncer's transaction mode)."""

from __future__ import annotations

import math
from typing import NamedTuple

from mesh_storage.postgres.deadline import SessionLimits
from mesh_storage.settings import Settings


class Pooling(NamedTuple):
    """What each transaction must set itself, since it has no dedicated session."""

    parameters: str
    """The SET LOCAL statements for the session parameters."""
    limits: SessionLimits
    """The transaction limits among them."""
    timeout: float
    """Seconds to wait for a server connection."""

    @classmethod
    def of(cls, settings: Settings, parameters: str | None) -> Pooling | None:
        """Return the per-transaction setup for these `parameters`, or None if sessions keep them."""
        if parameters is None:
            return None
        idle = math.ceil(settings.idle_in_transaction_timeout * 1000)
        return cls(parameters, SessionLimits(idle, None), settings.pool_timeout)
