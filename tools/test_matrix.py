"""Runs the tests on a temporary server of each PostgreSQL version found, of 15, 16 and 18, and reports missing ones.

python tools/test_matrix.py [--require] [VERSION ...] [-- arguments of pytest]
"""

from __future__ import annotations

import argparse
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mesh_storage.embedded.server import programs
from mesh_storage.errors import ConfigurationError

VERSIONS = ("15", "16", "18")
# The server need not survive a crash (PostgreSQL manual, 14.5). Enough connections for all test processes.
PARAMETERS = (
    "listen_addresses=",
    "max_connections=300",
    "fsync=off",
    "synchronous_commit=off",
    "full_page_writes=off",
)
WHERE = ("/usr/lib/postgresql/{}/bin", "/usr/pgsql-{}/bin", "/opt/homebrew/opt/postgresql@{}/bin")
ROOT = Path(__file__).parent.parent


def find(version: str) -> Path | None:
    """Return the directory of a version's programs: the system's, or else the bundled server's."""
    for pattern in WHERE:
        directory = Path(pattern.format(version))
        if (directory / "initdb").exists() and (directory / "postgres").exists():
            return directory
    try:
        return programs(version)
    except ConfigurationError:
        return None


def account() -> tuple[int, int] | tuple[None, None]:
    """Return the uid and gid for the server, which refuses to run as root."""
    if os.geteuid() != 0:
        return None, None
    accounts = {entry.pw_name: (entry.pw_uid, entry.pw_gid) for entry in pwd.getpwall()}
    return next(accounts[name] for name in ("postgres", "nobody") if name in accounts)


@contextmanager
def server(programs: Path) -> Generator[str]:
    """Run a server of these programs for the block, and yield its URL."""
    user, group = account()
    # Without root's groups: group permissions of a parent directory may be stricter than those of others.
    extra_groups = None if user is None else list[int]()
    ram = Path("/dev/shm")  # noqa: S108 - a private directory is created in it
    home = Path(tempfile.mkdtemp(prefix="mesh_storage-matrix-", dir=ram if os.access(ram, os.W_OK) else None))
    try:
        if user is not None and group is not None:
            os.chown(home, user, group)
        data = home / "data"
        options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale", "--no-sync"]
        subprocess.run(
            [programs / "initdb", *options, "--pgdata", data],
            user=user,
            group=group,
            extra_groups=extra_groups,
            cwd="/",
            check=True,
            stdout=subprocess.DEVNULL,
        )
        parameters = [option for parameter in PARAMETERS for option in ("-c", parameter)]
        with (home / "log").open("wb") as log:
            process = subprocess.Popen(
                [programs / "postgres", "-D", data, "-k", home, "-p", "5432", *parameters],
                user=user,
                group=group,
                extra_groups=extra_groups,
                cwd="/",
                stdout=log,
                stderr=log,
            )
        try:
            deadline = time.monotonic() + 60
            while not _is_ready(data):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the server does not start: {(home / 'log').read_text()}")
                time.sleep(0.05)
            yield f"postgresql://postgres@/postgres?host={home}&port=5432"
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _is_ready(data: Path) -> bool:
    """Return whether the server is ready, according to postmaster.pid (PostgreSQL's source, utils/pidfile.h)."""
    try:
        return (data / "postmaster.pid").read_text().split("\n")[7:8] == ["ready   "]
    except OSError:
        return False


def main(arguments: Sequence[str]) -> int:
    own_end = arguments.index("--") if "--" in arguments else len(arguments)
    own, for_pytest = arguments[:own_end], arguments[own_end + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--require", action="store_true", help="fail if a version is not found")
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"default: {', '.join(VERSIONS)}")
    given = parser.parse_args(own)
    results: dict[str, str] = {}
    for version in given.versions or VERSIONS:
        programs = find(version)
        if programs is None:
            results[version] = "skipped: not found"
            continue
        print(f"== PostgreSQL {version} ({programs})", flush=True)
        with server(programs) as url:
            environment = {**os.environ, "MESH_STORAGE_TEST_URL": url}
            tests = subprocess.run(
                [sys.executable, "-m", "pytest", *for_pytest], cwd=ROOT, env=environment, check=False
            )
        results[version] = "passed" if tests.returncode == 0 else f"failed (pytest ended with {tests.returncode})"
    for version, result in results.items():
        print(f"PostgreSQL {version}: {result}")
    failed = any(result.startswith("failed") for result in results.values())
    skipped = any(result.startswith("skipped") for result in results.values())
    nothing_ran = all(result.startswith("skipped") for result in results.values())
    return int(failed or nothing_ran or (given.require and skipped))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
