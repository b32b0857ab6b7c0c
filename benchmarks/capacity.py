"""What one server carries: a table for meshes of three sizes, computed from what is measured here in half a minute.

    python -m benchmarks.capacity [--seconds S] [--heartbeat S] [--messages N] [--json FILE] [--figures FILE]
        [--picture FILE]

Client and server share the machine, and one process does all the work, so that a real service has more, not less.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

from benchmarks.database import Database, durable_database
from benchmarks.samples import CONTENT, NODE_STATE, new_number
from mesh_storage import Message, Node

SIZES = (1_000, 100_000, 1_000_000)
_BATCH = 1_000
_CLAIMED = 50
_NODES = 50_000
_RECEIVER = "capacity"
_DAY_S = 86_400
_GIB = 2**30
_WIDTH, _BAR, _LEFT = 640, 34, 110
_COLOURS = {"heartbeats": "#0b62c4", "messages": "#d97706"}


@dataclass(frozen=True)
class Measured:
    """What a server does here."""

    heartbeats: float
    """Node states a second that are written by 1,000."""
    messages: float
    """Messages a second that are sent by 1,000, claimed by 50 and acknowledged."""
    node_bytes: float
    """Size of a node and its state, with their indexes."""
    message_bytes: float
    """Size of a message of 129 bytes once it is delivered, with its indexes."""
    heartbeat_wal: float
    """Bytes of write-ahead log of a heartbeat."""
    message_wal: float
    """Bytes of write-ahead log of a message, from sending to acknowledging."""


@dataclass(frozen=True)
class Load:
    """What a mesh of a size asks of the server."""

    nodes: int
    heartbeats: float
    """A second."""
    messages: float
    """A second."""

    @classmethod
    def of(cls, nodes: int, heartbeat_s: float, messages_a_minute: float) -> Load:
        """Return the load of so many nodes, each with a heartbeat every so often and so many messages a minute."""
        return cls(nodes, nodes / heartbeat_s, nodes * messages_a_minute / 60)

    def shares(self, measured: Measured) -> dict[str, float]:
        """Return which parts of the server's time heartbeats and messages take; more than 1 is more than it has."""
        return {
            "heartbeats": self.heartbeats / measured.heartbeats,
            "messages": self.messages / measured.messages,
        }


def measure(database: Database, seconds: float) -> Measured:
    """Measure each kind of work for so many seconds, on empty tables, beside a checkpoint at most."""
    storage = database.storage

    def register(nodes: Sequence[int]) -> None:
        with storage.begin() as uow:
            uow.nodes.add_many(Node(name=f"capacity-{n}", ip_address="10.0.0.1") for n in nodes)

    def beat(nodes: Sequence[int]) -> None:
        with storage.begin() as uow:
            uow.node_states.put_many({f"capacity-{n}": NODE_STATE for n in nodes})

    def deliver(nodes: Sequence[int]) -> None:
        with storage.begin() as uow:
            uow.messages.send_many(
                Message(id=f"capacity-{next(new_number)}", from_node="a", to_node=_RECEIVER, content=CONTENT)
                for _ in nodes
            )
        for _ in nodes[::_CLAIMED]:
            with storage.begin() as uow:
                claimed = uow.messages.claim(_RECEIVER, limit=_CLAIMED, lease=timedelta(minutes=10))
            with storage.begin() as uow:
                uow.messages.ack(claimed)

    database.fill(0)
    parts = [range(start, start + _BATCH) for start in range(0, _NODES, _BATCH)]
    for each in parts:
        register(each)
        beat(each)
    node_bytes = _size(database, "nodes", "mesh_node_state") / _NODES
    heartbeats, heartbeat_wal = _repeat(database, beat, parts, seconds)
    before = _size(database, "mesh_messages")
    begun = next(new_number)
    messages, message_wal = _repeat(database, deliver, parts, seconds)
    message_bytes = (_size(database, "mesh_messages") - before) / (next(new_number) - begun - 1)
    return Measured(heartbeats, messages, node_bytes, message_bytes, heartbeat_wal, message_wal)


def _repeat(
    database: Database, work: Callable[[Sequence[int]], None], parts: Sequence[Sequence[int]], seconds: float
) -> tuple[float, float]:
    """Repeat work on a thousand, and return how many there are a second, and their bytes of write-ahead log."""
    work(parts[0])
    begun, wal, done = time.perf_counter(), _wal(database), 0
    for part in itertools.cycle(parts):
        work(part)
        done += len(part)
        if (took := time.perf_counter() - begun) >= seconds:
            break
    return done / took, (_wal(database) - wal) / done


def _wal(database: Database) -> int:
    with database.connection(autocommit=True) as connection:
        return int(connection.execute("SELECT pg_current_wal_insert_lsn() - '0/0'").fetchall()[0][0])


def _size(database: Database, *tables: str) -> int:
    with database.connection(autocommit=True) as connection:
        query = "SELECT sum(pg_total_relation_size(name::regclass)) FROM unnest(%s::text[]) AS name"
        return int(connection.execute(query, [list(tables)]).fetchall()[0][0])


def table(measured: Measured, loads: Sequence[Load]) -> str:
    """Return the table as Markdown."""
    head = (
        "| nodes | heartbeats a second | messages a second | of one server | tables of nodes | messages a day | "
        "of these, with indexes | write-ahead log a day |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    return "\n".join([head, *(_line(measured, load) for load in loads)])


def _line(measured: Measured, load: Load) -> str:
    messages = load.messages * _DAY_S
    wal = _DAY_S * (load.heartbeats * measured.heartbeat_wal + load.messages * measured.message_wal)
    columns = [
        f"{load.nodes:,}",
        f"{load.heartbeats:,.0f}",
        f"{load.messages:,.0f}",
        f"{sum(load.shares(measured).values()):.1%}",
        f"{load.nodes * measured.node_bytes / _GIB:,.3f} GiB",
        f"{messages:,.0f}",
        f"{messages * measured.message_bytes / _GIB:,.1f} GiB",
        f"{wal / _GIB:,.1f} GiB",
    ]
    return f"| {' | '.join(columns)} |"


def draw(measured: Measured, loads: Sequence[Load]) -> str:
    """Return an SVG with a bar for each size: the part of one server that it takes."""
    most = max(1.0, *(sum(load.shares(measured).values()) for load in loads))
    scale = (_WIDTH - _LEFT - 70) / most
    bars = []
    for number, load in enumerate(loads):
        x, y, shares = float(_LEFT), 50 + number * (_BAR + 14), load.shares(measured)
        bars.append(f'<text x="{_LEFT - 8}" y="{y + 22}" text-anchor="end">{load.nodes:,}</text>')
        for name, share in shares.items():
            width = max(1.0, share * scale)
            bars.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{_COLOURS[name]}"/>')
            x += width
        bars.append(f'<text x="{x + 6:.1f}" y="{y + 22}">{sum(shares.values()):.1%}</text>')
    height = 60 + len(loads) * (_BAR + 14)
    limit = _LEFT + scale
    legend = "".join(
        f'<text x="{_LEFT + 110 * number}" y="36" fill="{colour}">■ {name}</text>'
        for number, (name, colour) in enumerate(_COLOURS.items())
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
        ' font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        '<text x="12" y="18" font-size="14">The part of one server that a mesh of so many nodes takes</text>'
        f"{legend}{''.join(bars)}"
        f'<path d="M{limit:.1f} 44 V{height - 10}" stroke="#444" stroke-dasharray="4 3"/></svg>\n'
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or read what was measured, and print and draw the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capacity", description="What one server carries.")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="how long each kind of work is measured (%(default)s)"
    )
    parser.add_argument("--heartbeat", type=float, default=30.0, help="seconds between two of a node (%(default)s)")
    parser.add_argument("--messages", type=float, default=1.0, help="messages of a node a minute (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    parser.add_argument("--figures", type=Path, metavar="FILE", help="compute from such a file instead of measuring")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="write an SVG")
    given = parser.parse_args(arguments)
    if given.figures is not None:
        measured = Measured(**json.loads(given.figures.read_text()))
    else:
        with durable_database() as database:
            measured = measure(database, given.seconds)
    loads = [Load.of(nodes, given.heartbeat, given.messages) for nodes in SIZES]
    print(table(measured, loads))
    if given.json is not None:
        given.json.write_text(json.dumps(asdict(measured), indent=2) + "\n")
    if given.picture is not None:
        given.picture.write_text(draw(measured, loads))


if __name__ == "__main__":
    main()
