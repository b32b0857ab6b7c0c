"""Errors: what the database says becomes the right class, with what a caller needs, and survives pickling."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import psycopg
import pytest
from psycopg.pq import DiagnosticField
from pydantic import SecretStr
from sqlalchemy import text

import mesh_storage
from mesh_storage import (
    AlreadyExistsError,
    InvalidInputError,
    MeshStorage,
    MeshStorageError,
    Message,
    MissingReferenceError,
    Node,
    NotFoundError,
    Route,
    SchemaMismatchError,
    SerializationError,
    Settings,
    StorageTimeoutError,
    UnavailableError,
    UnitOfWork,
)
from mesh_storage.errors import translate
from mesh_storage.testing import NodeFactory

CLASSES = [
    value
    for value in (getattr(mesh_storage, name) for name in mesh_storage.__all__)
    if isinstance(value, type) and issubclass(value, MeshStorageError)
]


def test_there_are_all_classes_of_the_contract() -> None:
    assert len(CLASSES) == 13
    assert issubclass(InvalidInputError, ValueError)
    assert {kind for kind in CLASSES if kind is not NotFoundError and kind().retryable} == {
        UnavailableError,
        SerializationError,
    }


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_survives_pickling(kind: type[MeshStorageError]) -> None:
    if kind is NotFoundError:
        error: MeshStorageError = NotFoundError("Node", "n")
    else:
        error = kind("what to do", sqlstate="23505", constraint="c")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert (type(again), str(again), vars(again)) == (kind, str(error), vars(error))


def test_an_error_without_words_says_what_its_class_means() -> None:
    assert str(UnavailableError()) == "The database cannot be reached, or the connection to it was lost."


def add_twice(uow: UnitOfWork) -> None:
    uow.nodes.add_many([NodeFactory.build(name="n"), NodeFactory.build(name="n")])


def add_dangling(uow: UnitOfWork) -> None:
    ids = [f"node_{'0' * 25}{i}" for i in (1, 2)]
    uow.routes.add(Route(source_node_id=ids[0], target_node_id=ids[1]))


def add_bad_port(uow: UnitOfWork) -> None:
    uow.nodes.add(Node(name="n", ip_address="h", port=70_000))


@pytest.mark.parametrize(
    ("act", "kind", "sqlstate", "constraint"),
    [
        (add_twice, AlreadyExistsError, "23505", "nodes_node_name_key"),
        (add_dangling, MissingReferenceError, "23503", "routes_source_node_id_fkey"),
        (add_bad_port, InvalidInputError, "23514", "nodes_port_check"),
    ],
)
def test_what_the_database_refuses_says_why(
    uow: UnitOfWork, act: Callable[[UnitOfWork], None], kind: type[MeshStorageError], sqlstate: str, constraint: str
) -> None:
    with pytest.raises(kind) as error:
        act(uow)
    assert (error.value.sqlstate, error.value.constraint, error.value.retryable) == (sqlstate, constraint, False)
    assert f"(SQLSTATE {sqlstate}, constraint {constraint})" in str(error.value)
    assert isinstance(error.value.__cause__, psycopg.Error)
    assert vars(pickle.loads(pickle.dumps(error.value))) == vars(error.value)  # noqa: S301 - our own bytes
    if isinstance(error.value, InvalidInputError):
        assert error.value.field == "Node.port"


def test_what_a_flush_of_the_session_raises_is_translated_at_commit(uow: UnitOfWork) -> None:
    uow.session.add(Message(id="x" * 65, from_node="a", to_node="b", content=b""))
    with pytest.raises(InvalidInputError) as error:
        uow.commit()
    assert error.value.sqlstate == "22001"


@pytest.mark.parametrize(
    ("sqlstate", "kind", "retryable"),
    [
        ("08006", UnavailableError, True),
        ("22021", InvalidInputError, False),
        ("23502", InvalidInputError, False),
        ("40001", SerializationError, True),
        ("40P01", SerializationError, True),
        ("42P01", SchemaMismatchError, False),
        ("53300", UnavailableError, True),
        ("55P03", StorageTimeoutError, False),
        ("57014", StorageTimeoutError, False),
        ("57P01", UnavailableError, True),
        ("57P03", UnavailableError, True),
        ("XX000", MeshStorageError, False),
    ],
)
def test_an_error_is_told_by_its_sqlstate(
    uow: UnitOfWork, sqlstate: str, kind: type[MeshStorageError], retryable: bool
) -> None:
    with pytest.raises(Exception) as raised:  # noqa: PT011 - any class may come, by the SQLSTATE
        uow.session.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{sqlstate}'; END $$"))
    translated = translate(raised.value)
    assert (type(translated), translated.sqlstate, translated.retryable) == (kind, sqlstate, retryable)


@pytest.mark.parametrize(("sqlstate", "stays"), [("53200", True), ("23514", True), ("26000", False), ("42P05", False)])
def test_an_error_costs_the_connection_only_where_that_is_the_cause(
    mesh_storage_url: str, sqlstate: str, *, stays: bool
) -> None:
    """Memory may be free again at once; a prepared statement that a session has not, it has not next time either."""
    backend = text("SELECT pg_backend_pid()")
    settings = Settings(url=SecretStr(mesh_storage_url), pool_size=1)
    with MeshStorage.open(settings=settings) as storage:
        with pytest.raises(MeshStorageError), storage.begin() as uow:
            before = uow.session.scalars(backend).one()
            uow.session.execute(text(f"DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '{sqlstate}'; END $$"))
        with storage.begin() as uow:
            assert (uow.session.scalars(backend).one() == before) is stays


def test_a_terminated_connection_is_unavailable_and_the_next_unit_of_work_has_another(storage: MeshStorage) -> None:
    with pytest.raises(UnavailableError) as error, storage.begin() as uow:
        pid = uow.session.execute(text("SELECT pg_backend_pid()")).scalar_one()
        with storage.begin() as other:
            other.session.execute(text(f"SELECT pg_terminate_backend({pid}, 5000)"))
        uow.state.put("k", b"v")
    assert error.value.retryable
    with storage.begin() as uow:
        assert uow.state.find("k") is None


def test_a_connection_that_died_in_the_pool_is_replaced_before_anybody_sees_it(storage: MeshStorage) -> None:
    with storage.begin() as one, storage.begin() as two:
        pids = [uow.session.execute(text("SELECT pg_backend_pid()")).scalar_one() for uow in (one, two)]
    with storage.begin() as uow:
        mine = uow.session.execute(text("SELECT pg_backend_pid()")).scalar_one()
        for pid in set(pids) - {mine}:
            uow.session.execute(text(f"SELECT pg_terminate_backend({pid}, 5000)"))
        (survivor,) = {mine} & set(pids)
    with storage.begin() as one, storage.begin() as two:
        one.state.put("a", b"")
        two.state.put("b", b"")
        now = {uow.session.execute(text("SELECT pg_backend_pid()")).scalar_one() for uow in (one, two)}
        assert now & set(pids) == {survivor}
    with storage.begin(read_only=True) as uow:
        assert [entry.key for entry in uow.state.stream()] == ["a", "b"]


@pytest.mark.parametrize(
    ("function", "kind"),
    [("GetCitusTableCacheEntry", SerializationError), ("LookupShardRelationFromCatalog", SerializationError),
     ("another", MeshStorageError)],
)  # fmt: skip
def test_an_internal_error_is_retryable_where_it_says_that_a_table_was_distributed(
    function: str, kind: type[MeshStorageError]
) -> None:
    fields = {DiagnosticField.SQLSTATE: b"XX000", DiagnosticField.SOURCE_FUNCTION: function.encode()}
    error = translate(psycopg.errors.InternalError_(info={**fields}))
    assert (type(error), error.retryable, error.sqlstate) == (kind, kind is SerializationError, "XX000")
