"""The HTTP interface: nodes join and report, links and settings are configured, messages are sent."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, HTTPException, Request, Response, status
from pydantic import BaseModel, Field

from mesh_storage import JSON, AlreadyExistsError, Mesh, Message, Node, Route
from mesh_storage.aio import AsyncMeshStorage
from service import arrivals
from service.background import PREFIX, Config
from service.overview import overview
from service.routing import DOWN, UP, follow, routing_table

router = APIRouter()


def the_storage(request: Request) -> AsyncMeshStorage:
    """Return the storage of the application."""
    storage: AsyncMeshStorage = request.app.state.storage
    return storage


def the_config(request: Request) -> Config:
    """Return the settings as they are now."""
    config: Config = request.app.state.config
    return config


async def the_routing_table(request: Request) -> dict[str, JSON]:
    """Return the best routes as they are now."""
    return await routing_table(request.app.state.storage, request.app.state.cached)


Storage = Annotated[AsyncMeshStorage, Depends(the_storage)]
Settings = Annotated[Config, Depends(the_config)]
RoutingTable = Annotated[dict[str, JSON], Depends(the_routing_table)]


class NewMesh(BaseModel):
    name: str
    join_key: str


class Joining(BaseModel):
    mesh: str
    join_key: str
    name: str
    ip_address: str


class Link(BaseModel):
    source: str
    target: str
    latency_ms: Decimal = Field(ge=0)
    up: bool = True


class NewMessage(BaseModel):
    id: str
    from_node: str
    to_node: str
    text: str


@router.post("/meshes", status_code=status.HTTP_201_CREATED)
async def create_mesh(new: NewMesh, storage: Storage) -> str:
    """Create a mesh that nodes with the key may join, and return its id."""
    async with storage.begin() as uow:
        mesh = await uow.meshes.add(Mesh(name=new.name, allow_join=True))
        await uow.meshes.set_join_key(mesh.id, new.join_key)
        return mesh.id


@router.post("/nodes", status_code=status.HTTP_201_CREATED)
async def join(joining: Joining, storage: Storage) -> str:
    """Let a node join a mesh, and return its id; one that joins again under its name keeps it."""
    async with storage.begin() as uow:
        mesh = await uow.meshes.get_by_name(joining.mesh)
        if not await uow.meshes.admits(mesh.id, joining.join_key):
            raise HTTPException(status.HTTP_403_FORBIDDEN, "the mesh does not admit this node")
        try:
            async with uow.savepoint():
                node = await uow.nodes.add(Node(name=joining.name, ip_address=joining.ip_address))
        except AlreadyExistsError:
            node = await uow.nodes.get_by_name(joining.name)
            node.ip_address = joining.ip_address
            await uow.nodes.update(node)
        return node.id


@router.put("/nodes/{node_id}/state", status_code=status.HTTP_204_NO_CONTENT)
async def report_state(node_id: str, state: dict[str, Any], storage: Storage) -> None:
    """Take a heartbeat: the state of a node. What is lost in a crash is soon said again."""
    async with storage.begin(durability="relaxed") as uow:
        await uow.node_states.put(node_id, state)


@router.put("/links", status_code=status.HTTP_204_NO_CONTENT)
async def set_link(link: Link, storage: Storage) -> None:
    """Configure the link between two nodes, or say that it is down; the leader then computes the best routes anew."""
    state = UP if link.up else DOWN
    async with storage.begin() as uow:
        there = await uow.routes.between(link.source, link.target)
        for route in there:
            route.status, route.latency_ms = state, link.latency_ms
            await uow.routes.update(route)
        if not there:
            await uow.routes.add(
                Route(
                    source_node_id=link.source,
                    target_node_id=link.target,
                    bidirectional=True,
                    latency_ms=link.latency_ms,
                    status=state,
                )
            )


@router.get("/paths/{source}/{target}")
async def path(source: str, target: str, table: RoutingTable) -> list[str]:
    """Return the nodes along the best route between two nodes."""
    found = follow(table, source, target)
    if not found:
        raise HTTPException(status.HTTP_404_NOT_FOUND, "no route leads there")
    return found


@router.post("/messages", status_code=status.HTTP_202_ACCEPTED)
async def send(new: NewMessage, storage: Storage) -> None:
    """Take a message for its receiver, where it arrives once, although the same one may be sent again."""
    message = Message(id=new.id, from_node=new.from_node, to_node=new.to_node, content=new.text.encode())
    async with storage.begin() as uow:
        await arrivals.send(uow, message)


@router.get("/messages/dead")
async def dead(storage: Storage, after: str | None = None) -> dict[str, Any]:
    """Return the messages that were set aside, a hundred at a time, and where the next ones begin."""
    async with storage.begin(read_only=True) as uow:
        page = await uow.messages.dead(arrivals.QUEUE, after=after)
    return {"dead": [arrivals.dead_as_json(delivery) for delivery in page.items], "next": page.next}


@router.post("/messages/redrive")
async def redrive(storage: Storage, ids: Annotated[list[str] | None, Body()] = None) -> int:
    """Drive messages back that were set aside, some or all, and return how many."""
    async with storage.begin() as uow:
        return await uow.messages.redrive(arrivals.QUEUE, ids)


@router.put("/config/{name}", status_code=status.HTTP_204_NO_CONTENT)
async def set_config(name: str, value: Annotated[JSON, Body()], storage: Storage) -> None:
    """Change a setting in all running processes."""
    async with storage.begin() as uow:
        await uow.runtime_config.put(f"{PREFIX}{name}", value)


@router.get("/overview")
async def get_overview(storage: Storage, config: Settings, table: RoutingTable, response: Response) -> dict[str, Any]:
    """Return what the page shows."""
    response.headers["Cache-Control"] = "no-store"
    return await overview(storage, config.silent_after_s, table)
