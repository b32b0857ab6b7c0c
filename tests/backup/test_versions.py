"""What a restore makes of versions and of the log of changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from alembic import command
from backup_help import run

from mesh_storage import CompactedError, ConflictError, MeshStorage, Node, backup, schema
from mesh_storage.postgres.server import Server, open_server
from mesh_storage.settings import Settings
from mesh_storage.testing import Databases


def version_of(storage: MeshStorage, key: str) -> int:
    with storage.begin() as uow:
        version = uow.state.get(key).version
    assert version is not None
    return version


def works_as_before(storage: MeshStorage, seen: int, cursor: str) -> None:
    """Show that no version is given twice, that changes are logged, and that an old cursor is refused."""
    with storage.begin() as uow:
        with pytest.raises(CompactedError):
            uow.changes.since(cursor, ["state"])
        beginning = uow.changes.since(None, ["state", "nodes"])
    keys = {change.aggregate: change.key for change in beginning.changes}
    assert (len(beginning.changes), keys["state"]) == (2, "k")
    with storage.begin() as uow:
        assert (uow.state.put("k", b"after").version or 0) > seen
        node = uow.nodes.get(keys["nodes"])
        node.description = "after"
        assert (uow.nodes.update(node).row_version or 0) > seen
    with storage.begin() as uow:
        assert [change.key for change in uow.changes.since(beginning.cursor, ["state"]).changes] == ["k"]
        uow.state.delete("k")
    with storage.begin() as uow:
        (gone,) = uow.changes.since(beginning.cursor, ["state"]).changes
        assert gone.entry is None


@pytest.fixture
def filled(storage: MeshStorage) -> MeshStorage:
    """Return a storage with an entry and a node."""
    with storage.begin() as uow:
        uow.state.put("k", b"before")
    with storage.begin() as uow:
        uow.nodes.add(Node(name="n", ip_address="10.0.0.1"))
    return storage


@pytest.mark.parametrize("into", ["itself", "an empty database", "a deployed database"])
def test_cursors_from_before_are_refused_and_versions_go_on(
    filled: MeshStorage, server: Server, mesh_storage_databases: Databases, tmp_path: Path, into: str
) -> None:
    filled.backup(tmp_path / "backup", verify=True)
    with filled.begin() as uow:
        cursor = uow.changes.cursor()
        last = uow.state.put("k", b"lost").version
    assert last is not None
    if into == "itself":
        backup.restore(server, tmp_path / "backup", overwrite=True)
        works_as_before(filled, last, cursor)
        return
    with (
        mesh_storage_databases.fresh(with_schema=into == "a deployed database") as url,
        MeshStorage(Settings(), open_server(Settings(url=url))) as other,
    ):
        other.restore(tmp_path / "backup")
        works_as_before(other, last, cursor)


def test_a_backup_of_an_older_revision_gets_new_versions(filled: MeshStorage, server: Server, tmp_path: Path) -> None:
    with filled.begin() as uow:
        cursor = uow.changes.cursor()
    last = version_of(filled, "k")
    command.downgrade(schema.alembic_config(server.connect), "0009")
    backup.backup(server, tmp_path / "backup")
    schema.upgrade_server(server)
    with filled.begin() as uow:
        newer = uow.state.put("k", b"newer")
        assert newer.version is not None
        assert newer.version > last
    backup.restore(server, tmp_path / "backup", overwrite=True)
    with filled.begin() as uow, pytest.raises(ConflictError), uow.savepoint():
        uow.state.put("k", b"", if_version=newer.version)
    works_as_before(filled, newer.version, cursor)


def test_the_log_is_in_no_backup_and_ours_is_not_called_others(
    filled: MeshStorage, bare: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = filled.backup(tmp_path / "backup")
    assert not {"mesh_changes", "mesh_changes_epoch"} & set(made.rows)
    run(bare, "SELECT 1")
    backup.restore(bare, tmp_path / "backup")
    assert "skipped" not in caplog.text
