"""Nothing is half done: failures of the session, old snapshots, limits of the asyncio side, a storage nobody holds."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy.exc import IntegrityError

from mesh_storage import (
    AlreadyExistsError,
    ConfigurationError,
    ConflictError,
    InvalidInputError,
    MeshStorage,
    MeshStorageError,
    SerializationError,
    StateEntry,
)
from mesh_storage.aio import AsyncMeshStorage
from mesh_storage.postgres.characteristics import Isolation


def keys(storage: MeshStorage) -> list[str]:
    with storage.begin(read_only=True) as uow:
        return [entry.key for entry in uow.state.stream()]


def test_a_flush_that_failed_and_was_caught_lets_nothing_be_committed(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.state.put("there", b"")
    with pytest.raises(MeshStorageError), storage.begin() as uow:
        uow.state.put("before", b"")
        uow.session.add(StateEntry(key="there", value=b""))
        with pytest.raises(IntegrityError):
            uow.session.flush()
        uow.state.put("after", b"")
    assert keys(storage) == ["there"]


@pytest.mark.parametrize("used_before", [False, True])
def test_a_savepoint_undoes_what_the_session_did_in_it_and_no_more(storage: MeshStorage, *, used_before: bool) -> None:
    with storage.begin() as uow:
        uow.state.put("there", b"")
    with storage.begin() as uow:
        uow.state.put("before", b"")
        if used_before:
            assert uow.session.get(StateEntry, "there") is not None
        with pytest.raises(AlreadyExistsError), uow.savepoint():
            uow.state.put("inside", b"")
            uow.session.add(StateEntry(key="before", value=b""))
        uow.state.put("after", b"")
    assert keys(storage) == ["after", "before", "there"]


def test_a_rollback_of_the_session_rolls_back_everything(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.state.put("before", b"")
        uow.session.rollback()
        uow.state.put("after", b"")
    assert keys(storage) == ["after"]


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_an_old_snapshot_makes_no_gap_in_the_log(storage: MeshStorage, isolation: Isolation) -> None:
    with pytest.raises(InvalidInputError), storage.begin(isolation=isolation) as old:
        assert old.consensus_log.last_index() == 0
        with storage.begin() as uow:
            uow.consensus_log.append_many([(1, index, None) for index in (1, 2, 3)])
        old.consensus_log.append(1, 100, None)
    with pytest.raises(SerializationError), storage.begin(isolation=isolation) as old:
        assert old.consensus_log.last_index() == 3
        with storage.begin() as uow:
            uow.consensus_log.delete_range(2, 3)
        old.consensus_log.append(1, 4, None)
    with storage.begin(isolation=isolation) as uow:
        uow.consensus_log.append(1, 2, None)
    with storage.begin(read_only=True) as uow:
        assert [entry.index for entry in uow.consensus_log.range(1, 100)] == [1, 2]


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_an_old_snapshot_mixes_no_routing_tables(storage: MeshStorage, isolation: Isolation) -> None:
    with storage.begin() as uow:
        uow.routing_table.replace_all({"a": 1})
    with pytest.raises(InvalidInputError), storage.begin(isolation=isolation) as old:
        old.routing_table.all()
        old.routing_table.replace_all({"b": 1})
    with storage.begin(isolation=isolation) as uow:
        uow.routing_table.replace_all({"c": 1})
    with storage.begin(read_only=True) as uow:
        assert uow.routing_table.all() == {"c": 1}


def test_an_empty_or_committed_async_unit_of_work_may_have_a_timeout(mesh_storage_url: str) -> None:
    async def main() -> None:
        async with AsyncMeshStorage.open(mesh_storage_url) as storage:
            async with storage.begin(timeout=5):
                pass
            async with storage.begin(timeout=5) as uow:
                await uow.state.put("k", b"")
                await uow.commit()
            async with storage.begin(read_only=True) as uow:
                assert [entry.key async for entry in uow.state.stream()] == ["k"]

    asyncio.run(main())


def test_a_storage_lives_as_long_as_its_unit_of_work() -> None:
    with MeshStorage.open("memory:").begin() as uow:
        uow.state.put("k", b"v")
        assert uow.state.get("k").value == b"v"


@pytest.mark.parametrize("setting", ["connect_timeout=abc", "sslmode=bogus", "application_name=a%00b"])
def test_a_bad_parameter_of_the_url_is_a_configuration_error(setting: str) -> None:
    with pytest.raises(ConfigurationError):
        MeshStorage.open(f"postgresql://127.0.0.1/mesh?{setting}")


def test_a_timeout_in_the_url_is_a_number(mesh_storage_url: str) -> None:
    with MeshStorage.open(f"{mesh_storage_url}&connect_timeout=3") as storage:
        assert storage.health().ok


def test_a_negative_zero_is_appended_twice_without_harm(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.consensus_log.append(1, 1, {"x": -0.0})
        uow.consensus_log.append(1, 1, {"x": -0.0})
        with pytest.raises(ConflictError), uow.savepoint():
            uow.consensus_log.append(1, 1, {"x": -1.0})
    with storage.begin(read_only=True) as uow:
        assert [(entry.index, entry.entry) for entry in uow.consensus_log.range(1, 10)] == [(1, {"x": 0.0})]
