"""The site of the documents: it has every public signature, needs no network, and a warning ends its making."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest
from factory import Factory

import mesh_storage
from mesh_storage import Settings, aio, backup, repositories, schema, testing
from mesh_storage.models import Base

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent


def build(project: Path, site: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "properdocs"
    return subprocess.run(
        [program, "build", "--strict", "--config-file", project / "properdocs.yml", "--site-dir", site],
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("site")
    built = build(ROOT, made)
    assert built.returncode == 0, built.stdout + built.stderr
    return made


@pytest.fixture(scope="module")
def documented(site: Path) -> set[str]:
    """Return what the reference describes, by the inventory of the site (Sphinx's format, version 2)."""
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split(" ")[0] for line in zlib.decompress(packed).decode().splitlines()}


PACKAGES = pytest.mark.parametrize(
    "package", [mesh_storage, aio, repositories, schema, backup, testing], ids=lambda package: package.__name__
)


def public(package: ModuleType) -> dict[str, Any]:
    """Return what a package says is public; one that says nothing, what it defines without an underscore."""
    names = getattr(package, "__all__", None) or [
        name
        for name, thing in vars(package).items()
        if getattr(thing, "__module__", None) == package.__name__ and not isinstance(thing, TypeVar)
    ]
    return {name: getattr(package, name) for name in names if not name.startswith("_")}


@PACKAGES
def test_every_public_name_is_in_the_reference(package: ModuleType, documented: set[str], site: Path) -> None:
    page = (site / "models.html").read_text()
    names = public(package)
    assert len(names) > 4
    for name, thing in names.items():
        if inspect.isclass(thing) and issubclass(thing, Base):
            assert f'id="mesh_storage.models.{name}"' in page
        else:
            assert f"{package.__name__}.{name}" in documented


@PACKAGES
def test_every_public_method_and_attribute_is_in_the_reference(package: ModuleType, documented: set[str]) -> None:
    classes = [thing for thing in public(package).values() if inspect.isclass(thing)]
    members = {
        f"{thing.__module__}.{thing.__qualname__}.{member}"
        for thing in classes
        if not issubclass(thing, (Base, Settings, Factory))  # what these have is data, and in tables of its own
        for owner in thing.__mro__
        if owner.__module__.startswith("mesh_storage")
        for member in vars(owner)
        if not member.startswith("_")
    }
    assert members or not classes
    assert members <= documented


def test_every_setting_is_in_the_reference(documented: set[str]) -> None:
    assert {f"mesh_storage.settings.Settings.{name}" for name in Settings.model_fields} <= documented


def test_every_document_is_a_page(site: Path) -> None:
    pages = {path.name for path in site.glob("*.html")}
    assert pages == {"index.html", "404.html"} | {
        path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")
    }
    overview = (site / "index.html").read_text()
    for page in pages - {"404.html"}:
        assert f'href="{page}"' in overview


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link|iframe)\b[^>]*?\b(?:src|href)=\"([^\"]*)\"", page.read_text())
        assert loaded
        assert [address for address in loaded if "//" in address] == []


def test_a_block_of_code_is_one_whatever_the_tests_are_told_about_it(site: Path) -> None:
    assert [page.name for page in site.rglob("*.html") if "```" in page.read_text()] == []


def test_a_warning_ends_the_build(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    for name in ("tools", "mesh_storage", "examples", "README.md", "properdocs.yml"):
        (project / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs", project / "docs")
    page = project / "docs/errors.md"
    page.write_text(
        page.read_text() + "\n[a](nowhere.md) [b](schema.md#nothing) ![c](none.svg) [d][mesh_storage.Nobody]\n"
    )
    (project / "docs/unlisted.md").write_text("# Unlisted\n")
    built = build(project, tmp_path / "site")
    assert built.returncode != 0
    assert "Aborted with 5 warnings in strict mode!" in built.stdout + built.stderr
    for named in ("nowhere.md", "#nothing", "none.svg", "mesh_storage.Nobody", "unlisted.md"):
        assert named in built.stdout + built.stderr
