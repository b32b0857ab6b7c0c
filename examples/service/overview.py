"""What the page shows of the mesh: all of it but the best routes as of one moment."""

from __future__ import annotations

from contextlib import aclosing
from datetime import timedelta
from typing import Any

from mesh_storage import JSON, Node, NodeState
from mesh_storage.aio import AsyncMeshStorage, AsyncUnitOfWork
from service import arrivals
from service.alerts import open_alerts
from service.background import LEASE
from service.routing import UP

_MOST_NODES = 200
"""More would not be seen on a page."""
_LAST_MESSAGES = 5


async def overview(storage: AsyncMeshStorage, silent_after_s: float, table: dict[str, JSON]) -> dict[str, Any]:
    """Return the nodes with their state, the links, the best routes, the leader, the alerts and the messages."""
    async with storage.begin(read_only=True, isolation="repeatable read") as uow:
        nodes = await _first_nodes(uow)
        silent = {state.node_id for state in await uow.node_states.stale(timedelta(seconds=silent_after_s))}
        leader = await uow.state.find(LEASE)
        alerts = await open_alerts(uow)
        return {
            "nodes": [
                {
                    "id": node.id,
                    "name": node.name,
                    "status": "new" if state is None else "silent" if node.id in silent else "up",
                    "state": state and state.state,
                }
                for node, state in nodes
            ],
            "links": [
                {
                    "source": route.source_node_id,
                    "target": route.target_node_id,
                    "latency_ms": float(route.latency_ms or 0),
                    "up": route.status == UP,
                }
                async for route in uow.routes.stream()
            ],
            "routes": table,
            "leader": leader and leader.value.decode(),
            "alerts": [{"node": alert.node_id, "since": alert.started_at.isoformat()} for alert in alerts.values()],
            "messages": await uow.messages.count(),
            **await _delivery(uow),
        }


async def _delivery(uow: AsyncUnitOfWork) -> dict[str, Any]:
    backlog = await uow.messages.backlog(arrivals.QUEUE)
    dead = await uow.messages.dead(arrivals.QUEUE, limit=_LAST_MESSAGES)
    return {
        "backlog": {
            "due": backlog.due,
            "leased": backlog.leased,
            "delayed": backlog.delayed,
            "waiting": backlog.waiting,
            "dead": backlog.dead,
            "oldest_due_s": backlog.oldest_due and backlog.oldest_due.total_seconds(),
        },
        "dead": [arrivals.dead_as_json(delivery) for delivery in dead.items],
        "arrived": await arrivals.count_arrivals(uow),
        "arrivals": [
            {
                "id": message.id,
                "from": message.from_node,
                "to": message.to_node,
                "hops": arrival.hops,
                "latency_ms": arrival.latency_ms,
            }
            for message, arrival in await arrivals.last_arrivals(uow, _LAST_MESSAGES)
        ],
    }


async def _first_nodes(uow: AsyncUnitOfWork) -> list[tuple[Node, NodeState | None]]:
    found: list[tuple[Node, NodeState | None]] = []
    async with aclosing(uow.nodes.with_state(batch_size=_MOST_NODES)) as nodes:
        async for node in nodes:
            found.append(node)
            if len(found) == _MOST_NODES:
                break
    return found
