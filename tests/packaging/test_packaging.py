"""The wheel and the source distribution, each installed in an environment of its own outside of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from mesh_storage import schema
from mesh_storage.testing import Databases

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and a directory to work in that is not the checkout."""

    home: Path
    work: Path

    def run(self, *arguments: str, url: str = "") -> str:
        process = subprocess.run(
            [self.home / "bin" / "python", "-P", *arguments],
            cwd=self.work,
            # An environment that knows nothing of the checkout.
            env={"PATH": os.defpath, "HOME": str(self.work), "MESH_STORAGE_URL": url},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build the source distribution, and the wheel from it: then all that the wheel needs is in both."""
    made = tmp_path_factory.mktemp("dist")
    build(ROOT, "sdist", made)
    (source,) = made.glob("*.tar.gz")
    (made / "source").mkdir()
    # Not by Python, which asks for a filter from 3.12 on and has none before 3.11.4.
    subprocess.run(["tar", "--extract", "--file", source, "--directory", made / "source"], check=True)
    (unpacked,) = (made / "source").iterdir()
    build(unpacked, "wheel", made)
    (wheel,) = made.glob("*.whl")
    return source, wheel


def build(source: Path, target: str, destination: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", destination],
        cwd=source,
        capture_output=True,
        check=True,
        timeout=120,
    )


@pytest.fixture(scope="module", params=["sdist", "wheel"])
def environment(
    request: pytest.FixtureRequest, distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    """Install one of the two, without the network: what it depends on is taken from the environment of the tests."""
    home = tmp_path_factory.mktemp(request.param)
    venv.create(home / "venv", with_pip=True)
    made = Environment(home / "venv", tmp_path_factory.mktemp("work"))
    (site,) = (home / "venv" / "lib").glob("python*/site-packages")
    # A path in a .pth file is not searched for .pth files itself: so the checkout, which is one there, stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    made.run(
        "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps",
        "--no-build-isolation", "--ignore-installed", str(distributions[request.param == "wheel"]),
    )  # fmt: skip
    where = made.run("-c", "import mesh_storage; print(mesh_storage.__file__)")
    assert Path(where.strip()).is_relative_to(home)
    return made


@pytest.fixture
def url(mesh_storage_databases: Databases) -> Iterator[str]:
    with mesh_storage_databases.fresh(with_schema=False) as made:
        yield made


def revision(url: str) -> str:
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT version_num FROM mesh_alembic_version").fetchone()
    assert row is not None
    return str(row[0])


def test_the_wheel_has_the_migrations_the_types_and_the_license(distributions: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(distributions[1]).namelist()
    migrations = {f"mesh_storage/alembic/versions/{path.name}" for path in (ROOT / "alembic/versions").glob("*.py")}
    assert len(migrations) == len(schema.revisions())
    assert {
        "mesh_storage/py.typed",
        "mesh_storage/alembic/env.py",
        "mesh_storage/alembic/script.py.mako",
        *migrations,
    } <= set(names)
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    outside = {name.split("/")[0] for name in names} - {"mesh_storage"}
    assert all(name.endswith(".dist-info") for name in outside)
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_the_source_distribution_has_what_it_takes_to_build_and_test(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "PKG-INFO",
        "alembic.ini",
        "alembic/env.py",
        "mesh_storage/py.typed",
        "mesh_storage/schema/deploy.py",
        "tests/packaging/test_packaging.py",
    } <= names


def test_the_schema_is_deployed_from_python(environment: Environment, url: str) -> None:
    program = "from mesh_storage import schema; schema.upgrade(); print(schema.script_location())"
    location = environment.run("-c", program, url=url)
    assert Path(location.strip()).is_relative_to(environment.home)
    assert revision(url) == schema.head()
    program = """
from mesh_storage import MeshStorage, Message
with MeshStorage.open() as storage, storage.begin() as uow:
    uow.messages.store(Message(id="m", from_node="a", to_node="b", content=b"hello"))
    print(storage.health().revision)
"""
    assert environment.run("-c", program, url=url).strip() == schema.head()


@pytest.mark.parametrize("location", ["mesh_storage:alembic", None])
def test_alembic_deploys_from_the_packaged_location(environment: Environment, url: str, location: str | None) -> None:
    if location is None:
        location = environment.run("-c", "from mesh_storage import schema; print(schema.script_location())").strip()
    ini = environment.work / "alembic.ini"
    ini.write_text(f"[alembic]\nscript_location = {location}\npath_separator = os\n")
    command = ["-m", "alembic", "-c", str(ini)]
    environment.run(*command, "upgrade", "head", url=url)
    assert revision(url) == schema.head()
    assert "No new upgrade operations" in environment.run(*command, "check", url=url)
    environment.run(*command, "downgrade", "0001", url=url)
    assert revision(url) == "0001"


def test_its_types_are_found_by_others(environment: Environment) -> None:
    program = environment.work / "program.py"
    program.write_text("import mesh_storage\n\nreveal_type(mesh_storage.MeshStorage.open)\n")
    process = subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "mypy",
            "--strict",
            "--python-executable",
            environment.home / "bin" / "python",
            program,
        ],
        cwd=environment.work,
        env={"PATH": os.defpath, "HOME": str(environment.work)},
        capture_output=True,
        text=True,
        check=False,
        timeout=170,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "MeshStorage" in process.stdout


def test_the_command_is_installed(environment: Environment, url: str) -> None:
    script = environment.home / "bin" / "mesh-storage"
    process = subprocess.run(
        [script, "upgrade"],
        cwd=environment.work,
        env={"PATH": os.defpath, "HOME": str(environment.work), "MESH_STORAGE_URL": url},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    assert revision(url) == schema.head()
