"""asyncio, compared with psycopg's own asyncio connection and with an AsyncSession running the same statement."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from typing import Any, Self

import psycopg
from psycopg.types.json import set_json_loads
from pydantic_core import from_json
from sqlalchemy import BigInteger, Text, bindparam, cast, func, literal_column, select
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool
from sqlalchemy.sql import Executable

from benchmarks import plain
from benchmarks.contest import Contest, Rival, Round, Target, Workload
from benchmarks.database import Database
from benchmarks.samples import CONTENT, LOG_ENTRY, encode, new_number
from benchmarks.single import TERM, new_message, next_index
from benchmarks.threads import THREADS, in_all, store_by_library
from mesh_storage import LogEntry, Message, StateEntry
from mesh_storage.aio import AsyncMeshStorage, AsyncUnitOfWork
from mesh_storage.models.base import table_of

TASKS = 8
_AGAINST_PSYCOPG = Target(cpu=1.5)
_AGAINST_SESSION = Target(cpu=1.15)
_AGAINST_TASKS = Target(throughput=0.7)

# Core statements, since the ORM's own would only make a session slower.
_MESSAGES, _STATE, _LOG = table_of(Message), table_of(StateEntry), table_of(LogEntry)
_STORE_NAMES = ("id", "from_node", "to_node", "content")
_APPEND_NAMES = ("term", "index", "entry", "previous", "highest")

Arguments = tuple[Any, ...]


class Arena:
    """An event loop with everything the contestants need, for one contest."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self.storage: AsyncMeshStorage
        self.sessions: async_sessionmaker[AsyncSession]

    def __enter__(self) -> Self:
        self._runner.run(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()

    def round(self, work: Callable[[int], Coroutine[Any, Any, None]]) -> Round:
        """Return a round that runs a coroutine function."""
        return lambda calls: self._runner.run(work(calls))

    def connect(self, *, autocommit: bool = False) -> psycopg.AsyncConnection[Any]:
        """Connect with plain psycopg."""
        return self._runner.run(self._connect(autocommit=autocommit))

    async def _open(self) -> None:
        self.storage = await self._stack.enter_async_context(AsyncMeshStorage.open(self._database.url))
        engine = create_async_engine(
            "postgresql+psycopg://",
            connect_args=self._database.connect_arguments,
            poolclass=AsyncAdaptedQueuePool,
            json_serializer=encode,
            json_deserializer=from_json,
        )
        self._stack.push_async_callback(engine.dispose)
        self.sessions = async_sessionmaker(engine, expire_on_commit=False)

    async def _connect(self, *, autocommit: bool) -> psycopg.AsyncConnection[Any]:
        connection = await psycopg.AsyncConnection.connect(**self._database.connect_arguments, autocommit=autocommit)
        set_json_loads(from_json, connection)
        return await self._stack.enter_async_context(connection)


def _writing(
    ours: Callable[[AsyncUnitOfWork, Arguments], Awaitable[object]],
    sql: str,
    statement: Executable,
    arguments: Callable[[Database], Callable[[], Arguments]],
    names: tuple[str, ...],
) -> Callable[[Database], Any]:
    """Return the workload that writes one aggregate per unit of work."""

    @contextmanager
    def write(database: Database) -> Generator[Contest]:
        new = arguments(database)
        with Arena(database) as arena:
            connection = arena.connect()
            cursor = connection.cursor(binary=True)

            async def by_library(calls: int) -> None:
                for _ in range(calls):
                    async with arena.storage.begin() as uow:
                        await ours(uow, new())

            async def by_psycopg(calls: int) -> None:
                for _ in range(calls):
                    await cursor.execute(sql, new())
                    assert await cursor.fetchone()
                    await connection.commit()

            async def by_session(calls: int) -> None:
                for _ in range(calls):
                    async with arena.sessions() as session:
                        result = await session.execute(statement, dict(zip(names, new(), strict=True)))
                        assert result.fetchone()
                        await session.commit()

            yield Contest(
                arena.round(by_library),
                [
                    Rival("psycopg, asyncio", arena.round(by_psycopg), _AGAINST_PSYCOPG),
                    Rival("SQLAlchemy AsyncSession", arena.round(by_session), _AGAINST_SESSION),
                ],
            )

    return write


@contextmanager
def get_message(database: Database) -> Generator[Contest]:
    """Get one message by id in a read-only unit of work, compared with autocommit."""
    by_id = select(_MESSAGES).where(_MESSAGES.c.id == bindparam("key"))
    with Arena(database) as arena:
        cursor = arena.connect(autocommit=True).cursor(binary=True)

        async def by_library(calls: int) -> None:
            for number in range(calls):
                async with arena.storage.unit_of_work(read_only=True) as uow:
                    await uow.messages.get(f"msg-{1 + number % database.rows}")

        async def by_psycopg(calls: int) -> None:
            for number in range(calls):
                await cursor.execute(plain.GET_MESSAGE, (f"msg-{1 + number % database.rows}",))
                assert await cursor.fetchone()

        async def by_session(calls: int) -> None:
            for number in range(calls):
                async with arena.sessions() as session:
                    result = await session.execute(by_id, {"key": f"msg-{1 + number % database.rows}"})
                    assert result.fetchone()

        yield Contest(
            arena.round(by_library),
            [
                Rival("psycopg, asyncio", arena.round(by_psycopg), _AGAINST_PSYCOPG),
                Rival("SQLAlchemy AsyncSession", arena.round(by_session), _AGAINST_SESSION),
            ],
        )


@contextmanager
def store_message_in_tasks(database: Database) -> Generator[Contest]:
    """Store one message per unit of work in eight tasks; also compared with the library in eight threads."""
    with Arena(database) as arena, ThreadPoolExecutor(THREADS) as executor:
        connections = [arena.connect() for _ in range(TASKS)]

        async def by_library(calls: int) -> None:
            async def one() -> None:
                for _ in range(calls // TASKS):
                    async with arena.storage.begin() as uow:
                        await uow.messages.store(new_message())

            await asyncio.gather(*(one() for _ in range(TASKS)))

        async def by_psycopg(calls: int) -> None:
            async def one(connection: psycopg.AsyncConnection[Any]) -> None:
                cursor = connection.cursor(binary=True)
                for _ in range(calls // TASKS):
                    row = (f"new-{next(new_number)}", "node-a", "node-b", CONTENT)
                    await cursor.execute(plain.STORE_MESSAGE, row)
                    assert await cursor.fetchone()
                    await connection.commit()

            await asyncio.gather(*map(one, connections))

        def by_threads(calls: int) -> None:
            in_all(executor, lambda _: store_by_library(database, calls // THREADS))

        yield Contest(
            arena.round(by_library),
            [
                Rival("psycopg, 8 tasks", arena.round(by_psycopg), _AGAINST_TASKS),
                Rival("mesh_storage, 8 threads", by_threads, _AGAINST_TASKS),
            ],
        )


def _new_messages(_database: Database) -> Callable[[], Arguments]:
    return lambda: (f"new-{next(new_number)}", "node-a", "node-b", CONTENT)


def _states(database: Database) -> Callable[[], Arguments]:
    return lambda: (f"key-{1 + next(new_number) % database.rows}", CONTENT)


def _entries(database: Database) -> Callable[[], Arguments]:
    next_one = next_index(database)

    def new() -> Arguments:
        index = next_one()
        return TERM, index, encode(LOG_ENTRY), index - 1, TERM

    return new


def _core_store() -> Executable:
    statement = insert(_MESSAGES).values({name: bindparam(name) for name in _STORE_NAMES})
    return statement.on_conflict_do_nothing().returning(_MESSAGES.c.timestamp, _MESSAGES.c.created_at)


def _core_put() -> Executable:
    statement = insert(_STATE).values(key=bindparam("key"), value=bindparam("value"))
    return statement.on_conflict_do_update(
        index_elements=[_STATE.c.key], set_={"value": statement.excluded.value, "updated_at": func.now()}
    ).returning(_STATE.c.created_at, _STATE.c.updated_at)


def _core_append() -> Executable:
    newest = select(_LOG.c.term, _LOG.c.index).order_by(_LOG.c.index.desc()).limit(literal_column("1"))
    last = newest.subquery("last")
    new = select(
        bindparam("term", type_=BigInteger),
        bindparam("index", type_=BigInteger),
        cast(bindparam("entry", type_=Text), JSONB),
    ).where(
        last.c.index == bindparam("previous", type_=BigInteger),
        last.c.term <= bindparam("highest", type_=BigInteger),
    )
    statement = insert(_LOG).from_select(["term", "index", "entry"], new)
    return statement.on_conflict_do_nothing().returning(_LOG.c.created_at)


async def _store(uow: AsyncUnitOfWork, arguments: Arguments) -> None:
    id_, from_node, to_node, content = arguments
    await uow.messages.store(Message(id=id_, from_node=from_node, to_node=to_node, content=content))


async def _put(uow: AsyncUnitOfWork, arguments: Arguments) -> None:
    await uow.state.put(*arguments)


async def _append(uow: AsyncUnitOfWork, arguments: Arguments) -> None:
    await uow.consensus_log.append(arguments[0], arguments[1], LOG_ENTRY)


store_message = _writing(_store, plain.STORE_MESSAGE, _core_store(), _new_messages, _STORE_NAMES)
put_state = _writing(_put, plain.PUT_STATE, _core_put(), _states, ("key", "value"))
append_entry = _writing(_append, plain.APPEND_ENTRY, _core_append(), _entries, _APPEND_NAMES)

WORKLOADS = [
    Workload("async: store one message", store_message, calls=300, quick_calls=10),
    Workload("async: put one state", put_state, calls=300, quick_calls=10),
    Workload("async: append one log entry", append_entry, calls=300, quick_calls=10),
    Workload("async: get one message", get_message, calls=1000, quick_calls=20),
    Workload("async: store one message, 8 tasks", store_message_in_tasks, calls=1600, quick_calls=80),
]
