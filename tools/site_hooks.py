"""Hooks of the site that `make docs` builds: README is its first page, and its reference has what is public."""

from __future__ import annotations

import re
from pathlib import Path

from properdocs.config.defaults import ProperDocsConfig
from properdocs.structure.files import File, Files
from properdocs.structure.pages import Page

import mesh_storage
from mesh_storage import aio, repositories, schema
from mesh_storage.cache import cached

ROOT = Path(__file__).parent.parent
REFERENCE = {
    "storage": [
        *(
            f"mesh_storage.{name}"
            for name in (
                "MeshStorage",
                "UnitOfWork",
                "Lease",
                "Cached",
                "Page",
                "Health",
                "ReplicaHealth",
                "Telemetry",
                "JSON",
            )
        ),
        *(
            f"mesh_storage.cache.cached.{name}"
            for name in vars(cached)
            if name.startswith("Cached") and name != "Cached"
        ),
        *(f"mesh_storage.postgres.characteristics.{name}" for name in ("Isolation", "Durability")),
    ],
    "repositories": [f"mesh_storage.repositories.{name}" for name in repositories.__all__ if name != "Page"],
    "asyncio": [f"mesh_storage.aio.{name}" for name in aio.__all__],
    "errors": [f"mesh_storage.{name}" for name in mesh_storage.__all__ if name.endswith("Error")],
    "settings": [f"mesh_storage.settings.{name}" for name in ("Settings", "Seconds", "SslMode")],
    "schema": [f"mesh_storage.schema.{name}" for name in schema.__all__],
    "backup": ["mesh_storage.backup", "mesh_storage.backup.manifest.Manifest"],
    "testing": ["mesh_storage.testing"],
}
"""The pages of the reference, and what is on each."""


def on_files(files: Files, config: ProperDocsConfig) -> Files:
    """Add README, what it shows outside of docs/, and the reference."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=readme.replace("](docs/", "](")))
    for path in re.findall(r"\]\((examples/[^)]+)\)", readme):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    for name, identifiers in REFERENCE.items():
        text = "\n\n".join([f"# Reference: {name}", *(f"::: {identifier}" for identifier in identifiers)])
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Take the words behind a block's language away, which say how the tests run it."""
    markdown = re.sub(r"^(```\w+) [^\n]*$", r"\1", markdown, flags=re.MULTILINE)
    if page.file.src_uri == "models.md":  # Signatures in the reference lead here.
        markdown = re.sub(r"^### (\w+)$", r"### \1 {#mesh_storage.models.\1}", markdown, flags=re.MULTILINE)
    return markdown
