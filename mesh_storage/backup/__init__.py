"""Backup and restore of this library's tables, by pg_dump and pg_restore.

A backup is a directory with `dump/`, in pg_dump's directory format, and `manifest.json`. A restore is a single
transaction on one connection: pg_restore generates the SQL, `archive` executes it, and the rows are counted before the
commit. So it is all or nothing, however the process ends. Existing tables are emptied and refilled, see `refill`. The
only parallelism within one transaction is that of index builds, which the server distributes among its own processes.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import sqlalchemy
from psycopg import sql
from pydantic import SecretStr

from mesh_storage import schema
from mesh_storage.backup import archive, catalog, client_tools, portable, refill
from mesh_storage.backup.catalog import Connection
from mesh_storage.backup.client_tools import ClientTools, path_error
from mesh_storage.backup.manifest import Manifest
from mesh_storage.errors import (
    AlreadyExistsError,
    ConfigurationError,
    ConflictError,
    InvalidInputError,
    MeshStorageError,
    SchemaMismatchError,
    StorageTimeoutError,
    UnavailableError,
)
from mesh_storage.postgres.server import Server, open_server
from mesh_storage.schema import changes, distribution, migration, tables
from mesh_storage.schema.tables import Location
from mesh_storage.settings import Settings

logger = logging.getLogger("mesh_storage")

JOBS = 4
"""Default number of parallel jobs."""
_MOST_JOBS = 64
_DUMP = "dump"
_INDEX_MEMORY_KB = 64 * 1024
"""Memory for each process that builds an index; with less, the server uses fewer of them."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a backup or restore."""

    step: str
    """`dump` and `load` count rows, `sum` and `check` count files, `index` counts indexes and constraints."""
    done: int
    """How many there are already."""
    total: int
    """How many there will be at the end of the step."""


Report: TypeAlias = Callable[[Progress], None]
"""What is told the progress; an error that it raises ends the work."""


def backup(
    server: Server,
    path: str | os.PathLike[str],
    *,
    jobs: int = JOBS,
    verify: bool = False,
    progress: Report | None = None,
) -> Manifest:
    """Write a consistent backup to a path, which must not exist, without blocking writers.

    It is written to a temporary directory next to the path and renamed when complete. The schema may be an older one.

    Args:
        server: The server of the database.
        path: The directory to create.
        jobs: The number of tables that pg_dump reads in parallel, with a connection each.
        verify: Test-restore it into a temporary server before it is renamed.
        progress: Called regularly; an exception it raises aborts the backup, and all its files are removed.

    Raises:
        AlreadyExistsError: The path exists.
        InvalidInputError: The path cannot be written.
        ConfigurationError: The database is distributed; pg_dump is missing or too old, or no available one produces
            a backup that restores on other servers; or this user may not read the tables, or `transaction_pooling` is
            set.
        SchemaMismatchError: The database has no schema of mesh_storage, or a newer one.
        StorageTimeoutError: A table was locked for longer than `lock_timeout`.
        UnavailableError: The disk is full, or the database cannot be reached.
    """
    server.require_session()
    target, report = _path(path), checked_report(progress)
    check_jobs(jobs)
    _check_flag("verify", verify)
    if os.path.lexists(target):
        raise _already_exists(target)
    with _path_errors(target):
        unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".part", dir=target.parent))
    try:
        with catalog.connected(server) as connection:
            distribution.check_on_one_server(tables.by_psycopg(connection))
            manifest = _dump(connection, unfinished, jobs, report)
        with _path_errors(target):
            manifest = manifest.write(unfinished, lambda done, total: report(Progress("sum", done, total)))
        if verify:
            _test_restore(unfinished, jobs, report)
        with _path_errors(target):
            _rename(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    logger.info("backup written", extra={"event": "backup", "revision": manifest.revision, "rows": manifest.rows})
    return manifest


def restore(
    server: Server,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    jobs: int = JOBS,
    progress: Report | None = None,
) -> Manifest:
    """Restore a backup in one transaction: either all of it is restored, or the database is unchanged.

    The backup is verified first, and its rows are counted before the commit. Missing tables are created, with the
    domains and functions they need; a foreign key to another system's table is restored if that table exists. Existing
    tables are emptied and refilled, keeping the objects others have added to them; their triggers do not fire. A backup
    of an older schema is upgraded after the commit, by the ordinary migrations.

    Args:
        server: The server of the database.
        path: The backup.
        overwrite: Replace the rows of the tables; otherwise they must be missing or empty.
        jobs: The number of server processes that build an index, with 64 MB of memory each.
        progress: Called regularly; an exception it raises aborts the restore, and the database is unchanged.

    Raises:
        NotFoundError: No backup was found at the path.
        InvalidInputError: The backup was truncated or altered, or cannot be read.
        SchemaMismatchError: The backup or the database has a newer schema than this code, or the name of one of our
            tables belongs to another kind of relation.
        ConflictError: The tables contain rows and `overwrite` was not given, or the rows violate a constraint that
            others added to the tables, or an object of others cannot be kept.
        MissingReferenceError: Foreign keys of or to other tables would be violated.
        ConfigurationError: The database is distributed, pg_restore is missing or too old, the server lacks something
            the tables need, this user may not change the tables, or `transaction_pooling` is set.
        StorageTimeoutError: A table was in use for longer than `lock_timeout`.
        UnavailableError: The database cannot be reached, or its disk is full.
    """
    server.require_session()
    source, report = _path(path), checked_report(progress)
    check_jobs(jobs)
    _check_flag("overwrite", overwrite)
    manifest = _restore(server, source, report, overwrite=overwrite, jobs=jobs)
    logger.info("backup restored", extra={"event": "restore", "revision": manifest.revision, "rows": manifest.rows})
    return manifest


def verify(path: str | os.PathLike[str], *, jobs: int = JOBS, progress: Report | None = None) -> Manifest:
    """Verify a backup by restoring it into a temporary bundled server, in RAM if it fits there, else on disk.

    Raises:
        NotFoundError: No backup was found at the path.
        InvalidInputError: The backup is broken: truncated, altered, or inconsistent with its manifest.
        ConfigurationError: The backup could not be verified here: the extra `embedded` is not installed, or the bundled
            server lacks something the tables need, such as an extension. It may still restore where that exists.
        SchemaMismatchError: It has a newer schema than this code, so it could not be verified here.
        UnavailableError: It could not be verified here: the bundled server does not start, or a disk is full.
    """
    check_jobs(jobs)
    return _test_restore(_path(path), jobs, checked_report(progress))


def check_jobs(jobs: int) -> None:
    """Validate the number of jobs.

    Raises:
        InvalidInputError: It is out of range.
    """
    if not isinstance(jobs, int) or isinstance(jobs, bool) or not 1 <= jobs <= _MOST_JOBS:
        raise InvalidInputError(f"jobs must be from 1 to {_MOST_JOBS}", field="jobs")


def checked_report(progress: Report | None) -> Report:
    """Return what is called with the progress.

    Raises:
        InvalidInputError: It cannot be called.
    """
    if progress is None:
        return _ignore_progress
    if not callable(progress):
        raise InvalidInputError(
            f"progress must be a function that takes a Progress, not {type(progress).__name__}", field="progress"
        )
    return progress


def _check_flag(field: str, value: object) -> None:
    if not isinstance(value, bool):
        raise InvalidInputError(f"{field} must be True or False, not {type(value).__name__}", field=field)


def _dump(connection: Connection, directory: Path, jobs: int, report: Report) -> Manifest:
    major, own = client_tools.server_major(connection), client_tools.server_version(connection)
    suitable = client_tools.suitable(major, own=own, tls=client_tools.uses_tls(connection))
    environment, public = client_tools.same_server(connection)
    location = catalog.locate(connection)
    if location.version_table is None:
        schema.check(None)
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        # Lock before the next statement takes the snapshot, so that no table is altered between snapshot and dump.
        listed = catalog.names(location.namespace, location.tables)
        connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(listed))
        location = catalog.locate(connection)
        namespace, there = location.namespace, location.tables
        snapshot: str = catalog.value(connection, "SELECT pg_export_snapshot()")
        lock_timeout: str = catalog.value(connection, "SHOW lock_timeout")
        options = [f"--dbname={public}", "--no-password", f"--lock-wait-timeout={lock_timeout}"]
        options += [f"--snapshot={snapshot}", "--no-owner", "--no-privileges", "--no-tablespaces"]
        options += ["--no-publications", "--no-security-labels"]
        options += [f"--table={sql.Identifier(namespace, table).as_string()}" for table in there]
        # Their state is that of the rows, and reading it would take a privilege of its own.
        options += [f"--exclude-table-data={sequence}" for sequence in catalog.sequences(connection, there)]
        tools = _choose(connection, suitable, options, environment, directory)
        manifest = _describe(connection, location, tools)
        output = ["--format=directory", f"--file={directory / _DUMP}", f"--jobs={jobs}"]
        copied, total = catalog.copied(connection, there, manifest.rows), sum(manifest.rows.values())
        client_tools.run(
            [tools.directory / "pg_dump", *options, *output],
            environment=environment,
            path=directory,
            tick=lambda: report(Progress("dump", copied(), total)),
        )
    report(Progress("dump", total, total))
    return manifest


def _choose(
    connection: Connection,
    suitable: list[ClientTools],
    options: list[str],
    environment: dict[str, str],
    directory: Path,
) -> ClientTools:
    """Return the first tools whose dump of the schema contains nothing that other servers do not support.

    Raises:
        ConfigurationError: There are none; the message says what to install.
        MeshStorageError: pg_dump failed, and no other one succeeded.
    """
    failure: MeshStorageError | None = None
    refused: dict[str, list[str]] = {}
    for tools in suitable:
        program = tools.directory / "pg_dump"
        try:
            with client_tools.output(
                [program, *options, "--schema-only"], path=directory, environment=environment
            ) as script:
                unknown = portable.unknown_options(script.read().decode(errors="replace"))
        except MeshStorageError as error:
            failure = failure or error
        else:
            if not unknown:
                return tools
            refused[tools.version] = unknown
    if failure and not refused:
        raise failure
    major, own = client_tools.server_major(connection), client_tools.server_version(connection)
    said = sorted({option for unknown in refused.values() for option in unknown})
    raise ConfigurationError(
        f"a backup by pg_dump {' or '.join(refused)} would not restore on other servers, since it would set "
        f"{', '.join(said)}, which they do not support; install postgresql-client-{major} of the server's version "
        f"{own}, or reset the options that were set manually"
    )


def _describe(connection: Connection, location: Location, tools: ClientTools) -> Manifest:
    """Return the manifest for the snapshot of this transaction."""
    revision, there = location.revision, location.tables
    if revision is None or revision not in schema.revisions():
        schema.check(revision)
    if location.missing:
        raise SchemaMismatchError(
            f"the database is at revision {revision}, but lacks the tables {', '.join(location.missing)} in schema "
            f"{location.namespace}; a backup of the rest would be incomplete"
        )
    catalog.check_kinds(connection, there)
    catalog.check_heirs(connection, there)
    catalog.check_sizes(connection, location.namespace, there)
    # So that all names are written with their schema.
    connection.execute("SET LOCAL search_path = ''")
    return Manifest(
        created=catalog.value(connection, "SELECT now()"),
        revision=str(revision),
        namespace=location.namespace,
        server_version=client_tools.server_version(connection),
        tool_version=tools.version,
        size=catalog.size(connection, there),
        rows={table: catalog.count(connection, location.namespace, table) for table in there},
        definitions=catalog.definitions(connection, there),
        references=catalog.references(connection, there),
    )


def _check(source: Path, report: Report) -> Manifest:
    manifest = Manifest.read(source)
    if manifest.revision not in schema.revisions():
        raise SchemaMismatchError(
            f"the backup has the schema revision {manifest.revision}, which this mesh_storage (at {schema.head()}) "
            "does not know; restore it with a newer mesh_storage"
        )
    lacking = tables.missing(manifest.revision, manifest.rows)
    if _version_table(manifest) not in manifest.rows:
        lacking.append(tables.VERSION_TABLE)
    if lacking:
        raise InvalidInputError(
            f"the backup cannot be used: it lacks the tables {', '.join(lacking)}; use another one", field="path"
        )
    manifest.verify_files(source, lambda done, total: report(Progress("check", done, total)))
    return manifest


def _version_table(manifest: Manifest) -> str:
    former = tables.FORMER_VERSION_TABLE
    return former if former in manifest.rows else tables.VERSION_TABLE


def _load(
    session: sqlalchemy.Connection,
    connection: Connection,
    manifest: Manifest,
    tools: ClientTools,
    dump: Path,
    *,
    report: Report,
    overwrite: bool,
    jobs: int,
) -> None:
    """Run the transaction of a restore."""
    location = catalog.locate(connection)
    namespace = location.namespace
    if namespace != manifest.namespace:
        raise ConfigurationError(
            f"the tables of the backup are in schema {manifest.namespace}, but the connection selects {namespace}; "
            f"change it with the URL parameter options=-csearch_path={manifest.namespace}"
        )
    refill.check(connection, location, overwrite=overwrite)
    foreign_keys = refill.empty(connection, location)
    location = refill.bring_to(session, connection, location, manifest.revision)
    selection = _select(connection, manifest, location)
    connection.execute(
        "SELECT set_config('max_parallel_maintenance_workers', %s::text, true), set_config('maintenance_work_mem',"
        " greatest(pg_size_bytes(current_setting('maintenance_work_mem')) / 1024, %s)::text || 'kB', true)",
        [jobs - 1, _INDEX_MEMORY_KB * jobs],
    )
    program, rows = tools.directory / "pg_restore", sum(manifest.rows.values())
    with refill.filling(connection, location, foreign_keys, lambda done, total: report(Progress("index", done, total))):
        archive.load(
            connection, program, dump, selection, lambda step, done, total: report(Progress(step, done, total or rows))
        )
    version_table = tables.VERSION_TABLE if location.tables else _version_table(manifest)
    expected = {table: number for table, number in manifest.rows.items() if table != _version_table(manifest)}
    found = {table: catalog.count(connection, namespace, table) for table in expected}
    if found != expected or catalog.revision(connection, namespace, version_table) != manifest.revision:
        raise InvalidInputError("the dump does not match its manifest; nothing was restored", field="path")
    refill.advance_sequences(connection, namespace, expected)
    if manifest.revision >= changes.SINCE:
        refill.begin_log(connection, namespace, [table for table in manifest.rows if table not in location.tables])
    # Before the commit, after which nothing may fail.
    connection.execute(sql.SQL("ANALYZE {}").format(catalog.names(namespace, expected)))


def _select(connection: Connection, manifest: Manifest, location: Location) -> archive.Selection:
    """Select the entries of the archive to restore, and prepare what the tables it creates need."""
    version_table, here = _version_table(manifest), {table: table for table in location.tables}
    if here:
        here[version_table] = tables.VERSION_TABLE
    elif version_table != tables.VERSION_TABLE:
        former = sql.Identifier(location.namespace, version_table).as_string()
        if catalog.value(connection, "SELECT to_regclass(%s)", former):
            raise ConflictError(
                f"the version table of the backup is named {former}, which another service uses here; restore it "
                "into a separate database, and take a new backup there"
            )
    made = [table for table in manifest.rows if table not in here]
    missing = catalog.missing(connection, manifest.references) if made else []
    if made:
        with archive.surroundings():
            catalog.define(connection, manifest.definitions)
    if missing:
        logger.warning(
            "foreign keys skipped, since the referenced tables do not exist: %s",
            ", ".join(missing),
            extra={"event": "restore", "foreign_keys": missing},
        )
    written = catalog.written(connection, location.namespace, {*manifest.rows, *here.values()})
    return archive.Selection(
        without=missing,
        made=[written[table] for table in made] if here else None,
        filled={written[table]: written[here[table]] for table in manifest.rows if table in here},
    )


def _restore(server: Server, source: Path, report: Report, *, overwrite: bool, jobs: int) -> Manifest:
    manifest = _check(source, report)
    with migration.turn(server.connect), catalog.transaction(server) as (session, connection):
        distribution.check_on_one_server(tables.by_psycopg(connection))
        tools = client_tools.find(max(manifest.tool_major, client_tools.server_major(connection)))
        _load(session, connection, manifest, tools, source / _DUMP, report=report, overwrite=overwrite, jobs=jobs)
    if manifest.revision != schema.head() or _version_table(manifest) != tables.VERSION_TABLE:
        schema.upgrade_server(server)
    return manifest


def _test_restore(source: Path, jobs: int, report: Report) -> Manifest:
    """Test-restore a backup into a temporary server.

    Raises:
        MeshStorageError: It is broken, or could not be verified here; the message says which.
    """
    manifest = Manifest.read(source)
    try:
        with closing(open_server(_throw_away(), space=2 * manifest.size)) as server:
            there = server if manifest.namespace == "public" else catalog.with_namespace(server, manifest.namespace)
            return _restore(there, source, report, overwrite=False, jobs=jobs)
    except (ConfigurationError, SchemaMismatchError, StorageTimeoutError, UnavailableError) as error:
        raise type(error)(
            f"the backup could not be verified here, which does not mean that it is broken: {error}",
            sqlstate=error.sqlstate,
            retryable=error.retryable,
        ) from error


def _throw_away() -> Settings:
    """Return settings without the limits of the environment, which are for the server of the service."""
    return Settings(
        url=SecretStr("memory:"),
        connect_timeout=30,
        statement_timeout=0,
        lock_timeout=0,
        idle_in_transaction_timeout=0,
    )


def _path(path: str | os.PathLike[str]) -> Path:
    try:
        found = Path(path).absolute()
        name = os.fsencode(found)
    except (TypeError, UnicodeError) as error:
        raise InvalidInputError("path must be a str or Path that the file system can store", field="path") from error
    if b"\0" in name:
        raise InvalidInputError("path must not contain NUL", field="path")
    return found


def _rename(unfinished: Path, target: Path) -> None:
    """Rename a finished backup into place durably."""
    try:
        unfinished.rename(target)
    except OSError as error:
        if os.path.lexists(target):
            raise _already_exists(target) from error
        raise
    try:
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        # The backup is complete, whether or not the directory can be synced.
        logger.warning(
            "the backup is at %s, but the rename may be lost in a crash of the machine: the directory cannot be "
            "synced, %s",
            target,
            error.strerror,
            extra={"event": "backup"},
        )


def _already_exists(target: Path) -> AlreadyExistsError:
    return AlreadyExistsError(f"{str(target)!r} already exists; a backup never replaces existing files")


@contextmanager
def _path_errors(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise path_error(path, error) from error


def _ignore_progress(_progress: Progress) -> None:
    """Ignore the progress."""
