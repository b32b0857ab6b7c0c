"""The read-only repositories whose answers come from Redis."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self

from mesh_storage.aio.cache.reader import AsyncReader
from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.postgres.pool import AsyncPool
from mesh_storage.aio.repositories import (
    AsyncMeshRepository,
    AsyncNodeRepository,
    AsyncRouteRepository,
    AsyncRoutingTableRepository,
    AsyncRuntimeConfigRepository,
    AsyncStateRepository,
)
from mesh_storage.aio.repositories.base import AsyncKeyedRepository
from mesh_storage.cache.encoding import Encoding
from mesh_storage.cache.view import Slot
from mesh_storage.errors import NotFoundError
from mesh_storage.models import JSON, ConfigEntry, Mesh, Node, Route, RoutingEntry, StateEntry
from mesh_storage.repositories import checks
from mesh_storage.repositories.changelog import AGGREGATES
from mesh_storage.repositories.loading import M
from mesh_storage.repositories.pages import MAX_ROWS
from mesh_storage.repositories.prefixes import key_range

if TYPE_CHECKING:  # OpenTelemetry is an extra
    from mesh_storage.telemetry.observed import Observed


class AsyncCachedRepository(Generic[M]):
    """One kind of aggregate, read through the cache; results and errors are those of the repository."""

    def __init__(
        self,
        reader: AsyncReader,
        name: str,
        repository: Callable[[AsyncUnitOfWorkConnection], AsyncKeyedRepository[M]],
    ) -> None:
        self._reader = reader
        self._name = name
        self._repository = repository
        self._aggregate = AGGREGATES[name]
        self._encoding: Encoding[M] = Encoding(self._aggregate)

    async def find(self, key: str) -> M | None:
        """Return the aggregate with this key, or None."""
        self._aggregate.check_key(key)

        async def load(connection: AsyncUnitOfWorkConnection) -> list[M]:
            found = await self._repository(connection).find(key)
            return [] if found is None else [found]

        found = await self._reader.read(Slot(self._name, "find", (key,)), self._encoding, load)
        return found[0] if found else None

    async def get(self, key: str) -> M:
        """Return the aggregate with this key.

        Raises:
            NotFoundError: There is none.
        """
        found = await self.find(key)
        if found is None:
            raise NotFoundError(self._aggregate.name, key)
        return found

    async def _get_by_name(self, name: str, get: Callable[[AsyncUnitOfWorkConnection], Awaitable[M]]) -> M:
        """Return the aggregate that `get` returns from the database."""
        checks.text("name", name, 255)

        async def load(connection: AsyncUnitOfWorkConnection) -> list[M]:
            try:
                return [await get(connection)]
            except NotFoundError:
                return []

        found = await self._reader.read(Slot(self._name, "get_by_name", (name,)), self._encoding, load)
        if not found:
            raise NotFoundError(self._aggregate.name, name)
        return found[0]


class AsyncCachedMeshes(AsyncCachedRepository[Mesh]):
    """The meshes, read through the cache."""

    async def get_by_name(self, name: str) -> Mesh:
        """Return the mesh with this name.

        Raises:
            NotFoundError: There is none.
        """
        return await self._get_by_name(name, lambda connection: AsyncMeshRepository(connection).get_by_name(name))


class AsyncCachedNodes(AsyncCachedRepository[Node]):
    """The nodes, read through the cache."""

    async def get_by_name(self, name: str) -> Node:
        """Return the node with this name.

        Raises:
            NotFoundError: There is none.
        """
        return await self._get_by_name(name, lambda connection: AsyncNodeRepository(connection).get_by_name(name))


class AsyncCachedRoutes(AsyncCachedRepository[Route]):
    """The routes, read through the cache."""

    async def between(self, a: str, b: str) -> list[Route]:
        """Return the routes from node `a` to node `b`, including bidirectional ones from `b` to `a`, in id order."""
        checks.text("a", a, 255)
        checks.text("b", b, 255)

        async def load(connection: AsyncUnitOfWorkConnection) -> list[Route]:
            return await AsyncRouteRepository(connection).between(a, b)

        return await self._reader.read(Slot(self._name, "between", (a, b)), self._encoding, load)

    async def for_node(self, node_id: str) -> list[Route]:
        """Return the routes that start at a node, and the bidirectional ones that end there, in id order."""
        checks.text("node_id", node_id, 255)

        async def load(connection: AsyncUnitOfWorkConnection) -> list[Route]:
            return await AsyncRouteRepository(connection).for_node(node_id)

        return await self._reader.read(Slot(self._name, "for_node", (node_id,)), self._encoding, load)


class AsyncCachedRuntimeConfig(AsyncCachedRepository[ConfigEntry]):
    """The runtime configuration, read through the cache."""

    async def value(self, key: str, default: Any = ...) -> JSON:
        """Return the value of this key, or `default` if there is none.

        Raises:
            NotFoundError: There is none, and no default was given.
        """
        found = await self.find(key)
        if found is not None:
            return found.value
        if default is ...:
            raise NotFoundError(self._aggregate.name, key)
        return default

    async def all(self, prefix: str = "") -> dict[str, JSON]:
        """Return the values of all keys that start with `prefix`, by key, in key order."""
        key_range(prefix)

        async def load(connection: AsyncUnitOfWorkConnection) -> list[ConfigEntry]:
            # Whole entries, whose expiry counts as long as they are cached.
            repository = AsyncRuntimeConfigRepository(connection)
            return [entry async for entry in repository.stream(prefix, batch_size=MAX_ROWS)]

        found = await self._reader.read(Slot(self._name, "all", (prefix,)), self._encoding, load)
        return {entry.key: entry.value for entry in found}


class AsyncCachedRoutingTable(AsyncCachedRepository[RoutingEntry]):
    """The routing table, read through the cache."""

    async def all(self) -> dict[str, JSON]:
        """Return the whole table as a dict of routes by destination, in destination order."""

        async def load(connection: AsyncUnitOfWorkConnection) -> list[RoutingEntry]:
            repository = AsyncRoutingTableRepository(connection)
            return [entry async for entry in repository.stream(batch_size=MAX_ROWS)]

        found = await self._reader.read(Slot(self._name, "all", ()), self._encoding, load)
        return {entry.destination: entry.route for entry in found}


class AsyncCached:
    """The repositories of a storage, to be read through a cache in Redis; see `MeshStorage.cached`."""

    def __init__(
        self, storage: object, pool: AsyncPool, observed: Observed | None, url: str, *, max_age: float, poll: float
    ) -> None:
        reader = self._reader = AsyncReader(storage, pool, observed, url, max_age=max_age, poll=poll)
        self.meshes = AsyncCachedMeshes(reader, "meshes", AsyncMeshRepository)
        """The meshes."""
        self.nodes = AsyncCachedNodes(reader, "nodes", AsyncNodeRepository)
        """The nodes."""
        self.routes = AsyncCachedRoutes(reader, "routes", AsyncRouteRepository)
        """The configured routes between nodes."""
        self.state: AsyncCachedRepository[StateEntry] = AsyncCachedRepository(reader, "state", AsyncStateRepository)
        """The shared state."""
        self.runtime_config = AsyncCachedRuntimeConfig(reader, "runtime_config", AsyncRuntimeConfigRepository)
        """The runtime configuration."""
        self.routing_table = AsyncCachedRoutingTable(reader, "routing_table", AsyncRoutingTableRepository)
        """The routing table."""

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._reader.closed

    async def close(self) -> None:
        """Close the connections to Redis, and look no more at what has changed; reads raise `ClosedError`."""
        await self._reader.close()

    async def __aenter__(self) -> Self:
        """Return the cache."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close it."""
        await self.close()
