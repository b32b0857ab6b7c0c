"""Alembic's environment: connects by the settings of mesh_storage, with one migrator at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from logging.config import fileConfig
from typing import Any

import sqlalchemy
import sqlalchemy.exc
from alembic import context
from alembic.util import CommandError
from sqlalchemy.dialects.postgresql import DOMAIN

from mesh_storage import schema
from mesh_storage.errors import MeshStorageError
from mesh_storage.models import Base
from mesh_storage.postgres.server import open_server
from mesh_storage.schema import adoption, migration, tables
from mesh_storage.settings import Settings

config = context.config
# A service's own alembic.ini may leave the logging configuration to the service.
if config.config_file_name is not None and config.file_config.has_section("loggers"):
    fileConfig(config.config_file_name, disable_existing_loggers=False)


NOT_REFLECTED = {
    index.name for table in Base.metadata.tables.values() for index in table.indexes if index.info.get("not_reflected")
}
MODELLED = tables.SINCE.keys() & Base.metadata.tables.keys()
"""Our tables that have a model; a service's own models may use our `Base` too."""
TIMES, CHECKS, VALIDATED, STALE, INDEXES = "0003", "0004", "0005", "0006", "0007"
"""The revisions that change the type of times, add the checks, validate them, add the stale log, and add indexes."""


def include_object(item: Any, name: str | None, kind: str, reflected: bool, compare_to: Any) -> bool:  # noqa: FBT001 - Alembic's signature
    """Exclude other tables, whichever metadata they are in, and the objects that others have added to ours."""
    if kind == "table":
        return name in MODELLED and item.schema is None
    if kind == "index" and name in NOT_REFLECTED:
        return False
    if kind == "column" and item.identity is not None:  # Alembic fails to compare it beside `compare_server_default`
        return False
    return not reflected or compare_to is not None


def compare_type(_context: Any, _column: Any, _metadata_column: Any, inspected: Any, _metadata: Any) -> bool | None:
    """Treat the earlier Go service's domain for ids as equal to text."""
    return False if isinstance(inspected, DOMAIN) and inspected.name == "ulid" else None


def compare_server_default(
    _context: Any, _column: Any, _metadata_column: Any, inspected: str | None, *_: Any
) -> bool | None:
    """Ignore the earlier Go service's default for ids."""
    return False if inspected is not None and "generate_ulid(" in inspected else None


OPTIONS: dict[str, Any] = {
    "target_metadata": Base.metadata,
    "version_table": tables.VERSION_TABLE,
    "transaction_per_migration": True,
    "include_object": include_object,
    "compare_type": compare_type,
    "compare_server_default": compare_server_default,
}


def changes_revision() -> bool:
    """Return whether the command changes the revision: upgrade, downgrade or stamp."""
    return "destination_rev" in context.get_context().opts


def check_before_upgrade(connection: sqlalchemy.Connection) -> None:
    """Find everything that would make an upgrade fail halfway, before it changes anything."""
    runner = context.get_context()
    command = runner.opts.get("fn")
    if not changes_revision() or getattr(command, "__name__", "") in {"downgrade", "do_stamp"}:
        return
    current = max(runner.get_current_heads(), default="")
    if current < INDEXES:
        revision = context.script.get_revision
        indexes = revision(INDEXES).module
        adoption.check(
            connection,
            revision("0001").module.TABLES,
            revision(CHECKS).module.CHECKS if current < VALIDATED else {},
            {name: (*index, name == indexes.KEY) for name, index in indexes.INDEXES.items()},
            new_tables=["mesh_consensus_log_stale"] if current < STALE else [],
            shape=not current,
            times=current < TIMES,
        )
    connection.rollback()


def run_offline() -> None:
    """Generate the SQL without running it (offline mode)."""
    context.configure(dialect_name="postgresql", literal_binds=True, dialect_opts={"paramstyle": "named"}, **OPTIONS)
    with context.begin_transaction():
        context.run_migrations()


def run_online(connect: dict[str, Any]) -> None:
    """Run the migrations; one that cannot get its locks in time is rolled back and retried, to not block traffic."""
    engine = migration.create_engine(connect)

    def migrate(connection: sqlalchemy.Connection, check_turn: Callable[[], None]) -> None:
        options = OPTIONS | {"connection": connection, "on_version_apply": lambda **_: check_turn()}
        context.configure(**options)
        location = migration.settle(connection, changes=changes_revision())
        if changes_revision() and location.revision not in (None, *schema.revisions()):
            schema.check(location.revision)
        if location.version_table == tables.FORMER_VERSION_TABLE and not location.shared:
            context.configure(**options | {"version_table": location.version_table})
        check_before_upgrade(connection)
        try:
            with context.begin_transaction():
                context.run_migrations()
        except sqlalchemy.exc.IntegrityError:
            # A service inserted an invalid row after the check, which reports it when repeated.
            connection.rollback()
            check_before_upgrade(connection)
            raise

    def run(check_turn: Callable[[], None]) -> None:
        with engine.connect() as connection:
            try:
                migrate(connection, check_turn)
            except sqlalchemy.exc.PendingRollbackError as error:
                raise migration.what_ended(error) from error

    with migration.turn(connect) as check_turn:
        migration.patiently(lambda: run(check_turn))


def run_in(given: sqlalchemy.Engine | sqlalchemy.Connection) -> None:
    """Run on the connection of a test, possibly in its transaction; the test ensures that no one else migrates."""
    with nullcontext(given) if isinstance(given, sqlalchemy.Connection) else given.connect() as connection:
        context.configure(connection=connection, in_callers_transaction=connection.in_transaction(), **OPTIONS)
        with context.begin_transaction():
            context.run_migrations()


def run_from_command_line() -> None:
    """Run on the database of the settings."""
    server = open_server(Settings())
    try:
        server.require_session()
        run_online(server.connect)
    finally:
        server.close()


if context.is_offline_mode():
    run_offline()
elif (connect_arguments := config.attributes.get("connect")) is not None:
    run_online(connect_arguments)
elif (given_connection := config.attributes.get("connection")) is not None:
    run_in(given_connection)
else:
    try:
        run_from_command_line()
    except MeshStorageError as error:  # an operator needs no traceback
        raise CommandError(str(error)) from error
