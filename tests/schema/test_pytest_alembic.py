"""pytest-alembic's whole set of tests with the experimental ones, and every step up and down with rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from alembic.config import Config
from psycopg.conninfo import conninfo_to_dict
from pytest_alembic import MigrationContext
from pytest_alembic.tests import (
    experimental,
    test_model_definitions_match_ddl,
    test_single_head_revision,
    test_up_down_consistency,
    test_upgrade,
)

from mesh_storage import models, schema
from mesh_storage.models import Base
from mesh_storage.schema import migration, tables
from mesh_storage.testing import Databases
from tests.schema import legacy

pytestmark = pytest.mark.slow

__all__ = [
    "test_model_definitions_match_ddl",
    "test_single_head_revision",
    "test_up_down_consistency",
    "test_upgrade",
]


@pytest.fixture
def alembic_config() -> Config:
    """Return the configuration of the packaged migrations."""
    return schema.alembic_config()


@pytest.fixture
def alembic_engine(mesh_storage_databases: Databases) -> Iterator[sqlalchemy.Engine]:
    """Yield an engine for an empty database, as the migrations have it."""
    with mesh_storage_databases.fresh(with_schema=False) as url:
        engine = migration.create_engine(dict(conninfo_to_dict(url)))
        yield engine
        engine.dispose()


def test_all_models_register_on_metadata(alembic_runner: MigrationContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as it is from the checkout: it looks for alembic.ini there, and reads the output of the migrations."""
    monkeypatch.chdir(Path(__file__).parent.parent.parent)
    # It knows a base class of SQLAlchemy 2 only by its metadata.
    monkeypatch.setattr(models, "metadata", Base.metadata, raising=False)
    monkeypatch.setenv("MESH_STORAGE_URL", "postgresql://nobody@nowhere.invalid/none")
    experimental.test_all_models_register_on_metadata(alembic_runner, "mesh_storage.models", offline=True)


# Alembic's comparison of indexes is not at home in SQLAlchemy 2.1 yet.
@pytest.mark.filterwarnings("ignore:Can't validate argument 'dialect_options':sqlalchemy.exc.SAWarning")
def test_downgrade_leaves_no_trace(alembic_runner: MigrationContext) -> None:
    # Alembic never drops a version table, and the comparison knows only the name that it has by default.
    alembic_runner.migrate_up_to("0001")
    alembic_runner.migrate_down_to("base")
    experimental.test_downgrade_leaves_no_trace(alembic_runner)


def values(engine: sqlalchemy.Engine) -> dict[str, list[tuple[Any, ...]]]:
    with engine.connect() as connection:
        driver: Any = connection.connection.driver_connection
        return legacy.rows(driver, also=())


def test_every_step_up_and_down_keeps_the_rows(
    alembic_runner: MigrationContext, alembic_engine: sqlalchemy.Engine
) -> None:
    """From the tables that the first revision makes; those of the Go service have tests of their own."""
    alembic_runner.migrate_up_to("0001")
    with alembic_engine.begin() as connection:
        driver: Any = connection.connection.driver_connection
        driver.execute("CREATE TABLE regions (region_id text, region_name text)")
        driver.execute("CREATE TABLE billing (node_id text, mesh_id text, amount decimal)")
        driver.execute("CREATE TABLE inventory (node_id text, note text)")
        # Here nothing but the library makes ids.
        driver.execute("ALTER TABLE nodes ALTER node_id SET DEFAULT 'node_0000000000000000000000000Z'")
        driver.execute("ALTER TABLE mesh ALTER mesh_id SET DEFAULT 'mesh_0000000000000000000000000Z'")
        driver.execute("ALTER TABLE routes ALTER route_id SET DEFAULT 'route_0000000000000000000000000Z'")
        legacy.fill(driver)
    before = values(alembic_engine)
    assert set(before) == {name for name, since in tables.SINCE.items() if since == "0001"}
    assert all(before.values())
    revisions = schema.revisions()
    for step, revision in enumerate(revisions[1:]):
        alembic_runner.migrate_up_to(revision)
        assert values(alembic_engine) == before, revision
        alembic_runner.migrate_down_to(revisions[step])
        assert values(alembic_engine) == before, revision
        alembic_runner.migrate_up_to(revision)
        assert values(alembic_engine) == before, revision
    for revision in reversed(revisions[:-1]):
        alembic_runner.migrate_down_to(revision)
        assert values(alembic_engine) == before, revision
    alembic_runner.migrate_up_to("head")
    assert values(alembic_engine) == before
