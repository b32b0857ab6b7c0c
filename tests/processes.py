"""What tests of several processes share: `alembic` as an operator runs it, and looking at what others do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg

ROOT = Path(__file__).parent.parent


def start_alembic(url: str, *arguments: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Start `alembic` in the checkout, with nothing of this process's environment but where programs are."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.Popen(
        [sys.executable, "-m", "alembic", *arguments],
        cwd=ROOT,
        env=environment | {"MESH_STORAGE_URL": url},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def eventually(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Return whether something comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def sockets() -> int:
    """Count the sockets that this process has open."""
    links: list[str] = []
    for each in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # that of the listing itself, or of another thread
            links.append(str(each.readlink()))
    return sum(link.startswith("socket:") for link in links)


def has_ended(url: str, backend: int) -> bool:
    """Return whether a session has ended, by the process id of its backend."""
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT FROM pg_stat_activity WHERE pid = %s", [backend]).fetchone() is None


def changes_are_over(connection: psycopg.Connection[Any]) -> bool:
    """Return whether no transaction on the server, also in other databases, is older than one whose change is logged.

    Until then none of those changes is removed, and cursors go back to before them; other tests write on the server.
    """
    (over,) = connection.execute(
        "SELECT count(*) = 0 FROM mesh_changes WHERE xid >= pg_snapshot_xmin(pg_current_snapshot())::text::bigint"
    ).fetchone() or (None,)
    return over is True
