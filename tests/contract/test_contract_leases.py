"""Leases, by either API and by a pooler: one holder at a time, renewed, given back, and fenced."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from mesh_storage import ClosedError, ConflictError, MeshStorage
from tests.contract.conftest import Open
from tests.processes import eventually

TTL = timedelta(seconds=0.6)
LONG = timedelta(hours=1)


def stored(storage: MeshStorage, name: str = "leader") -> Any:
    with storage.begin(read_only=True) as uow:
        return uow.state.find(name)


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if vars(each).get("event") == "lease"]


def taken(storage: MeshStorage, holder: bytes = b"other", **given: Any) -> Any:
    """Return the error with which a lease is refused."""
    with pytest.raises(ConflictError) as error, storage.lease("leader", holder, **{"ttl": TTL, "wait": 0} | given):
        raise AssertionError("it is held")
    return error.value


def test_it_is_an_entry_of_the_shared_state_which_is_gone_with_the_block(storage: MeshStorage) -> None:
    with storage.lease("leader", b"node-a", ttl=LONG) as lease:
        entry = stored(storage)
        assert (entry.value, entry.version) == (b"node-a", lease.token)
        assert abs(entry.expires_at - entry.updated_at - LONG) < timedelta(seconds=1)
        assert lease.held
    assert not lease.held
    assert stored(storage) is None
    assert lease.token == entry.version


def test_it_is_renewed_for_as_long_as_the_block_runs(storage: MeshStorage) -> None:
    with storage.lease("leader", b"node-a", ttl=TTL) as lease:
        first = stored(storage)
        end = time.monotonic() + 3 * TTL.total_seconds()
        while time.monotonic() < end:
            assert lease.held
            assert stored(storage).version == lease.token == first.version
            time.sleep(0.02)
        assert stored(storage).expires_at > first.expires_at + 2 * TTL


def test_who_does_not_get_it_learns_who_has_it(storage: MeshStorage) -> None:
    with storage.lease("leader", b"node-a", ttl=LONG) as lease:
        # The holder's name says nothing: another of the same name is another.
        for holder in (b"node-b", b"node-a"):
            refused = taken(storage, holder)
            assert (refused.holder, refused.actual) == (b"node-a", lease.token)
        assert lease.held
        with storage.lease("another", b"node-b", ttl=LONG, wait=0) as other:
            assert other.token > lease.token


def test_a_wait_ends_when_it_is_over_and_not_before(storage: MeshStorage) -> None:
    with storage.lease("leader", b"node-a", ttl=LONG):
        begun = time.monotonic()
        assert taken(storage, wait=0.5).holder == b"node-a"
        assert time.monotonic() - begun >= 0.5


@pytest.mark.parametrize("wait", [None, 30])
def test_who_waits_gets_it_soon_after_it_is_given_back(storage: MeshStorage, wait: float | None) -> None:
    def follow() -> tuple[float, int]:
        with storage.lease("leader", b"node-b", ttl=LONG, wait=wait) as lease:
            assert lease.held
            return time.monotonic(), lease.token

    with ThreadPoolExecutor(1) as threads:
        with storage.lease("leader", b"node-a", ttl=LONG) as lease:
            following = threads.submit(follow)
            time.sleep(0.3)  # It waits by then; if not, the less is shown.
            assert not following.done()
        left = time.monotonic()
        followed, token = following.result(30)
    assert followed - left < 1
    assert token > lease.token


def test_tokens_rise_from_holder_to_holder(storage: MeshStorage) -> None:
    tokens = []
    one = storage.lease("leader", b"node-a", ttl=LONG, wait=0)
    for number in range(6):
        with one if number == 3 else storage.lease("leader", b"node-a", ttl=LONG, wait=0) as lease:
            tokens.append(lease.token)
    assert tokens == sorted(set(tokens))


@pytest.mark.parametrize("by", ["put", "delete", "SQL", "expiry"])
def test_it_is_not_held_any_more_once_another_took_it(
    storage: MeshStorage, mesh_storage_url: str, caplog: pytest.LogCaptureFixture, by: str
) -> None:
    caplog.set_level(logging.INFO, "mesh_storage")
    with storage.lease("leader", b"secret holder", ttl=TTL) as lease:
        if by in ("put", "delete"):
            with storage.begin() as uow:
                uow.state.put("leader", b"usurper") if by == "put" else uow.state.delete("leader")
        else:
            change = "DELETE FROM mesh_state" if by == "SQL" else "UPDATE mesh_state SET expires_at = now()"
            with psycopg.connect(mesh_storage_url, autocommit=True) as connection:
                connection.execute(change)
        assert eventually(lambda: not lease.held, TTL.total_seconds())
        with pytest.raises(ConflictError), storage.begin() as uow:
            uow.state.check("leader", version=lease.token)
        assert eventually(lambda: "lease lost" in events(caplog))
    assert events(caplog) == ["lease acquired", "lease lost"]
    lost = next(each for each in caplog.records if each.getMessage() == "lease lost")
    assert (lost.levelno, vars(lost)["reason"]) == (logging.WARNING, "taken")
    # What another put there stays there.
    assert (stored(storage) is not None) == (by == "put")
    assert "secret" not in caplog.text
    assert not any("secret" in str(vars(each)) for each in caplog.records)


def test_what_became_of_it_is_logged(storage: MeshStorage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mesh_storage")
    with storage.lease("leader", b"secret holder", ttl=TTL) as lease:
        time.sleep(TTL.total_seconds())  # renewals are not worth a record
    assert events(caplog) == ["lease acquired", "lease released"]
    for record in caplog.records:
        assert "secret" not in str(vars(record))
        if vars(record).get("event") == "lease":
            assert (vars(record)["lease"], vars(record)["token"]) == ("leader", lease.token)


def test_leaving_masks_nothing_whatever_became_of_the_entry(open_storage: Open, mesh_storage_url: str) -> None:
    def lose(_: MeshStorage) -> None:
        with psycopg.connect(mesh_storage_url, autocommit=True) as connection:
            connection.execute("DELETE FROM mesh_state")

    def lock(_: MeshStorage) -> None:
        connection = psycopg.connect(mesh_storage_url)
        connection.execute("LOCK TABLE mesh_state")
        threading.Timer(1, connection.close).start()

    faults: list[Callable[[MeshStorage], None]] = [lose, lock, lambda storage: storage.close()]
    for fault in faults:
        with (
            open_storage(mesh_storage_url) as storage,
            pytest.raises(ZeroDivisionError),
            storage.lease("leader", b"a", ttl=TTL),
        ):
            fault(storage)
            raise ZeroDivisionError
        with open_storage(mesh_storage_url) as storage, storage.lease("leader", b"a", ttl=TTL) as lease:
            fault(storage)
        assert not lease.held


def test_a_storage_that_is_closed_in_the_block_renews_no_longer(
    open_storage: Open, mesh_storage_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mesh_storage")
    with open_storage(mesh_storage_url) as storage, open_storage(mesh_storage_url) as other:
        with storage.lease("leader", b"a", ttl=TTL) as lease:
            storage.close()
            assert eventually(lambda: not lease.held, 2 * TTL.total_seconds())
            with other.lease("leader", b"b", ttl=TTL, wait=5) as following:
                assert following.token > lease.token
        assert [vars(each)["reason"] for each in caplog.records if each.getMessage() == "lease lost"] == ["closed"]
        with pytest.raises(ClosedError), storage.lease("leader", b"a", ttl=TTL):
            pass


def test_no_connection_of_the_pool_is_needed(open_storage: Open, mesh_storage_url: str) -> None:
    with open_storage(mesh_storage_url, pool_size=1) as storage, storage.begin() as uow:
        uow.state.put("k", b"the only connection is in use")
        with storage.lease("leader", b"a", ttl=TTL) as lease:
            end = time.monotonic() + 2 * TTL.total_seconds()
            while time.monotonic() < end:
                assert lease.held
                time.sleep(0.02)
        with storage.lease("leader", b"a", ttl=TTL, wait=0):
            assert storage.health().pool_in_use == 1


def test_what_has_expired_is_free_and_what_never_expires_is_not(storage: MeshStorage, mesh_storage_url: str) -> None:
    with storage.begin() as uow:
        version = uow.state.put("leader", b"for ever").version
    refused = taken(storage, wait=0.3)
    assert (refused.holder, refused.actual) == (b"for ever", version)
    with psycopg.connect(mesh_storage_url, autocommit=True) as connection:
        connection.execute("UPDATE mesh_state SET expires_at = now()")
    with storage.lease("leader", b"a", ttl=LONG, wait=0) as lease:
        assert lease.token > version


def test_what_an_overtaken_holder_writes_late_is_refused(storage: MeshStorage, mesh_storage_url: str) -> None:
    def write(token: int, value: bytes) -> None:
        with storage.begin() as uow:
            uow.state.check("leader", version=token)
            uow.state.put("written", value)

    with storage.lease("leader", b"a", ttl=LONG) as lease:
        write(lease.token, b"in time")
        with psycopg.connect(mesh_storage_url, autocommit=True) as connection:
            connection.execute("UPDATE mesh_state SET expires_at = now() WHERE key = 'leader'")
        with storage.lease("leader", b"b", ttl=LONG, wait=0) as following:
            assert lease.held  # nobody told it yet
            with pytest.raises(ConflictError) as error:
                write(lease.token, b"late")
            assert error.value.actual == following.token
            assert stored(storage, "written").value == b"in time"
            write(following.token, b"by the next")
    with pytest.raises(ConflictError):
        write(following.token, b"after it was given back")
    assert stored(storage, "written").value == b"by the next"


def test_a_unit_of_work_that_stands_still_is_ended_so_that_another_can_follow(
    open_storage: Open, mesh_storage_url: str
) -> None:
    ttl = timedelta(seconds=1)
    with open_storage(mesh_storage_url) as storage, open_storage(mesh_storage_url) as other:
        with storage.lease("leader", b"a", ttl=ttl) as lease, storage.unit_of_work() as frozen:
            frozen.state.check("leader", version=lease.token)
            frozen.state.put("written", b"never")
            begun = time.monotonic()
            with other.lease("leader", b"b", ttl=ttl) as following:
                assert time.monotonic() - begun < ttl.total_seconds() + 1
                assert not lease.held
                assert following.token > lease.token
                with pytest.raises(Exception, match=r"lost|ended|terminat|timeout"):
                    frozen.commit()
        assert stored(other, "written") is None


def test_it_is_acquired_once_at_a_time(storage: MeshStorage) -> None:
    together = threading.Barrier(8)
    held: list[int] = []

    def elect(number: int) -> Any:
        together.wait(30)
        try:
            with storage.lease("leader", b"%d" % number, ttl=LONG, wait=0) as lease:
                held.append(lease.token)
                together.wait(30)
        except ConflictError as error:
            together.wait(30)
            return error.holder
        return None

    with ThreadPoolExecutor(8) as threads:
        holders = list(threads.map(elect, range(8)))
    assert len(held) == 1
    winner = b"%d" % holders.index(None)
    assert [holder for holder in holders if holder is not None] == [winner] * 7
