"""Engines and connections, created from settings."""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import time
import traceback
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
"""Matches a path that must be part of a password; the name of a database may contain "@" alone."""
_SERVER_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")
_PER_HOST = ("host", "hostaddr", "port")
_OF_HOSTS = (*_PER_HOST, "target_session_attrs", "load_balance_hosts")
"""What a URL says of its hosts, which is not true of those of another."""
_NOWHERE = {"hostaddr": "", "target_session_attrs": "any"}
"""Keeps libpq from adding these from its environment or a service file, which mean the primary."""
_LIMITS = {
    "statement_timeout": "statement_timeout",
    "lock_timeout": "lock_timeout",
    "idle_in_transaction_session_timeout": "idle_in_transaction_timeout",
}
"""The server parameters that limit a session, with their settings."""
# The parameters that a URL of `mesh_storage.testing` leaves to the settings and the environment.
_SESSION_PARAMETERS = ("application_name", "client_encoding", "connect_timeout", "options")
# Detect a vanished peer within about half a minute (PostgreSQL manual, 34.1.2).
_KEEPALIVES = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 30_000}


def split_scheme(url: str, setting: str = "url") -> tuple[str, str]:
    """Split a URL into its scheme and the rest after the colon.

    Raises:
        ConfigurationError: The scheme is not supported.
    """
    scheme, colon, rest = url.partition(":")
    if colon and scheme in (*_SERVER_SCHEMES, "embedded", "memory"):
        return scheme, rest
    raise ConfigurationError(
        f"invalid setting '{setting}': it must start with postgresql://, postgres://, postgresql+psycopg://, embedded: "
        "or memory:"
    )


def connect_arguments(settings: Settings) -> dict[str, Any]:
    """Return the arguments of `psycopg.connect` for a server.

    The URL takes precedence over the separate fields, these over libpq's environment and service file, and these over
    the defaults of the fields.

    Raises:
        ConfigurationError: The URL cannot be parsed, or a setting is invalid; the message does not repeat the URL.
    """
    arguments = _login(settings)
    return arguments | session_arguments(settings, arguments, _surroundings(arguments))


def replica_arguments(settings: Settings) -> tuple[list[dict[str, Any]], bool]:
    """Return the arguments of `psycopg.connect` for each replica, and whether they are to be tried in that order.

    What the URL of the replicas leaves out is that of the primary. Balancing is ours, since libpq does not tell whom it
    leaves out; the addresses of a name are libpq's.

    Raises:
        ConfigurationError: The URL cannot be parsed or names no host, or a pooler assigns a session per transaction.
    """
    if settings.replica_url is None:
        return [], False
    if settings.transaction_pooling:
        raise ConfigurationError(
            "invalid setting 'replica_url': it needs sessions of its own, which transaction_pooling rules out"
        )
    given = parse_url(settings.replica_url.get_secret_value(), "replica_url")
    if not (given.get("host") or given.get("hostaddr")):
        raise ConfigurationError("invalid setting 'replica_url': it must name a host, or several")
    login = {name: value for name, value in _login(settings).items() if name not in _OF_HOSTS}
    places = [_several(given, name) for name in _PER_HOST]
    number = max(map(len, places))
    if any(len(values) not in (1, number) for values in places):
        raise ConfigurationError("invalid setting 'replica_url': it names another number of hosts than of addresses")
    found: list[dict[str, Any]] = []
    for place in zip(*(values * number if len(values) == 1 else values for values in places), strict=True):
        own = {name: value for name, value in zip(_PER_HOST, place, strict=True) if value}
        arguments = login | _NOWHERE | {name: value for name, value in given.items() if name not in _PER_HOST} | own
        found.append(arguments | session_arguments(settings, arguments, _surroundings(arguments)))
    return found, given.get("load_balance_hosts") == "disable"


def _several(arguments: Mapping[str, Any], name: str) -> list[str]:
    return str(arguments.get(name) or "").split(",")


def _login(settings: Settings) -> dict[str, Any]:
    """Return the parameters of the URL, and those of the separate fields that it leaves out."""
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
    return arguments


def session_arguments(settings: Settings, url: Mapping[str, Any], surroundings: Mapping[str, str]) -> dict[str, Any]:
    """Return the session parameters for any server, given the parameters of the URL and those libpq adds.

    Raises:
        ConfigurationError: A setting is invalid.
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
        raise ConfigurationError("invalid setting 'connect_timeout': it must be a whole number of seconds")
    arguments["connect_timeout"] = int(timeout)
    if not settings.transaction_pooling:
        return arguments | {"options": _options(settings, url.get("options"), surroundings.get("options", ""))}
    if url.get("options"):
        raise ConfigurationError(
            "invalid setting 'url': its options are set per session, which transaction_pooling rules out; "
            "set them for the role or database (ALTER ROLE ... SET), or connect directly"
        )
    if surroundings.get("options"):
        logger.warning(
            "PGOPTIONS, or the options of a service file, are ignored: they are set per session, which "
            "transaction_pooling rules out",
            extra={"event": "options"},
        )
    # Options and prepared statements belong to a session, and each transaction may get another one. An empty value also
    # overrides PGOPTIONS.
    return arguments | {"options": "", "prepare_threshold": None}


def _options(settings: Settings, of_url: str | None, around: str) -> str:
    """Concatenate options by increasing precedence: the server uses the last value of a parameter."""
    given: dict[bool, list[str]] = {False: [], True: []}
    for parameter, value in _parameters(settings).items():
        said = _LIMITS.get(parameter) in settings.model_fields_set
        given[said].append(f"-c {parameter}={value}")
    if of_url is not None:
        around = ""
    # psycopg parses only the ISO date style.
    return " ".join(part for part in (*given[False], around, "-c datestyle=ISO", *given[True], of_url) if part)


def local_parameters(settings: Settings) -> str:
    """Return the SET LOCAL statements that give each transaction the parameters of a dedicated session."""
    return "; ".join(f"SET LOCAL {name} = '{value}'" for name, value in _parameters(settings).items())


def connect(arguments: Mapping[str, Any]) -> TimedConnection:
    """Open a connection outside the pool, in autocommit mode.

    Raises:
        UnavailableError: The server cannot be reached, or rejects the connection.
    """
    try:
        parameters = {**arguments, "autocommit": True}
        made = connect_within(share_time(parameters), parameters)
    except psycopg.Error as error:
        refused, cause = connection_refused(error)
    else:
        made.deadline = None  # it is connected
        return made
    raise refused from cause


def engine_arguments(connect: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments shared by `create_engine` and `create_async_engine`."""
    return {
        "url": "postgresql+psycopg://",
        "connect_args": connect,
        "poolclass": NullPool,  # our own pool is used instead
        "pool_reset_on_return": None,  # a unit of work ends its own transaction
        "hide_parameters": True,
        "use_native_hstore": False,
        "json_serializer": jsonb.dumps,
        "json_deserializer": jsonb.loads,
    }


def create_engine(connect: dict[str, Any]) -> sqlalchemy.Engine:
    """Create an engine for connect arguments from `connect_arguments` or the bundled server."""
    engine = sqlalchemy.create_engine(**engine_arguments(connect))
    limit_connecting(engine)
    return engine


@contextmanager
def connect_before(deadline: float | None) -> Generator[None]:
    """Limit new connections in the block to a deadline, by `time.monotonic()`."""
    token = _connect_deadline.set(deadline)
    try:
        yield
    finally:
        _connect_deadline.reset(token)


def limit_connecting(engine: sqlalchemy.Engine) -> None:
    """Make the engine create our connections, with one time limit for all hosts together."""

    @event.listens_for(engine, "do_connect")
    def connect(_dialect: Any, _entry: Any, _args: Any, parameters: dict[str, Any]) -> Any:
        return connect_within(share_time(parameters), parameters)


def share_time(parameters: dict[str, Any]) -> float | None:
    """Divide the connect timeout among the hosts; return the total in seconds.

    libpq's limit applies per host, in whole seconds of at least 2, and does not cover name resolution.
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
    """Connect within a time limit, which holds for SQLAlchemy's first statements as well.

    An attempt that takes longer finishes in a thread of its own.

    Raises:
        psycopg.errors.ConnectionTimeout: No server responded in time.
    """
    if seconds is None:
        with closing_half_open():
            return TimedConnection.connect(**parameters)
    end = time.monotonic() + seconds
    made = _Attempt(parameters).result(seconds)
    made.deadline = end
    return made


@contextmanager
def closing_half_open() -> Generator[None]:
    """Close what psycopg has half connected if connecting in the block fails or is given up.

    Its frames form cycles with the errors of several hosts, which would keep the sockets open until a collection.
    """
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


class _Attempt:
    """An attempt to connect, in a thread, which can be abandoned."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        self._parameters = parameters
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._abandoned = False
        self._made: TimedConnection | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._connect, name="mesh_storage connect", daemon=True).start()

    def _connect(self) -> None:
        try:
            with closing_half_open():
                made = TimedConnection.connect(**self._parameters)
        except BaseException as error:  # noqa: BLE001 - `result` raises it
            with self._lock:
                if not self._abandoned:
                    self._error = error
        else:
            with self._lock:
                if not self._abandoned:
                    self._made = made
            if self._made is None:
                made.close()
        self._ended.set()

    def result(self, seconds: float) -> TimedConnection:
        """Wait for the connection and return it."""
        try:
            self._ended.wait(seconds)
        except BaseException:  # KeyboardInterrupt
            with self._lock:
                self._abandoned = True
            if self._made is not None:
                self._made.close()
            raise
        with self._lock:
            self._abandoned = True
        if self._made is not None:
            return self._made
        if self._error is not None:
            raise self._error
        raise psycopg.errors.ConnectionTimeout(f"no server responded within {seconds:g} s")


def _parameters(settings: Settings) -> dict[str, int | str]:
    """Return the server parameters to set for each session or transaction."""
    limits = {name: math.ceil(getattr(settings, setting) * 1000) for name, setting in _LIMITS.items()}
    return {**limits, "timezone": "UTC"}


def _surroundings(arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameters that libpq adds from its environment and its service file.

    libpq reveals them only for a connection, so this connects, in vain, to a socket that cannot exist.

    Raises:
        ConfigurationError: The service is not defined, or its file cannot be read.
    """
    nowhere = {**arguments, "host": os.devnull, "hostaddr": "", "port": "1", "password": "-"}
    bundled = environment.leaves_nothing_out(arguments, besides=_SESSION_PARAMETERS)
    with environment.hidden() if bundled else nullcontext():
        probe = pq.PGconn.connect_start(make_conninfo("", **nowhere).encode())
    found = {option.keyword.decode(): os.fsdecode(option.val) for option in probe.info if option.val}
    if "host" not in found:
        words = probe.error_message.decode(errors="replace").strip()
        raise ConfigurationError(f"invalid setting 'url', PGSERVICE or PGSERVICEFILE: {words}")
    return found


def _fill(arguments: dict[str, Any], name: str, setting: object) -> None:
    """Fill in a setting that the URL omits, possibly for only some of several hosts or ports."""
    if setting is None:
        return
    given, ours = str(arguments.get(name) or "").split(","), str(setting).split(",")
    if given == [""]:
        arguments[name] = setting
    elif "" in given:
        if len(ours) == 1:
            ours *= len(given)
        if len(ours) != len(given):
            raise ConfigurationError(f"invalid setting '{name}': specify one value, or as many as the URL has")
        arguments[name] = ",".join(theirs or own for theirs, own in zip(given, ours, strict=True))


def _check(arguments: Mapping[str, Any], of: str = "url") -> None:
    """Reject values that libpq would misinterpret; names the setting, or `of` if that is another URL."""
    for name, value in arguments.items():
        if "\0" in str(value) or any("\ud800" <= character <= "\udfff" for character in str(value)):
            raise ConfigurationError(f"invalid setting '{_setting(name, of)}': it contains NUL or is not valid text")
    # A host that starts with "@" is an abstract Unix-domain socket.
    hosts = str(arguments.get("host", "")).split(",")
    for name, wrong in {
        "host": any("@" in host[1:] or "://" in host for host in hosts),
        "dbname": "://" in str(arguments.get("dbname", "")),
    }.items():
        if wrong:
            raise ConfigurationError(
                f"invalid setting '{_setting(name, of)}': it contains part of a URL; percent-encode the password"
            )
    if re.search(r"(^|[\s+])(-c|--)\+", str(arguments.get("options", ""))):
        raise ConfigurationError(
            f"invalid setting '{of}': \"+\" in its options is not a space; use %20 (quote, not quote_plus)"
        )
    if str(arguments.get("client_encoding", "UTF8")).upper().replace("-", "") not in ("UTF8", "UNICODE", "AUTO"):
        raise ConfigurationError(f"invalid setting '{of}': client_encoding is always UTF8; omit it")
    _check_ports(arguments, _setting("port", of))
    if arguments.get("sslmode", "prefer") not in SSL_MODES:
        raise ConfigurationError(
            f"invalid setting '{_setting('sslmode', of)}': it must be one of {', '.join(SSL_MODES)}"
        )


def _check_ports(arguments: Mapping[str, Any], setting: str) -> None:
    ports = str(arguments.get("port", "")).split(",")
    for port in ports:
        # An empty port means the default port (PostgreSQL manual, 34.1.1.3).
        if port and not (_WHOLE_NUMBER.fullmatch(port) and 1 <= int(port) <= _HIGHEST_PORT):
            raise ConfigurationError(f"invalid setting '{setting}': it must be a number from 1 to {_HIGHEST_PORT}")
    hosts = arguments.get("hostaddr") or arguments.get("host")
    if hosts and len(ports) not in (1, len(str(hosts).split(","))):
        raise ConfigurationError(f"invalid setting '{setting}': specify one port, or as many as there are hosts")


def _setting(name: str, of: str) -> str:
    """Return our name of a setting that libpq names differently, or that of the URL which alone can give it."""
    if of != "url":
        return of
    return "database" if name == "dbname" else name


def parse_url(url: str, setting: str = "url") -> dict[str, Any]:
    """Return the arguments of `psycopg.connect` for the URL of a server.

    Raises:
        ConfigurationError: It is not the URL of a server; the message does not repeat it.
    """
    scheme, rest = split_scheme(url, setting)
    if scheme not in _SERVER_SCHEMES:
        raise ConfigurationError(f"invalid setting '{setting}': {scheme}: is the bundled PostgreSQL, not a server")
    try:
        arguments: dict[str, Any] = dict(conninfo_to_dict(f"postgresql:{rest}"))
    except (psycopg.Error, UnicodeError):
        arguments = {}
        parsed = False
    else:
        # libpq accepts anything as a host or a database name; a "@" in one may be the end of an unencoded password.
        authority, _, path = rest.removeprefix("//").partition("?")[0].partition("/")
        parsed = rest.startswith("//") and authority.count("@") <= 1 and not _PASSWORD_END.search(path)
    if not parsed:
        # Raise outside the handler: libpq's message repeats parts of the URL, possibly the password.
        raise ConfigurationError(
            f"invalid setting '{setting}': not a valid PostgreSQL URL; percent-encode special characters in user and "
            "password"
        )
    _check(arguments, setting)
    return arguments
