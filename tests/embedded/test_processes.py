"""Processes that die, fork or start at the worst moment while they use the bundled server."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from mesh_storage import ClosedError, MeshStorage, StateEntry, UnavailableError
from mesh_storage.aio import AsyncMeshStorage, AsyncUnitOfWork
from mesh_storage.embedded.server import EmbeddedServer
from tests.processes import eventually

pytestmark = pytest.mark.slow

HOLD = """
import sys
from mesh_storage import MeshStorage
storage = MeshStorage.open(sys.argv[1])
server = storage._server
with storage.begin(read_only=True) as uow:
    directory = uow._connection.driver.sqlalchemy.exec_driver_sql("SHOW data_directory").scalar()
print(directory, server.connect["host"], flush=True)
sys.stdin.readline()
"""


def processes_that_name(directory: Path) -> list[int]:
    """Return the processes that have a directory on their command line."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(directory) in command:
                found.append(int(entry.name))
    return found


@contextmanager
def holding(url: str) -> Iterator[tuple[subprocess.Popen[str], Path, Path]]:
    """Let another process have the storage open; give it, the home of its server and the directory of the sockets."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        data, sockets = process.stdout.readline().split()
        yield process, Path(data).parent, Path(sockets)
        process.communicate("\n")


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, None])
def test_memory_is_gone_however_its_process_ends(ending: signal.Signals | None) -> None:
    with holding("memory:") as (process, home, sockets):
        assert (home.exists(), sockets.exists()) == (True, True)
        assert processes_that_name(home)
        if ending is not None:
            process.send_signal(ending)
    assert eventually(lambda: not home.exists() and not sockets.exists() and not processes_that_name(home))


def open_in_memory() -> None:
    MeshStorage.open("memory:").close()


def open_in_memory_by_asyncio() -> None:
    async def main() -> None:
        await (await AsyncMeshStorage.open("memory:")).close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "step", ["importlib.util.find_spec", "mesh_storage.postgres.engine.connect", "mesh_storage.schema.ensure"]
)
@pytest.mark.parametrize("opens", [open_in_memory, open_in_memory_by_asyncio])
def test_memory_that_cannot_be_opened_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, opens: Callable[[], None], step: str
) -> None:
    made: list[Path] = []
    real = tempfile.mkdtemp

    def note(*arguments: Any, **more: Any) -> str:
        made.append(Path(real(*arguments, **more)))
        return str(made[-1])

    def fails(*_arguments: Any, **_more: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(tempfile, "mkdtemp", note)
    monkeypatch.setattr(step, fails)
    with pytest.raises(ZeroDivisionError) as error:
        opens()
    assert made
    assert eventually(lambda: not any(path.exists() or processes_that_name(path) for path in made))
    del error  # Held until here, it would keep alive what nobody closed.


def test_an_opener_that_is_killed_at_any_moment_leaves_what_the_next_one_can_use(tmp_path: Path) -> None:
    home = tmp_path / "mesh"
    signs = ("lock", "control", "data.new", "data/postmaster.pid")
    for sign in signs:
        with subprocess.Popen(
            [sys.executable, "-c", HOLD, f"embedded:{home}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert eventually((home / sign).exists)
            process.kill()
    with MeshStorage.open(f"embedded:{home}") as storage, storage.begin() as uow:
        uow.state.put("k", b"v")
    assert eventually(lambda: not processes_that_name(home))


def test_openers_and_closers_in_a_crowd_get_a_server_each_time(tmp_path: Path) -> None:
    url = f"embedded:{tmp_path / 'mesh'}"
    MeshStorage.open(url).close()

    def come_and_go(number: int) -> None:
        for turn in range(4):
            with MeshStorage.open(url) as storage, storage.begin() as uow:
                uow.state.put(f"{number}-{turn}", b"")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(come_and_go, range(4)))
    with MeshStorage.open(url) as storage, storage.begin(read_only=True) as uow:
        assert uow.state.count() == 16
    assert eventually(lambda: not processes_that_name(tmp_path / "mesh"))


def in_child(work: Callable[[], bytes]) -> bytes:
    """Do something in a forked child, and give what it says."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        said = b"failed"
        try:
            said = work()
        except BaseException as error:  # noqa: BLE001 - the parent shows it
            said = repr(error).encode()
        finally:
            os.write(write, said)
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read, "rb") as answer:
        return answer.read()


def test_children_of_children_work_and_leave_the_connections_of_their_parents_alone(tmp_path: Path) -> None:
    storage = MeshStorage.open(f"embedded:{tmp_path / 'mesh'}")
    with storage.begin() as one, storage.begin() as two:  # Two connections lie in the pool at the fork.
        one.session.add(StateEntry(key="session", value=b""))
        two.state.put("parent", b"")

    def put(key: str) -> None:
        with storage.begin() as uow:
            uow.state.put(key, b"")

    def grandchild() -> bytes:
        put("grandchild")
        return b"grandchild"

    def child() -> bytes:
        put("child")
        said = in_child(grandchild)
        put("child again")
        return b"child of " + said

    with storage.begin() as open_at_the_fork:
        open_at_the_fork.state.put("open", b"")
        open_at_the_fork.session.add(StateEntry(key="open session", value=b""))
        assert in_child(child) == b"child of grandchild"
    with storage.begin() as one, storage.begin() as two:
        assert one.state.count() == two.state.count() == 7
    storage.close()
    assert eventually(lambda: not processes_that_name(tmp_path / "mesh"))


@pytest.mark.parametrize("error", [None, ZeroDivisionError()], ids=["leaves", "raises"])
def test_a_child_that_leaves_a_savepoint_of_its_parent_undoes_nothing(
    storage: MeshStorage, error: Exception | None
) -> None:
    with storage.begin() as uow:
        savepoint = uow.savepoint()
        savepoint.__enter__()
        uow.session.add(StateEntry(key="inside", value=b""))
        uow.session.flush()

        def child() -> bytes:
            with pytest.raises(ClosedError):
                savepoint.__exit__(type(error) if error else None, error, None)
            return b"done"

        assert in_child(child) == b"done"
        savepoint.__exit__(None, None, None)
    with storage.begin(read_only=True) as uow:
        assert uow.state.count() == 1


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12 and later
def test_a_child_of_asyncio_works_and_leaves_the_connections_of_its_parent_alone(tmp_path: Path) -> None:
    url = f"embedded:{tmp_path / 'mesh'}"

    async def put(storage: AsyncMeshStorage, key: str) -> int:
        async with storage.begin() as uow:
            await uow.state.put(key, b"")
            return int((await uow.session.execute(text("SELECT pg_backend_pid()"))).scalar_one())

    async def parent() -> None:
        async with AsyncMeshStorage.open(url) as storage:
            of_parent = await put(storage, "parent")  # Its connection lies in the pool at the fork.
            scope = storage.begin()
            async with scope as open_at_the_fork:
                await open_at_the_fork.state.put("open", b"")
                open_at_the_fork.session.add(StateEntry(key="open session", value=b""))
                await open_at_the_fork.session.flush()
                await put(storage, "beside")
                said = in_child(lambda: asyncio.run(child(storage, open_at_the_fork, scope)))
                assert said.isdigit(), said
                assert int(said) != of_parent
            assert await put(storage, "parent again")
            async with storage.begin() as uow:
                assert await uow.state.count() == 6
                assert (await storage.health()).pool_in_use == 1

    async def child(
        storage: AsyncMeshStorage,
        open_at_the_fork: AsyncUnitOfWork,
        scope: AbstractAsyncContextManager[AsyncUnitOfWork],
    ) -> bytes:
        with pytest.raises(ClosedError):
            await open_at_the_fork.state.count()
        with pytest.raises(ClosedError):
            await scope.__aexit__(None, None, None)
        assert (await storage.health()).pool_in_use == 0
        return str(await put(storage, "child")).encode()

    asyncio.run(parent())
    assert eventually(lambda: not processes_that_name(tmp_path / "mesh"))


def said_after(close: Callable[[], object], work: Callable[[], object]) -> bytes:
    """Let a forked child work after its parent has closed the storage, and return what the child says."""
    go_read, go_write = os.pipe()
    done_read, done_write = os.pipe()
    child = os.fork()
    if child == 0:
        said = b"failed"
        try:
            os.close(go_write)
            os.write(done_write, b"here")
            os.read(go_read, 1)
            work()
            said = b"done"
        except BaseException as error:  # noqa: BLE001 - the parent shows it
            said = repr(error).encode()
        finally:
            os.write(done_write, said)
            os._exit(0)
    assert os.read(done_read, 100) == b"here"
    close()
    os.write(go_write, b"g")
    said = os.read(done_read, 1000)
    os.waitpid(child, 0)
    return said


def test_a_child_outlives_its_parents_close(tmp_path: Path) -> None:
    storage = MeshStorage.open(f"embedded:{tmp_path / 'mesh'}")

    def work() -> None:
        with storage.begin() as uow:
            uow.state.put("child", b"")
        storage.close()

    assert said_after(storage.close, work) == b"done"
    assert eventually(lambda: not processes_that_name(tmp_path / "mesh"))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12 and later
def test_a_child_of_asyncio_outlives_its_parents_close(tmp_path: Path) -> None:
    async def opened() -> AsyncMeshStorage:
        return await AsyncMeshStorage.open(f"embedded:{tmp_path / 'mesh'}")

    async def work() -> None:
        async with storage.begin() as uow:
            await uow.state.put("child", b"")
        await storage.close()

    with asyncio.Runner() as runner:
        storage = runner.run(opened())
        assert said_after(lambda: runner.run(storage.close()), lambda: asyncio.run(work())) == b"done"
    assert eventually(lambda: not processes_that_name(tmp_path / "mesh"))


def two_backends(storage: MeshStorage) -> set[int]:
    """Return the server's processes for two units of work, whose connections then lie in the pool."""
    with storage.begin() as one, storage.begin() as two:
        return {uow.session.scalars(text("SELECT pg_backend_pid()")).one() for uow in (one, two)}


async def two_backends_of_asyncio(storage: AsyncMeshStorage) -> set[int]:
    async with storage.begin() as one, storage.begin() as two:
        return {(await uow.session.scalars(text("SELECT pg_backend_pid()"))).one() for uow in (one, two)}


def test_a_child_leaves_the_idle_connections_of_its_parent_alone(storage: MeshStorage) -> None:
    of_parent = two_backends(storage)

    def child() -> bytes:
        of_child = two_backends(storage)
        storage.close()
        return b"shared" if of_child & of_parent else b"its own"

    assert in_child(child) == b"its own"
    assert two_backends(storage) == of_parent


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12 and later
def test_a_child_of_asyncio_leaves_the_idle_connections_of_its_parent_alone(mesh_storage_url: str) -> None:
    async def parent() -> None:
        async with AsyncMeshStorage.open(mesh_storage_url) as storage:
            of_parent = await two_backends_of_asyncio(storage)

            async def child() -> bytes:
                of_child = await two_backends_of_asyncio(storage)
                await storage.close()
                return b"shared" if of_child & of_parent else b"its own"

            assert in_child(lambda: asyncio.run(child())) == b"its own"
            assert await two_backends_of_asyncio(storage) == of_parent

    asyncio.run(parent())


def test_every_connection_of_the_pool_is_replaced_after_a_crash(tmp_path: Path) -> None:
    home = tmp_path / "mesh"
    with MeshStorage.open(f"embedded:{home}") as storage:
        with storage.begin() as one, storage.begin() as two, storage.begin(read_only=True) as three:
            one.state.put("a", b"")
            two.state.put("b", b"")
            three.state.count()
        pid = int((home / "data" / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGKILL)

        def started_anew() -> bool:
            with suppress(FileNotFoundError):
                lines = (home / "data" / "postmaster.pid").read_text().split("\n")
                return lines[0] != str(pid) and "ready   " in lines
            return False

        assert eventually(started_anew)
        with storage.begin() as one, storage.begin() as two, storage.begin(read_only=True) as three:
            assert one.state.count() == two.state.count() == three.state.count() == 2


def test_run_gets_over_a_crash_by_itself(tmp_path: Path) -> None:
    home = tmp_path / "mesh"
    with MeshStorage.open(f"embedded:{home}") as storage:
        crashed = False

        def work(uow: object) -> None:
            nonlocal crashed
            del uow
            with storage.begin() as inner:
                inner.state.put("before", b"")
            if not crashed:
                crashed = True
                os.kill(int((home / "data" / "postmaster.pid").read_text().split()[0]), signal.SIGKILL)
                raise UnavailableError

        storage.run(work, attempts=15)
        with storage.begin(read_only=True) as uow:
            assert uow.state.count() == 1


@pytest.mark.parametrize("name", ["with 'quotes' and \\", "ключ", "%s {x} #1", "x" * 180], ids=range(4))
def test_a_path_may_have_any_name(tmp_path: Path, name: str) -> None:
    server = EmbeddedServer.open(tmp_path / name)
    assert processes_that_name(tmp_path / name)
    server.close()
    assert eventually(lambda: not processes_that_name(tmp_path / name))
