"""What a commit says of a synchronous standby that is not there: never a plain success."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Iterator

import psycopg
import pytest
from sqlalchemy import text

from mesh_storage import MeshStorage, MeshStorageError, StorageTimeoutError, UnavailableError, UnitOfWork
from mesh_storage.aio import AsyncMeshStorage, AsyncUnitOfWork


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the URL of a server that waits for a standby which never comes."""
    where = f"embedded:{tmp_path_factory.mktemp('primary') / 'server'}"
    with MeshStorage.open(where) as storage:
        with psycopg.connect(**storage._server.connect, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
            connection.execute("SELECT pg_reload_conf()")
        yield where


@pytest.fixture
def storage(url: str) -> Iterator[MeshStorage]:
    with MeshStorage.open(url) as opened:
        yield opened


@pytest.fixture
def observer(storage: MeshStorage) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    with psycopg.connect(**storage._server.connect, autocommit=True) as connection:
        yield connection


def put(uow: UnitOfWork) -> None:
    uow.state.put("k", b"v")


def signal_the_waiting(observer: psycopg.Connection[tuple[object, ...]], function: str) -> threading.Thread:
    """Cancel or terminate, in a thread, the backend that will wait for the standby."""

    def work() -> None:
        while not observer.execute(
            f"SELECT {function}(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        ).fetchall():
            pass

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_timeout_of_the_commit_says_that_it_is_committed_here(storage: MeshStorage) -> None:
    with pytest.raises(StorageTimeoutError, match="standby") as error, storage.begin(timeout=0.5) as uow:
        uow.state.put("timeout", b"v")
    assert (error.value.committed, error.value.retryable) == ("locally", False)
    assert pickle.loads(pickle.dumps(error.value)).committed == "locally"  # noqa: S301 - ours
    with storage.begin(read_only=True) as uow:
        assert uow.state.get("timeout").value == b"v"


def test_a_commit_that_somebody_cancels_is_no_success(
    storage: MeshStorage, observer: psycopg.Connection[tuple[object, ...]]
) -> None:
    thread = signal_the_waiting(observer, "pg_cancel_backend")
    with pytest.raises(StorageTimeoutError) as error, storage.begin() as uow:
        put(uow)
    thread.join()
    assert error.value.committed == "locally"


def test_a_commit_whose_session_is_ended_is_known_to_be_here(
    storage: MeshStorage, observer: psycopg.Connection[tuple[object, ...]]
) -> None:
    thread = signal_the_waiting(observer, "pg_terminate_backend")
    with pytest.raises(UnavailableError) as error, storage.begin() as uow:
        put(uow)
    thread.join()
    assert (error.value.committed, error.value.retryable) == ("locally", False)


def test_run_does_not_do_it_again(storage: MeshStorage) -> None:
    calls = 0

    def work(uow: UnitOfWork) -> None:
        nonlocal calls
        calls += 1
        put(uow)

    with pytest.raises(StorageTimeoutError):
        storage.run(work, timeout=0.3)
    with pytest.raises(StorageTimeoutError):
        storage.run(work, within=0.5)
    assert calls == 2


def test_asyncio_says_the_same(url: str) -> None:
    async def main() -> None:
        async with AsyncMeshStorage.open(url) as storage:

            async def work(uow: AsyncUnitOfWork) -> None:
                await uow.state.put("asyncio", b"v")

            with pytest.raises(StorageTimeoutError, match="standby") as error:
                await storage.run(work, timeout=0.5)
            assert error.value.committed == "locally"
            async with storage.begin(read_only=True) as uow:
                assert (await uow.state.get("asyncio")).value == b"v"

    asyncio.run(main())


def test_what_is_relaxed_waits_for_no_standby(storage: MeshStorage) -> None:
    with storage.begin(durability="relaxed", timeout=5) as uow:
        put(uow)


def test_a_session_that_commits_is_no_plain_success_either(storage: MeshStorage) -> None:
    with pytest.raises(StorageTimeoutError) as error, storage.begin(timeout=0.5) as uow:
        uow.session.connection()
        put(uow)
    assert error.value.committed == "locally"


def test_other_errors_say_that_nothing_is_committed(storage: MeshStorage) -> None:
    with pytest.raises(MeshStorageError) as error, storage.begin() as uow:
        uow.nodes.get("node_01J9ZQ4E8G3Q1M1V7W2T5K6X8Y")
    assert error.value.committed == "no"


def test_the_next_unit_of_work_on_the_connection_is_a_success(
    storage: MeshStorage, observer: psycopg.Connection[tuple[object, ...]]
) -> None:
    thread = signal_the_waiting(observer, "pg_cancel_backend")
    with pytest.raises(StorageTimeoutError), storage.begin() as uow:
        put(uow)
    thread.join()
    for read_only in (True, False):
        with storage.begin(read_only=read_only) as uow:
            assert uow.state.get("k").value == b"v"


def test_a_commit_that_failed_is_not_said_to_be_rolled_back(
    storage: MeshStorage, observer: psycopg.Connection[tuple[object, ...]]
) -> None:
    thread = signal_the_waiting(observer, "pg_terminate_backend")
    with pytest.raises(MeshStorageError) as error, storage.begin() as uow:
        uow.state.put("twice", b"v")
        with pytest.raises(UnavailableError):
            uow.commit()
    thread.join()
    assert (error.value.committed, error.value.retryable) == ("locally", False)


def test_a_connection_that_is_lost_before_a_relaxed_commit_has_committed_nothing(
    storage: MeshStorage, observer: psycopg.Connection[tuple[object, ...]]
) -> None:
    with pytest.raises(UnavailableError) as error, storage.begin(durability="relaxed") as uow:
        put(uow)
        pid = uow.session.execute(text("SELECT pg_backend_pid()")).scalar_one()
        observer.execute("SELECT pg_terminate_backend(%s, 10000)", [pid])
    assert error.value.committed == "no"
