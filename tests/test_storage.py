"""The storage object: which arguments it takes, on both sides, and what its repr says."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from mesh_storage import ClosedError, InvalidInputError, MeshStorage, Settings, backup, schema
from mesh_storage.aio import AsyncMeshStorage
from mesh_storage.postgres.server import open_server

NO_FLAGS: tuple[Any, ...] = (None, "no", 1)
NO_NUMBERS: tuple[Any, ...] = ("3", None, True, b"3", [])
NO_FUNCTIONS: tuple[Any, ...] = ("work", 3, [])
NO_PATHS: tuple[Any, ...] = (None, 3, b"backup", ["backup"], "\ud800", "a\0b")

REFUSED: dict[str, tuple[tuple[Any, ...], Callable[[Any, Any], Any]]] = {
    "begin read_only": (NO_FLAGS, lambda storage, value: entered(storage.begin(read_only=value))),
    "begin isolation": (("chaos", 3, [], {}), lambda storage, value: entered(storage.begin(isolation=value))),
    "begin durability": (("none", None, []), lambda storage, value: entered(storage.begin(durability=value))),
    "begin timeout": (("3", True, 0, -1, float("nan")), lambda storage, value: entered(storage.begin(timeout=value))),
    "run work": ((None, *NO_FUNCTIONS), lambda storage, value: storage.run(value)),
    "run attempts": ((*NO_NUMBERS, 0, 2.5), lambda storage, value: storage.run(print, attempts=value)),
    "run within": (("3", True, [], 0), lambda storage, value: storage.run(print, within=value)),
    "run read_only": (NO_FLAGS, lambda storage, value: storage.run(print, read_only=value)),
    "backup path": (NO_PATHS, lambda storage, value: storage.backup(value)),
    "backup jobs": ((*NO_NUMBERS, 0, 65), lambda storage, value: storage.backup("b", jobs=value)),
    "backup verify": (NO_FLAGS, lambda storage, value: storage.backup("b", verify=value)),
    "backup progress": (NO_FUNCTIONS, lambda storage, value: storage.backup("b", progress=value)),
    "restore path": (NO_PATHS, lambda storage, value: storage.restore(value)),
    "restore jobs": ((*NO_NUMBERS, 0, 65), lambda storage, value: storage.restore("b", jobs=value)),
    "restore overwrite": (NO_FLAGS, lambda storage, value: storage.restore("b", overwrite=value)),
    "restore progress": (NO_FUNCTIONS, lambda storage, value: storage.restore("b", progress=value)),
}


def entered(scope: Any) -> Any:
    """Enter a unit of work of either side, to no good end."""
    return scope.__aenter__() if hasattr(scope, "__aenter__") else scope.__enter__()


@pytest.mark.parametrize("argument", REFUSED)
def test_a_wrong_argument_is_refused_by_its_name(storage: MeshStorage, argument: str) -> None:
    values, call = REFUSED[argument]
    for value in values:
        with pytest.raises(InvalidInputError, match=argument.split()[1]) as error:
            call(storage, value)
        assert error.value.field == argument.split()[1]
    assert list(Path().iterdir()) == []
    assert storage.health().ok
    assert storage.health().pool_in_use == 0


def test_a_wrong_argument_is_refused_on_the_asyncio_side(mesh_storage_url: str) -> None:
    async def main() -> None:
        async with AsyncMeshStorage.open(mesh_storage_url) as storage:
            for argument, (values, call) in REFUSED.items():
                for value in values:
                    with pytest.raises(InvalidInputError, match=argument.split()[1]) as error:
                        await call(storage, value)
                    assert error.value.field == argument.split()[1]
            assert (await storage.health()).ok
            assert (await storage.health()).pool_in_use == 0

    asyncio.run(main())
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("value", [3, 2.5, True, b"postgresql://h/d", [], SecretStr("postgresql://h/d")])
@pytest.mark.parametrize("call", [MeshStorage.open, AsyncMeshStorage.open, schema.upgrade])
def test_a_url_is_a_text(call: Callable[[Any], object], value: object) -> None:
    with pytest.raises(InvalidInputError, match="url must be a str") as error:
        call(value)
    assert error.value.field == "url"


@pytest.mark.parametrize("value", ["memory:", {}, 3])
@pytest.mark.parametrize("side", [MeshStorage, AsyncMeshStorage])
def test_settings_are_settings(side: Any, value: object) -> None:
    with pytest.raises(InvalidInputError, match="settings must be Settings") as error:
        side.open(settings=value)
    assert error.value.field == "settings"


@pytest.mark.parametrize("value", NO_PATHS)
def test_verify_refuses_what_is_no_path(value: Any) -> None:
    with pytest.raises(InvalidInputError) as error:
        backup.verify(value)
    assert error.value.field == "path"


def test_repr_tells_the_pool_and_whether_it_is_open(mesh_storage_url: str) -> None:
    with MeshStorage.open(settings=Settings(url=mesh_storage_url, pool_size=3)) as storage:
        with storage.begin(), storage.begin():
            assert re.fullmatch(r"<MeshStorage on server /.+/mesh_storage_\w+: open, 2 of 3 .*>", repr(storage))
        assert "open, 0 of 3 connections in use" in repr(storage)
    assert repr(storage).endswith(": closed>")
    with pytest.raises(ClosedError):
        storage.health()


def test_repr_of_the_asyncio_side() -> None:
    async def main() -> None:
        async with AsyncMeshStorage.open("memory:") as storage, storage.begin():
            assert re.fullmatch(
                r"<AsyncMeshStorage on embedded /.+/mesh: open, 1 of 10 connections in use>", repr(storage)
            )
        assert repr(storage).endswith(": closed>")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("postgresql://me:hush@db/mesh", "db/mesh"),
        ("postgresql://me:hush@one:5432,two:6432/mesh", "one:5432,two:6432/mesh"),
        ("postgresql://one,two/mesh?password=hush&port=5433", "one:5433,two:5433/mesh"),
        ("postgresql://me:hush@/mesh?host=/run/postgresql", "/run/postgresql/mesh"),
        ("postgresql:///mesh?hostaddr=192.0.2.1", "192.0.2.1/mesh"),
        ("postgresql://", "libpq's default place"),
    ],
)
def test_repr_tells_where_the_database_is_and_no_password(url: str, place: str) -> None:
    settings = Settings(url=url, password=SecretStr("hush"))
    with MeshStorage(settings, open_server(settings)) as storage:
        assert repr(storage) == f"<MeshStorage on server {place}: open, 0 of 10 connections in use>"
