"""Two replicas answer more reads than the primary alone.

All servers share the processors of the machine here, so each answers as many reads as it has connections at a time, and
takes as long as a policy on the rows sleeps.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from pydantic import SecretStr

from mesh_storage import MeshStorage
from tests.replicas.conftest import ports, settings_of
from tests.servers import PASSWORD, Replication, execute

pytestmark = pytest.mark.slow

SLEEP_S = 0.02
CONNECTIONS = 4
SECONDS = 2.0


@pytest.fixture
def slow(servers: Replication) -> Iterator[Replication]:
    """Yield servers that sleep before they show a row to a role."""
    password = PASSWORD.replace("'", "''")
    for statement in (
        f"CREATE ROLE slow LOGIN PASSWORD '{password}'",
        "GRANT SELECT ON ALL TABLES IN SCHEMA public TO slow",
        "INSERT INTO mesh_state (key, value) VALUES ('slow', '')",
        "ALTER TABLE mesh_state ENABLE ROW LEVEL SECURITY",
        f"CREATE POLICY slow ON mesh_state TO slow USING (pg_sleep({SLEEP_S})::text IS NOT NULL)",
    ):
        execute(servers.primary, statement)
    servers.await_replay()
    yield servers
    execute(servers.primary, "DROP POLICY slow ON mesh_state")
    execute(servers.primary, "ALTER TABLE mesh_state DISABLE ROW LEVEL SECURITY")
    execute(servers.primary, "DROP OWNED BY slow")
    execute(servers.primary, "DROP ROLE slow")


def test_two_replicas_answer_more_reads_than_the_primary_alone(slow: Replication) -> None:
    url = SecretStr(slow.url().replace("//postgres:", "//slow:"))
    replicas = SecretStr("postgresql://" + ",".join(f"127.0.0.1:{each.port}" for each in slow.standbys))
    sizes = {"pool_size": CONNECTIONS, "replica_pool_size": CONNECTIONS}
    with MeshStorage.open(settings=settings_of(slow, url=url, replica_url=replicas, **sizes)) as storage:

        def reads(*, replica: bool) -> Counter[int]:
            answers = Counter[int]()
            counted = threading.Lock()

            def look(end: float) -> None:
                while time.monotonic() < end:
                    with storage.begin(read_only=True, replica=replica) as uow:
                        uow.state.get("slow")
                        port = uow._connection.driver.connection.info.port
                    with counted:
                        answers[port] += 1

            end = time.monotonic() + SECONDS
            threads = [threading.Thread(target=look, args=(end,)) for _ in range(3 * CONNECTIONS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return answers

        reads(replica=True)  # makes the connections
        alone, together = reads(replica=False), reads(replica=True)
    print(f"{alone.total() / SECONDS:.0f} reads/s by the primary, {together.total() / SECONDS:.0f} by two replicas")
    assert set(alone) == ports(slow.primary)
    assert set(together) == ports(*slow.standbys)
    assert together.total() > 1.5 * alone.total()
