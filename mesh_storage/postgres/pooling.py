"""A pooler between here and the server that gives each transaction another session (PgBouncer's transaction mode)."""

from __future__ import annotations

import math
from typing import NamedTuple

from mesh_storage.postgres.characteristics import SessionLimits
from mesh_storage.settings import Settings


class Pooling(NamedTuple):
    """What each transaction must bring along, because no session keeps it."""

    parameters: str
    """The statements that set the parameters which a session would have."""
    limits: SessionLimits
    """The limits that are among them."""
    timeout: float
    """Seconds to wait for a session."""

    @classmethod
    def of(cls, settings: Settings, parameters: str | None) -> Pooling | None:
        """Return what a transaction needs where there are `parameters` for each; None where sessions keep them."""
        if parameters is None:
            return None
        idle = math.ceil(settings.idle_in_transaction_timeout * 1000)
        return cls(parameters, SessionLimits(idle, None), settings.pool_timeout)
