"""What the tests of the examples share: a day lived by a program of its own, and networks to live it on."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import psycopg

EXAMPLES = Path(__file__).parents[2] / "examples"
QUIET = {"MESH_STORAGE_SLOW_UNIT_OF_WORK": "0"}
"""No word on stderr about a unit of work that a busy machine made slow."""


def live(
    url: str | None = None, network: Path | None = None, picture: Path | None = None, *, program: str = "mesh_day.py"
) -> str:
    """Run an example and return what it prints; its picture is kept only where a path for it is given."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = [*([network] if network else []), "--picture", picture or Path(directory) / "day.svg"]
        return run(EXAMPLES / program, *arguments, **({"MESH_STORAGE_URL": url} if url else {}))


def run(program: Path, *arguments: Path | str, **environment: str) -> str:
    """Run a program that is to succeed without a word on stderr, and return what it prints."""
    ran = subprocess.run(
        [sys.executable, program, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **QUIET, **environment},
        timeout=120,
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout


def graphml(places: list[tuple[str | None, float | None, float | None]], links: list[tuple[int, int]]) -> str:
    """Write a network: the names, latitudes and longitudes of its cities as far as they are known, and its links."""
    keys = {"label": "string", "Latitude": "double", "Longitude": "double"}
    body = "".join(f'<key id="{key}" for="node" attr.name="{key}" attr.type="{kind}"/>' for key, kind in keys.items())
    body += '<graph edgedefault="directed">'
    for number, place in enumerate(places):
        known = [(key, escape(str(value))) for key, value in zip(keys, place, strict=True) if value is not None]
        data = "".join(f'<data key="{key}">{value}</data>' for key, value in known)
        body += f'<node id="{number}">{data}</node>'
    body += "".join(f'<edge source="{a}" target="{b}"/>' for a, b in links)
    return f'<graphml xmlns="http://graphml.graphdrawing.org/xmlns">{body}</graph></graphml>'


def rows(url: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(query.encode()).fetchall()
