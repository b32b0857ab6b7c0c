"""Plays the nodes of a network over HTTP, so that there is something to see: they report, send messages, and fail."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
import uuid
from pathlib import Path
from typing import Any

import httpx
from network import Network, read_network

logger = logging.getLogger("service.play")

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

    async def cut_off(self, city: str, *, up: bool = False) -> None:
        """Cut all links of a city, or mend them: meanwhile, no message gets there."""
        for link in self._network.links:
            if city in (link.a, link.b):
                await self.set_link(link.a, link.b, link.latency_ms, up=up)
        (self.silent.discard if up else self.silent.add)(city)

    async def redrive(self) -> None:
        """Let the messages go on that found no route."""
        await self._send("POST", "/messages/redrive")

    async def close(self) -> None:
        """End the connections."""
        await self._http.aclose()

    async def _send(self, method: str, path: str, **body: Any) -> httpx.Response:
        response = await self._http.request(method, path, json=body or None)
        response.raise_for_status()
        return response


async def take_turn(acting: Play, cities: list[str], turn: int) -> None:
    """Act for a second, in a round of thirty."""
    city = cities[turn // 30 % len(cities)]
    match turn % 30:
        case 8:
            await acting.cut_off(city)
        case 20:
            await acting.cut_off(city, up=True)
        case 26:
            await acting.redrive()
    await acting.report()
    for _ in range(4):
        await acting.talk()


async def play(url: str, network: Path = NETWORK) -> None:
    """Play until cancelled: now and then a city is cut off for a while, and the messages to it and from it wait."""
    shown = read_network(network)
    acting = Play(url, shown)
    try:
        await acting.begin()
        for turn in itertools.count():
            begun = time.monotonic()
            try:
                await take_turn(acting, shown.cities, turn)
            except httpx.HTTPError as error:
                logger.warning("the service does not answer as it should: %s", error)
            await asyncio.sleep(max(0.0, begun + _REPORT_EVERY_S - time.monotonic()))
    finally:
        await acting.close()
