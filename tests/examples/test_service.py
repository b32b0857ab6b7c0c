"""The service of the examples, as its operators and the nodes of its mesh see it: real processes, over HTTP."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import redis

from mesh_storage import MeshStorage
from mesh_storage.testing import Databases
from tests.processes import eventually
from tests.relay import relayed

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
KEY = "the join key"


class Service:
    """A process of the service, and a client of it."""

    def __init__(self, url: str, *arguments: str, **environment: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "service", "--port", str(port), *arguments],
            cwd=EXAMPLES,
            env={**os.environ, "MESH_STORAGE_URL": url, **environment},
        )
        self.http = httpx.Client(base_url=self.url, timeout=10)
        assert eventually(self._answers, 30)

    def _answers(self) -> bool:
        assert self.process.poll() is None
        try:
            return self.http.get("/live").status_code == 200
        except httpx.TransportError:
            return False

    def send(self, method: str, path: str, body: Any, expected: int = 204) -> Any:
        response = self.http.request(method, path, json=body)
        assert response.status_code == expected, response.text
        return response.json() if response.content else None

    def overview(self) -> dict[str, Any]:
        found: dict[str, Any] = self.http.get("/overview").raise_for_status().json()
        return found

    def sees(self, what: Callable[[dict[str, Any]], object], seconds: float = 20) -> bool:
        return eventually(lambda: bool(what(self.overview())), seconds)

    def join(self, mesh: str, *names: str) -> list[str]:
        self.send("POST", "/meshes", {"name": mesh, "join_key": KEY}, 201)
        joining = {"mesh": mesh, "join_key": KEY, "ip_address": "10.0.0.1"}
        return [self.send("POST", "/nodes", {**joining, "name": name}, 201) for name in names]

    def link(self, source: str, target: str, latency_ms: float, *, up: bool = True) -> None:
        self.send("PUT", "/links", {"source": source, "target": target, "latency_ms": latency_ms, "up": up})

    def routes(self, *pairs: tuple[str, str]) -> bool:
        return self.sees(lambda mesh: all(f"{a}>{b}" in mesh["routes"] for a, b in pairs))

    def message(self, name: str, source: str, target: str) -> None:
        self.send("POST", "/messages", {"id": name, "from_node": source, "to_node": target, "text": "hello"}, 202)

    def refuses(self) -> bool:
        try:
            httpx.get(f"{self.url}/live")
        except httpx.TransportError:
            return True
        return False

    def end(self, signum: signal.Signals = signal.SIGTERM) -> int:
        self.http.close()
        self.process.send_signal(signum)
        return self.process.wait(30)


Start = Callable[..., Service]


@pytest.fixture
def start(mesh_storage_url: str, unmeasured: None) -> Iterator[Start]:
    """Yield what starts a process of the service on the database of the test."""
    del unmeasured
    started: list[Service] = []

    def one(*arguments: str, url: str = mesh_storage_url, **environment: str) -> Service:
        started.append(Service(url, *arguments, **environment))
        return started[-1]

    yield one
    for service in started:
        service.http.close()
        if service.process.poll() is None:
            service.process.kill()
            service.process.wait()


@pytest.fixture
def look(tmp_path: Path) -> Callable[[str], str]:
    """Return what shows a page to a browser, and returns it as it then is."""
    browser = shutil.which("chromium")
    if browser is None:
        assert not os.environ.get("CI"), "the page must be looked at: apt-get install chromium"
        pytest.skip("there is no chromium to look at the page with")

    def once(url: str) -> str:
        profile = f"--user-data-dir={tmp_path / uuid.uuid4().hex}"
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", profile, "--virtual-time-budget=3000"]
        done = subprocess.run([*command, "--dump-dom", url], capture_output=True, text=True, check=True, timeout=60)
        return done.stdout

    def look(url: str) -> str:
        # A browser without a window does not always wait for what a page fetches.
        return next((page for page in (once(url) for _ in range(5)) if "data-name=" in page), "")

    return look


@contextmanager
def no_arrivals(url: str) -> Iterator[None]:
    """Keep the workers in the middle of their messages for a block."""
    with psycopg.connect(url) as connection:
        connection.execute("LOCK TABLE service_arrivals IN SHARE MODE")
        yield


def arrived(url: str) -> list[str]:
    """Return the messages that arrived, in their order."""
    with psycopg.connect(url) as connection:
        return [name for (name,) in connection.execute("SELECT message_id FROM service_arrivals ORDER BY id")]


NOTHING = {"due": 0, "leased": 0, "delayed": 0, "waiting": 0, "dead": 0, "oldest_due_s": None}


def test_nodes_join_with_the_key_and_report(start: Start) -> None:
    service = start()
    (node,) = service.join("north", "alpha")
    assert service.join("south", "alpha") == [node]
    joining = {"mesh": "north", "join_key": "a guess", "name": "beta", "ip_address": "10.0.0.2"}
    service.send("POST", "/nodes", joining, 403)
    service.send("POST", "/nodes", {**joining, "mesh": "nowhere"}, 404)
    service.send("POST", "/meshes", {"name": "north", "join_key": KEY}, 409)
    service.send("PUT", f"/nodes/{node}/state", "no object", 422)
    assert [seen["status"] for seen in service.overview()["nodes"]] == ["new"]
    service.send("PUT", f"/nodes/{node}/state", {"load": 0.5})
    (seen,) = service.overview()["nodes"]
    assert (seen["name"], seen["status"], seen["state"]) == ("alpha", "up", {"load": 0.5})


def test_messages_are_kept_once(start: Start, mesh_storage: MeshStorage) -> None:
    service = start()
    message = {"id": "m1", "from_node": "a", "to_node": "b", "text": "grüße"}
    for _ in range(2):
        service.send("POST", "/messages", message, 202)
    service.send("POST", "/messages", {**message, "text": "something else"}, 409)
    with mesh_storage.begin(read_only=True) as uow:
        assert [kept.content.decode() for kept in uow.messages.stream()] == ["grüße"]
    assert service.overview()["messages"] == 1


def test_messages_arrive_once_and_in_order_whoever_takes_and_carries_them(start: Start, mesh_storage_url: str) -> None:
    services = start(), start()
    service = services[0]
    a, b, c = service.join("north", "a", "b", "c")
    service.link(a, b, 1)
    service.link(b, c, 1)
    pairs = [(a, b), (b, a), (a, c), (c, b)]
    assert service.routes(*pairs)

    def send(number: int) -> list[str]:
        names = [f"{number}-{turn:02}" for turn in range(20)]
        for turn, name in enumerate(names):
            for one in (services[turn % 2], services[1 - turn % 2]):  # each twice
                one.message(name, *pairs[number])
        return names

    with ThreadPoolExecutor() as senders:
        sent = list(senders.map(send, range(len(pairs))))
    assert service.sees(lambda mesh: mesh["backlog"] == NOTHING)
    there = arrived(mesh_storage_url)
    assert [[name for name in there if name.startswith(f"{number}-")] for number in range(len(pairs))] == sent
    seen = service.overview()
    assert (seen["arrived"], seen["messages"], len(there)) == (80, 80, 80)
    assert seen["arrivals"][0]["id"] == there[-1]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_ends_in_the_middle_of_messages_loses_and_doubles_none(
    start: Start, mesh_storage_url: str, signum: signal.Signals
) -> None:
    first, second = start(), start()
    nodes = second.join("north", "a", "b", "c")
    second.link(nodes[0], nodes[1], 1)
    second.link(nodes[1], nodes[2], 1)
    pairs = [(a, b) for a in nodes for b in nodes if a != b]
    assert second.routes(*pairs)
    with no_arrivals(mesh_storage_url):
        for number, (a, b) in enumerate(pairs):
            second.message(f"m{number}", a, b)
        in_hand = {**NOTHING, "leased": 4, "due": 2}
        assert second.sees(lambda mesh: {**mesh["backlog"], "oldest_due_s": None} == in_hand), "two workers in each"
        assert second.overview()["backlog"]["oldest_due_s"] > 0
        first.http.close()
        first.process.send_signal(signum)
        if signum == signal.SIGKILL:
            first.process.wait()
        else:
            assert eventually(first.refuses)
            assert first.process.poll() is None, "it waits for the messages in hand"
        assert second.overview()["backlog"]["leased"] == 4
    assert first.process.wait(30) == -signum
    assert second.sees(lambda mesh: mesh["backlog"] == NOTHING)
    assert sorted(arrived(mesh_storage_url)) == [f"m{number}" for number in range(6)]


def test_a_message_without_a_route_is_set_aside_and_driven_back(start: Start, mesh_storage_url: str) -> None:
    service = start()
    a, b, c = service.join("north", "a", "b", "c")
    service.link(a, c, 1)
    assert service.routes((a, c))
    for name, target in [("m1", b), ("m2", b), ("m3", c)]:
        service.message(name, a, target)
    assert service.sees(lambda mesh: mesh["backlog"] == {**NOTHING, "waiting": 1, "dead": 1})
    assert arrived(mesh_storage_url) == ["m3"]
    answer = service.http.get("/messages/dead").json()
    (dead,) = answer["dead"]
    expected = {"id": "m1", "from": a, "to": b, "attempts": 4, "reason": "NoRouteError: no route leads there"}
    assert {name: dead[name] for name in expected} == expected
    assert answer["next"] is None
    metrics = service.http.get("/metrics").text
    assert re.search(r'mesh_storage_delivery_failures_total\{.*outcome="dead".*\} 1\.0', metrics), metrics
    assert re.search(r"^mesh_storage_delivery_backlog\{.*\} \d", metrics, re.MULTILINE), metrics

    service.link(a, b, 1)
    assert service.routes((a, b))
    assert service.send("POST", "/messages/redrive", ["m2"], 200) == 0, "it is not dead"
    assert service.http.post("/messages/redrive").json() == 1
    assert service.sees(lambda mesh: mesh["backlog"] == NOTHING)
    assert arrived(mesh_storage_url) == ["m3", "m1", "m2"]


def test_the_page_shows_what_is_on_its_way_and_what_is_dead(start: Start, look: Callable[[str], str]) -> None:
    service = start()
    a, b = service.join("north", "alpha", "beta")
    service.message("m1", a, b)
    service.message("m2", a, b)
    assert service.sees(lambda mesh: mesh["backlog"]["dead"])
    page = look(service.url)
    shown = dict(re.findall(r"<dt>([^<]+)</dt><dd>([^<]+)</dd>", page))
    assert shown == {"due": "0", "leased": "0", "delayed": "0", "waiting": "1", "dead": "1", "oldest due": "0.0 s"}
    assert "alpha → beta" in page
    assert "no route leads there" in page
    assert re.search(r'<button id="redrive">', page), "it is not hidden"


def test_the_best_routes_follow_the_links(start: Start) -> None:
    service = start()
    a, b, c = service.join("north", "a", "b", "c")
    service.link(a, b, 1)
    service.link(b, c, 1)
    service.link(a, c, 5)
    assert service.sees(lambda mesh: mesh["routes"].get(f"{a}>{c}") == {"next": b, "latency_ms": 2.0, "hops": 2})
    assert service.http.get(f"/paths/{a}/{c}").json() == [a, b, c]
    service.link(b, c, 1, up=False)
    assert service.sees(lambda mesh: mesh["routes"].get(f"{a}>{c}") == {"next": c, "latency_ms": 5.0, "hops": 1})
    service.link(a, c, 5, up=False)
    assert service.sees(lambda mesh: f"{a}>{c}" not in mesh["routes"])
    assert service.http.get(f"/paths/{a}/{c}").status_code == 404


def test_a_silent_node_is_told_until_it_reports_again_and_the_time_for_it_is_followed(start: Start) -> None:
    service = start()
    (node,) = service.join("north", "a")
    service.send("PUT", "/config/silent_after_s", 3600)
    service.send("PUT", f"/nodes/{node}/state", {})
    assert service.sees(lambda mesh: mesh["leader"])
    assert service.overview()["alerts"] == []
    for nonsense in ("nonsense", 1e15, 10**400):
        service.send("PUT", "/config/silent_after_s", 0.2)
        assert service.sees(lambda mesh: [alert["node"] for alert in mesh["alerts"]] == [node])
        assert [seen["status"] for seen in service.overview()["nodes"]] == ["silent"]
        service.send("PUT", "/config/silent_after_s", nonsense)
        assert eventually(lambda: service.send("PUT", f"/nodes/{node}/state", {}) or not service.overview()["alerts"])
    service.send("PUT", "/config/silent_after_s", 3600)
    service.send("PUT", f"/nodes/{node}/state", {})
    assert service.sees(lambda mesh: not mesh["alerts"])


def test_settings_are_followed_although_changes_are_no_longer_kept(start: Start, mesh_storage_url: str) -> None:
    service = start()
    (node,) = service.join("north", "a")
    service.send("PUT", f"/nodes/{node}/state", {})
    service.send("PUT", "/config/silent_after_s", 3600)
    with psycopg.connect(mesh_storage_url) as connection:
        connection.execute("TRUNCATE mesh_runtime_config")
    service.send("PUT", "/config/silent_after_s", 0.2)
    assert service.sees(lambda mesh: [seen["status"] for seen in mesh["nodes"]] == ["silent"])
    assert service.process.poll() is None


def test_another_process_leads_when_the_leader_is_killed(start: Start) -> None:
    first = start()
    assert first.sees(lambda mesh: mesh["leader"])
    leader = first.overview()["leader"]
    second = start()
    assert second.overview()["leader"] == leader
    a, b = second.join("north", "a", "b")
    first.end(signal.SIGKILL)
    second.link(a, b, 1)
    assert second.sees(lambda mesh: f"{a}>{b}" in mesh["routes"])
    assert second.overview()["leader"] != leader


def test_it_is_shut_down_in_good_order(start: Start, mesh_storage_url: str) -> None:
    service = start()
    assert service.sees(lambda mesh: mesh["leader"])
    began = time.monotonic()
    service.end()
    assert time.monotonic() - began < 5, "shorter than the lease: it was given back, not left to expire"
    with psycopg.connect(mesh_storage_url, autocommit=True) as connection:
        assert connection.execute("SELECT count(*) FROM mesh_state").fetchone() == (0,)
        left = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        assert eventually(lambda: connection.execute(left).fetchone() == (0,))


def test_the_best_routes_are_read_from_redis_if_there_is_one(start: Start, redis_url: str) -> None:
    service = start(REDIS_URL=redis_url)
    a, b = service.join("north", "a", "b")
    service.link(a, b, 1)
    assert service.routes((a, b))
    assert service.http.get(f"/paths/{a}/{b}").json() == [a, b]
    with redis.Redis.from_url(redis_url) as client:
        assert client.keys("mesh:*")
    service.link(a, b, 1, up=False)
    assert service.sees(lambda mesh: not mesh["routes"])
    assert service.http.get(f"/paths/{a}/{b}").status_code == 404


def test_an_outage_of_the_database_is_waited_out(start: Start, mesh_storage_url: str, tmp_path: Path) -> None:
    with relayed(mesh_storage_url, tmp_path) as relay:
        service = start(url=relay.url)
        assert service.http.get("/ready").json() == {"ready": True, "detail": None}
        a, b = service.join("north", "a", "b")
        relay.stop()
        answer = service.http.get("/ready")
        assert (answer.status_code, answer.json()["ready"]) == (503, False)
        assert service.http.get("/live").status_code == 200
        refused = service.http.get("/overview")
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        relay.start()
        assert eventually(lambda: service.http.get("/ready").status_code == 200)
        service.link(a, b, 1)
        service.message("m1", a, b)
        assert service.sees(lambda mesh: mesh["arrived"] == 1)
        assert service.end() == -signal.SIGTERM  # as uvicorn ends, once the application is shut down


def test_it_ends_if_its_work_fails_for_good(
    start: Start, mesh_storage_databases: Databases, capfd: pytest.CaptureFixture[str]
) -> None:
    with mesh_storage_databases.fresh() as url:
        service = start(url=url)
        with psycopg.connect(url) as connection:
            connection.execute("ALTER TABLE mesh_deliveries RENAME TO away")
        assert service.process.wait(30) == 1, "so that it is started anew"
    said = capfd.readouterr().err
    assert "CRITICAL: service: work in the background failed for good\nTraceback" in said
    assert "mesh_deliveries" in said
    assert "Application shutdown complete" in said


def test_its_metrics_are_those_of_the_library(start: Start) -> None:
    service = start()
    service.join("north", "alpha")
    metrics = service.http.get("/metrics").text
    counted = re.search(r'db_client_operation_duration_seconds_count\{.*db_operation_name="nodes.add".*\} 1.0', metrics)
    assert counted, metrics
    assert "mesh_storage_lease_held" in metrics
    assert "mesh_storage_table_dead_rows" in metrics


def test_its_table_and_ours_are_migrated_side_by_side(start: Start, mesh_storage_url: str) -> None:
    start().end()
    start().end()  # what is there already stays
    check = (
        "from alembic import command; from sqlalchemy import create_engine, make_url; from service import migration\n"
        "with create_engine(make_url(URL).set(drivername='postgresql+psycopg')).begin() as connection:\n"
        "    command.check(migration.config(connection)); command.downgrade(migration.config(connection), 'base')\n"
    )
    program = f"URL = {mesh_storage_url!r}\n{check}"
    done = subprocess.run([sys.executable, "-c", program], cwd=EXAMPLES, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with MeshStorage.open(mesh_storage_url) as storage:
        assert storage.health().ok


def test_the_page_shows_the_mesh(start: Start, look: Callable[[str], str]) -> None:
    service = start("--play")
    assert service.sees(lambda mesh: any("Seattle" in node["name"] for node in mesh["nodes"]))
    assert service.sees(lambda mesh: len(mesh["routes"]) == 110)
    names = {node["name"] for node in service.overview()["nodes"]}
    page = look(f"{service.url}/#Denver")
    assert set(re.findall(r'data-name="([^"]+)"', page)) == names
    assert "Best routes from Denver" in page
    assert len(re.findall(r'class="link[^"]*"', page)) == 14
    assert len(re.findall(r'class="link best"', page)) >= 9, "the best routes are a tree of all cities"
    assert service.overview()["leader"] in page
    assert re.search(r'class="node (up|silent) "', page)
    assert service.sees(lambda mesh: mesh["backlog"]["dead"], 60), "a city is cut off for a while"
    assert service.sees(lambda mesh: not mesh["backlog"]["dead"], 60), "and then what did not get there goes on"
