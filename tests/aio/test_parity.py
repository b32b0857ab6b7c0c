"""Shows that both sides have the same names and signatures, and that the derived one is what its source says."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.util import ro_memoized_property

from mesh_storage import Cached, Lease, MeshStorage, UnitOfWork, aio, repositories
from mesh_storage.aio import AsyncMeshStorage, AsyncUnitOfWork
from mesh_storage.aio.cache import cached as async_cached
from mesh_storage.cache import cached
from mesh_storage.repositories import ChangeRepository
from mesh_storage.repositories.base import Repository

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

REPOSITORIES = [
    value
    for value in vars(repositories).values()
    if isinstance(value, type) and issubclass(value, (Repository, ChangeRepository))
]

ORIGINALS = {
    "CachedRepository": "StateRepository",
    "CachedMeshes": "MeshRepository",
    "CachedNodes": "NodeRepository",
    "CachedRoutes": "RouteRepository",
    "CachedRuntimeConfig": "RuntimeConfigRepository",
    "CachedRoutingTable": "RoutingTableRepository",
}
CACHED = [getattr(cached, name) for name in ORIGINALS]


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
        r"\bGenerator\[(.*), None, None\]": r"AsyncGenerator[\1, None]",
        r"\b(Abstract)(Async)?ContextManager\b": "AbstractAsyncContextManager",
        r"\b(Async)?UnitOfWork\b": "AsyncUnitOfWork",
        r"\bAsyncUnitOfWork\], T\]": "AsyncUnitOfWork], Awaitable[T]]",
        r"\bAsyncUnitOfWork, Delivery\], object\]": "AsyncUnitOfWork, Delivery], Awaitable[object]]",
        r"\b(Async)?Session\b": "AsyncSession",
        r"\b(Async)?Lease\b": "AsyncLease",
        r"\b(Async)?Cached\b": "AsyncCached",
    }
    for word, async_word in words.items():
        annotation = re.sub(word, async_word, annotation)
    return annotation


def twin(class_: type) -> type:
    found = getattr(async_cached if class_ in CACHED else aio, f"Async{class_.__name__}")
    assert isinstance(found, type)
    return found


def test_every_repository_has_a_twin_that_is_exported() -> None:
    assert len(REPOSITORIES) == 10
    expected = {f"Async{each.__name__}" for each in REPOSITORIES}
    expected |= {"AsyncCached", "AsyncLease", "AsyncMeshStorage", "AsyncUnitOfWork"}
    assert set(aio.__all__) == expected


@pytest.mark.parametrize(
    "class_", [Cached, Lease, MeshStorage, UnitOfWork, *REPOSITORIES], ids=lambda class_: class_.__name__
)
def test_names_and_signatures_are_the_same(class_: type) -> None:
    ours, theirs = members(class_), members(twin(class_))
    assert set(theirs) == set(ours)
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


@pytest.mark.parametrize("class_", CACHED, ids=lambda class_: class_.__name__)
def test_what_is_cached_has_the_signatures_of_its_repository_on_both_sides(class_: type) -> None:
    for name, member in members(twin(class_)).items():
        expected = getattr(class_, name)
        assert parameters(member) == parameters(expected), name
        assert annotations(member) == annotations(expected), name
        assert inspect.getdoc(member) == inspect.getdoc(expected), name
        assert inspect.iscoroutinefunction(member), name
    repository = next((each for each in REPOSITORIES if each.__name__ == ORIGINALS[class_.__name__]), None)
    assert repository is not None
    for name, member in members(class_).items():
        assert parameters(member) == parameters(getattr(repository, name)), name


@pytest.mark.parametrize("class_", REPOSITORIES, ids=lambda class_: class_.__name__)
def test_annotations_and_docstrings_of_the_repositories_are_the_same(class_: type) -> None:
    for name, member in members(twin(class_)).items():
        original = getattr(class_, name)
        expected = annotations(original)
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
    assert given[1]["return"] == (f"Async{given[0]['return']}" if name != "position" else "str")


def test_opening_takes_what_the_sync_side_takes() -> None:
    assert parameters(AsyncMeshStorage.open) == parameters(MeshStorage.open)


# What is derived


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of the package and of what is said about deriving it."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "mesh_storage", tmp_path / "mesh_storage", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def derive(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "unasyncd"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)


def derived() -> dict[str, str]:
    """Return the derived files by their sources."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    files: dict[str, str] = project["tool"]["unasyncd"]["files"]
    return files


def test_what_is_committed_is_what_is_derived_to_the_letter(copy: Path) -> None:
    ran = derive(copy, "--force")
    assert ran.returncode == 0, ran.stderr
    for target in derived().values():
        assert (copy / target).read_text() == (ROOT / target).read_text(), target


def test_a_stale_file_fails_make_lint_and_is_mended(copy: Path) -> None:
    assert derive(copy, "--force").returncode == 0
    stale = copy / "mesh_storage" / "repositories" / "runtime" / "consensus_log.py"
    original = stale.read_text()
    stale.write_text(original.replace("def last_term", "def last_time"))
    assert derive(copy, "--force").returncode != 0
    assert stale.read_text() == original


def test_each_derived_file_says_what_to_edit_instead() -> None:
    for source, target in derived().items():
        first, second = (ROOT / target).read_text().splitlines()[:2]
        assert first.startswith("# Do not edit this file"), target
        assert second == f"# {source}"


def test_no_derived_file_knows_the_asyncio_side() -> None:
    for target in derived().values():
        text = (ROOT / target).read_text()
        lines = [
            line for line in text.splitlines()[2:] if re.search(r"asyncio|\baio\b|\bawait\b|\basync\b|Async[A-Z]", line)
        ]
        assert not lines, (target, lines)


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
