"""A server that is killed while it is watched: ids of transactions that it forgot are used anew, nothing is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psycopg

from mesh_storage import MeshStorage, UnitOfWork
from tests.processes import eventually

ROUNDS = 4


def rolled_back(connection: psycopg.Connection[Any]) -> int:
    """Return the id of a transaction of which nothing needs to be on disk."""
    connection.execute("BEGIN")
    connection.execute("INSERT INTO mesh_state (key, value) VALUES ('rolled back', '')")
    row = connection.execute("SELECT pg_current_xact_id()::text::bigint").fetchone()
    connection.execute("ROLLBACK")
    assert row is not None
    return int(row[0])


def test_a_transaction_gets_the_id_of_one_that_was_rolled_back_and_forgotten(tmp_path: Path) -> None:
    home = tmp_path / "mesh"
    reused = 0
    with MeshStorage.open(f"embedded:{home}") as storage:

        def server() -> int:
            return int((home / "data" / "postmaster.pid").read_text().split()[0])

        def is_back() -> bool:
            try:
                psycopg.connect(**storage._server.connect).close()
            except psycopg.OperationalError:
                return False
            return server() != killed

        watch = storage.watch("state", poll=0.02)
        cursor = next(watch).cursor
        for n in range(ROUNDS):
            with psycopg.connect(**storage._server.connect, autocommit=True) as connection:
                connection.execute("CHECKPOINT")
                forgotten = rolled_back(connection)
                with storage.begin(read_only=True) as uow:
                    cursor = uow.changes.since(cursor, ["state"]).cursor
                killed = server()
                os.kill(killed, signal.SIGKILL)
            assert eventually(is_back, 60)

            def put(uow: UnitOfWork, key: str = f"{n}") -> None:
                uow.state.put(key, b"")

            storage.run(put, within=30)
            for batch in (uow_since(storage, cursor), next(watch)):
                assert [change.key for change in batch.changes] == [f"{n}"]
            with psycopg.connect(**storage._server.connect) as connection:
                row = connection.execute("SELECT xid FROM mesh_changes WHERE key = %s", [f"{n}"]).fetchone()
            reused += row == (forgotten,)
    assert reused, "no id was used anew, so nothing was tried"


def uow_since(storage: MeshStorage, cursor: str) -> Any:
    with storage.begin(read_only=True) as uow:
        return uow.changes.since(cursor, ["state"])
