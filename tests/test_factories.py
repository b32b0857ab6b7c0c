"""Shows the factories of mesh_storage.testing, which services use on both sides."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mesh_storage import Node, UnitOfWork, testing
from mesh_storage.aio import AsyncMeshStorage

FACTORIES: dict[str, type[testing.AggregateFactory[Any]]] = {
    "meshes": testing.MeshFactory,
    "nodes": testing.NodeFactory,
    "routes": testing.RouteFactory,
    "messages": testing.MessageFactory,
    "state": testing.StateEntryFactory,
    "node_states": testing.NodeStateFactory,
    "consensus_log": testing.LogEntryFactory,
    "routing_table": testing.RoutingEntryFactory,
    "runtime_config": testing.ConfigEntryFactory,
}
every_factory = pytest.mark.parametrize("name", FACTORIES)


class EdgeFactory(testing.NodeFactory):
    """A service's own."""

    region_id = "edge"


@every_factory
def test_create_stores_and_build_does_not(uow: UnitOfWork, name: str) -> None:
    built = FACTORIES[name].build()
    assert len(FACTORIES[name].build_batch(2)) == 2
    assert getattr(uow, name).count() == 0
    created = FACTORIES[name].create(uow=uow)
    batch = FACTORIES[name].create_batch(2, uow=uow)
    assert {type(built)} == set(map(type, [created, *batch]))
    assert getattr(uow, name).count() == 3


@every_factory
def test_the_same_for_asyncio(mesh_storage_url: str, name: str) -> None:
    async def main() -> None:
        async with AsyncMeshStorage.open(mesh_storage_url) as storage, storage.unit_of_work() as uow:
            created = await FACTORIES[name].create(uow=uow)
            batch = await FACTORIES[name].create_batch(2, uow=uow)
            assert len({type(each) for each in (created, *batch)}) == 1
            assert await getattr(uow, name).count() == 3

    asyncio.run(main())


def test_attributes_are_passed_on(mesh_storage_url: str, uow: UnitOfWork) -> None:
    async def main() -> list[Node]:
        async with AsyncMeshStorage.open(mesh_storage_url) as storage, storage.unit_of_work() as other:
            return await EdgeFactory.create_batch(2, uow=other, platform="toaster")

    for nodes in (EdgeFactory.create_batch(2, uow=uow, platform="toaster"), asyncio.run(main())):
        assert [(each.region_id, each.platform) for each in nodes] == [("edge", "toaster")] * 2


def test_a_route_makes_the_nodes_that_are_not_there_and_no_others(mesh_storage_url: str, uow: UnitOfWork) -> None:
    source = testing.NodeFactory.create(uow=uow)
    route = testing.RouteFactory.create(uow=uow, source_node_id=source.id)
    assert uow.nodes.count() == 2
    assert uow.nodes.find(route.target_node_id) is not None

    async def main() -> None:
        async with AsyncMeshStorage.open(mesh_storage_url) as storage, storage.unit_of_work() as other:
            source = await testing.NodeFactory.create(uow=other)
            await testing.RouteFactory.create_batch(2, uow=other, source_node_id=source.id)
            assert await other.nodes.count() == 3

    asyncio.run(main())


def test_log_entries_go_behind_the_last_one(mesh_storage_url: str, uow: UnitOfWork) -> None:
    assert [each.index for each in testing.LogEntryFactory.create_batch(3, uow=uow)] == [1, 2, 3]
    uow.rollback()

    async def main() -> list[int]:
        async with AsyncMeshStorage.open(mesh_storage_url) as storage, storage.unit_of_work() as other:
            return [each.index for each in await testing.LogEntryFactory.create_batch(3, uow=other)]

    assert asyncio.run(main()) == [1, 2, 3]
