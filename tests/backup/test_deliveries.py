"""Open and dead deliveries are part of a backup; after a restore they go on where they were."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from backup_help import run

from mesh_storage import ConflictError, Delivery, MeshStorage, Message, backup, schema
from mesh_storage.postgres.server import Server, open_server
from mesh_storage.settings import Settings
from mesh_storage.testing import Databases


def send(storage: MeshStorage, *numbers: int, key: str | None = None) -> None:
    with storage.begin() as uow:
        for number in numbers:
            uow.messages.send(Message(id=f"m-{number}", from_node="a", to_node="b", content=b""), key=key)


def claim(storage: MeshStorage) -> list[Delivery]:
    with storage.begin() as uow:
        return uow.messages.claim("b", limit=10)


@pytest.mark.parametrize("into", ["itself", "an empty database", "a deployed database"])
def test_deliveries_go_on_after_a_restore(
    storage: MeshStorage, server: Server, mesh_storage_databases: Databases, tmp_path: Path, into: str
) -> None:
    send(storage, 1, 2, key="k")
    send(storage, 3, 4)
    leased, dead, acknowledged = claim(storage)
    with storage.begin() as uow:
        uow.messages.bury([dead], "reason")
        uow.messages.ack([acknowledged])
    storage.backup(tmp_path / "backup", verify=True)
    with mesh_storage_databases.fresh(with_schema=into == "a deployed database") as other_url:
        target = server if into == "itself" else open_server(Settings(url=other_url))
        backup.restore(target, tmp_path / "backup", overwrite=into == "itself")
        run(target, "UPDATE mesh_deliveries SET available_at = now() WHERE state = 'leased'")  # as an older one's are
        schema.upgrade_server(target)
        with MeshStorage.open(other_url) if into != "itself" else storage.unit_of_work() as opened:
            restored = storage if into == "itself" else opened
            assert isinstance(restored, MeshStorage)
            (again,) = claim(restored)
            assert (again.message.id, again.attempts) == ("m-1", 2)
            assert again.token > leased.token
            with pytest.raises(ConflictError), restored.begin() as uow:
                uow.messages.ack([leased])
            send(restored, 4, 5, key="k")  # one was sent before
            with restored.begin() as uow:
                assert [each.reason for each in uow.messages.dead("b").items] == ["reason"]
                assert uow.messages.redrive("b") == 1
                uow.messages.extend([again], timedelta(hours=1))
                uow.messages.ack([again])
            assert [each.message.id for each in claim(restored)] == ["m-3", "m-2"]
            assert restored.health().ok
