"""The extra `redis`: nothing but `cached` needs it, and that names it."""

from __future__ import annotations

import os
import subprocess
import sys


def python(code: str) -> str:
    # What measures coverage would import more.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_nothing_imports_redis_before_a_cache_is_made() -> None:
    made = python("import sys, mesh_storage, mesh_storage.aio; mesh_storage.Cached; print('redis' in sys.modules)")
    assert made == "False"


def test_without_redis_the_rest_works_and_a_cache_names_the_extra(mesh_storage_url: str) -> None:
    code = """
import asyncio, sys
sys.modules["redis"] = None
from mesh_storage import ConfigurationError, MeshStorage
from mesh_storage.aio import AsyncMeshStorage

with MeshStorage.open(URL) as storage:
    with storage.begin() as uow:
        uow.state.put("a", b"")
    try:
        storage.cached("redis://:hush@localhost")
    except ConfigurationError as error:
        print(error)

async def main():
    async with AsyncMeshStorage.open(URL) as storage:
        try:
            storage.cached("redis://:hush@localhost")
        except ConfigurationError as error:
            print(error)

asyncio.run(main())
"""
    lines = python(f"URL = {mesh_storage_url!r}\n{code}").splitlines()
    assert len(lines) == 2
    assert all("pip install 'mesh-storage[redis]'" in line and "hush" not in line for line in lines)
