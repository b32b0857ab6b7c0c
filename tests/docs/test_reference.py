"""What the documents take from the code is what the code and a real database say."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from mesh_storage import Mesh, MeshStorage, Node, Route, models
from mesh_storage.models.base import attribute_names, table_of

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
SOURCES = sorted((ROOT / "mesh_storage").rglob("*.py"))
MODELS = {name: getattr(models, name) for name in models.__all__ if hasattr(getattr(models, name), "__table__")}
STATUS = re.compile(r"""["'`](STATUS_[A-Z_]+)["'`]""")
SVG = "{http://www.w3.org/2000/svg}"


def run(*arguments: str | Path) -> tuple[int, str]:
    process = subprocess.run(
        [sys.executable, ROOT / "tools/reference.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return process.returncode, process.stdout + process.stderr


def rows(text: str) -> Iterator[list[str]]:
    """Yield the cells of each row of the tables in a text."""
    for line in text.splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def section(document: str, heading: str) -> str:
    """Return what stands below a heading."""
    _, _, rest = (DOCS / document).read_text().partition(f"# {heading}\n")
    return re.split(r"^#+ ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def attributes(model: str) -> dict[str, list[str]]:
    return {cells[0].strip("`"): cells for cells in rows(section("models.md", model))}


def test_the_documents_are_current() -> None:
    assert run("--check") == (0, "")


STALE = {
    "logging.md": [("| `slow_unit_of_work` | WARNING |", "| `slow_unit_of_work` | INFO |")],
    "models.md": [
        ("`port` integer | `8443`", "`port` integer | `443`"),
        ("One-way latency in milliseconds.", "One-way latency in seconds."),
    ],
    "schema.svg": [(">node_name<", ">name<")],
}


def test_stale_documents_are_named_and_made_anew(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    shutil.copytree(DOCS, docs)
    for document, changes in STALE.items():
        text = (docs / document).read_text()
        for current, stale in changes:
            assert current in text
            text = text.replace(current, stale)
        (docs / document).write_text(text)
    status, said = run("--check", "--docs", docs)
    assert status == 1
    assert sorted(said.splitlines()) == [f"{docs / document} is out of date; run make sync" for document in STALE]
    assert run("--docs", docs) == (0, "")
    for document in STALE:
        assert (docs / document).read_text() == (DOCS / document).read_text()


def test_every_attribute_and_relationship_of_every_model_is_documented() -> None:
    assert len(MODELS) == 9
    for name, model in MODELS.items():
        assert list(attributes(name)) == list(attribute_names(model))
        assert all(cells[-1] for cells in attributes(name).values())
        listed = re.findall(r"^- `(\w+)`", section("models.md", name), re.MULTILINE)
        own = model.__annotations__  # a test may have added others to the mapper
        assert listed == [key for key in model.__mapper__.relationships.keys() if key in own]  # noqa: SIM118


@pytest.mark.parametrize("name", MODELS)
def test_columns_and_their_types_are_those_of_the_database(name: str, mesh_storage_url: str) -> None:
    with psycopg.connect(mesh_storage_url) as connection:
        columns = connection.execute(
            "SELECT attname, replace(format_type(atttypid, atttypmod), 'character varying', 'varchar'), NOT attnotnull"
            " FROM pg_attribute WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped",
            [table_of(MODELS[name]).name],
        ).fetchall()
    documented = attributes(name).values()
    assert {(column, "or `None`" in kind) for _, kind, column, *_ in documented} == {
        (f"`{column}` {kind}", nullable) for column, kind, nullable in columns
    }


def test_checks_are_those_of_the_database(mesh_storage: MeshStorage) -> None:
    with mesh_storage.begin() as uow:
        connection = uow.session.connection()
        for name, model in MODELS.items():
            table = table_of(model).name
            found = connection.exec_driver_sql(
                "SELECT conname FROM pg_constraint WHERE contype = 'c' AND conrelid = to_regclass(%s)", (table,)
            ).scalars()
            written = {cells[2].split("`")[1] for cells in attributes(name).values() if re.search(r"`[^`]* ", cells[4])}
            assert {f"{table}_{column}_check" for column in written} == set(found)


def test_defaults_are_what_a_stored_aggregate_has(mesh_storage: MeshStorage) -> None:
    with mesh_storage.begin() as uow:
        a, b = (uow.nodes.add(Node(name=name, ip_address="10.0.0.1")) for name in "ab")
        stored: list[Mesh | Node | Route] = [
            uow.meshes.add(Mesh(name="mesh")),
            a,
            uow.routes.add(Route(source_node_id=a.id, target_node_id=b.id)),
        ]
    compared = 0
    for entity in stored:
        for name, cells in attributes(type(entity).__name__).items():
            default = cells[3].strip("`")
            if default not in ("a new one", "required", "CURRENT_TIMESTAMP") and name in vars(entity):
                assert str(getattr(entity, name)) == default.strip("'"), name
                compared += 1
    assert compared > 15


def test_the_status_values_are_those_of_the_library_and_its_examples() -> None:
    examples = sorted((ROOT / "examples").glob("*.py"))
    found = {status for path in [*SOURCES, *examples] for status in STATUS.findall(path.read_text())}
    assert {cells[0].strip("`") for cells in rows(section("models.md", "Status values"))} == found


def test_no_event_is_missing() -> None:
    written = {event for path in SOURCES for event in re.findall(r"""["']event["']:\s*["'](\w+)""", path.read_text())}
    assert {cells[0].strip("`") for cells in rows(section("logging.md", "Events"))} == written


def test_every_field_of_an_event_is_explained() -> None:
    in_events = {field for cells in rows(section("logging.md", "Events")) for field in re.findall(r"\w+", cells[3])}
    assert {
        field for cells in rows(section("logging.md", "Fields")) for field in re.findall(r"\w+", cells[0])
    } == in_events


def test_a_record_has_the_level_the_message_and_the_fields_of_its_event(
    mesh_storage_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    documented = {
        (cells[0].strip("`"), *cells[1:3], *re.findall(r"\w+", cells[3]))
        for cells in rows(section("logging.md", "Events"))
    }
    plain = set(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
    with caplog.at_level(logging.INFO, "mesh_storage"), MeshStorage.open(mesh_storage_url) as storage:
        storage.backup(tmp_path / "backup")
    seen = {
        (
            record.__dict__["event"],
            record.levelname,
            str(record.msg),
            *(field for field in vars(record) if field not in {*plain, "event"}),
        )
        for record in caplog.records
    }
    assert {event for event, *_ in seen} == {"open", "backup", "close"}
    assert seen <= documented


def test_the_picture_has_the_tables_their_columns_and_their_references() -> None:
    picture = ET.parse(DOCS / "schema.svg").getroot()  # noqa: S314 - it is our own
    texts = [element.text for element in picture.iter(f"{SVG}text")]
    tables = [table_of(model) for model in MODELS.values()]
    for table in tables:
        assert texts.count(table.name) == 1
        assert {column.name for column in table.columns} <= set(texts)
    references = [element for element in picture.iter(f"{SVG}path") if element.get("class") == "reference"]
    assert len(references) == sum(len(table.foreign_keys) for table in tables) == 2
