"""The schema of a database: which revision it has, which one this code needs, and how to deploy it."""

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
from mesh_storage.schema import tables
from mesh_storage.settings import settings_of

if TYPE_CHECKING:
    from alembic.config import Config

logger = logging.getLogger("mesh_storage")

_UPGRADE = "run: mesh-storage upgrade (or alembic upgrade head)"
# Alembic keeps what it works on in its modules, so of two threads one would migrate the other's database.
_alembic = threading.Lock()


@functools.cache
def script_location() -> Path:
    """Return the directory of the migrations: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    return next(path for path in (package / "alembic", package.parent / "alembic") if (path / "env.py").exists())


@functools.cache
def revisions() -> tuple[str, ...]:
    """Return the revisions of the migrations in their order, which is that of their file names."""
    files = (script_location() / "versions").glob("[0-9]*_*.py")
    return tuple(sorted(file.name.split("_", 1)[0] for file in files))


def head() -> str:
    """Return the revision that this code works with."""
    return revisions()[-1]


def current(connection: sqlalchemy.Connection) -> str | None:
    """Return the revision of a database, or None where mesh_storage's schema was never deployed."""
    return tables.revision_in(tables.by_sqlalchemy(connection))


def check(revision: str | None) -> None:
    """Refuse a database whose schema is not the one that this code works with.

    Raises:
        SchemaMismatchError: It is behind, ahead, or not there; the message says what to run.
    """
    if revision == head():
        return
    if revision is None:
        raise SchemaMismatchError(f"the database has no mesh_storage schema; {_UPGRADE} (to {head()})")
    if revision in revisions():
        raise SchemaMismatchError(
            f"the schema is behind: the database is at revision {revision}, this mesh_storage needs {head()}; "
            + _UPGRADE
        )
    raise SchemaMismatchError(
        f"the schema is ahead: the database is at revision {revision}, which this mesh_storage (at {head()}) does not "
        "know; run a newer mesh_storage"
    )


def ensure(server: Server) -> None:
    """Deploy the schema on a bundled server; on any other, check that it is there.

    Raises:
        SchemaMismatchError: It is behind or ahead of this code.
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
    """Make Alembic's configuration for the packaged migrations, for the database of these connect arguments."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(script_location()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connect"] = connect
    return config


def upgrade(url: str | None = None, revision: str = "head") -> None:
    """Bring the schema of a database up to date: what `alembic upgrade head` does, from Python.

    Without a URL the settings of the environment apply. Many processes and threads may do this at once: one
    migrates, and the others wait for it.

    Raises:
        ConflictError: The database holds rows that cannot be adopted; nothing was changed, and the message lists them.
        ConfigurationError: The URL or another setting is wrong, `transaction_pooling` among them.
        UnavailableError: The database cannot be reached.
        StorageTimeoutError: A lock was not to be had, or another process migrates for too long.
        SchemaMismatchError: The schema is ahead of this code.
    """
    server = open_server(settings_of(url))
    try:
        upgrade_server(server, revision)
    finally:
        server.close()


def upgrade_server(server: Server, revision: str = "head") -> None:
    """Bring the schema up to date on a server that is open already."""
    from alembic import command
    from alembic.util import CommandError

    server.require_session()
    logger.info("deploying the schema", extra={"event": "deploy", "server": server.kind, "revision": revision})
    try:
        with _alembic:
            command.upgrade(alembic_config(server.connect), revision)
    except CommandError as error:
        raise MeshStorageError(f"the schema cannot be brought to {revision}: {error}") from error
    except Exception as error:
        translated = translate(error)
        if translated is error:
            raise
        raise translated from error


def migrate(connection: sqlalchemy.Connection, revision: str) -> None:
    """Bring the schema to a revision, a newer or an older one, in the transaction of a connection."""
    from alembic import command

    config = alembic_config()
    config.attributes["connection"] = connection
    at = current(connection) or ""
    with _alembic:
        (command.upgrade if at < revision else command.downgrade)(config, revision)
