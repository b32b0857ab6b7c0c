"""The bundled server: shared by processes, gone with the last of them, and never taken from one by another."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from mesh_storage import ClosedError, ConfigurationError, MeshStorage, MeshStorageError
from mesh_storage.embedded.server import EmbeddedServer
from tests.processes import eventually

HOLD = """
import sys
from mesh_storage import MeshStorage
with MeshStorage.open(sys.argv[1]) as storage:
    with storage.begin() as uow:
        uow.state.put(sys.argv[2], b"here")
    print("ready", flush=True)
    sys.stdin.readline()
"""


def hold(url: str, key: str) -> subprocess.Popen[str]:
    """Start a process that has the storage open until its input ends."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, url, key], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def postmaster(home: Path) -> int | None:
    try:
        return int((home / "data" / "postmaster.pid").read_text().split()[0])
    except FileNotFoundError:
        return None


def alive(pid: int | None) -> bool:
    return pid is not None and Path(f"/proc/{pid}").exists()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "with a space" / "mesh"


def test_several_processes_share_it_and_it_stops_with_the_last(home: Path) -> None:
    url = f"embedded:{home}"
    processes = [hold(url, f"key-{i}") for i in range(4)]  # All at once: one of them starts the server.
    for process in processes:
        ready(process)
    pid = postmaster(home)
    assert alive(pid)
    for process in processes[1:]:
        process.communicate("\n")
    assert alive(pid)
    with MeshStorage.open(url) as storage, storage.begin() as uow:
        assert uow.state.count("key-") == 4
    assert alive(pid)
    processes[0].communicate("\n")
    assert not alive(pid)
    assert postmaster(home) is None


def test_it_stops_when_the_last_process_is_killed_and_the_data_stay(home: Path) -> None:
    process = hold(f"embedded:{home}", "kept")
    ready(process)
    pid = postmaster(home)
    process.kill()
    process.communicate()
    assert eventually(lambda: not alive(pid))
    with MeshStorage.open(f"embedded:{home}") as storage, storage.begin(read_only=True) as uow:
        assert uow.state.get("kept").value == b"here"


def test_a_process_that_forgets_to_close_leaves_nothing_behind(home: Path) -> None:
    code = "import sys; from mesh_storage import MeshStorage; s = MeshStorage.open(sys.argv[1]); print(s.health().ok)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, f"embedded:{home}"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"
    assert eventually(lambda: postmaster(home) is None)


def test_a_server_whose_supervisor_was_killed_is_taken_over(home: Path) -> None:
    with MeshStorage.open(f"embedded:{home}") as storage:
        with storage.begin() as uow:
            uow.state.put("k", b"v")
        pid = postmaster(home)
        supervisor = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        os.kill(supervisor, signal.SIGKILL)
        assert eventually(lambda: not alive(supervisor) or "Z" in Path(f"/proc/{supervisor}/stat").read_text())
        with MeshStorage.open(f"embedded:{home}") as other, other.begin(read_only=True) as uow:
            assert uow.state.get("k").value == b"v"
            assert postmaster(home) != pid
    assert eventually(lambda: postmaster(home) is None)


def test_autovacuum_looks_every_ten_seconds_unless_its_user_says_otherwise(home: Path) -> None:
    def naptime() -> str:
        server = EmbeddedServer.open(home)
        try:
            with psycopg.connect(**server.connect_arguments | {"dbname": "postgres"}, autocommit=True) as connection:
                ((found,),) = connection.execute("SHOW autovacuum_naptime").fetchall()
                connection.execute("ALTER SYSTEM SET autovacuum_naptime = '20s'")
        finally:
            server.close()
        return str(found)

    assert [naptime(), naptime()] == ["10s", "20s"]


def test_memory_is_gone_at_close() -> None:
    storage = MeshStorage.open("memory:")
    embedded = storage._server.embedded
    assert embedded is not None
    sockets = embedded._sockets
    assert sockets.exists()
    storage.close()
    assert not sockets.exists()
    for call in (storage.health, storage.begin().__enter__, lambda: storage.run(lambda uow: uow)):
        with pytest.raises(ClosedError):
            call()
    storage.close()


def test_two_in_memory_know_nothing_of_each_other() -> None:
    with MeshStorage.open("memory:") as one, MeshStorage.open("memory:") as two:
        with one.begin() as uow:
            uow.state.put("k", b"v")
        with two.begin() as uow:
            assert uow.state.find("k") is None


def test_a_forked_child_goes_on_with_the_storage_and_takes_nothing_from_its_parent(home: Path) -> None:
    storage = MeshStorage.open(f"embedded:{home}")
    with storage.unit_of_work() as uow:
        uow.state.put("parent", b"open at the fork")
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            found = []
            try:
                try:
                    uow.state.put("child", b"on the parent's connection")
                except ClosedError:
                    found.append(b"refused")
                with storage.begin() as mine:
                    mine.state.put("child", b"on its own")
                storage.close()
                found.append(b"stored")
            finally:
                os.write(write, b" ".join(found))
                os._exit(0)
        os.waitpid(child, 0)
        assert os.read(read, 100) == b"refused stored"
        uow.commit()
    with storage.begin(read_only=True) as uow:
        assert {entry.key: entry.value for entry in uow.state.stream()} == {
            "parent": b"open at the fork",
            "child": b"on its own",
        }
    storage.close()
    assert postmaster(home) is None


def test_a_path_that_cannot_be_used_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="file"):
        MeshStorage.open(f"embedded:{tmp_path / 'file'}")


def test_a_stop_leaves_no_words_in_the_log(home: Path) -> None:
    for _ in range(2):
        MeshStorage.open(f"embedded:{home}").close()
    assert (home / "supervisor.log").read_text() == ""


def test_a_cluster_that_does_not_start_says_where_to_look(home: Path) -> None:
    MeshStorage.open(f"embedded:{home}").close()
    (home / "data" / "postgresql.conf").write_text("nonsense = = 1\n")
    with pytest.raises(MeshStorageError, match=r"server\.log"):
        MeshStorage.open(f"embedded:{home}")


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ConfigurationError, match=r"mesh-storage\[embedded\]"):
        EmbeddedServer.open(home)


@pytest.mark.skipif(os.geteuid() != 0, reason="the tests run as an ordinary user anyway")
def test_an_ordinary_user_uses_it_and_root_leaves_no_root_behind(home: Path) -> None:
    with MeshStorage.open(f"embedded:{home}"):
        owner = (home / "data").stat().st_uid
        assert pwd.getpwuid(owner).pw_name in {"postgres", "nobody"}
        pid = postmaster(home)
        assert Path(f"/proc/{pid}").stat().st_uid == owner


def test_what_the_environment_says_to_other_programs_of_postgresql_is_not_for_the_bundled_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"PGPORT": "55432", "PGHOST": "nowhere", "PGDATABASE": "other", "PGUSER": "nobody"}.items():
        monkeypatch.setenv(name, value)
    with MeshStorage.open("memory:") as storage:
        assert storage.health().ok
