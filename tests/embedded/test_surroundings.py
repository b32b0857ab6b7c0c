"""The bundled server in surroundings that are against it: variables, small disks, cleaners, users without a name."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict
from pydantic import SecretStr

from mesh_storage import MeshStorage, Settings, UnavailableError
from mesh_storage.aio import AsyncMeshStorage
from mesh_storage.postgres.server import open_server
from mesh_storage.testing import databases
from tests.processes import eventually

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
VARIABLES = {option.envvar.decode(): "nonsense" for option in pq.Conninfo.get_defaults() if option.envvar} | {
    "PGHOSTADDR": "192.0.2.1",
    "PGSERVICEFILE": "/nowhere",
    "PGTZ": "Nowhere/Nowhere",
    "PGDATESTYLE": "nonsense",
    "PGGEQO": "nonsense",
    "PGDATA": "/nowhere",
}

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount, and be another user")


def put_and_get(storage: MeshStorage) -> None:
    with storage.begin() as uow:
        uow.state.put("k", b"v")
    with storage.begin(read_only=True) as uow:
        assert uow.state.get("k").value == b"v"


def postmaster_pid(home: Path) -> int:
    return int((home / "data" / "postmaster.pid").read_text().split()[0])


def run(
    code: str, *arguments: str, prefix: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own that knows the checkout, and give what it printed."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return subprocess.run(
        [*prefix, sys.executable, "-c", textwrap.dedent(code), *arguments],
        env=kept | {"PYTHONPATH": str(ROOT)} | environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def every_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", VARIABLES)
def test_no_variable_of_libpq_has_a_say(name: str, monkeypatch: pytest.MonkeyPatch, shared: str) -> None:
    monkeypatch.setenv(name, VARIABLES[name])
    with MeshStorage.open(shared) as storage:
        put_and_get(storage)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the URL of a bundled server that runs while these tests do."""
    del tmp_path_factory
    with MeshStorage.open("memory:") as storage:
        assert storage._server.embedded is not None
        yield f"embedded:{storage._server.embedded._sockets.parent}"


@pytest.mark.usefixtures("every_variable")
def test_all_variables_together_have_no_say_and_stay(tmp_path: Path) -> None:
    before = dict(os.environ)
    with MeshStorage.open("memory:") as storage:
        put_and_get(storage)
        storage.backup(tmp_path / "backup", verify=True)
        storage.restore(tmp_path / "backup", overwrite=True)

        def work() -> None:
            for _ in range(10):
                with storage.unit_of_work() as one, storage.unit_of_work() as two:
                    one.state.count()
                    two.state.count()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    async def main() -> None:
        async with AsyncMeshStorage.open("memory:") as storage, storage.begin() as uow:
            await uow.state.put("k", b"v")

    asyncio.run(main())
    assert dict(os.environ) == before
    inherited = subprocess.run(["env", "-0"], capture_output=True, text=True, check=True).stdout.split("\0")
    assert {f"{name}={value}" for name, value in VARIABLES.items()} <= set(inherited)


def test_the_variables_say_nothing_about_where_the_fixtures_databases_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MESH_STORAGE_TEST_URL", raising=False)  # on a given server, libpq's variables count
    for name in VARIABLES.keys() - {"PGOPTIONS", "PGCONNECT_TIMEOUT"}:  # What a session is like they may say.
        monkeypatch.setenv(name, VARIABLES[name])
    with databases() as made, made.fresh() as url, MeshStorage.open(url) as storage:
        put_and_get(storage)


def test_a_server_is_found_by_a_service_while_the_bundled_one_is_in_use(
    mesh_storage_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = conninfo_to_dict(mesh_storage_url)
    file = tmp_path / "services"
    file.write_text("[mesh]\n" + "".join(f"{name}={there[name]}\n" for name in ("host", "user", "dbname")))
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    monkeypatch.setenv("PGSERVICE", "mesh")
    with MeshStorage.open("memory:") as bundled, MeshStorage.open("postgresql://") as server:
        for storage, key in ((bundled, "bundled"), (server, "server")):
            with storage.begin() as uow:
                uow.state.put(key, b"")
        with bundled.begin() as one, server.begin() as two:
            assert ([e.key for e in one.state.stream()], [e.key for e in two.state.stream()]) == (
                ["bundled"],
                ["server"],
            )


@pytest.mark.parametrize("lost", ["directory", "control", ".s.PGSQL.5432"])
@pytest.mark.parametrize("where", ["home", "tmp"])
def test_a_cleaner_that_takes_the_sockets_is_got_over(lost: str, where: str, tmp_path: Path) -> None:
    # A comma may be in no host of libpq's, so the sockets of such a home are elsewhere.
    home = tmp_path / ("mesh" if where == "home" else "me,sh")
    with MeshStorage.open(f"embedded:{home}") as storage:
        put_and_get(storage)
        assert storage._server.embedded is not None
        sockets = storage._server.embedded._sockets
        assert (sockets.parent == home) == (where == "home")
        if lost == "directory":
            shutil.rmtree(sockets)
        else:
            (sockets / lost).unlink()
        assert eventually(lambda: (sockets / "control").exists() and (sockets / ".s.PGSQL.5432").exists())
        done = run(
            "import sys; from mesh_storage import MeshStorage; s = MeshStorage.open(sys.argv[1]); print(s.health().ok)",
            f"embedded:{home}",
        )
        assert done.stdout == "True\n", done.stderr
        with storage.unit_of_work() as one, storage.unit_of_work() as two:
            assert one.state.count() == two.state.count() == 1
        child = os.fork()
        if child == 0:
            try:
                put_and_get(storage)
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
    assert eventually(lambda: not sockets.exists())


SMALL_RAM_DISK = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh")
FILL = """
    import sys
    from mesh_storage import MeshStorage, Message
    with MeshStorage.open("memory:") as storage:
        for part in range(20):
            with storage.begin() as uow:
                uow.messages.store_many(
                    Message(id=f"{part}-{n}", from_node="a", to_node="b", content=b"x" * 1000) for n in range(1000)
                )
        storage.backup(sys.argv[1], verify=True)
        with storage.begin(read_only=True) as uow:
            print(uow.messages.count())
"""


@as_root
def test_a_small_ram_disk_is_left_alone(tmp_path: Path) -> None:
    done = run(FILL, str(tmp_path / "backup"), prefix=SMALL_RAM_DISK)
    assert done.stdout == "20000\n", done.stderr


@as_root
def test_the_fixtures_work_with_a_small_ram_disk() -> None:
    code = """
        from mesh_storage import MeshStorage
        from mesh_storage.testing import databases
        with databases() as made:
            for _ in range(8):
                with made.fresh() as url, MeshStorage.open(url) as storage:
                    assert storage.health().ok
    """
    done = run(code, prefix=SMALL_RAM_DISK)
    assert done.returncode == 0, done.stderr


@as_root
def test_where_no_disk_has_room_it_is_said_before_anything_is_made(tmp_path: Path) -> None:
    small = 'for place in /dev/shm "$TMPDIR" /var/tmp; do mount -t tmpfs -o size=20m tmpfs "$place"; done; exec "$@"'
    code = """
        from mesh_storage import MeshStorage
        try:
            MeshStorage.open("memory:")
        except Exception as error:
            print(type(error).__name__, error)
    """
    done = run(code, prefix=("unshare", "--mount", "sh", "-c", small, "sh"), TMPDIR=str(tmp_path))
    assert done.stdout.startswith("UnavailableError not enough space for a temporary PostgreSQL server"), (
        done.stdout + done.stderr
    )


@pytest.mark.parametrize(("free", "in_ram"), [(0.5, False), (2, True)])
def test_a_temporary_server_is_in_ram_only_where_what_it_will_hold_fits(
    monkeypatch: pytest.MonkeyPatch, free: float, *, in_ram: bool
) -> None:
    space = 1 << 40

    def disk_usage(place: Path) -> SimpleNamespace:
        return SimpleNamespace(free=space * (free if str(place) == "/dev/shm" else 2))  # noqa: S108 - only compared

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with closing(open_server(Settings(url=SecretStr("memory:")), space=space)) as server:
        assert Path(server.connect["host"]).is_relative_to("/dev/shm") is in_ram  # noqa: S108 - only compared


@pytest.mark.parametrize("name", ["with a space", "with, a comma", 'with "quotes"', "%41+ü", "x" * 120])
def test_the_directory_for_temporary_files_may_have_any_name(name: str, tmp_path: Path) -> None:
    directory = tmp_path / name
    directory.mkdir()
    directory.chmod(0o777)
    code = """
        import sys
        from mesh_storage import MeshStorage
        from mesh_storage.embedded import server
        from mesh_storage.testing import databases
        from pathlib import Path
        server._RAM_DISK = Path("/no RAM disk")
        with databases() as made, made.fresh() as url, MeshStorage.open(url) as storage:
            assert storage.health().ok
        for url in ("memory:", f"embedded:{sys.argv[1]}/mesh"):
            with MeshStorage.open(url) as storage:
                assert storage.health().ok
    """
    done = run(code, str(directory), TMPDIR=str(directory))
    assert done.returncode == 0, done.stderr
    assert list(directory.iterdir()) == [directory / "mesh"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the account of root's server has no way into root's runtime directory")
def test_sockets_that_cannot_be_beside_the_data_are_in_the_runtime_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with MeshStorage.open(f"embedded:{tmp_path / 'a,b'}") as storage:
        assert storage._server.embedded is not None
        assert storage._server.embedded._sockets.parent == tmp_path


def test_a_supervisor_that_cannot_begin_is_not_waited_for(tmp_path: Path) -> None:
    home = tmp_path / "mesh"
    MeshStorage.open(f"embedded:{home}").close()
    (home / "control.new").mkdir()  # Nor can the pointer to the sockets be written there.
    with pytest.raises(UnavailableError, match=r"supervisor\.log"):
        MeshStorage.open(f"embedded:{home}")


OPEN = """
    import sys
    from mesh_storage import MeshStorage
    from mesh_storage.errors import ConfigurationError
    try:
        with MeshStorage.open(*sys.argv[1:]) as storage:
            print(storage.health().ok)
    except ConfigurationError as error:
        print("refused:", error)
"""
NO_NAME = ("setpriv", "--reuid=54321", "--regid=54321", "--clear-groups")


@as_root
@pytest.mark.parametrize("url", [(), ("embedded:",), ("memory:",), ("embedded:~/mesh",)], ids=str)
@pytest.mark.parametrize("home", [None, "/nonexistent", "/"], ids=str)
def test_a_user_without_a_name_is_told_what_to_do(url: tuple[str, ...], home: str | None) -> None:
    environment = ("env", "-u", "HOME") if home is None else ("env", f"HOME={home}")
    done = run(OPEN, *url, prefix=(*environment, *NO_NAME))
    assert done.stdout.startswith("refused:"), done.stdout + done.stderr


@as_root
@pytest.mark.skipif(
    not all(path.stat().st_mode & stat.S_IXOTH for path in Path(sys.executable).resolve().parents),
    reason="no other user may run this Python",
)
def test_a_user_without_a_name_may_use_what_is_there(tmp_path: Path) -> None:
    home = tmp_path / "mesh"
    MeshStorage.open(f"embedded:{home}").close()
    tmp_path.chmod(0o755)
    for path in (home, *home.rglob("*")):
        os.chown(path, 54321, 54321)
    assert run(OPEN, f"embedded:{home}", prefix=NO_NAME).stdout == "True\n"
    # Nor does root need the name of whom the data belongs to.
    assert run(OPEN, f"embedded:{home}").stdout == "True\n"


@as_root
@pytest.mark.parametrize("url", ["memory:", "embedded:{}"])
def test_a_root_that_is_nobody_else_is_told_what_to_do(url: str, tmp_path: Path) -> None:
    done = run(OPEN, url.format(tmp_path / "mesh"), prefix=("unshare", "--user", "--map-root-user"))
    assert done.stdout.startswith("refused: PostgreSQL does not run as root"), done.stdout + done.stderr


@contextmanager
def somebody(kind: str, owner: os.stat_result, data: Path) -> Iterator[int]:
    """Let something of the server's account live for a block, and give its number."""
    if kind != "thread":
        # The one has the data on its command line, and yet is no server.
        command = ["sh", "-c", "sleep 60; exit", *([str(data)] if kind == "process that names the data" else [])]
        with subprocess.Popen(command, user=owner.st_uid, group=owner.st_gid, extra_groups=[]) as process:
            yield process.pid
            assert process.poll() is None
            process.kill()
        return
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)
        thread = threading.Thread(target=signal.pause)
        thread.start()
        os.write(write, str(thread.native_id).encode())
        signal.pause()
    yield int(os.read(read, 20))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("kind", ["thread", "process", "process that names the data"])
def test_a_stale_lock_that_names_something_alive_does_not_keep_the_server_from_starting(
    kind: str, tmp_path: Path
) -> None:
    home = tmp_path / "mesh"
    with MeshStorage.open(f"embedded:{home}") as storage:
        put_and_get(storage)
        lines = (home / "data" / "postmaster.pid").read_text().split("\n")
    assert "ready   " in lines
    owner = (home / "data").stat()
    (home / "run").mkdir()
    with somebody(kind, owner, home / "data") as number:
        for place in (home / "data" / "postmaster.pid", home / "run" / ".s.PGSQL.5432.lock"):
            place.write_text("\n".join([str(number), *lines[1:]]))
        for place in (home / "run", home / "data" / "postmaster.pid"):
            os.chown(place, owner.st_uid, owner.st_gid)
        with MeshStorage.open(f"embedded:{home}") as storage:
            assert storage.health().ok
            put_and_get(storage)


@as_root
def test_in_a_container_the_number_of_the_last_server_is_used_again(tmp_path: Path) -> None:
    home = tmp_path / "mesh"
    code = """
        import os, signal, sys, time
        from pathlib import Path
        from mesh_storage import MeshStorage
        storage = MeshStorage.open(f"embedded:{sys.argv[1]}")
        with storage.begin() as uow:
            uow.state.put(sys.argv[2], b"")
            print(uow.state.count(), flush=True)
        print((Path(sys.argv[1]) / "data" / "postmaster.pid").read_text().split()[0], flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    container = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
    said = [run(code, str(home), str(number), prefix=container) for number in range(3)]
    assert [each.stdout.split("\n")[0] for each in said] == ["1", "2", "3"], [each.stderr for each in said]
    assert said[1].stdout.split("\n")[1] == said[2].stdout.split("\n")[1]  # It is the very case.


def test_processes_of_an_earlier_server_are_waited_for(tmp_path: Path) -> None:
    home = tmp_path / "mesh"
    with MeshStorage.open(f"embedded:{home}") as storage:
        put_and_get(storage)
        with storage.unit_of_work() as uow:
            backend = uow.session.connection().connection.driver_connection.info.backend_pid
        pid = postmaster_pid(home)
        os.kill(backend, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        assert not eventually(lambda: (home / "data" / "postmaster.pid").read_text().split()[0] != str(pid), 1)
        os.kill(backend, signal.SIGCONT)
        storage.run(put, attempts=15)
        assert postmaster_pid(home) != pid


def put(uow: object) -> None:
    uow.state.put("k", b"v")
