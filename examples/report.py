"""What the examples print: each step as it is taken, and what the database holds at the end of the day."""

from __future__ import annotations

import argparse
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from network import LinkFailure, Network, Table, table_key

from mesh_storage import JSON, Backlog, Health, Mesh

SHOWN = 10
"""Routes that are printed at most."""


@dataclass(frozen=True)
class Facts:
    """What was read from the database at the end of the day."""

    mesh: Mesh
    right_key_admitted: bool
    wrong_key_admitted: bool
    nodes: int
    reporting: int
    silent: int
    routes: int
    messages: int
    backlog: Backlog
    best_routes: int
    log_entries: int
    first_index: int
    last_index: int
    term: int
    settings: Mapping[str, JSON]
    undone: bool
    health: Health


def arguments(description: str | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "network",
        nargs="?",
        type=Path,
        default=Path(__file__).with_name("abilene.graphml"),
        metavar="NETWORK.graphml",
        help="a network in the form of the Internet Topology Zoo (default: the Abilene network)",
    )
    parser.add_argument(
        "--picture", type=Path, metavar="FILE.svg", help="where to draw the network (default: build/ of the checkout)"
    )
    return parser.parse_args()


@contextmanager
def step(what: str) -> Generator[None]:
    """Print what is being done, and behind it how long it took."""
    print(f"{what} ... ", end="", flush=True)
    begun = time.perf_counter()
    try:
        yield
    except BaseException:
        print("failed", flush=True)
        raise
    print(f"{time.perf_counter() - begun:.1f} s", flush=True)


def print_report(network: Network, facts: Facts, failure: LinkFailure | None) -> None:
    """Print what the database holds, each number with its reason, and what the failed link changed."""
    cities, links = len(network.cities), len(network.links)
    pairs = cities * (cities - 1)
    each_pair = f"one from each city to each other city, {cities} x {cities - 1}"
    joined = f"one for the leader of term {facts.term} and one for each city that joined"
    print("\nWhat the database holds at the end of the day:")
    print(f"  {explained(facts.nodes, 'node', 'nodes', cities, 'one for each city')}")
    print(
        f"  {explained(facts.reporting, 'node state', 'node states', cities, 'what each node reported last')};", end=" "
    )
    print(f"{facts.silent or 'none'} of them older than an hour")
    print(f"  {explained(facts.routes, 'route', 'routes', links, 'one for each link, with its latency')}")
    print(f"  {explained(facts.messages, 'message', 'messages', pairs, each_pair)}")
    print(f"  {explained(facts.log_entries, 'log entry', 'log entries', 1 + cities, joined)};", end=" ")
    print(f"indexes {facts.first_index} to {facts.last_index}")
    print(f"  {counted(len(facts.settings), 'setting', 'settings')}:", end=" ")
    print(", ".join(f"{key} = {value}" for key, value in facts.settings.items()))
    reason = each_pair if facts.best_routes == pairs else "one from each city to each other city that it can reach"
    print(f"  {counted(facts.best_routes, 'best route', 'best routes')} in the routing table: {reason}")

    print("\nWhat the database promises:")
    right, wrong = ("admits" if ok else "refuses" for ok in (facts.right_key_admitted, facts.wrong_key_admitted))
    print(f"  the mesh {facts.mesh.name} {right} a node that shows the join key, and {wrong} one that guesses")
    left = facts.backlog.due + facts.backlog.leased + facts.backlog.dead
    print(f"  each message was delivered to its receiver once, and {left or 'none'} of them is left to deliver")
    print(f"  a transaction that failed half-way left {'nothing' if facts.undone else 'something'} behind")
    print(
        f"  it is {'healthy' if facts.health.ok else 'not healthy'}, and its schema is revision {facts.health.revision}"
    )
    if failure:
        print_failure(failure)


def print_failure(failure: LinkFailure) -> None:
    """Print how the routes from the city with the most changes were, and how they are now."""
    source, targets = failure.most_affected()
    print(f"\nThe link between {failure.link.a} and {failure.link.b} failed:")
    changed = f"{len(failure.changed)} of the {counted(len(failure.before), 'best route', 'best routes')} changed"
    if not targets:
        print(f"  {changed}")
        return
    print(f"  {changed}, all in one transaction; those that begin in {source} ({len(targets)}, and no city has more):")
    lines = [
        (f"to {target}", in_words(failure.before, source, target), in_words(failure.after, source, target))
        for target in targets[:SHOWN]
    ]
    width, before_width = (max(len(line[column]) for line in lines) for column in (0, 1))
    for target, before, after in lines:
        print(f"    {target:{width}}  {before:{before_width}}  now {after}")
    if targets[SHOWN:]:
        print(f"    and {len(targets) - SHOWN} more")


def in_short(network: Network) -> str:
    """Return the name and the size of a network."""
    cities, links = counted(len(network.cities), "city", "cities"), counted(len(network.links), "link", "links")
    return f"{network.name}, a network of {cities} and {links}"


def counted(number: int, singular: str, plural: str) -> str:
    """Return a number of things."""
    return f"{number} {singular if number == 1 else plural}"


def explained(number: int, singular: str, plural: str, expected: int, reason: str) -> str:
    """Return a number of things with its reason; what is more than expected was there before this day."""
    if number == expected:
        return f"{counted(number, singular, plural)}: {reason}"
    return f"{counted(number, singular, plural)}: {expected} of this day ({reason}) and {number - expected} from before"


def in_words(table: Table, source: str, target: str) -> str:
    """Return the route from one city to another in words."""
    route = table.get(table_key(source, target))
    if route is None:
        return "unreachable"
    return f"{route['latency_ms']:.1f} ms " + (
        "directly" if route["next_hop"] == target else f"via {route['next_hop']}"
    )
