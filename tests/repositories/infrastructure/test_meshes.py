"""Shows the meshes: defined by administrators, found by name, and joined by those who show the join key."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import select, text

from mesh_storage import AlreadyExistsError, InvalidInputError, Mesh, MeshStorage, NotFoundError, UnitOfWork
from mesh_storage.models.base import new_id
from mesh_storage.testing import MeshFactory

NOWHERE = new_id("mesh")
KEYS = ["secret", " ", "x" * 1000, "\u05e9\u05dc\u05d5\u05dd", "\U0001f600", "100%_'\\{}$"]


def hash_of(uow: UnitOfWork, mesh_id: str) -> str | None:
    """Return the hash of a join key, which no aggregate has."""
    return uow.session.scalar(select(Mesh.join_key_hash).where(Mesh.id == mesh_id))


def test_add_gives_the_mesh_back_with_its_id_defaults_and_times(uow: UnitOfWork) -> None:
    mesh = Mesh(name="main")
    assert uow.meshes.add(mesh) is mesh
    assert mesh.id.startswith("mesh_")
    assert (mesh.description, mesh.allow_join, mesh.status) == ("", False, "STATUS_PENDING")
    assert mesh.public_key == ""
    assert hash_of(uow, mesh.id) is None
    assert mesh.created is not None
    assert mesh.created == mesh.updated


def test_add_keeps_everything_that_is_given(storage: MeshStorage) -> None:
    given: dict[str, Any] = {
        "id": new_id("mesh"),
        "name": "main",
        "description": "the main one",
        "allow_join": True,
        "status": "STATUS_CONNECTED",
        "public_key": "ssh-ed25519 AAAA",
    }
    with storage.begin() as uow:
        uow.meshes.add(Mesh(**given))
    with storage.unit_of_work() as uow:
        found = uow.meshes.get(given["id"])
        assert {name: getattr(found, name) for name in given} == given
        assert uow.meshes.get_by_name("main").id == given["id"]


@pytest.mark.parametrize("taken", ["id", "name"])
def test_a_taken_id_or_name_is_refused_and_leaves_what_was_given_alone(uow: UnitOfWork, taken: str) -> None:
    there = MeshFactory.create(uow=uow)
    mesh = MeshFactory.build(**{taken: getattr(there, taken)})
    with pytest.raises(AlreadyExistsError) as error, uow.savepoint():
        uow.meshes.add(mesh)
    assert error.value.sqlstate == "23505"
    assert error.value.constraint == {"id": "mesh_pkey", "name": "mesh_mesh_name_key"}[taken]
    assert not error.value.retryable
    assert mesh.created is None
    assert uow.meshes.count() == 1


def test_get_by_name_of_an_unknown_name_is_not_found(uow: UnitOfWork) -> None:
    MeshFactory.create(uow=uow, name="main")
    with pytest.raises(NotFoundError) as error:
        uow.meshes.get_by_name("Main")
    assert (error.value.entity, error.value.key) == ("Mesh", "Main")


@pytest.mark.parametrize("name", ["", "x" * 256, "\0", "\ud800", None, 5])
def test_get_by_name_refuses_what_is_no_name(uow: UnitOfWork, name: Any) -> None:
    with pytest.raises(InvalidInputError) as error:
        uow.meshes.get_by_name(name)
    assert error.value.field == "name"


def test_update_stores_the_changes_and_leaves_the_join_key_alone(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        mesh = MeshFactory.create(uow=uow, allow_join=True)
        uow.meshes.set_join_key(mesh.id, "secret")
    with storage.begin() as uow:
        mesh = uow.meshes.get(mesh.id)
        mesh.name, mesh.status = "renamed", "STATUS_CONNECTED"
        assert uow.meshes.update(mesh) is mesh
        found = uow.meshes.get(mesh.id)
        assert (found.name, found.status) == ("renamed", "STATUS_CONNECTED")
        assert found.created == mesh.created
        assert found.created is not None
        assert found.updated is not None
        assert found.updated == mesh.updated > found.created
        assert uow.meshes.admits(mesh.id, "secret")
        assert not uow.meshes.admits(mesh.id)


def test_update_of_an_unknown_mesh_is_not_found(uow: UnitOfWork) -> None:
    with pytest.raises(NotFoundError) as error:
        uow.meshes.update(Mesh(id=NOWHERE, name="x"))
    assert (error.value.entity, error.value.key) == ("Mesh", NOWHERE)


def test_update_to_a_taken_name_is_refused(uow: UnitOfWork) -> None:
    first, second = MeshFactory.create_batch(2, uow=uow)
    second.name = first.name
    with pytest.raises(AlreadyExistsError) as error, uow.savepoint():
        uow.meshes.update(second)
    assert error.value.constraint == "mesh_mesh_name_key"


@pytest.mark.parametrize("key", KEYS)
def test_only_a_salted_hash_of_the_join_key_is_stored(uow: UnitOfWork, key: str) -> None:
    first, second = (mesh.id for mesh in MeshFactory.create_batch(2, uow=uow))
    for mesh_id in (first, second):
        uow.meshes.set_join_key(mesh_id, key)
    hashes = [hash_of(uow, mesh_id) for mesh_id in (first, second)]
    assert all(hashed is not None and hashed.startswith("scrypt$") for hashed in hashes)
    assert hashes[0] != hashes[1]
    if key.strip():
        rows = uow.session.execute(text("SELECT mesh::text FROM mesh")).scalars().all()
        assert not any(key in row for row in rows)


@pytest.mark.parametrize("key", KEYS)
def test_a_mesh_with_a_join_key_admits_those_who_show_it(uow: UnitOfWork, key: str) -> None:
    mesh = MeshFactory.create(uow=uow, allow_join=True)
    uow.meshes.set_join_key(mesh.id, key)
    assert uow.meshes.admits(mesh.id, key)
    for other in (None, "", key + "x", key[:-1], key.upper() + "X"):
        assert not uow.meshes.admits(mesh.id, other)


def test_a_mesh_without_a_join_key_admits_everybody_if_it_allows_joining(uow: UnitOfWork) -> None:
    mesh = MeshFactory.create(uow=uow, allow_join=True)
    assert uow.meshes.admits(mesh.id)
    assert uow.meshes.admits(mesh.id, "any")
    assert uow.meshes.admits(mesh.id, "")


@pytest.mark.parametrize("key", [None, "secret"])
def test_a_mesh_that_does_not_allow_joining_admits_nobody(uow: UnitOfWork, key: str | None) -> None:
    mesh = MeshFactory.create(uow=uow, allow_join=False)
    uow.meshes.set_join_key(mesh.id, key)
    assert not uow.meshes.admits(mesh.id, key)
    assert not uow.meshes.admits(mesh.id, "other")


def test_a_join_key_is_replaced_and_taken_away(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        mesh = MeshFactory.create(uow=uow, allow_join=True)
        uow.meshes.set_join_key(mesh.id, "old")
    with storage.begin() as uow:
        uow.meshes.set_join_key(mesh.id, "new")
        found = uow.meshes.get(mesh.id)
        assert found.updated is not None
        assert found.created is not None
        assert found.updated > found.created
        assert [uow.meshes.admits(mesh.id, key) for key in ("old", "new", None)] == [False, True, False]
        uow.meshes.set_join_key(mesh.id, None)
        assert hash_of(uow, mesh.id) is None
        assert uow.meshes.admits(mesh.id)


def test_the_join_key_of_an_unknown_mesh_is_not_found(uow: UnitOfWork) -> None:
    for call in (uow.meshes.set_join_key, uow.meshes.admits):
        with pytest.raises(NotFoundError) as error:
            call(NOWHERE, "secret")
        assert (error.value.entity, error.value.key) == ("Mesh", NOWHERE)


@pytest.mark.parametrize("key", ["", "\0", "\ud800", 5, b"secret"])
def test_a_join_key_that_is_no_text_is_refused(uow: UnitOfWork, key: Any) -> None:
    mesh = MeshFactory.create(uow=uow, allow_join=True)
    with pytest.raises(InvalidInputError) as error:
        uow.meshes.set_join_key(mesh.id, key)
    assert error.value.field == "key"
    assert hash_of(uow, mesh.id) is None


def test_a_join_key_never_gets_into_the_column_of_its_hash(uow: UnitOfWork) -> None:
    with pytest.raises(InvalidInputError) as error:
        uow.meshes.add(Mesh(name="main", allow_join=True, join_key_hash="secret"))
    assert error.value.field == "Mesh.join_key_hash"


def test_no_representation_shows_the_join_key_or_its_hash(uow: UnitOfWork) -> None:
    mesh = MeshFactory.create(uow=uow)
    uow.meshes.set_join_key(mesh.id, "secret")
    assert repr(uow.meshes.get(mesh.id)) == f"Mesh(id={mesh.id!r})"
