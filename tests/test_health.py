"""Health: each fact by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text

from mesh_storage import MeshStorage, SchemaMismatchError, UnavailableError, schema


def test_all_is_well(storage: MeshStorage) -> None:
    health = storage.health()
    assert health.ok
    assert (health.connected, health.writable, health.revision, health.head) == (
        True,
        True,
        schema.head(),
        schema.head(),
    )
    assert health.round_trip_ms is not None
    assert health.round_trip_ms > 0


def test_a_server_that_takes_no_writes_is_seen(mesh_storage_url: str) -> None:
    with MeshStorage.open(mesh_storage_url) as storage, storage.begin() as uow:
        name = uow.session.execute(text("SELECT current_database()")).scalar_one()
        uow.session.execute(text(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'))
    with MeshStorage.open(mesh_storage_url) as storage:
        health = storage.health()
        assert (health.ok, health.connected, health.writable) == (False, True, False)
        with pytest.raises(UnavailableError), storage.begin() as uow:
            uow.state.put("k", b"v")


def test_a_server_that_is_away_is_seen(tmp_path: Path) -> None:
    with MeshStorage.open(f"embedded:{tmp_path / 'mesh'}") as storage:
        embedded = storage._server.embedded
        assert embedded is not None
        embedded.close()
        health = storage.health()
        assert (health.ok, health.connected, health.writable, health.revision) == (False, False, False, None)
        assert isinstance(health.error, UnavailableError)


@pytest.mark.parametrize(
    ("revision", "words"),
    [
        ("0001", "out of date.*mesh-storage upgrade"),
        ("9999", "too new.*newer"),
        (None, "no mesh_storage schema.*mesh-storage upgrade"),
    ],
)
def test_another_schema_is_seen_and_not_opened(mesh_storage_url: str, revision: str | None, words: str) -> None:
    with MeshStorage.open(mesh_storage_url) as storage:
        with storage.begin() as uow:
            change = (
                "DELETE FROM mesh_alembic_version"
                if revision is None
                else f"UPDATE mesh_alembic_version SET version_num = '{revision}'"
            )
            uow.session.execute(text(change))
        health = storage.health()
        assert (health.ok, health.connected, health.writable, health.revision) == (False, True, True, revision)
    with pytest.raises(SchemaMismatchError, match=words):
        MeshStorage.open(mesh_storage_url)
