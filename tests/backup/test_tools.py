"""Which of PostgreSQL's programs are used, and what goes wrong with them and with the path."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backup_help import SYSTEM_15, contents, server_of, shape, system_server

from mesh_storage import (
    AlreadyExistsError,
    ConfigurationError,
    InvalidInputError,
    MeshStorage,
    MeshStorageError,
    UnavailableError,
    backup,
    schema,
)
from mesh_storage.backup import client_tools, portable
from mesh_storage.backup.client_tools import ClientTools
from mesh_storage.embedded.server import programs
from mesh_storage.postgres import engine
from mesh_storage.postgres.server import Server
from mesh_storage.testing import Databases


def program(directory: Path, name: str, version: str, then: str = "exit 0") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "{name} (PostgreSQL) {version}" && exit\n{then}\n'
    )
    (directory / name).chmod(0o755)


def only(monkeypatch: pytest.MonkeyPatch, *directories: Path) -> None:
    """Let the tools of these directories be all that there are."""
    found = [tools for tools in map(client_tools._examine, directories) if tools is not None]
    monkeypatch.setattr(client_tools, "_found", lambda **_: iter(found))


def test_the_newest_is_chosen_of_the_system_the_path_and_the_bundled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pg_dump", "pg_restore"):
        program(tmp_path / "path", name, "97.1")
        program(tmp_path / "usr/lib/postgresql/98/bin", name, "98.2 (Debian 98.2-1)")
    monkeypatch.setattr(client_tools, "_PLACES", ())
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert client_tools.find(16).directory == programs("18")
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert client_tools.find(18) == ClientTools(tmp_path / "path", "97.1")
    monkeypatch.setattr(client_tools, "_PLACES", (str(tmp_path / "usr/lib/postgresql/*/bin").lstrip("/"),))
    assert client_tools.find(18) == ClientTools(tmp_path / "usr/lib/postgresql/98/bin", "98.2")
    assert client_tools.find(98).major == 98


@pytest.mark.parametrize(
    ("server", "there", "best"),
    [
        ("15.20", "18.4 15.20 16.14", "15.20"),  # 18.4 came out with 15.18
        ("15.18", "15.17 18.4 15.18", "18.4"),
        ("15.20", "15.20 18.6 17.11", "18.6"),
        ("15.20", "15.21 15.20 15.19 18.4", "15.20"),
        ("15.20", "15.18 15.21 15.19", "15.21"),
        ("18.4", "15.20 18.4", "18.4"),
        ("15.19", "15.19 19.0", "19.0"),
        ("15.20", "15.20 19.0", "15.20"),
        ("15.20", "19.1 20.0 18.6", "20.0"),
        ("15.20", "20.9 21.0", "20.9"),
        ("15.20", "18.4 19devel 19beta2 20rc1", "18.4"),
        ("19beta2", "18.4 19devel 19beta2", "19beta2"),
    ],
)
def test_the_newest_release_is_the_best_and_of_its_major_version_the_servers_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: str, there: str, best: str
) -> None:
    for version in there.split():
        for name in ("pg_dump", "pg_restore"):
            program(tmp_path / version, name, f"{version} (Debian {version}-0+deb12u1)")
    only(monkeypatch, *(tmp_path / version for version in there.split()))
    chosen = client_tools.suitable(client_tools.major(server), own=server)[0]
    assert chosen == ClientTools(tmp_path / best, best)


def test_the_major_version_of_a_version_that_is_not_released() -> None:
    assert [client_tools.major(version) for version in ("15.20", "19devel", "19beta1")] == [15, 19, 19]


def test_programs_that_are_broken_are_none(tmp_path: Path) -> None:
    for name in ("pg_dump", "pg_restore"):
        program(tmp_path, name, "\\0377\\0376")
    assert client_tools._examine(tmp_path) is None
    for name in ("pg_dump", "pg_restore"):
        (tmp_path / name).write_bytes(b"\x7fELF")
    assert client_tools._examine(tmp_path) is None


@pytest.fixture
def real(server: Server) -> ClientTools:
    """Return real programs for the server."""
    with engine.connect(server.connect) as connection:
        own = client_tools.server_version(connection)
        return client_tools.suitable(client_tools.server_major(connection), own=own)[0]


def wrapped(directory: Path, real: ClientTools, **then: str) -> Path:
    """Make programs that do as real ones, and something more."""
    for name in ("pg_dump", "pg_restore"):
        program(directory, name, "99.0", f'"{real.directory / name}" "$@" {then.get(name, "")}')
    return directory


FUTURE = "&& case \"$*\" in *--schema-only*) echo 'ALTER TABLE ONLY t ALTER COLUMN c SET (pg_future=1);';; esac"


def test_a_dump_that_other_servers_would_not_know_is_refused(
    storage: MeshStorage, real: ClientTools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, wrapped(tmp_path / "tools", real, pg_dump=FUTURE))
    words = r"by pg_dump 99\.0 would not restore .* set pg_future, .* install postgresql-client-\d+ of "
    with pytest.raises(ConfigurationError, match=words):
        storage.backup(tmp_path / "backup")
    assert [path.name for path in tmp_path.iterdir()] == ["tools"]


@pytest.mark.parametrize("then", [FUTURE, "&& exit 1"])
def test_where_the_best_makes_no_good_dump_the_next_does(
    storage: MeshStorage, real: ClientTools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    only(monkeypatch, real.directory, wrapped(tmp_path / "tools", real, pg_dump=then))
    assert storage.backup(tmp_path / "backup").tool_version == real.version
    assert storage.restore(tmp_path / "backup", overwrite=True).tool_version == real.version


def test_programs_older_than_the_marks_of_a_server_are_refused(
    databases_of: Callable[[str], Databases], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Since 15.20 a server marks every column, and only a pg_dump that is as new leaves that out."""
    with databases_of("15").fresh() as url, MeshStorage.open(url) as storage:
        if not marks(server_of(url)):
            pytest.skip("this PostgreSQL 15 does not mark columns")
        only(monkeypatch, programs("18"), programs("16"))
        with pytest.raises(ConfigurationError, match=r"by pg_dump 18\.\d+ or 16\.\d+ .*postgresql-client-15 "):
            storage.backup(tmp_path / "backup", verify=True)
        assert list(tmp_path.iterdir()) == []
        only(monkeypatch, programs("18"), SYSTEM_15)
        assert storage.backup(tmp_path / "backup", verify=True).tool_version.startswith("15.")


def marks(server: Server) -> list[tuple[str]]:
    with engine.connect(server.connect) as connection:
        query = "SELECT attname FROM pg_attribute WHERE attrelid = 'mesh_state'::regclass AND attoptions IS NOT NULL"
        return connection.execute(query).fetchall()


def test_what_users_may_set_is_in_a_backup(storage: MeshStorage, server: Server, tmp_path: Path) -> None:
    with engine.connect(server.connect) as connection:
        connection.execute(
            "ALTER TABLE mesh_state ALTER key SET (n_distinct = -0.5),"
            " SET (fillfactor = 70, toast.autovacuum_enabled = false);"
            'CREATE INDEX "it\'s; WITH (none=1)" ON mesh_state USING brin (updated_at) WITH (pages_per_range = 8);'
            "COMMENT ON COLUMN mesh_state.key IS 'a\nWITH (none=1)'"
        )
    storage.backup(tmp_path / "backup", verify=True)
    storage.restore(tmp_path / "backup", overwrite=True)
    with engine.connect(server.connect) as connection:
        query = (
            "SELECT reloptions FROM pg_class WHERE relname IN ('mesh_state', 'it''s; WITH (none=1)') ORDER BY relkind"
        )
        assert connection.execute(query).fetchall() == [(["pages_per_range=8"],), (["fillfactor=70"],)]


@pytest.mark.parametrize(
    ("statement", "unknown"),
    [
        ("ALTER TABLE ONLY public.t ALTER COLUMN \"a 'b' (c)\" SET (n_distinct=5, mark=1);", ["mark"]),
        ("ALTER TABLE public.t SET (toast.mark='1');", ["mark"]),
        ("CREATE TABLE public.t (\n    c text DEFAULT 'it''s'::text\n)\nWITH (fillfactor='70', mark='1');", ["mark"]),
        ("CREATE INDEX i ON public.t USING btree (lower(c)) WITH (mark='1') WHERE (c > ''::text);", ["mark"]),
        (
            "ALTER TABLE ONLY public.t\n    ADD CONSTRAINT c UNIQUE (a) WITH (\"mark b\"='(', mark=on);",
            ['"mark b"', "mark"],
        ),
        ("-- Name: it's; WITH (mark=1)\nCREATE TABLE t (c text DEFAULT '\nWITH (mark=1)'::text);", []),
    ],
)
def test_options_that_not_every_server_knows_are_found(statement: str, unknown: list[str]) -> None:
    assert portable.unknown_options(statement) == unknown


def test_settings_that_the_server_has_not_are_left_out(
    storage: MeshStorage, server: Server, real: ClientTools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine.connect(server.connect) as connection:
        connection.execute("ALTER TABLE mesh_state ALTER key SET DEFAULT E'\\nSET future_timeout = 0;\\n'")
    before = contents(server), shape(server)
    set_more = "| sed '0,/^SET /s//SET future_timeout = 0;\\nSET /'"
    only(monkeypatch, wrapped(tmp_path / "tools", real, pg_restore=set_more))
    storage.backup(tmp_path / "backup")
    storage.restore(tmp_path / "backup", overwrite=True)
    assert (contents(server), shape(server)) == before


def test_a_directory_with_half_of_them_or_two_versions_is_none(tmp_path: Path) -> None:
    program(tmp_path, "pg_dump", "18.1")
    assert client_tools._examine(tmp_path) is None
    program(tmp_path, "pg_restore", "16.1")
    assert client_tools._examine(tmp_path) is None
    program(tmp_path, "pg_restore", "of no known version")
    assert client_tools._examine(tmp_path) is None


def test_missing_tools(storage: MeshStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = storage.backup(tmp_path / "backup")
    only(monkeypatch)
    with engine.connect(storage._server.connect) as connection:
        major = client_tools.server_major(connection)
    with pytest.raises(ConfigurationError, match=f"none found; install postgresql-client-{major}"):
        storage.backup(tmp_path / "other")
    # No older tool than the one that wrote the dump can read it.
    with pytest.raises(ConfigurationError, match=f"none found; install postgresql-client-{made.tool_major}"):
        storage.restore(tmp_path / "backup")
    assert [path.name for path in tmp_path.iterdir()] == ["backup"]


def test_tools_that_are_too_old(storage: MeshStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pg_dump", "pg_restore"):
        program(tmp_path / "old", name, "14.3")
    only(monkeypatch, tmp_path / "old")
    with pytest.raises(ConfigurationError, match=r"only found 14\.3; install .* or mesh-storage\[embedded\]"):
        storage.backup(tmp_path / "backup")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_tool_that_fails_says_why_but_no_stored_value(
    storage: MeshStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pg_dump", "pg_restore"):
        words = f"echo '{name}: warning: a' >&2; echo '{name}: error: it broke' >&2; echo 'DETAIL: secret' >&2; exit 1"
        program(tmp_path / "tools", name, "99.0", words)
    storage.backup(tmp_path / "backup")
    only(monkeypatch, tmp_path / "tools")
    for work in (lambda: storage.backup(tmp_path / "other"), lambda: storage.restore(tmp_path / "backup")):
        with pytest.raises(MeshStorageError, match=r"^pg_(dump|restore) failed: it broke$"):
            work()
    assert {path.name for path in tmp_path.iterdir()} == {"backup", "tools"}


def test_rows_that_end_too_early_are_an_error(
    storage: MeshStorage, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "case \"$1\" in --list) ;; *) echo 'COPY public.mesh_state (key, value) FROM stdin;'; exit 0;; esac"
    program(tmp_path / "tools", "pg_restore", "99.0", script)
    program(tmp_path / "tools", "pg_dump", "99.0")
    storage.backup(tmp_path / "backup")
    before = contents(server)
    only(monkeypatch, tmp_path / "tools")
    with pytest.raises(InvalidInputError, match="prematurely"):
        storage.restore(tmp_path / "backup")
    assert contents(server) == before


@pytest.mark.parametrize("what", ["a file", "a directory", "an empty directory", "a dangling link"])
def test_a_path_in_the_way_is_not_touched(storage: MeshStorage, tmp_path: Path, what: str) -> None:
    path = tmp_path / "backup"
    if what == "a file":
        path.write_text("precious")
    elif what == "a dangling link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.mkdir()
        if what == "a directory":
            (path / "file").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(AlreadyExistsError, match="never replaces"):
        storage.backup(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_path_that_gets_in_the_way_meanwhile_is_not_touched(storage: MeshStorage, tmp_path: Path) -> None:
    def write(_: backup.Progress) -> None:
        (tmp_path / "backup").write_text("precious")

    with pytest.raises(AlreadyExistsError):
        storage.backup(tmp_path / "backup", progress=write)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_a_path_that_cannot_be(storage: MeshStorage, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "no" / "such", tmp_path / "file" / "backup", tmp_path / ("x" * 300), f"{tmp_path}/\0"):
        with pytest.raises(InvalidInputError) as error:
            storage.backup(path)
        assert error.value.field == "path"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def in_child(url: str, path: Path, work: str, prelude: str = "") -> str:
    """Do something with a storage in a process of its own, and give the class and message of the error."""
    script = f"""
import resource, sys
from pathlib import Path
from mesh_storage import MeshStorage, MeshStorageError, backup  # Loaded before the process gives its rights away.
with MeshStorage.open(sys.argv[1]) as storage:
    {prelude}
    try:
        storage.{work}(Path(sys.argv[2]))
    except MeshStorageError as error:
        print(type(error).__name__, error, error.retryable)
"""
    done = subprocess.run([sys.executable, "-c", script, url, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """Yield a directory that a process may not use, and what makes it such a process."""
    directory = tmp_path / "locked"
    directory.mkdir(mode=0o500)
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        yield directory, f"import os; os.seteuid({nobody.pw_uid})"
    else:
        yield directory, ""
    directory.chmod(0o700)


def test_no_permission(mesh_storage_url: str, locked: tuple[Path, str], storage: MeshStorage) -> None:
    directory, prelude = locked
    words = in_child(mesh_storage_url, directory / "backup", "backup", prelude)
    assert words.startswith("InvalidInputError the path")
    assert "Permission denied" in words
    assert list(directory.iterdir()) == []
    directory.chmod(0o700)
    storage.backup(directory / "backup")
    (directory / "backup").chmod(0 if os.geteuid() else 0o700)
    words = in_child(mesh_storage_url, directory / "backup", "restore", prelude)
    (directory / "backup").chmod(0o700)
    assert words.startswith("InvalidInputError the path")
    assert "Permission denied" in words


def test_a_directory_that_may_not_be_read_makes_no_failure_of_a_backup_that_is_there(
    databases_of: Callable[[str], Databases], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One may make files in it, but not open it, and so not sync it."""
    with tempfile.TemporaryDirectory() as name, databases_of("15").fresh() as url:
        directory, prelude = Path(name), ""
        monkeypatch.setenv("TMPDIR", "/tmp")  # noqa: S108 - where anybody may write
        if os.geteuid() == 0:
            nobody = pwd.getpwnam("nobody")
            os.chown(directory, nobody.pw_uid, -1)
            prelude = f"import os; os.seteuid({nobody.pw_uid})"
        directory.chmod(0o300)
        words = in_child(url, directory / "backup", "backup", prelude)
        directory.chmod(0o700)
        assert words == ""
        assert backup.verify(directory / "backup").revision == schema.head()


LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))"


def test_a_limit_on_the_size_of_files(mesh_storage_url: str, storage: MeshStorage, tmp_path: Path) -> None:
    fill_with_noise(storage)
    words = in_child(mesh_storage_url, tmp_path / "backup", "backup", LIMIT)
    assert words.startswith("UnavailableError the disk is full, or a file size limit was reached")
    assert words.endswith("False\n")
    assert list(tmp_path.iterdir()) == []


def fill_with_noise(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        for number in range(20):
            uow.state.put(f"noise-{number}", os.urandom(100_000))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a disk of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("this account cannot mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk(storage: MeshStorage, tiny_disk: Path) -> None:
    fill_with_noise(storage)
    with pytest.raises(UnavailableError, match="disk is full") as error:
        storage.backup(tiny_disk / "backup")
    assert not error.value.retryable
    assert list(tiny_disk.iterdir()) == []


def test_a_disk_that_is_full_only_when_the_manifest_is_written(
    storage: MeshStorage, tiny_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = client_tools.run

    def run_and_fill(*arguments: object, **rest: object) -> None:
        real(*arguments, **rest)
        with (tiny_disk / "filler").open("wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(b"x" * 4096)
            except OSError:
                pass

    monkeypatch.setattr(client_tools, "run", run_and_fill)
    with pytest.raises(UnavailableError, match="disk is full"):
        storage.backup(tiny_disk / "backup")
    assert [path.name for path in tiny_disk.iterdir()] == ["filler"]


def certify(data: Path) -> None:
    """Return a server a certificate."""
    subject = ["-subj", "/CN=localhost", "-days", "1", "-nodes"]
    files = ["-keyout", str(data / "server.key"), "-out", str(data / "server.crt")]
    subprocess.run(["openssl", "req", "-new", "-x509", *subject, *files], check=True, capture_output=True)
    owner = data.stat()
    for name in ("server.key", "server.crt"):
        os.chown(data / name, owner.st_uid, owner.st_gid)
        (data / name).chmod(0o600)


@pytest.mark.skipif(
    not SYSTEM_15.exists() or shutil.which("openssl") is None, reason="PostgreSQL 15 or openssl is not there"
)
def test_an_encrypted_connection_stays_encrypted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unused_port: Callable[[], int]
) -> None:
    """The bundled tools have no TLS, so they are not used, however new."""
    port = unused_port()
    options = ("-c ssl=on", "-c listen_addresses=127.0.0.1", f"-c port={port}")
    with system_server(SYSTEM_15, *options, prepare=certify) as connect:
        server = Server({**connect, "host": "127.0.0.1", "port": port, "sslmode": "require", "options": ""})
        schema.upgrade_server(server)
        assert backup.backup(server, tmp_path / "backup").tool_version.startswith("15.")
        bundled = [programs("18"), programs("16")]
        monkeypatch.setattr(client_tools, "_PLACES", ())
        monkeypatch.setenv("PATH", str(tmp_path))
        assert client_tools.find(15).directory in bundled
        with pytest.raises(ConfigurationError, match=r"with TLS, none found; install postgresql-client-15$"):
            backup.backup(server, tmp_path / "other")
        backup.restore(server, tmp_path / "backup")  # pg_restore makes no connection


@pytest.fixture
def unused_port() -> Callable[[], int]:
    """Return what finds a free port."""
    import socket

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
            return port

    return find
