"""Shows that opening and refusing fail with the same errors on the sync and the async side."""

from __future__ import annotations

import math
import pickle
import re
import socket
import traceback
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from mesh_storage import (
    AlreadyExistsError,
    ConfigurationError,
    InvalidInputError,
    Mesh,
    MeshStorageError,
    Message,
    Node,
    SchemaMismatchError,
    UnavailableError,
    UnitOfWork,
    testing,
)
from tests.contract.conftest import Open


@pytest.mark.parametrize("url", ["mysql://host/db", "postgresql:///db?no_such=1", "nonsense"])
def test_a_bad_url_is_a_configuration_error_that_names_the_setting(open_storage: Open, url: str) -> None:
    with pytest.raises(ConfigurationError, match="url"), open_storage(url):
        pass


def test_a_password_never_shows_in_an_error(open_storage: Open) -> None:
    for url in ("postgresql://user:hidden word@host/db", "postgresql://user:hiddenword@127.0.0.1:1/db"):
        with pytest.raises((ConfigurationError, UnavailableError)) as error, open_storage(url):
            pass
        shown = "".join(traceback.TracebackException.from_exception(error.value).format())
        assert "hidden" not in re.sub(r"(?m)^    .*$", "", shown)  # without the lines of source code


def test_a_server_that_is_not_there_is_unavailable(open_storage: Open, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    for url in (f"postgresql://user@127.0.0.1:{port}/mesh", f"postgresql:///mesh?host={tmp_path}"):
        with pytest.raises(UnavailableError) as error, open_storage(url):
            pass
        assert error.value.retryable
        assert error.value.__cause__ is not None


def test_a_database_without_the_schema_says_what_to_run(
    open_storage: Open, mesh_storage_databases: testing.Databases
) -> None:
    with mesh_storage_databases.fresh(with_schema=False) as url:
        with (
            pytest.raises(SchemaMismatchError, match=r"mesh-storage upgrade \(or alembic upgrade head\)"),
            open_storage(url),
        ):
            pass
        with pytest.raises(UnavailableError), open_storage(url.replace("/mesh_storage_", "/no_such_")):
            pass


def test_a_taken_name_tells_the_constraint_and_pickles(uow: UnitOfWork) -> None:
    with pytest.raises(AlreadyExistsError) as error, uow.savepoint():
        uow.meshes.add_many([Mesh(name="taken"), Mesh(name="taken")])
    copy = pickle.loads(pickle.dumps(error.value))  # noqa: S301 - our own bytes
    for each in (error.value, copy):
        assert (each.sqlstate, each.constraint, each.retryable) == ("23505", "mesh_mesh_name_key", False)
        assert str(each) == str(error.value)
    assert isinstance(error.value.__cause__, Exception)
    assert uow.meshes.count() == 0


REFUSED: dict[str, tuple[str, Any]] = {
    "an empty key": ("StateEntry.key", lambda uow: uow.state.put("", b"")),
    "a key that is too long": ("StateEntry.key", lambda uow: uow.state.put("x" * 256, b"")),
    "text with NUL": ("StateEntry.key", lambda uow: uow.state.get("\0")),
    "a lone surrogate": ("Mesh.description", lambda uow: uow.meshes.add(Mesh(name="m", description="\ud800"))),
    "NaN": ("ConfigEntry.value", lambda uow: uow.runtime_config.put("k", [math.nan])),
    "a large integer": ("LogEntry.term", lambda uow: uow.consensus_log.append(2**63, 1, {})),
    "a naive time": (
        "Node.created",
        lambda uow: uow.nodes.add(Node(name="n", ip_address="i", created=datetime(2026, 1, 1))),  # noqa: DTZ001
    ),
    "text for bytes": ("StateEntry.value", lambda uow: uow.state.put("k", "text")),
    "no message": ("message", lambda uow: uow.messages.store(Mesh(name="m"))),
    "no duration": ("older_than", lambda uow: uow.node_states.stale(5)),
    "a limit of nothing": ("limit", lambda uow: uow.node_states.stale(timedelta(1), limit=0)),
    "a bad id": ("Message.id", lambda uow: uow.messages.store(Message(id="", from_node="a", to_node="b", content=b""))),
}


@pytest.mark.parametrize(("field", "call"), REFUSED.values(), ids=list(REFUSED))
def test_what_cannot_be_stored_is_refused_by_name_before_it_is_sent(uow: UnitOfWork, field: str, call: Any) -> None:
    with pytest.raises(InvalidInputError) as error:
        call(uow)
    assert error.value.field == field
    assert isinstance(error.value, (MeshStorageError, ValueError))
    assert uow.state.put("still", b"works").value == b"works"


def test_a_batch_size_out_of_range_is_refused(uow: UnitOfWork) -> None:
    sizes: tuple[Any, ...] = (-1, 10_001, "1", 0)  # 0 at the end: a loop that takes no rows has no end
    for size in sizes:
        with pytest.raises(InvalidInputError) as error:
            list(uow.messages.stream(batch_size=size))
        assert error.value.field == "batch_size"
