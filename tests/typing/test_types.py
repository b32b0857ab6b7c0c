"""Shows that mypy and pyright, both strict, see the same types on the sync and the asyncio side."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RIGHT = [HERE / "sync_calls.py", HERE / "async_calls.py"]
WRONG = HERE / "wrong_calls.py"


def mypy(cache: Path) -> dict[str, set[int]]:
    """Return the lines with errors by file."""
    output = check("mypy", "--cache-dir", str(cache))
    found: dict[str, set[int]] = {}
    for file, line in re.findall(r"^(\S+):(\d+): error:", output, re.MULTILINE):
        found.setdefault(Path(file).name, set()).add(int(line))
    return found


def pyright(_: Path) -> dict[str, set[int]]:
    """Return the lines with errors by file."""
    report = json.loads(check("pyright", "--outputjson"))
    assert report["summary"]["filesAnalyzed"] == 3
    found: dict[str, set[int]] = {}
    for each in report["generalDiagnostics"]:
        if each["severity"] == "error":
            found.setdefault(Path(each["file"]).name, set()).add(each["range"]["start"]["line"] + 1)
    return found


def check(*command: str) -> str:
    files = map(str, [*RIGHT, WRONG])
    ran = subprocess.run(
        [sys.executable, "-m", *command, *files], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.parametrize("checker", [mypy, pyright], ids=lambda checker: checker.__name__)
def test_right_calls_have_their_types_and_wrong_ones_are_refused(checker: object, tmp_path: Path) -> None:
    assert callable(checker)
    marked = {number for number, line in enumerate(WRONG.read_text().splitlines(), 1) if line.endswith("# wrong")}
    assert len(marked) == 55
    assert checker(tmp_path) == {WRONG.name: marked}


@pytest.mark.parametrize("file", RIGHT, ids=lambda file: file.stem)
def test_the_types_of_more_than_two_dozen_calls_are_asserted(file: Path) -> None:
    assert file.read_text().count("assert_type(") > 24
