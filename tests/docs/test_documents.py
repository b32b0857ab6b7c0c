"""Every block of code in the documents runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from mesh_storage import MeshStorage

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(#[^)]*)?\)")


class Block(NamedTuple):
    """A fenced block of a document."""

    document: str
    line: int
    language: str
    options: str
    text: str


def blocks(*languages: str) -> Iterator[Block]:
    for document in DOCUMENTS:
        text = document.read_text()
        for match in FENCE.finditer(text):
            language, options, code = match.groups()
            if language in languages and "no-run" not in options:
                yield Block(document.name, text.count("\n", 0, match.start()) + 1, language, options, code)


def name(block: Block) -> str:
    return f"{block.document}:{block.line}"


@pytest.mark.parametrize("block", blocks("python"), ids=name)
def test_python_runs(block: Block, mesh_storage: MeshStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = "\n" * block.line + block.text  # So that a traceback names the line of the document.
    exec(compile(code, block.document, "exec"), {"storage": mesh_storage, "__name__": "document"})  # noqa: S102


@pytest.mark.parametrize("block", blocks("console", "bash", "sh"), ids=name)
def test_commands_run(block: Block, mesh_storage_url: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "MESH_STORAGE_URL": mesh_storage_url,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_is_something_to_run() -> None:
    assert len(list(blocks("python"))) > 5


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = [target for target, _ in LINK.findall(document.read_text())]
    assert [target for target in targets if not (document.parent / target).exists()] == []
