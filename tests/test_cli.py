"""The command line: what it prints, and its exit codes."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

import mesh_storage
from mesh_storage import MeshStorage, Message, schema
from mesh_storage.backup import Progress
from mesh_storage.cli import Exit, commands, main
from mesh_storage.postgres import engine
from mesh_storage.postgres.server import Server, open_server
from mesh_storage.settings import Settings
from mesh_storage.testing import Databases
from tests.processes import changes_are_over, eventually

SECRET = "hush-hush"  # noqa: S105 - what must not be printed
ROOT = Path(__file__).parents[1]
COMMANDS = (
    "health",
    "schema",
    "upgrade",
    "roles",
    "distribute",
    "maintain",
    "backup",
    "psql",
    "restore",
    "verify",
    "completion",
)
NOWHERE = f"postgresql://somebody:{SECRET}@127.0.0.1:1/nowhere"


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """Leave pytest's own way to end alone."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def url(mesh_storage_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of a database with the schema, which is also in the environment."""
    monkeypatch.setenv("MESH_STORAGE_URL", mesh_storage_url)
    return mesh_storage_url


@pytest.fixture
def bare(mesh_storage_databases: Databases) -> Iterator[str]:
    """Yield the URL of a database without the schema."""
    with mesh_storage_databases.fresh(with_schema=False) as url:
        yield url


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return what runs a command: its exit code, and what it printed on stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert SECRET not in printed.out + printed.err
        return status, printed.out, printed.err

    return run


Call = Callable[..., tuple[int, str, str]]


def execute(url: str, statement: str) -> None:
    with engine.connect(open_server(Settings(url=url)).connect) as connection:
        connection.execute(statement.encode())


def messages(url: str) -> int:
    with MeshStorage.open(url) as storage, storage.begin(read_only=True) as uow:
        return uow.messages.count()


def store(url: str, number: int) -> None:
    with MeshStorage.open(url) as storage, storage.begin() as uow:
        uow.messages.store_many(Message(id=f"m-{n}", from_node="a", to_node="b", content=b"x") for n in range(number))


def test_the_module_and_the_script_are_the_same_command(url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mesh_storage", "health", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["ok"] is True
    assert done.stderr == ""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    module, function = project["project"]["scripts"]["mesh-storage"].split(":")
    assert getattr(importlib.import_module(module), function) is main
    assert url


@pytest.mark.usefixtures("url")
def test_health(call: Call) -> None:
    status, out, err = call("health")
    assert (status, err) == (Exit.OK, "")
    assert out.startswith("healthy")
    status, out, err = call("health", "--json")
    facts = json.loads(out)
    assert status == Exit.OK
    assert {**facts, "round_trip_ms": None} == {
        "ok": True, "connected": True, "writable": True, "round_trip_ms": None, "revision": schema.head(),
        "head": schema.head(), "missing_privileges": [], "silent_workers": [], "replicas": [], "error": None,
        "message": None,
    }  # fmt: skip
    assert facts["round_trip_ms"] > 0


def test_health_of_a_database_that_takes_no_writes(url: str, call: Call) -> None:
    status, out, _ = call("health", "--url", f"{url}&options=-cdefault_transaction_read_only%3Don")
    assert status == Exit.UNHEALTHY == 3
    assert "does not accept writes" in out


def test_health_of_a_database_that_is_not_there(call: Call) -> None:
    status, out, _ = call("health", "--url", NOWHERE)
    assert status == Exit.UNAVAILABLE == 6
    status, out, _ = call("health", "--url", NOWHERE, "--json")
    assert status == Exit.UNAVAILABLE
    assert json.loads(out)["connected"] is False
    assert json.loads(out)["error"] == "UnavailableError"


def test_health_and_schema_of_a_database_without_schema_write_nothing(bare: str, call: Call) -> None:
    status, out, _ = call("health", "--url", bare)
    assert status == Exit.SCHEMA_MISMATCH == 4
    assert "no mesh_storage schema" in out
    assert "run: mesh-storage upgrade" in out
    status, out, _ = call("health", "--url", bare, "--json")
    assert status == Exit.SCHEMA_MISMATCH
    facts = json.loads(out)
    assert (facts["connected"], facts["revision"], facts["error"]) == (True, None, "SchemaMismatchError")
    assert "run: mesh-storage upgrade" in facts["message"]
    status, out, _ = call("schema", "--url", bare, "--json")
    assert status == Exit.SCHEMA_MISMATCH
    assert json.loads(out) == {"current": None, "head": schema.head(), "pending": list(schema.revisions())}


@pytest.mark.parametrize("command", [["health"], ["health", "--json"], ["schema"], ["backup", "backup"]])
def test_to_look_for_a_bundled_server_makes_none(command: list[str], tmp_path: Path, call: Call) -> None:
    home = tmp_path / "mesh"
    status, out, err = call(*command, "--url", f"embedded:{home}")
    assert status == Exit.UNAVAILABLE
    assert "mesh-storage upgrade" in out + err
    assert list(tmp_path.iterdir()) == []


def test_schema(url: str, call: Call) -> None:
    status, out, _ = call("schema", "--json")
    assert status == Exit.OK
    assert json.loads(out) == {"current": schema.head(), "head": schema.head(), "pending": []}
    assert call("schema")[1] == f"current {schema.head()}, head {schema.head()}, pending none\n"
    schema.upgrade(url)  # nothing to do
    from alembic import command

    command.downgrade(schema.alembic_config(open_server(Settings(url=url)).connect), schema.revisions()[-3])
    status, out, _ = call("schema", "--json")
    assert status == Exit.SCHEMA_MISMATCH
    assert json.loads(out)["pending"] == list(schema.revisions()[-2:])


def test_upgrade(bare: str, call: Call) -> None:
    status, out, _ = call("upgrade", "--url", bare, "--json")
    assert status == Exit.OK
    assert json.loads(out) == {"before": None, "current": schema.head()}
    assert call("upgrade", "--url", bare)[0] == Exit.OK
    assert call("health", "--url", bare)[0] == Exit.OK


def test_a_schema_that_is_ahead(url: str, call: Call, tmp_path: Path) -> None:
    execute(url, "UPDATE mesh_alembic_version SET version_num = '9999'")
    for arguments in (("health",), ("schema",), ("upgrade",), ("backup", tmp_path / "backup")):
        assert call(*arguments)[0] == Exit.SCHEMA_MISMATCH
    assert json.loads(call("schema", "--json")[1])["pending"] == []
    assert list(tmp_path.iterdir()) == []


def test_backup_and_restore(url: str, bare: str, call: Call, tmp_path: Path) -> None:
    store(url, 10)
    status, out, err = call("backup", tmp_path / "backup", "--jobs", 2, "--verify", "--json")
    assert (status, err) == (Exit.OK, "")
    assert json.loads(out)["rows"]["mesh_messages"] == 10
    assert json.loads(out)["revision"] == schema.head()
    status, out, err = call("restore", tmp_path / "backup", "--url", bare, "--jobs", 2)
    assert (status, err) == (Exit.OK, "")
    assert out.startswith("restored")
    assert messages(bare) == 10
    status, out, err = call("restore", tmp_path / "backup", "--url", bare)
    assert (status, out) == (Exit.FAILED, "")
    assert err.startswith("mesh-storage: ")
    assert "overwrite" in err
    assert call("restore", tmp_path / "backup", "--url", bare, "--overwrite")[0] == Exit.OK
    assert call("backup", tmp_path / "backup")[0] == Exit.FAILED == 1
    assert call("backup", tmp_path / "second")[1].startswith("written: ")


def test_an_older_schema_is_backed_up_and_its_restore_upgraded(url: str, bare: str, call: Call, tmp_path: Path) -> None:
    from alembic import command

    command.downgrade(schema.alembic_config(open_server(Settings(url=url)).connect), schema.revisions()[2])
    assert call("backup", tmp_path / "backup")[0] == Exit.OK
    status, out, _ = call("restore", tmp_path / "backup", "--url", bare)
    assert status == Exit.OK
    assert f"upgraded to {schema.head()}" in out
    assert call("health", "--url", bare)[0] == Exit.OK


@pytest.mark.parametrize(
    ("arguments", "status", "error"),
    [
        (["health", "--url", f"nonsense://{SECRET}"], Exit.CONFIGURATION, "ConfigurationError"),
        (["schema", "--url", NOWHERE], Exit.UNAVAILABLE, "UnavailableError"),
        (["upgrade", "--url", NOWHERE], Exit.UNAVAILABLE, "UnavailableError"),
        (["restore", "nowhere", "--url", NOWHERE], Exit.FAILED, "NotFoundError"),
        (["verify", "nowhere"], Exit.FAILED, "NotFoundError"),
    ],
)
def test_an_error_is_one_json_object_and_an_exit_code(
    url: str, call: Call, arguments: list[str], status: int, error: str
) -> None:
    assert url
    found, out, err = call(*arguments, "--json")
    assert (found, err) == (status, "")
    assert json.loads(out).keys() == {"error", "message"}
    assert json.loads(out)["error"] == error
    found, out, err = call(*arguments)
    assert (found, out) == (status, "")
    assert err.startswith("mesh-storage: ")


def test_missing_tools_are_a_matter_of_configuration(
    url: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert url
    monkeypatch.setattr("mesh_storage.backup.client_tools._found", lambda **_: iter(()))
    status, _, err = call("backup", tmp_path / "backup")
    assert status == Exit.CONFIGURATION == 5
    assert "install postgresql-client-" in err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["backup"],
        ["verify"],
        *(
            [command, "x", "--jobs", jobs]
            for command, jobs in [("restore", "many"), ("backup", "0"), ("restore", "-1"), ("verify", "65")]
        ),
    ],
)
def test_a_wrong_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == Exit.USAGE == 2
    assert "usage: mesh-storage" in capsys.readouterr().err


def test_help_and_the_manual_tell_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    words = capsys.readouterr().out
    assert all(name in words for name in COMMANDS)
    codes = {int(status) for status in Exit}
    assert {int(code) for code in re.findall(r"\d+", words.split("Exit codes:")[1])} == codes
    manual = (ROOT / "docs" / "operations.md").read_text()
    assert {
        int(code) for line in re.findall(r"^\| ([\d, ]+) \|", manual, re.MULTILINE) for code in line.split(",")
    } == codes


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_imports_nothing_but_the_command_line(arguments: list[str]) -> None:
    program = (
        "import atexit, sys; from mesh_storage.cli import main\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr)); main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    modules = set(done.stderr.split())
    assert {name for name in modules if name.startswith("mesh_storage")} == {"mesh_storage", "mesh_storage.cli"}
    assert not modules & {"alembic", "asyncio", "psycopg", "pydantic", "shtab", "sqlalchemy"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"mesh-storage {mesh_storage.__version__}\n"


def test_options_stand_before_the_command_or_behind_it(bare: str, url: str, call: Call) -> None:
    assert url, "and it is in the environment"
    missing = {"current": None, "head": schema.head(), "pending": list(schema.revisions())}
    for arguments in (["--url", bare, "--json", "schema"], ["--url", bare, "schema", "--json"]):
        status, out, _ = call(*arguments)
        assert (status, json.loads(out)) == (Exit.SCHEMA_MISMATCH, missing)
    assert call("--url", bare, "schema", "--url", url)[0] == Exit.OK


@pytest.mark.parametrize("command", [["verify", "x"], ["completion", "bash"]])
def test_a_command_without_a_database_takes_no_url(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--url", NOWHERE, *command], [*command, "--url", NOWHERE]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == Exit.USAGE
        assert "--url" in capsys.readouterr().err


def test_bash_completes(call: Call, tmp_path: Path) -> None:
    status, script, _ = call("completion", "bash")
    assert status == Exit.OK
    (tmp_path / "script").write_text(script)
    (tmp_path / "backup-monday").mkdir()

    def completed(*words: str) -> set[str]:
        program = (
            'source ./script; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}\n'
            'function=$(complete -p mesh-storage); function=${function#*-F }; ${function%% *}; echo "${COMPREPLY[@]}"'
        )
        done = subprocess.run(
            ["bash", "-c", program, "bash", *words], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return set(done.stdout.split())

    assert completed("mesh-storage", "") == set(COMMANDS)
    assert completed("mesh-storage", "ver") == {"verify"}
    assert completed("mesh-storage", "restore", "--ov") == {"--overwrite"}
    assert completed("mesh-storage", "restore", "ba") == {"backup-monday"}


@pytest.mark.parametrize("shell", ["zsh", "tcsh", "fish", "powershell"])
def test_other_shells_complete(shell: str, call: Call) -> None:
    status, out, _ = call("completion", shell, "--json")
    assert status == Exit.OK
    facts = json.loads(out)
    assert facts["shell"] == shell
    assert all(command in facts["script"] for command in COMMANDS)


def test_completion_names_the_extra_that_is_missing(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    status, _, err = call("completion", "bash")
    assert status == Exit.CONFIGURATION
    assert "mesh-storage[completion]" in err


def test_ctrl_c(url: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    assert url
    monkeypatch.setattr("mesh_storage.backup.client_tools.run", interrupt)
    status, _, err = call("backup", tmp_path / "backup")
    assert (status, err) == (Exit.INTERRUPTED, "mesh-storage: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def begun(tmp_path: Path, _: psycopg.Connection[Any]) -> bool:
    return bool(list(tmp_path.iterdir()))


def waits_for_the_lock(_: Path, connection: psycopg.Connection[Any]) -> bool:
    query = "SELECT FROM pg_locks WHERE NOT granted AND relation = 'mesh_state'::regclass"
    return connection.execute(query).fetchone() is not None


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("moment", [begun, waits_for_the_lock])
def test_sigterm_leaves_nothing_behind(
    url: str, tmp_path: Path, moment: Callable[[Path, psycopg.Connection[Any]], bool]
) -> None:
    """The lock makes it wait for as long as the test needs."""
    server: Server = open_server(Settings(url=url))
    with engine.connect(server.connect) as connection, connection.transaction():
        connection.execute("LOCK TABLE mesh_state")
        with subprocess.Popen([sys.executable, "-m", "mesh_storage", "backup", str(tmp_path / "backup")]) as process:
            while not moment(tmp_path, connection):
                assert process.poll() is None, "it ended too soon"
                time.sleep(0.02)
            process.terminate()
            process.wait(5)
    assert process.returncode == Exit.TERMINATED == 143
    assert list(tmp_path.iterdir()) == []


def test_maintain_removes_what_is_over(url: str, call: Call) -> None:
    with MeshStorage.open(url) as storage, storage.begin() as uow:
        uow.state.put("k", b"", ttl=timedelta(microseconds=1))
        uow.messages.store(Message(id="m", from_node="a", to_node="b", content=b"", timestamp=1))
    assert call("maintain") == (Exit.OK, "removed: 1 expired, 0 changes, 0 messages\n", "")
    with psycopg.connect(url, autocommit=True) as connection:
        assert eventually(lambda: changes_are_over(connection))
    status, out, _ = call("maintain", "--json", "--changes-older-than", 0, "--messages-older-than", 1)
    assert (status, json.loads(out)) == (Exit.OK, {"expired": 0, "changes": 2, "messages": 1})
    for arguments in (["--every", "-1"], ["--every", "0"], ["--changes-older-than", "soon"]):
        with pytest.raises(SystemExit) as error:
            call("maintain", *arguments)
        assert error.value.code == Exit.USAGE


@pytest.mark.usefixtures("unmeasured")
def test_maintain_stays_and_outlives_an_outage(url: str) -> None:
    command = [sys.executable, "-m", "mesh_storage", "maintain", "--every", "0.05"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
        engine.connect(open_server(Settings(url=url)).connect) as connection,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        assert "removed: 0 expired" in process.stdout.readline()
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        connection.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}".encode())
        with MeshStorage.open(url) as storage, storage.begin() as uow:
            uow.state.put("k", b"", ttl=timedelta(microseconds=1))
        while "1 expired" not in process.stdout.readline():
            assert process.poll() is None
        process.terminate()
        assert process.wait(10) == Exit.TERMINATED


@pytest.mark.usefixtures("unmeasured")
def test_maintain_outlives_a_lock(url: str) -> None:
    command = [sys.executable, "-m", "mesh_storage", "maintain", "--every", "0.05"]
    with (
        engine.connect(open_server(Settings(url=url)).connect) as connection,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "MESH_STORAGE_LOCK_TIMEOUT": "0.05"},
        ) as process,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        with connection.transaction():
            connection.execute("LOCK TABLE mesh_state")
            assert "lock_timeout" in process.stderr.readline()
        assert "removed: 0 expired" in process.stdout.readline()
        process.terminate()
        assert process.wait(10) == Exit.TERMINATED


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Let stderr be a terminal, and give its other end."""
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        yield ours
        monkeypatch.undo()
    os.close(ours)


def test_a_progress_bar_only_for_a_person(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(url, 10)
    assert main(["backup", "--url", url, str(tmp_path / "unseen")]) == Exit.OK
    with terminal(monkeypatch) as screen:
        assert main(["backup", "--url", url, str(tmp_path / "seen")]) == Exit.OK
        drawn = ""
        while not drawn.endswith("\r\033[K") or not re.search(r" sum .* 100% (\d+)/\1", drawn):
            drawn += os.read(screen, 100_000).decode()
    assert re.search(r" dump \[#{30}\] 100% (\d+)/\1\r", drawn)


def test_the_bar_is_drawn_ten_times_a_second_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is the test's: half a second passes, however busy the machine is."""
    now = 1000.0
    with terminal(monkeypatch) as screen:
        monkeypatch.setattr("time.monotonic", lambda: now)
        with commands._progress_bar() as draw:
            assert draw is not None
            for done in range(1001):
                draw(Progress("load", done, 1000))
                now += 0.0005
            draw(Progress("index", 0, 0))
        drawn = ""
        while not drawn.endswith("0/0\r\033[K"):  # A terminal gives what it has, not all that was written.
            drawn += os.read(screen, 100_000).decode()
    assert 1 < drawn.count("load") < 10
    assert "1,000/1,000" in drawn


@pytest.mark.parametrize("bundled", [True, False])
def test_psql_is_started_on_the_database(bundled: bool, mesh_storage_url: str, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as home:
        url = f"embedded:{home}/mesh" if bundled else mesh_storage_url
        with MeshStorage.open(url) as storage, storage.begin() as uow:
            uow.state.put("k", b"v")
        command = [sys.executable, "-m", "mesh_storage", "psql", "--url", url, "--", "-X", "-At", "-c"]
        environment = os.environ | {"PGHOSTADDR": "192.0.2.1"} if bundled else os.environ
        for query, printed, status in (("SELECT key FROM mesh_state", "k\n", 0), ("nonsense", "", 1)):
            done = subprocess.run(
                [*command, query], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
            )
            assert (done.stdout, done.returncode) == (printed, status), done.stderr


def test_psql_makes_no_database(call: Call, tmp_path: Path) -> None:
    assert call("psql", "--url", f"embedded:{tmp_path / 'none'}")[0] == Exit.UNAVAILABLE
    assert not (tmp_path / "none").exists()
