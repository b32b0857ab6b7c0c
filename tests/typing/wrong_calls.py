"""What a type checker must refuse, each line by itself; see test_types.py."""
# ruff: noqa: B018, ARG005 - they are never run

from __future__ import annotations

from mesh_storage import MeshStorage, Message, Node, UnitOfWork
from mesh_storage.aio import AsyncMeshStorage, AsyncUnitOfWork


def sync_side(storage: MeshStorage, uow: UnitOfWork) -> None:
    uow.state.put("key", "text")  # wrong
    uow.state.get(5)  # wrong
    uow.messages.store(Node())  # wrong
    uow.messages.page(100)  # wrong
    uow.consensus_log.append(1, "1", {})  # wrong
    uow.nodes.find("n").name  # wrong
    uow.no_such_repository  # wrong
    storage.begin(isolation="chaos")  # wrong
    storage.begin(durability="eternal")  # wrong
    storage.run(5)  # wrong
    number: str = storage.run(lambda uow: uow.messages.count())  # wrong
    print(number)


async def async_side(storage: AsyncMeshStorage, uow: AsyncUnitOfWork) -> None:
    await uow.state.put("key", "text")  # wrong
    await uow.messages.store(Node())  # wrong
    uow.messages.get("m").content  # wrong
    await uow.messages.stream()  # wrong
    for _ in uow.messages.stream():  # wrong
        pass
    with storage.begin():  # wrong
        pass
    storage.begin(isolation="chaos")  # wrong
    await storage.run(lambda uow: 5)  # wrong
    entry: Message = await uow.state.get("k")  # wrong
    print(entry)
