"""Other libraries on the same tables: SQLAlchemy's ORM used as in its tutorial, and others if installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy
from sqlalchemy.orm import Session

from benchmarks.contest import Rival
from benchmarks.database import Database
from benchmarks.samples import CONTENT, new_number
from mesh_storage import Message
from mesh_storage.models import RoutingEntry, StateEntry

_MODELS: dict[str, type[Any]] = {"msg": Message, "key": StateEntry, "dest": RoutingEntry}


@contextmanager
def store_one(database: Database) -> Generator[list[Rival]]:
    """Store one message per transaction."""
    with _engine(database) as engine:

        def orm(calls: int) -> None:
            for _ in range(calls):
                with Session(engine) as session:
                    session.add(_message())
                    session.commit()

        yield [Rival("SQLAlchemy ORM", orm), *_by_repository(engine, lambda repository: repository.add(_message()))]


@contextmanager
def get_one(database: Database, prefix: str) -> Generator[list[Rival]]:
    """Get one aggregate by key."""
    with _engine(database) as engine:
        model = _MODELS[prefix]

        def keys(calls: int) -> Iterator[str]:
            return (f"{prefix}-{1 + number % database.rows}" for number in range(calls))

        def orm(calls: int) -> None:
            for key in keys(calls):
                with Session(engine) as session:
                    assert session.get(model, key)

        others = _by_repository(engine, lambda repository: repository.get("msg-1"), commit=False)
        yield [Rival("SQLAlchemy ORM", orm), *(others if model is Message else [])]


@contextmanager
def store_many(database: Database, number: int) -> Generator[list[Rival]]:
    """Store many messages per transaction."""
    with _engine(database) as engine:

        def orm(calls: int) -> None:
            for _ in range(calls):
                with Session(engine) as session:
                    session.add_all([_message() for _ in range(number)])
                    session.commit()

        def add_many(repository: Any) -> object:
            return repository.add_many([_message() for _ in range(number)])

        yield [Rival("SQLAlchemy ORM", orm), *_by_repository(engine, add_many)]


@contextmanager
def _engine(database: Database) -> Generator[sqlalchemy.Engine]:
    engine = sqlalchemy.create_engine("postgresql+psycopg://", connect_args=database.connect_arguments)
    try:
        yield engine
    finally:
        engine.dispose()


def _message() -> Message:
    return Message(id=f"new-{next(new_number)}", from_node="node-a", to_node="node-b", content=CONTENT)


def _by_repository(engine: sqlalchemy.Engine, work: Callable[[Any], object], *, commit: bool = True) -> list[Rival]:
    """Yield advanced-alchemy's repository as a rival, if it is installed."""
    try:
        module: Any = importlib.import_module("advanced_alchemy.repository")
    except ImportError:
        return []
    repository = type("MessageRepository", (module.SQLAlchemySyncRepository,), {"model_type": Message})

    def round_(calls: int) -> None:
        for _ in range(calls):
            with Session(engine) as session:
                work(repository(session=session))
                if commit:
                    session.commit()

    return [Rival("advanced-alchemy", round_)]
