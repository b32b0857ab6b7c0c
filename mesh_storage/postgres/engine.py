"""From Settings to an Engine: the only place where the arguments of engines and connections are."""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import psycopg
import sqlalchemy
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from sqlalchemy import event
from sqlalchemy.pool import NullPool

from mesh_storage.errors import ConfigurationError, connection_refused
from mesh_storage.postgres import environment, jsonb
from mesh_storage.postgres.timed import TimedConnection
from mesh_storage.settings import SSL_MODES, Settings

logger = logging.getLogger("mesh_storage")

_connect_deadline: ContextVar[float | None] = ContextVar("connect_deadline", default=None)

_HIGHEST_PORT = 65_535
_WHOLE_NUMBER = re.compile("[0-9]{1,9}")
_PASSWORD_END = re.compile("[:/].*@|@.*[:/]")
"""What the path of a URL holds that begins inside of a password; the name of a database may hold "@" alone."""
_SERVER_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")
_LIMITS = {
    "statement_timeout": "statement_timeout",
    "lock_timeout": "lock_timeout",
    "idle_in_transaction_session_timeout": "idle_in_transaction_timeout",
}
"""The parameters of a session that settings limit it by, and these settings."""
# What a URL of `mesh_storage.testing` leaves to the settings and to the environment.
_OF_A_SESSION = ("application_name", "client_encoding", "connect_timeout", "options")
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

    What the URL says goes before the separate fields, these before libpq's environment and service file, and these
    before the defaults of the fields.

    Raises:
        ConfigurationError: The URL cannot be parsed, or a setting is wrong; the message does not repeat it.
    """
    arguments: dict[str, Any] = {} if settings.url is None else parse_url(settings.url.get_secret_value())
    for name in ("host", "port"):
        _fill(arguments, name, getattr(settings, name))
    login = {
        "user": settings.user,
        "password": settings.password.get_secret_value() if settings.password else None,
        "dbname": settings.database,
        "sslmode": settings.sslmode,
    }
    arguments = {name: value for name, value in login.items() if value is not None} | arguments
    _check(arguments)
    return arguments | session_arguments(settings, arguments, _surroundings(arguments))


def session_arguments(settings: Settings, url: Mapping[str, Any], surroundings: Mapping[str, str]) -> dict[str, Any]:
    """Make the arguments that a session is to have wherever it is, given what the URL and libpq's surroundings say.

    Raises:
        ConfigurationError: A setting is wrong.
    """
    arguments: dict[str, Any] = {"client_encoding": "UTF8"}
    seconds = max(2, math.ceil(settings.connect_timeout)) if settings.connect_timeout else 0
    for name, value in {"application_name": settings.application_name, "connect_timeout": seconds}.items():
        around = None if name in settings.model_fields_set else surroundings.get(name)
        arguments[name] = url.get(name, around or value)
    for name, keepalive in _KEEPALIVES.items():
        arguments[name] = url.get(name, surroundings.get(name, keepalive))
    _check(arguments)
    timeout = str(arguments["connect_timeout"])
    if not _WHOLE_NUMBER.fullmatch(timeout):
        raise ConfigurationError("bad setting connect_timeout: it must be a whole number of seconds")
    arguments["connect_timeout"] = int(timeout)
    if not settings.transaction_pooling:
        return arguments | {"options": _options(settings, url.get("options"), surroundings.get("options", ""))}
    if url.get("options"):
        raise ConfigurationError(
            "bad setting url: its options belong to a session, which transaction_pooling has none of; "
            "set them for the role or the database (ALTER ROLE ... SET), or connect directly"
        )
    if surroundings.get("options"):
        logger.warning(
            "PGOPTIONS, or the options of a service file, are left out: they belong to a session, which "
            "transaction_pooling has none of",
            extra={"event": "options"},
        )
    # Each would belong to one session, and the next transaction has another; empty, so that PGOPTIONS has no say.
    return arguments | {"options": "", "prepare_threshold": None}


def _options(settings: Settings, of_url: str | None, around: str) -> str:
    """Put options in the order of their weight: of the same parameter, the server takes the last one."""
    given: dict[bool, list[str]] = {False: [], True: []}
    for parameter, value in _parameters(settings).items():
        said = _LIMITS.get(parameter) in settings.model_fields_set
        given[said].append(f"-c {parameter}={value}")
    if of_url is not None:
        around = ""
    # psycopg can read no other style of dates.
    return " ".join(part for part in (*given[False], around, "-c datestyle=ISO", *given[True], of_url) if part)


def local_parameters(settings: Settings) -> str:
    """Make the statements by which a transaction sets for itself what a session of its own would have."""
    return "; ".join(f"SET LOCAL {name} = '{value}'" for name, value in _parameters(settings).items())


def connect(arguments: Mapping[str, Any]) -> psycopg.Connection[tuple[Any, ...]]:
    """Connect without the pool, in autocommit, for what is done once.

    Raises:
        UnavailableError: The server cannot be reached, or refuses the connection.
    """
    try:
        parameters = {**arguments, "autocommit": True}
        return connect_within(share_time(parameters), parameters)
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
    """Make the engine's connections ours, and connecting end within its time, however many hosts there are."""

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _entry: Any, _args: Any, parameters: dict[str, Any]) -> Any:
        return connect_within(share_time(parameters), parameters)


def share_time(parameters: dict[str, Any]) -> float | None:
    """Share the time for connecting among the hosts; return the seconds for all of them together.

    libpq's limit is for each host and in whole seconds, at least 2, and a slow resolver of names is in none.
    """
    limits = [float(parameters.get("connect_timeout") or 0) or math.inf]
    deadline = _connect_deadline.get()
    if deadline is not None:
        limits.append(max(0.0, deadline - time.monotonic()))
    seconds = min(limits)
    if seconds == math.inf:
        return None
    hosts = str(parameters.get("hostaddr") or parameters.get("host") or "").split(",")
    parameters["connect_timeout"] = max(2, math.ceil(seconds / len(hosts)))
    return seconds


def connect_within(seconds: float | None, parameters: dict[str, Any]) -> TimedConnection:
    """Connect, and give up after some seconds: what is still under way then comes to its end in a thread of its own.

    Raises:
        psycopg.errors.ConnectionTimeout: No server has answered in time.
    """
    return TimedConnection.connect(**parameters) if seconds is None else _Attempt(parameters).result(seconds)


class _Attempt:
    """One attempt to connect, in a thread, which can be given up."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        self._parameters = parameters
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._given_up = False
        self._made: TimedConnection | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._connect, name="mesh_storage connect", daemon=True).start()

    def _connect(self) -> None:
        try:
            made = TimedConnection.connect(**self._parameters)
        except BaseException as error:  # noqa: BLE001 - `result` raises it
            self._error = error
        else:
            with self._lock:
                if not self._given_up:
                    self._made = made
            if self._made is None:
                made.close()
        self._ended.set()

    def result(self, seconds: float) -> TimedConnection:
        """Wait for the connection."""
        try:
            self._ended.wait(seconds)
        except BaseException:  # An interrupt.
            with self._lock:
                self._given_up = True
            if self._made is not None:
                self._made.close()
            raise
        with self._lock:
            self._given_up = True
        if self._made is not None:
            return self._made
        if self._error is not None:
            raise self._error
        raise psycopg.errors.ConnectionTimeout(f"no server has answered within {seconds:g} s")


def _parameters(settings: Settings) -> dict[str, int | str]:
    """Return the parameters of the server that each session, or each transaction, is to have."""
    limits = {name: math.ceil(getattr(settings, setting) * 1000) for name, setting in _LIMITS.items()}
    return {**limits, "timezone": "UTC"}


def _surroundings(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameters that libpq adds from its environment and its service file.

    libpq tells them of a connection only. This one ends at once, at a socket that cannot be there.

    Raises:
        ConfigurationError: The service is not defined, or its file cannot be read.
    """
    nowhere = {**arguments, "host": os.devnull, "hostaddr": "", "port": "1", "password": "-"}
    bundled = environment.leaves_nothing_out(arguments, besides=_OF_A_SESSION)
    with environment.hidden() if bundled else nullcontext():
        probe = pq.PGconn.connect_start(make_conninfo("", **nowhere).encode())
    found = {option.keyword.decode(): os.fsdecode(option.val) for option in probe.info if option.val}
    if "host" not in found:
        words = probe.error_message.decode(errors="replace").strip()
        raise ConfigurationError(f"bad setting url, PGSERVICE or PGSERVICEFILE: {words}")
    return found


def _fill(arguments: dict[str, Any], name: str, setting: object) -> None:
    """Let a setting stand where the URL says nothing; of several hosts or ports the URL may name some only."""
    if setting is None:
        return
    given, ours = str(arguments.get(name) or "").split(","), str(setting).split(",")
    if given == [""]:
        arguments[name] = setting
    elif "" in given:
        if len(ours) == 1:
            ours *= len(given)
        if len(ours) != len(given):
            raise ConfigurationError(f"bad setting {name}: give one, or as many as the URL has")
        arguments[name] = ",".join(theirs or own for theirs, own in zip(given, ours, strict=True))


def _check(arguments: Mapping[str, Any]) -> None:
    """Refuse what libpq would take for something else."""
    for name, value in arguments.items():
        if "\0" in str(value) or any("\ud800" <= character <= "\udfff" for character in str(value)):
            raise ConfigurationError(f"bad setting {_setting(name)}: it holds NUL, or is no valid text")
    # A host that begins with "@" is an abstract socket.
    hosts = str(arguments.get("host", "")).split(",")
    for name, wrong in {
        "host": any("@" in host[1:] or "://" in host for host in hosts),
        "dbname": "://" in str(arguments.get("dbname", "")),
    }.items():
        if wrong:
            raise ConfigurationError(
                f"bad setting {_setting(name)}: it holds a part of a URL; percent-encode the password"
            )
    if re.search(r"(^|[\s+])(-c|--)\+", str(arguments.get("options", ""))):
        raise ConfigurationError('bad setting url: in its options "+" is no space; write %20 (quote, not quote_plus)')
    if str(arguments.get("client_encoding", "UTF8")).upper().replace("-", "") not in ("UTF8", "UNICODE", "AUTO"):
        raise ConfigurationError("bad setting url: client_encoding is always UTF8; leave it out")
    _check_ports(arguments)
    if arguments.get("sslmode", "prefer") not in SSL_MODES:
        raise ConfigurationError(f"bad setting sslmode: it must be one of {', '.join(SSL_MODES)}")


def _check_ports(arguments: Mapping[str, Any]) -> None:
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


def parse_url(url: str) -> dict[str, Any]:
    """Return what the URL of a server says, as the arguments of `psycopg.connect`.

    Raises:
        ConfigurationError: It is no URL of a server; the message does not repeat it.
    """
    scheme, rest = split_scheme(url)
    if scheme not in _SERVER_SCHEMES:
        raise ConfigurationError(f"bad setting url: {scheme}: is the bundled PostgreSQL, not a server")
    try:
        arguments: dict[str, Any] = dict(conninfo_to_dict(f"postgresql:{rest}"))
    except (psycopg.Error, UnicodeError):
        arguments = {}
        parsed = False
    else:
        # libpq takes anything for a host or a database; a "@" in one may be the end of a password that was not encoded.
        authority, _, path = rest.removeprefix("//").partition("?")[0].partition("/")
        parsed = rest.startswith("//") and authority.count("@") <= 1 and not _PASSWORD_END.search(path)
    if not parsed:
        # Outside of the handler: libpq's message repeats parts of the URL, the password perhaps.
        raise ConfigurationError(
            "bad setting url: it is no valid PostgreSQL URL; percent-encode special characters in the user and password"
        )
    _check(arguments)
    return arguments
