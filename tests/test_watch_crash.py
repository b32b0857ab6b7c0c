"""A server that is killed while it is watched: ids of transactions that it forgot are used anew, and nothing is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psycopg

from mesh_storage import MeshStorage


def test_a_transaction_gets_the_id_of_one_that_was_rolled_back_and_forgotten(tmp_path: Path) -> None:
    home = tmp_path / "mesh"
    with MeshStorage.open(f"embedded:{home}") as storage:
        watch = storage.watch("state", poll=0.02)
        batch = next(watch)
        reused = 0
        for n in range(3):
            with psycopg.connect(**storage._server.connect, autocommit=True) as connection:
                connection.execute("CHECKPOINT")
                connection.execute("BEGIN")
                connection.execute("INSERT INTO mesh_state (key, value) VALUES ('rolled back', '')")
                row = connection.execute("SELECT pg_current_xact_id()::text::bigint").fetchone()
                connection.execute("ROLLBACK")
                with storage.begin(read_only=True) as uow:
                    cursor = uow.changes.since(batch.cursor, ["state"]).cursor
            pid = int((home / "data" / "postmaster.pid").read_text().split()[0])
            os.kill(pid, signal.SIGKILL)

            def put(uow, n=n):
                uow.state.put(f"{n}", b"")

            storage.run(put, within=30)
            with storage.begin(read_only=True) as uow:
                assert [change.key for change in uow.changes.since(cursor, ["state"]).changes] == [f"{n}"]
            with psycopg.connect(**storage._server.connect) as connection:
                found = connection.execute("SELECT xid::text::bigint FROM mesh_changes WHERE key = %s", [f"{n}"]).fetchone()
            assert row is not None
            reused += found == row
            batch = next(watch)
            assert [change.key for change in batch.changes] == [f"{n}"]
        print("reused", reused)
