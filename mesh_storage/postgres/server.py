"""The server to use: one at an address, or the bundled one, which is started."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from mesh_storage.errors import ConfigurationError
from mesh_storage.postgres import engine
from mesh_storage.postgres.engine import connect_arguments, replica_arguments, session_arguments, split_scheme
from mesh_storage.settings import Settings

if TYPE_CHECKING:  # imported on demand
    from mesh_storage.embedded.server import EmbeddedServer

logger = logging.getLogger("mesh_storage")


@dataclass(frozen=True)
class Server:
    """How to connect to a database, and the bundled server behind it, if any."""

    connect: dict[str, Any] = field(repr=False)  # contains the password
    """The arguments of `psycopg.connect`."""
    embedded: EmbeddedServer | None = None
    local_parameters: str | None = None
    """The SET LOCAL statements for each transaction, if a pooler in transaction mode leaves no session to keep
    parameters."""

    replicas: tuple[Server, ...] = ()
    """The servers of `replica_url`, each with one host."""
    replicas_in_order: bool = False
    """Whether they are tried in this order, instead of a random one."""

    @property
    def kind(self) -> str:
        """`server` or `embedded`."""
        return "server" if self.embedded is None else "embedded"

    @property
    def address(self) -> str:
        """The hosts with their ports, and the database; without the login."""
        hosts = str(self.connect.get("host") or self.connect.get("hostaddr") or "").split(",")
        ports = str(self.connect.get("port") or "").split(",")
        if len(ports) == 1:
            ports *= len(hosts)
        places = ",".join(f"{host}:{port}" if port else host for host, port in zip(hosts, ports, strict=True))
        return "/".join(filter(None, [places, self.connect.get("dbname")])) or "libpq's default place"

    def require_session(self) -> None:
        """Raise unless the connection has a dedicated session, as session-level locks and parameters require.

        Raises:
            ConfigurationError: A pooler assigns a session per transaction.
        """
        if self.local_parameters is not None:
            raise ConfigurationError(
                "invalid setting 'transaction_pooling': migrations, grants, distribution, backup and restore need a "
                "dedicated session; set the URL to the server itself, and transaction_pooling to false"
            )

    def close(self) -> None:
        """Stop the bundled server, if there is one, unless others use it."""
        if self.embedded is not None:
            self.embedded.close()


def open_server(settings: Settings, *, create: bool = True, space: int = 0) -> Server:
    """Return the server for the settings; start the bundled one if they select it.

    Without `create`, the bundled server creates no database; a temporary one will need `space` bytes.

    Raises:
        ConfigurationError: A setting is invalid, or the extra `embedded` is not installed.
        UnavailableError: The bundled server does not start, or has no data and `create` is off.
    """
    embedded = _open_embedded(settings, create=create, space=space)
    if embedded is None:
        local = engine.local_parameters(settings) if settings.transaction_pooling else None
        replicas, in_order = replica_arguments(settings)
        return Server(
            connect_arguments(settings),
            local_parameters=local,
            replicas=tuple(map(Server, replicas)),
            replicas_in_order=in_order,
        )
    if settings.replica_url is not None:
        embedded.close()
        raise ConfigurationError("invalid setting 'replica_url': the bundled PostgreSQL has no replicas")
    own = settings.model_copy(update={"transaction_pooling": False})
    try:
        connect = {**embedded.connect_arguments, **session_arguments(own, {}, {})}
        _create_database(connect)
    except BaseException:
        embedded.close()
        raise
    return Server(connect, embedded)


def replica_settings(settings: Settings) -> Settings:
    """Return the settings of the pool of a replica."""
    return settings.model_copy(update={"pool_size": settings.replica_pool_size})


def _open_embedded(settings: Settings, *, create: bool, space: int) -> EmbeddedServer | None:
    if settings.url is None and settings.host:
        return None
    scheme, rest = ("embedded", "") if settings.url is None else split_scheme(settings.url.get_secret_value())
    if scheme not in ("memory", "embedded"):
        return None
    from mesh_storage.embedded.server import EmbeddedServer, default_home

    if scheme == "memory":
        if rest not in ("", "//"):
            raise ConfigurationError("invalid setting 'url': nothing may follow memory:; use embedded: with a path")
        return EmbeddedServer.throw_away(space=space)
    if settings.url is None and create and not (home := default_home()).exists():
        logger.warning(
            "no URL is set: creating a database in %s; set MESH_STORAGE_URL to the URL of a server, or to embedded:",
            home,
            extra={"event": "create", "path": str(home)},
        )
    path = rest.removeprefix("//")
    return EmbeddedServer.open(Path(path) if path else None, create=create)


def _create_database(connect: dict[str, Any]) -> None:
    name = connect["dbname"]
    with engine.connect({**connect, "dbname": "postgres"}) as connection:
        if connection.execute("SELECT FROM pg_database WHERE datname = %s", [name]).fetchone() is None:
            # Another process that shares the server may have created it first.
            with suppress(psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation):
                connection.execute(f'CREATE DATABASE "{name}"'.encode())
