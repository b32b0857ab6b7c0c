"""Starts the service, on the database of MESH_STORAGE_URL or on a throw-away one.

    python -m service [--port 8080] [--play]

With --play, it also plays the nodes of a network, so that its page shows something. With REDIS_URL, it reads the
best routes through a cache there.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from contextlib import suppress

import uvicorn

from service.app import create_app
from service.background import running
from service.play import play


async def main() -> int:
    """Serve until a signal, or until the work in the background fails; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m service", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--play", action="store_true", help="play the nodes of a network")
    given = parser.parse_args()
    logging.basicConfig(format="%(levelname)s: %(name)s: %(message)s")
    os.environ.setdefault("MESH_STORAGE_URL", "memory:")
    failed = asyncio.Event()

    def end() -> None:
        failed.set()
        server.should_exit = True

    server = uvicorn.Server(uvicorn.Config(create_app(on_failure=end), port=given.port, access_log=False))
    acting = [act(server, f"http://127.0.0.1:{given.port}")] if given.play else []
    async with running(*acting, on_failure=end):
        await server.serve()
    return int(failed.is_set() or not server.started)


async def act(server: uvicorn.Server, url: str) -> None:
    """Play as soon as the server answers."""
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.1)
    print(f"\nThe mesh, live: {url}/\n", flush=True)
    await play(url)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(asyncio.run(main()))
