"""The schema of a database: its revision, the one this code requires, and its deployment."""

from __future__ import annotations

import functools
import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import sqlalchemy

from mesh_storage.errors import MeshStorageError, SchemaMismatchError, translate
from mesh_storage.postgres import engine
from mesh_storage.postgres.server import Server, open_server
from mesh_storage.schema import privileges, tables
from mesh_storage.settings import settings_of

if TYPE_CHECKING:
    from alembic.config import Config

logger = logging.getLogger("mesh_storage")

_UPGRADE = "run: mesh-storage upgrade (or alembic upgrade head)"
# Alembic keeps its context in module globals, so with two threads one would migrate the other's database.
_alembic = threading.Lock()


@functools.cache
def script_location() -> Path:
    """Return the directory of the migrations: in the installed package, or next to it in a checkout."""
    package = Path(__file__).parent.parent
    return next(path for path in (package / "alembic", package.parent / "alembic") if (path / "env.py").exists())


@functools.cache
def revisions() -> tuple[str, ...]:
    """Return the revisions of the migrations in order, which is that of their file names."""
    files = (script_location() / "versions").glob("[0-9]*_*.py")
    return tuple(sorted(file.name.split("_", 1)[0] for file in files))


def head() -> str:
    """Return the revision that this code requires."""
    return revisions()[-1]


def current(connection: sqlalchemy.Connection) -> str | None:
    """Return the revision of a database, or None if the schema was never deployed."""
    return tables.revision_in(tables.by_sqlalchemy(connection))


def examine(connection: sqlalchemy.Connection) -> tuple[str | None, tuple[str, ...]]:
    """Return the revision of a database, and the privileges on its tables that a service needs and this role lacks."""
    fetch = tables.by_sqlalchemy(connection)
    location = tables.locate_during_upgrade(fetch)
    return location.revision, privileges.missing(fetch, location.tables)


def check(revision: str | None) -> None:
    """Raise unless the revision of a database is the one that this code requires.

    Raises:
        SchemaMismatchError: It is older, newer or missing; the message says what to run.
    """
    if revision == head():
        return
    if revision is None:
        raise SchemaMismatchError(f"the database has no mesh_storage schema; {_UPGRADE} (to {head()})")
    if revision in revisions():
        raise SchemaMismatchError(
            f"the schema is out of date: the database is at revision {revision}, this mesh_storage requires {head()}; "
            + _UPGRADE
        )
    raise SchemaMismatchError(
        f"the schema is too new: the database is at revision {revision}, which this mesh_storage (at {head()}) "
        "does not know; use a newer mesh_storage"
    )


def ensure(server: Server) -> None:
    """Deploy the schema on a bundled server; on any other, check that it exists.

    Raises:
        SchemaMismatchError: It is older or newer than this code requires, or missing.
        UnavailableError: The database cannot be reached.
    """
    try:
        with engine.connect(server.connect) as connection:
            if server.local_parameters is not None:
                connection.execute(f"BEGIN READ ONLY; {server.local_parameters}".encode())
            revision = tables.revision_in(tables.by_psycopg(connection))
    except psycopg.Error as error:
        raise translate(error) from error
    if server.embedded is not None and (revision is None or revision in revisions()[:-1]):
        upgrade_server(server)
    else:
        check(revision)


def alembic_config(connect: dict[str, object] | None = None) -> Config:
    """Return Alembic's configuration for the packaged migrations and the database of these connect arguments."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(script_location()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connect"] = connect
    return config


def upgrade(url: str | None = None, revision: str = "head") -> None:
    """Upgrade the schema of a database, like `alembic upgrade head`, from Python.

    Without a URL, the settings come from the environment. Safe to call from many processes and threads at once: one
    migrates, and the others wait for it.

    Raises:
        ConflictError: The database contains rows that cannot be adopted; nothing was changed, and the message lists
            them.
        ConfigurationError: The URL or another setting is invalid, including `transaction_pooling`.
        UnavailableError: The database cannot be reached.
        StorageTimeoutError: A lock could not be acquired, or another process takes too long to migrate.
        SchemaMismatchError: The schema is newer than this code.
    """
    server = open_server(settings_of(url))
    try:
        upgrade_server(server, revision)
    finally:
        server.close()


def upgrade_server(server: Server, revision: str = "head") -> None:
    """Upgrade the schema on a server that is already open."""
    from alembic import command
    from alembic.util import CommandError

    server.require_session()
    logger.info("deploying the schema", extra={"event": "deploy", "server": server.kind, "revision": revision})
    try:
        with _alembic:
            command.upgrade(alembic_config(server.connect), revision)
    except CommandError as error:
        raise MeshStorageError(f"the schema cannot be upgraded to revision {revision}: {error}") from error
    except Exception as error:
        translated = translate(error)
        if translated is error:
            raise
        raise translated from error


def migrate(connection: sqlalchemy.Connection, revision: str) -> None:
    """Upgrade or downgrade the schema to a revision, in the transaction of a connection."""
    from alembic import command

    config = alembic_config()
    config.attributes["connection"] = connection
    at = current(connection) or ""
    with _alembic:
        (command.upgrade if at < revision else command.downgrade)(config, revision)
