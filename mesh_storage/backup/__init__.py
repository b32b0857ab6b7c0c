"""Backup and restore of this library's tables, by pg_dump and pg_restore.

A backup is a directory: `dump/`, which is pg_dump's directory format, and `manifest.json`. A restore is one transaction
on one connection: pg_restore makes the SQL, `archive` runs it, and the rows are counted before the commit. So all is
there or as before, whatever ends the process. Tables that are there already are emptied and filled, see `refill`. What
can go on at once within one transaction is the building of each index, which the server shares among its own processes.
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
from mesh_storage.schema import migration, tables
from mesh_storage.schema.tables import Location
from mesh_storage.settings import Settings

logger = logging.getLogger("mesh_storage")

JOBS = 4
"""How many processes work at once where nothing else is said."""
_MOST_JOBS = 64
_DUMP = "dump"
_INDEX_MEMORY_KB = 64 * 1024
"""What each process that builds an index may take; with less, the server uses fewer of them."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a backup or restore is."""

    step: str
    """`dump` and `load` count rows, `sum` and `check` count files, `index` counts indexes and constraints."""
    done: int
    total: int


Report: TypeAlias = Callable[[Progress], None]


def backup(
    server: Server,
    path: str | os.PathLike[str],
    *,
    jobs: int = JOBS,
    verify: bool = False,
    progress: Report | None = None,
) -> Manifest:
    """Write a backup to a path, where nothing may be yet, as the database is at one moment; writers go on meanwhile.

    It is made under another name beside the path, and gets its own when it is complete. The schema may be an older one.

    Args:
        server: Where the database is.
        path: The directory to make.
        jobs: How many tables pg_dump reads at once, with a connection each.
        verify: Restore it into a throw-away server before it gets its name.
        progress: Called now and then; what it raises ends the backup, and nothing of it stays.

    Raises:
        AlreadyExistsError: There is something at the path.
        InvalidInputError: The path cannot be written.
        ConfigurationError: pg_dump is missing or too old, or none that is there makes a backup that restores on other
            servers, this user may not read the tables, or the connection is one of `transaction_pooling`.
        SchemaMismatchError: The database has no schema of mesh_storage, or a newer one.
        StorageTimeoutError: A table is locked for longer than `lock_timeout`.
        UnavailableError: The disk is full, or the database cannot be reached.
    """
    server.require_session()
    target, report = _path(path), checked_report(progress)
    check_jobs(jobs)
    _check_flag("verify", verify)
    if os.path.lexists(target):
        raise _in_the_way(target)
    with _path_errors(target):
        unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".part", dir=target.parent))
    try:
        with catalog.connected(server) as connection:
            manifest = _dump(connection, unfinished, jobs, report)
        with _path_errors(target):
            manifest = manifest.write(unfinished, lambda done, total: report(Progress("sum", done, total)))
        if verify:
            _prove(unfinished, jobs, report)
        with _path_errors(target):
            _rename(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    logger.info("backup made", extra={"event": "backup", "revision": manifest.revision, "rows": manifest.rows})
    return manifest


def restore(
    server: Server,
    path: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    jobs: int = JOBS,
    progress: Report | None = None,
) -> Manifest:
    """Restore a backup in one transaction: all of it is there afterwards, or the database is as before.

    The backup is verified first, and its rows are counted before the commit. Tables that are not there are made, with
    the domains and functions that they need; a foreign key into another system's table is restored where that table is.
    Tables that are there are emptied and filled, and what others have put onto them stays; their triggers do not fire.
    A backup of an older schema is upgraded after the commit, by the ordinary migrations.

    Args:
        server: Where the database is.
        path: A backup.
        overwrite: Replace the rows of the tables; without it they must be missing or empty.
        jobs: How many processes of the server work on an index, with 64 MB of memory each.
        progress: Called now and then; what it raises ends the restore, and the database is as before.

    Raises:
        NotFoundError: There is no backup at the path.
        InvalidInputError: The backup was truncated or altered, or cannot be read.
        SchemaMismatchError: The backup or the database has a newer schema than this code, or a table of ours is none.
        ConflictError: The tables hold rows and `overwrite` was not given, or the rows do not hold with what others have
            put onto the tables, or that cannot be kept.
        MissingReferenceError: Foreign keys of others or to others would point nowhere.
        ConfigurationError: pg_restore is missing or too old, the server lacks something that the tables need, this user
            may not change the tables, or the connection is one of `transaction_pooling`.
        StorageTimeoutError: A table is in use for longer than `lock_timeout`.
        UnavailableError: The database cannot be reached, or its disk is full.
    """
    server.require_session()
    source, report = _path(path), checked_report(progress)
    check_jobs(jobs)
    _check_flag("overwrite", overwrite)
    manifest = _check(source, report)
    with migration.turn(server.connect), catalog.transaction(server) as (session, connection):
        tools = client_tools.find(max(manifest.tool_major, client_tools.server_major(connection)))
        _load(session, connection, manifest, tools, source / _DUMP, report=report, overwrite=overwrite, jobs=jobs)
    if manifest.revision != schema.head() or _version_table(manifest) != tables.VERSION_TABLE:
        schema.upgrade_server(server)
    logger.info("backup restored", extra={"event": "restore", "revision": manifest.revision, "rows": manifest.rows})
    return manifest


def verify(path: str | os.PathLike[str], *, jobs: int = JOBS, progress: Report | None = None) -> Manifest:
    """Prove a backup by restoring it into a throw-away bundled server: in RAM where it fits there, else on disk.

    Raises:
        NotFoundError: There is no backup at the path.
        InvalidInputError: The backup is broken: truncated or altered, or not what its manifest says.
        ConfigurationError: The backup could not be verified here: the extra `embedded` is not installed, or the bundled
            server lacks what the tables need, such as an extension. It may be restored where that is there.
        SchemaMismatchError: It has a newer schema than this code, so it could not be verified here either.
        UnavailableError: It could not be verified here, since the bundled server does not start or a disk is full.
    """
    check_jobs(jobs)
    return _prove(_path(path), jobs, checked_report(progress))


def check_jobs(jobs: int) -> None:
    """Refuse an impossible number of jobs.

    Raises:
        InvalidInputError: It is one.
    """
    if not isinstance(jobs, int) or isinstance(jobs, bool) or not 1 <= jobs <= _MOST_JOBS:
        raise InvalidInputError(f"jobs must be 1 to {_MOST_JOBS}", field="jobs")


def checked_report(progress: Report | None) -> Report:
    """Return what is called with the progress.

    Raises:
        InvalidInputError: It cannot be called.
    """
    if progress is None:
        return _silent
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
        # Before the snapshot, which the statement after it takes: no table changes its shape between that and the dump.
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
    """Choose the first tools whose dump of the schema has nothing in it that other servers do not know.

    Raises:
        ConfigurationError: There are none; the message says what to install.
        MeshStorageError: pg_dump failed, and there is no other that does better.
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
        f"{', '.join(said)}, which they do not know; install postgresql-client-{major} of the server's version {own}, "
        "or reset what was set by hand"
    )


def _describe(connection: Connection, location: Location, tools: ClientTools) -> Manifest:
    """Say what the snapshot of this transaction holds."""
    revision, there = location.revision, location.tables
    if revision is None or revision not in schema.revisions():
        schema.check(revision)
    if location.missing:
        raise SchemaMismatchError(
            f"the database is at revision {revision}, but lacks the tables {', '.join(location.missing)} in the schema "
            f"{location.namespace}; no backup of what is left would be whole"
        )
    catalog.check_kinds(connection, there)
    catalog.check_heirs(connection, there)
    catalog.check_sizes(connection, location.namespace, there)
    # So that every name is written with its schema.
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
            f"the backup cannot be used: it lacks the tables {', '.join(lacking)}; take another one", field="path"
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
    """Do what is in the transaction of a restore."""
    location = catalog.locate(connection)
    namespace = location.namespace
    if namespace != manifest.namespace:
        raise ConfigurationError(
            f"the tables of the backup are in the schema {manifest.namespace}, the connection leads to {namespace}; "
            f"change it by the URL's parameter options=-csearch_path={manifest.namespace}"
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
        raise InvalidInputError("the dump is not what its manifest says; nothing was restored", field="path")
    # Before the commit, after which nothing may fail any more.
    connection.execute(sql.SQL("ANALYZE {}").format(catalog.names(namespace, expected)))


def _select(connection: Connection, manifest: Manifest, location: Location) -> archive.Selection:
    """Choose what of the archive is restored, and make ready what the tables need that it makes."""
    version_table, here = _version_table(manifest), {table: table for table in location.tables}
    if here:
        here[version_table] = tables.VERSION_TABLE
    elif version_table != tables.VERSION_TABLE:
        former = sql.Identifier(location.namespace, version_table).as_string()
        if catalog.value(connection, "SELECT to_regclass(%s)", former):
            raise ConflictError(
                f"the backup has its version table under the name {former}, which another service has here; restore it "
                "into a database of its own, and take a backup there"
            )
    made = [table for table in manifest.rows if table not in here]
    missing = catalog.missing(connection, manifest.references) if made else []
    if made:
        with archive.surroundings():
            catalog.define(connection, manifest.definitions)
    if missing:
        logger.warning(
            "foreign keys left out, for their tables are not there: %s",
            ", ".join(missing),
            extra={"event": "restore", "foreign_keys": missing},
        )
    written = catalog.written(connection, location.namespace, {*manifest.rows, *here.values()})
    return archive.Selection(
        without=missing,
        made=[written[table] for table in made] if here else None,
        filled={written[table]: written[here[table]] for table in manifest.rows if table in here},
    )


def _prove(source: Path, jobs: int, report: Report) -> Manifest:
    """Restore a backup into a throw-away server.

    Raises:
        MeshStorageError: It is broken, or could not be verified here; the message says which.
    """
    manifest = Manifest.read(source)
    try:
        with closing(open_server(Settings(url=SecretStr("memory:")), space=2 * manifest.size)) as server:
            there = server if manifest.namespace == "public" else catalog.with_namespace(server, manifest.namespace)
            return restore(there, source, jobs=jobs, progress=report)
    except (ConfigurationError, SchemaMismatchError, StorageTimeoutError, UnavailableError) as error:
        raise type(error)(
            f"the backup could not be verified here, which does not say that it is broken, because {error}",
            sqlstate=error.sqlstate,
            retryable=error.retryable,
        ) from error


def _path(path: str | os.PathLike[str]) -> Path:
    try:
        found = Path(path).absolute()
        name = os.fsencode(found)
    except (TypeError, UnicodeError) as error:
        raise InvalidInputError("path must be a str or a Path that the file system can hold", field="path") from error
    if b"\0" in name:
        raise InvalidInputError("path must not have a NUL in it", field="path")
    return found


def _rename(unfinished: Path, target: Path) -> None:
    """Return a finished backup its name, and make that last."""
    try:
        unfinished.rename(target)
    except OSError as error:
        if os.path.lexists(target):
            raise _in_the_way(target) from error
        raise
    try:
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        # The backup is there and whole, whatever the directory says to this.
        logger.warning(
            "the backup is at %s, but its name may be lost if the machine fails soon: the directory cannot be synced, "
            "%s",
            target,
            error.strerror,
            extra={"event": "backup"},
        )


def _in_the_way(target: Path) -> AlreadyExistsError:
    return AlreadyExistsError(f"there is something at {str(target)!r} already; a backup never replaces anything")


@contextmanager
def _path_errors(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise path_error(path, error) from error


def _silent(_progress: Progress) -> None:
    """Nobody watches."""
