"""The run over several versions of PostgreSQL: it passes, fails and skips as it says."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import psycopg
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
VERSION_TEST = """
import psycopg

def test_version(mesh_storage_url):
    with psycopg.connect(mesh_storage_url) as connection:
        assert connection.info.server_version // 10_000 == {version}
"""


@pytest.fixture
def one_for_16(tmp_path: Path) -> Path:
    """Return a file with a test that passes on PostgreSQL 16 alone."""
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["mesh_storage.testing"]\n')
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    path = tmp_path / "test_version.py"
    path.write_text(VERSION_TEST.format(version=16))
    return path


def run(*arguments: str, test: Path) -> tuple[int, list[str]]:
    process = subprocess.run(
        [sys.executable, ROOT / "tools/test_matrix.py", *arguments, "--", "-q", "-c", test.parent / "pytest.ini", test],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return process.returncode, [line for line in process.stdout.splitlines() if line.startswith("PostgreSQL ")]


def test_each_version_has_its_own_server_and_one_failure_fails_all(one_for_16: Path) -> None:
    status, said = run("16", "18", test=one_for_16)
    assert status == 1
    assert said == ["PostgreSQL 16: passed", "PostgreSQL 18: failed (pytest ended with 1)"]


def test_what_is_not_found_is_skipped_and_said(one_for_16: Path) -> None:
    assert run("99", "16", test=one_for_16) == (0, ["PostgreSQL 99: skipped: not found", "PostgreSQL 16: passed"])


@pytest.mark.parametrize("arguments", [["--require", "99", "16"], ["99"]])
def test_a_version_that_is_required_or_the_only_one_must_be_there(one_for_16: Path, arguments: list[str]) -> None:
    assert run(*arguments, test=one_for_16)[0] == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server under another account")
def test_the_server_is_in_none_of_roots_groups() -> None:
    matrix = runpy.run_path(str(ROOT / "tools/test_matrix.py"))
    with tempfile.TemporaryDirectory() as directory:  # not tmp_path, which is root's alone
        Path(directory).chmod(0o701)
        installed = Path(directory, "installed")
        installed.symlink_to(matrix["find"]("16").parent)
        with matrix["server"](installed / "bin") as url, psycopg.connect(url) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
