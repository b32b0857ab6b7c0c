"""Runs a real PgBouncer in transaction mode in front of the test server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from psycopg.conninfo import conninfo_to_dict

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
PORT = 6432


@contextmanager
def pgbouncer(url: str, *, sessions: int, more: str = "") -> Generator[str]:
    """Yield the URL by which the database of another URL is reached through a pooler of so many sessions."""
    if PROGRAM is None:
        pytest.skip("PgBouncer is not installed: apt install pgbouncer")
    server = conninfo_to_dict(url)
    address = {
        name: str(server[name]).replace("'", "''") for name in ("host", "port", "user", "password") if name in server
    }
    target = " ".join(f"{name}='{value}'" for name, value in address.items())
    host, user = str(server.get("host", "")), str(server.get("user", "postgres"))
    with tempfile.TemporaryDirectory(prefix="pgbouncer-") as directory:
        config = Path(directory, "pgbouncer.ini")
        config.touch(mode=0o600)  # The password may be in it.
        config.write_text(
            f"[databases]\n* = {target}\n[pgbouncer]\nunix_socket_dir = {directory}\nlisten_port = {PORT}\n"
            f"auth_type = any\nadmin_users = {user}\npool_mode = transaction\ndefault_pool_size = {sessions}\n{more}\n"
        )
        account: list[str] = []
        if os.geteuid() == 0:  # It refuses root; the socket of a bundled server is open to the account of that alone.
            name = Path(host).owner() if host.startswith("/") else "nobody"
            for path in (directory, config):
                shutil.chown(path, name)
            account = ["-u", name]
        with (Path(directory) / "log").open("w+") as log:
            process = subprocess.Popen([PROGRAM, *account, str(config)], stderr=log)
            try:
                _await(Path(directory, f".s.PGSQL.{PORT}"), process, log.name)
                here = urlencode({"host": directory, "port": PORT})
                yield f"postgresql://{quote(user, '')}@/{quote(str(server['dbname']), '')}?{here}"
            finally:
                process.terminate()
                process.wait()


def _await(path: Path, process: subprocess.Popen[bytes], log: str) -> None:
    deadline = time.monotonic() + 30
    while not _listens(path):
        assert process.poll() is None, Path(log).read_text()
        assert time.monotonic() < deadline, "PgBouncer does not start"
        time.sleep(0.005)


def _listens(path: Path) -> bool:
    """Try it: the file is there a moment before anybody listens."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0
