"""Plays the nodes of a network over HTTP, so that there is something to see: they report, send messages, and fail."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
import uuid
from pathlib import Path
from typing import Any

import httpx
from network import Network, read_network

NETWORK = Path(__file__).parents[1] / "abilene.graphml"
_KEY = "the key of this play"
_REPORT_EVERY_S = 1.0


class Play:
    """The nodes of a network, as clients of the service."""

    def __init__(self, url: str, network: Network) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=5)
        self._network = network
        self._ids: dict[str, str] = {}
        self.silent: set[str] = set()
        """The cities that do not report."""

    async def begin(self) -> None:
        """Create a mesh, let all nodes join it, and connect them."""
        mesh = f"{self._network.name} {uuid.uuid4().hex[:6]}"
        await self._send("POST", "/meshes", name=mesh, join_key=_KEY)
        for number, city in enumerate(self._network.cities):
            joining = {"mesh": mesh, "join_key": _KEY, "name": city, "ip_address": f"10.0.0.{number % 255}"}
            self._ids[city] = (await self._send("POST", "/nodes", **joining)).json()
        for link in self._network.links:
            await self.set_link(link.a, link.b, link.latency_ms, up=True)

    async def set_link(self, a: str, b: str, latency_ms: float, *, up: bool) -> None:
        """Connect two cities, or cut their link."""
        await self._send("PUT", "/links", source=self._ids[a], target=self._ids[b], latency_ms=latency_ms, up=up)

    async def report(self) -> None:
        """Let each node that is not silent report its state once."""
        for number, city in enumerate(self._network.cities):
            if city not in self.silent:
                load = round(0.5 + 0.4 * random.random(), 2)
                await self._send("PUT", f"/nodes/{self._ids[city]}/state", load=load, messages=number)

    async def talk(self) -> None:
        """Send a message between two nodes."""
        a, b = random.sample(self._network.cities, 2)
        message = {"id": uuid.uuid4().hex, "from_node": self._ids[a], "to_node": self._ids[b], "text": "hello"}
        await self._send("POST", "/messages", **message)

    async def close(self) -> None:
        """End the connections."""
        await self._http.aclose()

    async def _send(self, method: str, path: str, **body: Any) -> httpx.Response:
        response = await self._http.request(method, path, json=body)
        response.raise_for_status()
        return response


async def play(url: str, network: Path = NETWORK) -> None:
    """Play until cancelled: now and then a node falls silent for a while, or a link fails."""
    shown = read_network(network)
    acting = Play(url, shown)
    try:
        await acting.begin()
        for turn in itertools.count():
            begun = time.monotonic()
            link = shown.links[turn // 20 % len(shown.links)]
            if turn % 20 == 10:
                await acting.set_link(link.a, link.b, link.latency_ms, up=False)
            if turn % 20 == 0:
                last = shown.links[(turn // 20 - 1) % len(shown.links)]
                await acting.set_link(last.a, last.b, last.latency_ms, up=True)
                acting.silent = {random.choice(shown.cities)}
            await acting.report()
            for _ in range(3):
                await acting.talk()
            await asyncio.sleep(max(0.0, begun + _REPORT_EVERY_S - time.monotonic()))
    finally:
        await acting.close()
