"""From Settings to an Engine: the only place where the arguments of engines and connections are."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import psycopg
import sqlalchemy
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import event
from sqlalchemy.pool import NullPool

from mesh_storage.errors import ConfigurationError, connection_refused
from mesh_storage.postgres import jsonb
from mesh_storage.settings import SSL_MODES, Settings

_connect_deadline: ContextVar[float | None] = ContextVar("connect_deadline", default=None)

_HIGHEST_PORT = 65_535
_WHOLE_NUMBER = re.compile("[0-9]{1,9}")
_SERVER_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")
# A peer that vanished without a word is noticed within about half a minute (PostgreSQL manual, 34.1.2).
_KEEPALIVES = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 30_000}


def split_scheme(url: str) -> tuple[str, str]:
    """Split a URL into its scheme and the rest after the colon.

    Raises:
        ConfigurationError: The scheme is none that mesh_storage knows.
    """
    scheme, colon, rest = url.partition(":")
    if colon and scheme in (*_SERVER_SCHEMES, "embedded", "memory"):
        return scheme, rest
    raise ConfigurationError(
        "bad setting url: it must begin with postgresql://, postgres://, postgresql+psycopg://, embedded: or memory:"
    )


def connect_arguments(settings: Settings) -> dict[str, Any]:
    """Make the arguments of `psycopg.connect` for a server.

    Raises:
        ConfigurationError: The URL cannot be parsed; the message does not repeat it.
    """
    arguments: dict[str, Any] = {} if settings.url is None else _parse(settings.url.get_secret_value())
    fields = {
        "host": settings.host,
        "port": settings.port,
        "user": settings.user,
        "password": settings.password.get_secret_value() if settings.password else None,
        "dbname": settings.database,
        "sslmode": settings.sslmode,
        "application_name": settings.application_name,
        "connect_timeout": max(2, math.ceil(settings.connect_timeout)) if settings.connect_timeout else 0,
        **_KEEPALIVES,
    }
    for name, value in fields.items():
        if value is not None:
            arguments.setdefault(name, value)
    _check(arguments)
    if settings.transaction_pooling:
        if arguments.get("options"):
            raise ConfigurationError(
                "bad setting url: its options belong to a session, which transaction_pooling has none of; "
                "set them for the role or the database (ALTER ROLE ... SET), or connect directly"
            )
        # Each would belong to one session, and the next transaction has another; empty, so that PGOPTIONS has no say.
        return arguments | {"options": "", "prepare_threshold": None}
    ours = " ".join(f"-c {name}={value}" for name, value in _parameters(settings).items())
    # Later options go before earlier ones, so what the URL says has the last word.
    arguments["options"] = f"{ours} {arguments.get('options', '')}".strip()
    return arguments


def local_parameters(settings: Settings) -> str:
    """Make the statements by which a transaction sets for itself what a session of its own would have."""
    return "; ".join(f"SET LOCAL {name} = '{value}'" for name, value in _parameters(settings).items())


def connect(arguments: Mapping[str, Any]) -> psycopg.Connection[tuple[Any, ...]]:
    """Connect without the pool, in autocommit, for what is done once.

    Raises:
        UnavailableError: The server cannot be reached, or refuses the connection.
    """
    try:
        return psycopg.connect(**arguments, autocommit=True)
    except psycopg.Error as error:
        refused, cause = connection_refused(error)
    raise refused from cause


def engine_arguments(connect: dict[str, Any]) -> dict[str, Any]:
    """Make the arguments that `create_engine` and `create_async_engine` take alike."""
    return {
        "url": "postgresql+psycopg://",
        "connect_args": connect,
        "poolclass": NullPool,  # our own pool keeps the connections
        "pool_reset_on_return": None,  # a unit of work ends its own transaction
        "hide_parameters": True,
        "use_native_hstore": False,
        "json_serializer": jsonb.dumps,
        "json_deserializer": jsonb.loads,
    }


def create_engine(connect: dict[str, Any]) -> sqlalchemy.Engine:
    """Make the engine for the given connect arguments, which `connect_arguments` or the bundled server provides."""
    engine = sqlalchemy.create_engine(**engine_arguments(connect))
    limit_connecting(engine)
    return engine


@contextmanager
def connect_before(deadline: float | None) -> Generator[None]:
    """Let a new connection that is made in the block take no longer than to a moment of `time.monotonic()`."""
    token = _connect_deadline.set(deadline)
    try:
        yield
    finally:
        _connect_deadline.reset(token)


def limit_connecting(engine: sqlalchemy.Engine) -> None:
    """Let `connect_before` limit how long the engine takes to connect."""

    @event.listens_for(engine, "do_connect")
    def limit(_dialect: Any, _entry: Any, _args: Any, parameters: dict[str, Any]) -> None:
        deadline = _connect_deadline.get()
        if deadline is not None:
            # psycopg takes whole seconds, at least 2.
            remaining = max(2, math.ceil(deadline - time.monotonic()))
            parameters["connect_timeout"] = min(parameters["connect_timeout"] or remaining, remaining)


def _parameters(settings: Settings) -> dict[str, int | str]:
    """Return the parameters of the server that each session, or each transaction, is to have."""
    limits = {
        "statement_timeout": settings.statement_timeout,
        "lock_timeout": settings.lock_timeout,
        "idle_in_transaction_session_timeout": settings.idle_in_transaction_timeout,
    }
    return {**{name: math.ceil(seconds * 1000) for name, seconds in limits.items()}, "timezone": "UTC"}


def _check(arguments: dict[str, Any]) -> None:
    """Refuse what libpq would take for something else."""
    for name, value in arguments.items():
        if "\0" in str(value) or any("\ud800" <= character <= "\udfff" for character in str(value)):
            raise ConfigurationError(f"bad setting {_setting(name)}: it holds NUL, or is no valid text")
    for name in ("host", "dbname"):
        if "@" in str(arguments.get(name, "")) or "://" in str(arguments.get(name, "")):
            raise ConfigurationError(
                f"bad setting {_setting(name)}: it holds a part of a URL; percent-encode the password"
            )
    _check_ports(arguments)
    timeout = str(arguments["connect_timeout"])
    if not _WHOLE_NUMBER.fullmatch(timeout):
        raise ConfigurationError("bad setting connect_timeout: it must be a whole number of seconds")
    arguments["connect_timeout"] = int(timeout)
    if arguments.get("sslmode", "prefer") not in SSL_MODES:
        raise ConfigurationError(f"bad setting sslmode: it must be one of {', '.join(SSL_MODES)}")


def _check_ports(arguments: dict[str, Any]) -> None:
    ports = str(arguments.get("port", "")).split(",")
    for port in ports:
        # An empty one is the default port (PostgreSQL manual, 34.1.1.3).
        if port and not (_WHOLE_NUMBER.fullmatch(port) and 1 <= int(port) <= _HIGHEST_PORT):
            raise ConfigurationError(f"bad setting port: it must be a number from 1 to {_HIGHEST_PORT}")
    hosts = arguments.get("hostaddr") or arguments.get("host")
    if hosts and len(ports) not in (1, len(str(hosts).split(","))):
        raise ConfigurationError("bad setting port: give one port, or as many as there are hosts")


def _setting(name: str) -> str:
    """Return the name of a setting that libpq calls otherwise."""
    return "database" if name == "dbname" else name


def _parse(url: str) -> dict[str, Any]:
    scheme, rest = split_scheme(url)
    if scheme not in _SERVER_SCHEMES:
        raise ConfigurationError(f"bad setting url: {scheme}: is the bundled PostgreSQL, not a server")
    try:
        arguments: dict[str, Any] = dict(conninfo_to_dict(f"postgresql:{rest}"))
    except (psycopg.Error, UnicodeError):
        arguments = {}
        parsed = False
    else:
        # libpq takes anything for a host; a "@" in it is the end of a password that was not encoded.
        parsed = rest.startswith("//") and "@" not in str(arguments.get("host", ""))
    if not parsed:
        # Outside of the handler: libpq's message repeats parts of the URL, the password perhaps.
        raise ConfigurationError(
            "bad setting url: it is no valid PostgreSQL URL; percent-encode special characters in the user and password"
        )
    return arguments
