"""Control over libpq's environment variables: honoured for a server, ignored for the bundled one."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
import sqlalchemy
from psycopg import pq
from psycopg.abc import PQGenConn
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import event

from mesh_storage.postgres.statement import Row

T = TypeVar("T")

_SET_BY_US = ("PGTZ", "PGDATESTYLE")
"""The variables that would override the time zone and date style we rely on."""
_BEYOND_PARAMETERS = (*_SET_BY_US, "PGGEQO", "PGSERVICE")
"""The variables that libpq honours whatever the connection parameters are (PostgreSQL manual, 34.15)."""
# Where libpq does not treat an empty value as unset, or would read a file of the user.
_NEUTRAL = {
    "connect_timeout": "0",
    "gssencmode": "disable",
    "max_protocol_version": "3.0",
    "min_protocol_version": "3.0",
    "passfile": f"{os.devnull}/none",
    "sslcertmode": "disable",
    "sslmode": "disable",
}


@functools.cache
def neutral_parameters() -> Mapping[str, str]:
    """Return every parameter that has a variable in this libpq, with a value equivalent to libpq's built-in default.

    An explicit parameter overrides its variable. The service is omitted, since no name means none, as is the password,
    which the bundled server never requests.
    """
    return {
        name: _NEUTRAL.get(name, (option.compiled or b"").decode())
        for option in pq.Conninfo.get_defaults()
        if option.envvar and (name := option.keyword.decode()) not in ("service", "password")
    }


def leaves_nothing_out(arguments: Mapping[str, Any], *, besides: Collection[str] = ()) -> bool:
    """Return whether connect arguments leave nothing to the environment, as those of the bundled server do."""
    return neutral_parameters().keys() <= {*arguments, *besides}


def for_programs() -> dict[str, str]:
    """Return the environment of this process without PostgreSQL's variables, which all start with PG."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")}


def keep_out(engine: sqlalchemy.Engine) -> None:
    """Protect the engine's connections from disallowed environment variables."""

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _entry: Any, _args: Any, parameters: dict[str, Any]) -> Any:
        return Connection.connect(**parameters)


_hiding = threading.RLock()
# A child forked while variables are hidden would lack them, and could never acquire the lock.
os.register_at_fork(before=_hiding.acquire, after_in_parent=_hiding.release, after_in_child=_hiding.release)


@contextmanager
def hidden(names: Sequence[str] = _BEYOND_PARAMETERS) -> Generator[None]:
    """Hide variables that no parameter overrides, for the microseconds of one libpq call.

    libpq reads the environment of the process; `os.environ` is Python's copy of it and is not changed.
    """
    there = [name for name in names if name in os.environ]
    if not there:
        yield
        return
    with _hiding:
        values = {name: os.environ[name] for name in there}
        for name in there:
            os.unsetenv(name)
        try:
            yield
        finally:
            for name, value in values.items():
                os.putenv(name, value)


def _hiding_between_waits(conninfo: str, steps: PQGenConn[T]) -> PQGenConn[T]:
    """Run the steps of connecting with the variables hidden, but wait between them with the variables restored."""
    names = _BEYOND_PARAMETERS if leaves_nothing_out(conninfo_to_dict(conninfo)) else _SET_BY_US
    try:
        with hidden(names):
            wait = next(steps)
        while True:
            ready = yield wait
            with hidden(names):
                wait = steps.send(ready)
    except StopIteration as end:
        done: T = end.value
        return done
    finally:
        steps.close()


class Connection(psycopg.Connection[Row]):
    """A connection protected from disallowed environment variables."""

    @classmethod
    def _connect_gen(cls, conninfo: str = "", **more: Any) -> Any:
        return _hiding_between_waits(conninfo, super()._connect_gen(conninfo, **more))


class AsyncConnection(psycopg.AsyncConnection[Row]):
    """An asyncio connection protected from disallowed environment variables."""

    @classmethod
    def _connect_gen(cls, conninfo: str = "", **more: Any) -> Any:
        return _hiding_between_waits(conninfo, super()._connect_gen(conninfo, **more))
