"""The values to be stored, the same for the library and its rivals."""

from __future__ import annotations

import itertools
from typing import Any

from pydantic_core import to_json

CONTENT = b"the quick brown fox jumps over the lazy dog" * 3
NODE_STATE: dict[str, Any] = {"status": "active", "load": 0.42, "peers": ["node-7", "node-12"], "uptime_s": 86400}
LOG_ENTRY: dict[str, Any] = {"op": "set", "key": "gossip.interval_ms", "value": 500}

new_number = itertools.count(1_000_000_000)
"""Yields numbers for keys that do not exist yet."""


def encode(value: object) -> str:
    """Encode JSON with the fastest installed encoder."""
    return to_json(value).decode()
