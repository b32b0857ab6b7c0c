"""A service's own tables beside ours: two Alembic environments in one database, which never see each other's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Column, ForeignKey, MetaData, Table, Text

from mesh_storage import ConfigurationError, MeshStorage, Node, SchemaMismatchError, schema
from mesh_storage.models import Base
from mesh_storage.postgres.server import open_server
from mesh_storage.schema import tables
from mesh_storage.settings import Settings
from mesh_storage.testing import Databases, NodeFactory
from tests.processes import ROOT, start_alembic
from tests.schema import legacy

pytestmark = pytest.mark.slow

# The example of the document, up to its own upgrade.
DOCUMENT = (ROOT / "docs" / "schema.md").read_text()
EXAMPLE = re.search(r"^```console\n(alembic init migrations.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
OPERATORS = """
class Operator(Base):
    __tablename__ = "operators"

    id: Mapped[int] = mapped_column(primary_key=True)
"""


@pytest.fixture
def url(mesh_storage_databases: Databases) -> Iterator[str]:
    """Yield the URL of an empty database."""
    with mesh_storage_databases.fresh(with_schema=False) as made:
        yield made


class Service:
    """The Alembic environment of a service, in a directory of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def run(self, url: str, script: str, *, fails: bool = False) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.home,
            env={
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "MESH_STORAGE_URL": url,
                "HOME": str(self.home),
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def service(mesh_storage_databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Service:
    """Return a service of two revisions: a table by itself, and the one of the document, which refers to ours."""
    assert EXAMPLE is not None
    made = Service(tmp_path_factory.mktemp("service"))
    files, _, commands = EXAMPLE[1].partition("mesh-storage upgrade\n")
    assert commands.count("alembic") == 3
    with mesh_storage_databases.fresh() as url:
        made.run(url, files)
        models = made.home / "alerts.py"
        whole = models.read_text()
        models.write_text(whole[: whole.index("class Alert")] + OPERATORS)
        made.run(url, "alembic revision --autogenerate --rev-id 0001 -m operators && alembic upgrade head")
        models.write_text(whole + OPERATORS)
        made.run(url, "alembic revision --autogenerate --rev-id 0002 -m alerts")
    for written in (made.home / "migrations" / "versions").glob("*.py"):
        text = written.read_text()
        assert [name for name in tables.TABLES if f"'{name}'" in text] == [], text
    return made


def ours(url: str, *arguments: str) -> str:
    process = start_alembic(url, *arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    return out


def rows(url: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(query.encode()).fetchall()


def both_are_whole(url: str, service: Service) -> None:
    assert rows(url, "SELECT version_num FROM mesh_alembic_version") == [(schema.head(),)]
    assert rows(url, "SELECT version_num FROM alembic_version") == [("0002",)]
    assert "No new upgrade operations" in ours(url, "check")
    assert "No new upgrade operations" in service.run(url, "alembic check")
    with MeshStorage.open(url) as storage:
        with storage.begin() as uow:
            node = NodeFactory.create(uow=uow)
            uow.session.execute(
                sqlalchemy.text("INSERT INTO alerts (node_id, text) VALUES (:node, 'hot')"), {"node": node.id}
            )
        with storage.begin() as uow:
            uow.nodes.delete(node.id)
    assert rows(url, "SELECT FROM alerts") == []


ORDERS = {
    "ours first": ("ours head", "theirs head"),
    "theirs first": ("theirs 0001", "ours head", "theirs head"),
    "step by step": ("theirs 0001", "ours 0005", "theirs head", "ours head"),
}


@pytest.mark.parametrize("order", ORDERS)
def test_two_environments_upgrade_in_any_order(url: str, service: Service, order: str) -> None:
    for step in ORDERS[order]:
        who, revision = step.split()
        if who == "ours":
            ours(url, "upgrade", revision)
        else:
            service.run(url, f"alembic upgrade {revision}")
    both_are_whole(url, service)


def test_each_goes_back_without_the_other(url: str, service: Service) -> None:
    ours(url, "upgrade", "head")
    service.run(url, "alembic upgrade head && alembic downgrade base")
    assert "No new upgrade operations" in ours(url, "check")
    with MeshStorage.open(url) as storage:
        assert storage.health().ok
    service.run(url, "alembic upgrade 0001")
    ours(url, "downgrade", "base")
    assert rows(url, "SELECT version_num FROM alembic_version") == [("0001",)]
    assert rows(url, "SELECT FROM operators") == []


def test_the_document_is_complete(url: str, tmp_path: Path) -> None:
    assert EXAMPLE is not None
    assert "No new upgrade operations" in Service(tmp_path).run(url, EXAMPLE[1])
    (written,) = (tmp_path / "migrations" / "versions").glob("*.py")
    # The table, its foreign key to ours and its index, up and down, and nothing else.
    operations = re.findall(
        r"^    op\.(\w+)\('(\w+)'|^    op\.(\w+)\(op\.f\('(\w+)'\)", written.read_text(), re.MULTILINE
    )
    assert [" ".join(filter(None, each)) for each in operations] == [
        "create_table alerts",
        "create_index alerts_node_id_idx",
        "drop_index alerts_node_id_idx",
        "drop_table alerts",
    ]
    assert rows(
        url, "SELECT confrelid::regclass::text FROM pg_constraint WHERE conrelid = 'alerts'::regclass AND contype = 'f'"
    ) == [("nodes",)]


def engine_of(url: str) -> sqlalchemy.Engine:
    address = sqlalchemy.make_url(url).set(drivername="postgresql+psycopg")
    return sqlalchemy.create_engine(address, poolclass=sqlalchemy.NullPool)


def metadata_of_its_own() -> MetaData:
    own = MetaData()
    Table("alerts", own, Column("node_id", Text, ForeignKey(Node.__table__.c.node_id), primary_key=True))
    return own


@pytest.mark.filterwarnings("ignore:Can't validate argument 'dialect_options':sqlalchemy.exc.SAWarning")
@pytest.mark.parametrize("own", [True, False, None], ids=["a base of its own", "our Base", "both"])
def test_nothing_of_ours_is_seen_in_an_adopted_database_either(legacy_url: str, *, own: bool | None) -> None:
    with psycopg.connect(legacy_url) as connection:
        connection.execute("CREATE INDEX idx_nodes_region_id ON nodes (region_id)")
    schema.upgrade(legacy_url)
    metadata = metadata_of_its_own()
    target: Any = {True: metadata, False: Base.metadata, None: [Base.metadata, metadata]}[own]
    alerts = set() if own is False else {"alerts"}

    def found(url: str) -> set[str]:
        with engine_of(url).connect() as connection:
            context = MigrationContext.configure(connection, opts={"include_object": schema.include_object})
            changes = compare_metadata(context, target)
        return {change[1].name if isinstance(change, tuple) else str(change) for change in changes}

    others = {*legacy.OTHER_TABLES, "billing_by_node"}  # which are the service's to leave out
    assert found(legacy_url) == alerts | others
    if alerts:
        with psycopg.connect(legacy_url) as connection:
            connection.execute("CREATE TABLE alerts (node_id text PRIMARY KEY REFERENCES nodes (node_id))")
        assert found(legacy_url) == others


def test_a_table_of_the_same_name_in_a_schema_of_the_services_is_the_services(mesh_storage_url: str) -> None:
    own = MetaData()
    Table("nodes", own, Column("id", Text, primary_key=True), schema="app")
    with psycopg.connect(mesh_storage_url) as session:
        session.execute("CREATE SCHEMA app")
    options = {"include_object": schema.include_object, "include_schemas": True}
    with engine_of(mesh_storage_url).connect() as connection:
        (change,) = compare_metadata(MigrationContext.configure(connection, opts=options), own)
        assert (change[0], change[1].fullname) == ("add_table", "app.nodes")
        connection.rollback()
        own.create_all(connection)
        connection.commit()
        assert compare_metadata(MigrationContext.configure(connection, opts=options), own) == []
    with MeshStorage.open(mesh_storage_url) as storage:
        assert storage.health().ok


def to_former(url: str, *theirs: str) -> None:
    """Put the revision where it was up to 0009, beside revisions of a service."""
    with psycopg.connect(url) as connection:
        newer = (tables.revision_in(tables.by_psycopg(connection)) or "") > "0009"
    if newer:
        command.downgrade(schema.alembic_config(open_server(Settings(url=url)).connect), "0009")
    with psycopg.connect(url) as connection:
        connection.execute("ALTER TABLE mesh_alembic_version RENAME TO alembic_version")
        connection.execute(
            "ALTER TABLE alembic_version RENAME CONSTRAINT mesh_alembic_version_pkc TO alembic_version_pkc"
        )
        for revision in theirs:
            connection.execute("INSERT INTO alembic_version VALUES (%s)", [revision])


@pytest.mark.parametrize("revision", schema.revisions()[:9])
@pytest.mark.parametrize("theirs", [(), ("a1b2c3",), ("9999", "abc")], ids=["alone", "one of theirs", "two of theirs"])
def test_a_version_table_of_the_former_name_is_taken_over(url: str, revision: str, theirs: tuple[str, ...]) -> None:
    schema.upgrade(url, revision)
    to_former(url, *theirs)
    with psycopg.connect(url) as connection:
        assert tables.revision_in(tables.by_psycopg(connection)) == revision
    assert [line.split()[0] for line in ours(url, "current").splitlines()] == ([revision] if not theirs else [])
    schema.upgrade(url)
    assert rows(url, "SELECT version_num FROM mesh_alembic_version") == [(schema.head(),)]
    if theirs:
        assert sorted(rows(url, "SELECT version_num FROM alembic_version")) == sorted((each,) for each in theirs)
    else:
        assert rows(url, "SELECT to_regclass('alembic_version')") == [(None,)]
    assert "No new upgrade operations" in ours(url, "check")


def test_a_revision_of_the_services_that_is_called_like_one_of_ours_stays_the_services(
    url: str, service: Service
) -> None:
    service.run(url, "alembic upgrade 0001")
    with psycopg.connect(url) as connection:
        legacy.create(connection)
    assert "current none" in service.run(url, "mesh-storage schema || true")
    schema.upgrade(url)
    assert rows(url, "SELECT version_num FROM alembic_version") == [("0001",)]
    with MeshStorage.open(url) as storage:
        assert storage.health().ok


@pytest.mark.parametrize(("first", "second"), [("0003", "0007"), ("0007", "0003")])
def test_of_two_revisions_in_one_table_the_one_that_the_tables_look_like_is_ours(
    url: str, first: str, second: str
) -> None:
    schema.upgrade(url, "0007")
    to_former(url)
    with psycopg.connect(url) as connection:
        connection.execute("DELETE FROM alembic_version")
        connection.execute("INSERT INTO alembic_version VALUES (%s), (%s)", [first, second])
    schema.upgrade(url)
    assert rows(url, "SELECT version_num FROM alembic_version") == [("0003",)]
    assert rows(url, "SELECT version_num FROM mesh_alembic_version") == [(schema.head(),)]


def test_of_two_revisions_that_may_both_be_ours_none_is_taken(url: str) -> None:
    schema.upgrade(url, "0007")
    to_former(url, "0008")
    for call in (schema.upgrade, MeshStorage.open):
        with pytest.raises(SchemaMismatchError, match=r"public\.alembic_version has several .*: 0007, 0008; delete"):
            call(url)
    assert rows(url, "SELECT version_num FROM alembic_version ORDER BY 1") == [("0007",), ("0008",)]


@pytest.mark.parametrize("theirs", [(), ("a1b2c3",)], ids=["alone", "shared"])
def test_many_take_it_over_at_once(url: str, theirs: tuple[str, ...]) -> None:
    schema.upgrade(url, "0004")
    to_former(url, *theirs)
    with ThreadPoolExecutor(6) as threads:
        processes = [start_alembic(url, "upgrade", "head") for _ in range(2)]
        commands = [
            subprocess.Popen(
                [sys.executable, "-m", "mesh_storage", "upgrade", "--url", url],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for _ in range(2)
        ]
        list(threads.map(schema.upgrade, [url] * 2))
        for process in (*processes, *commands):
            said = process.communicate(timeout=120)
            assert process.returncode == 0, said
    assert rows(url, "SELECT version_num FROM mesh_alembic_version") == [(schema.head(),)]


def test_it_waits_for_a_migration_of_the_service(url: str) -> None:
    schema.upgrade(url)
    to_former(url, "a1b2c3")
    with psycopg.connect(url) as migration, ThreadPoolExecutor(1) as threads:
        migration.execute("UPDATE alembic_version SET version_num = 'd4e5f6' WHERE version_num = 'a1b2c3'")
        upgrade = threads.submit(schema.upgrade, url)
        with pytest.raises(TimeoutError):
            upgrade.result(1.5)
        migration.commit()
        upgrade.result(60)
    assert rows(url, "SELECT version_num FROM alembic_version") == [("d4e5f6",)]


@pytest.mark.parametrize("theirs", [(), ("a1b2c3",)], ids=["alone", "shared"])
def test_who_could_read_the_revision_still_can(url: str, theirs: tuple[str, ...]) -> None:
    role = f"the \"reader' {os.getpid()}"
    quoted = psycopg.sql.Identifier(role).as_string()
    schema.upgrade(url)
    to_former(url, *theirs)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {quoted}".encode())
        try:
            connection.execute(f"GRANT SELECT ON alembic_version TO {quoted}".encode())
            schema.upgrade(url)
            connection.execute(f"SET ROLE {quoted}".encode())
            assert connection.execute("SELECT version_num FROM mesh_alembic_version").fetchone() == (schema.head(),)
        finally:
            connection.execute("RESET ROLE")
            connection.execute(f"DROP OWNED BY {quoted}".encode())
            connection.execute(f"DROP ROLE {quoted}".encode())


def test_a_split_that_an_earlier_upgrade_left_is_named(legacy_url: str) -> None:
    with psycopg.connect(legacy_url, autocommit=True) as connection:
        schema.upgrade(legacy_url, "0005")
        to_former(legacy_url)
        connection.execute("CREATE SCHEMA own")
        connection.execute("ALTER TABLE alembic_version SET SCHEMA own")
        url = f"{legacy_url}&options=-csearch_path%3Down,public"
        with pytest.raises(ConfigurationError, match="ALTER TABLE") as caught:
            schema.upgrade(url)
        connection.execute(str(caught.value).partition("same schema: ")[2].encode())
        schema.upgrade(url)
        assert MeshStorage.open(url).health().ok


def test_a_backup_before_and_after_the_take_over(url: str, mesh_storage_databases: Databases, tmp_path: Path) -> None:
    from mesh_storage import ConflictError, Settings, backup
    from mesh_storage.postgres.server import open_server

    schema.upgrade(url)
    to_former(url)
    server = open_server(Settings(url=url))
    backup.backup(server, tmp_path / "before", verify=True)
    with mesh_storage_databases.fresh(with_schema=False) as other:
        backup.restore(open_server(Settings(url=other)), tmp_path / "before")
        assert rows(other, "SELECT version_num FROM mesh_alembic_version") == [(schema.head(),)]
        assert rows(other, "SELECT to_regclass('alembic_version')") == [(None,)]
    with mesh_storage_databases.fresh(with_schema=False) as other:
        with psycopg.connect(other) as connection:
            connection.execute(
                "CREATE TABLE alembic_version (version_num text); INSERT INTO alembic_version VALUES ('x')"
            )
        with pytest.raises(ConflictError, match="another service"):
            backup.restore(open_server(Settings(url=other)), tmp_path / "before")
        assert rows(other, "SELECT version_num FROM alembic_version") == [("x",)]
    with psycopg.connect(url) as connection:
        connection.execute("INSERT INTO alembic_version VALUES ('x')")
    with pytest.raises(ConflictError, match="mesh-storage upgrade"):
        backup.backup(server, tmp_path / "shared")
    with pytest.raises(ConflictError, match="mesh-storage upgrade"):
        backup.restore(server, tmp_path / "before", overwrite=True)
    schema.upgrade(url)
    made = backup.backup(server, tmp_path / "after", verify=True)
    assert set(made.rows) == {*tables.SINCE, tables.VERSION_TABLE}
    backup.restore(server, tmp_path / "after", overwrite=True)
    assert rows(url, "SELECT version_num FROM alembic_version") == [("x",)]
