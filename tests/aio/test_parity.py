"""Shows that the asyncio side has the names and signatures of the sync side, and that its generator guards that."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, overload

import pytest
from sqlalchemy.util import ro_memoized_property

from mesh_storage import MeshStorage, UnitOfWork, aio, repositories
from mesh_storage.aio import AsyncMeshStorage, AsyncUnitOfWork
from mesh_storage.models import StateEntry
from mesh_storage.repositories.base import Repository

ROOT = Path(__file__).parents[2]
GENERATOR = ROOT / "tools" / "generate_aio.py"

REPOSITORIES = [
    value for value in vars(repositories).values() if isinstance(value, type) and issubclass(value, Repository)
]
ONLY_SYNC = {"use_session"}
"""The door by which the asyncio side brings its own session."""


def members(class_: type) -> dict[str, Any]:
    return {name: inspect.getattr_static(class_, name) for name in dir(class_) if not name.startswith("_")}


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    function = inspect.unwrap(getattr(function, "__func__", function))
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]


def annotations(function: Any) -> dict[str, str]:
    """Return the annotations as they are written, in the words of the asyncio side."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    return {name: in_async_words(str(text)) for name, text in function.__annotations__.items()}


def in_async_words(annotation: str) -> str:
    words = {
        r"\b(Async)?Generator\b": "AsyncGenerator",
        r"\b(Abstract)(Async)?ContextManager\b": "AbstractAsyncContextManager",
        r"\b(Async)?UnitOfWork\b": "AsyncUnitOfWork",
        r"\bAsyncUnitOfWork\], T\]": "AsyncUnitOfWork], Awaitable[T]]",
        r"\b(Async)?Session\b": "AsyncSession",
    }
    for word, async_word in words.items():
        annotation = re.sub(word, async_word, annotation)
    return annotation


def twin(class_: type) -> type:
    found = getattr(aio, f"Async{class_.__name__}")
    assert isinstance(found, type)
    return found


def test_every_repository_has_a_twin_that_is_exported() -> None:
    assert len(REPOSITORIES) == 9
    expected = {f"Async{each.__name__}" for each in REPOSITORIES} | {"AsyncMeshStorage", "AsyncUnitOfWork"}
    assert set(aio.__all__) == expected


@pytest.mark.parametrize("class_", [MeshStorage, UnitOfWork, *REPOSITORIES], ids=lambda class_: class_.__name__)
def test_names_and_signatures_are_the_same(class_: type) -> None:
    ours, theirs = members(class_), members(twin(class_))
    assert set(theirs) == set(ours) - ONLY_SYNC
    for name, member in theirs.items():
        if isinstance(member, (property, ro_memoized_property)):
            assert isinstance(ours[name], (property, ro_memoized_property)), name
        else:
            assert parameters(member) == parameters(ours[name]), name


@pytest.mark.parametrize("class_", [MeshStorage, UnitOfWork], ids=lambda class_: class_.__name__)
def test_annotations_of_the_shells_are_the_same(class_: type) -> None:
    ours = members(class_)
    for name, member in members(twin(class_)).items():
        if name != "open" and not isinstance(
            member, (property, ro_memoized_property)
        ):  # Opening is awaited or entered.
            assert annotations(member) == annotations(ours[name]), name


@pytest.mark.parametrize("class_", REPOSITORIES, ids=lambda class_: class_.__name__)
def test_annotations_and_docstrings_of_the_repositories_are_the_same(class_: type) -> None:
    model = class_.__orig_bases__[0].__args__[0].__name__  # type: ignore[attr-defined]
    for name, member in members(twin(class_)).items():
        original = getattr(class_, name)
        expected = {key: re.sub(r"\bM\b", model, text) for key, text in annotations(original).items()}
        assert annotations(member) == expected, name
        assert inspect.getdoc(member) == inspect.getdoc(original), name
        assert inspect.iscoroutinefunction(member) != expected["return"].startswith("AsyncGenerator["), name


@pytest.mark.parametrize(
    "name",
    [name for name, member in members(UnitOfWork).items() if isinstance(member, (property, ro_memoized_property))],
)
def test_each_attribute_of_the_unit_of_work_is_the_twin(name: str) -> None:
    ours, theirs = members(UnitOfWork)[name], members(AsyncUnitOfWork)[name]
    given = [each.fget.__annotations__ for each in (ours, theirs)]
    assert given[1]["return"] == f"Async{given[0]['return']}"


def test_opening_takes_what_the_sync_side_takes() -> None:
    assert parameters(AsyncMeshStorage.open) == parameters(MeshStorage.open)


# The generator


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of the generator that works on a copy of its target."""
    for name in ("pyproject.toml", "tools/generate_aio.py", "mesh_storage/aio/repositories.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def generate(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(directory / "tools" / "generate_aio.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)


def test_the_committed_file_is_what_the_generator_writes() -> None:
    checked = generate(ROOT, "--check")
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_stale_or_missing_file_fails_the_check_and_is_mended(copy: Path) -> None:
    target = copy / "mesh_storage" / "aio" / "repositories.py"
    original = target.read_text()
    stale = original.replace("async def last_term", "async def last_time")
    target.write_text(stale)
    checked = generate(copy, "--check")
    assert checked.returncode == 1
    assert "tools/generate_aio.py" in checked.stderr
    assert target.read_text() == stale
    target.unlink()
    assert generate(copy, "--check").returncode == 1
    assert generate(copy).returncode == 0
    assert target.read_text() == original


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """Return the generator as a module."""
    spec = importlib.util.spec_from_file_location("generate_aio", GENERATOR)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Unfit:
    def no_annotation(self, key) -> None: ...  # type: ignore[no-untyped-def]  # noqa: ANN001

    def no_result(self, key: str): ...  # type: ignore[no-untyped-def]  # noqa: ANN201

    def takes_a_function(self, key: Callable[[str], int]) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    def streams_without_a_batch_size(self) -> Generator[int]:
        yield 1

    def streams_in_disguise(self) -> Iterator[int]:
        yield 1

    def takes_any_number(self, *keys: str) -> None: ...

    def takes_any_keyword(self, **keys: str) -> None: ...


@pytest.mark.parametrize("name", [name for name in vars(Unfit) if not name.startswith("_")])
def test_the_generator_refuses_a_method_that_cannot_cross_the_bridge(generator: ModuleType, name: str) -> None:
    with pytest.raises(TypeError, match=f"Unfit.{name}"):
        generator.twin_of_method(getattr(Unfit, name), "StateEntry")


class WithProperty(Repository[StateEntry]):
    @property
    def unfit(self) -> int:
        return 1


class WithContext(Repository[StateEntry]):
    @contextmanager
    def unfit(self) -> Generator[int]:
        yield 1


class WithOverloads(Repository[StateEntry]):
    @overload
    def unfit(self, key: str) -> str: ...
    @overload
    def unfit(self, key: int) -> int: ...
    def unfit(self, key: Any) -> Any:
        return key


class WithStatic(Repository[StateEntry]):
    @staticmethod
    def unfit(key: str) -> str:
        return key


@pytest.mark.parametrize(
    "class_", [WithProperty, WithContext, WithOverloads, WithStatic], ids=lambda class_: class_.__name__
)
def test_the_generator_refuses_what_is_no_plain_method(generator: ModuleType, class_: type) -> None:
    with pytest.raises(TypeError, match="unfit"):
        generator.twin_of_class(class_)


def test_the_generator_takes_what_can_cross(generator: ModuleType) -> None:
    def fit(self: Any, key: str, *, default: Any = ..., limit: int = 5) -> M | None:  # type: ignore[name-defined]  # noqa: F821
        """Return it."""

    assert isinstance(fit, FunctionType)
    source = generator.twin_of_method(fit, "Mesh")
    assert "async def fit(self, key: str, *, default: Any = ..., limit: int = 5) -> Mesh | None:" in source
    assert '"""Give it."""' in source
    assert "self._repository.fit, key, default=default, limit=limit)" in source


# Imports


def python(code: str) -> subprocess.CompletedProcess[str]:
    # What measures coverage would import greenlet itself.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)


def test_the_sync_side_imports_neither_the_async_side_nor_greenlet() -> None:
    ran = python(
        "import sys, mesh_storage, mesh_storage.schema\n"
        "unwanted = ('mesh_storage.aio', 'greenlet', 'sqlalchemy.ext.asyncio')\n"
        "print([name for name in sys.modules if name.startswith(unwanted)])"
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr


def test_without_greenlet_the_sync_side_works_and_the_async_side_names_the_extra() -> None:
    ran = python(
        "import sys\n"
        "sys.modules['greenlet'] = None\n"
        "import mesh_storage\n"
        "print(mesh_storage.MeshStorage.__name__)\n"
        "import mesh_storage.aio"
    )
    assert ran.stdout.strip() == "MeshStorage"
    assert ran.returncode == 1
    assert ran.stderr.strip().splitlines()[-1].startswith("ImportError: ")
    assert "mesh-storage[async]" in ran.stderr.strip().splitlines()[-1]


def test_all_is_importable_with_greenlet() -> None:
    ran = python("from mesh_storage.aio import *; print(AsyncMeshStorage.__name__)")
    assert (ran.returncode, ran.stdout.strip()) == (0, "AsyncMeshStorage"), ran.stderr
