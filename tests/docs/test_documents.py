"""Every block of code in the documents runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mesh_storage import MeshStorage

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(#[^)]*)?\)")


class Block(NamedTuple):
    """A fenced block of a document.

    Words behind its language say how it runs: `no-run` not at all, `checkout` in the directory of the project, which
    Alembic's configuration is in, instead of an empty one.
    """

    document: str
    line: int
    language: str
    options: list[str]
    text: str


def all_blocks() -> Iterator[Block]:
    for document in DOCUMENTS:
        text = document.read_text()
        for match in FENCE.finditer(text):
            language, options, code = match.groups()
            yield Block(document.name, text.count("\n", 0, match.start()) + 1, language, options.split(), code)


def blocks(*languages: str) -> list[Block]:
    return [block for block in all_blocks() if block.language in languages and "no-run" not in block.options]


def name(block: Block) -> str:
    return f"{block.document}:{block.line}"


def commands() -> Iterator[Any]:
    for block in blocks("console"):
        measures = "python -m benchmarks" in block.text
        yield pytest.param(block, id=name(block), marks=[pytest.mark.slow] if measures else [])


@pytest.mark.parametrize("block", blocks("python"), ids=name)
def test_python_runs(
    block: Block, mesh_storage: MeshStorage, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REDIS_URL", redis_url)
    code = "\n" * block.line + block.text  # So that a traceback names the line of the document.
    exec(compile(code, block.document, "exec"), {"storage": mesh_storage, "__name__": "document"})  # noqa: S102


@pytest.mark.parametrize("block", commands())
def test_commands_run(block: Block, mesh_storage_url: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "MESH_STORAGE_URL": mesh_storage_url,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=ROOT if "checkout" in block.options else tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_there_is_something_to_run() -> None:
    assert len(blocks("python")) > 8
    assert len(blocks("console")) > 1


def test_no_block_escapes_by_a_word_that_nobody_knows() -> None:
    for block in all_blocks():
        assert block.language in {"python", "console", "text"}, name(block)
        assert set(block.options) <= {"no-run", "checkout"}, name(block)
    for document in DOCUMENTS:
        fences = [line for line in document.read_text().splitlines() if line.lstrip().startswith("```")]
        assert len(fences) == 2 * sum(block.document == document.name for block in all_blocks())


def test_python_that_does_not_run_compiles() -> None:
    spared = [block for block in all_blocks() if "no-run" in block.options]
    assert len(spared) <= 4
    for block in spared:
        if block.language == "python":
            compile(block.text, name(block), "exec")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = [target for target, _ in LINK.findall(document.read_text())]
    assert [target for target in targets if not (document.parent / target).exists()] == []
