"""Which server the settings mean: one with an address, or the bundled one, which is started."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

from mesh_storage.errors import ConfigurationError
from mesh_storage.postgres import engine
from mesh_storage.postgres.engine import connect_arguments, session_arguments, split_scheme
from mesh_storage.settings import Settings

if TYPE_CHECKING:  # It loads when needed.
    from mesh_storage.embedded.server import EmbeddedServer

logger = logging.getLogger("mesh_storage")


@dataclass(frozen=True)
class Server:
    """How a database is reached, and the bundled server that must run for that."""

    connect: dict[str, Any] = field(repr=False)  # the password is in it
    """The arguments for `psycopg.connect`."""
    embedded: EmbeddedServer | None = None
    local_parameters: str | None = None
    """The statements by which each transaction sets its parameters, where a pooler leaves no session to keep them."""

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
        """Refuse to begin what holds locks or parameters of a session beyond a transaction.

        Raises:
            ConfigurationError: A pooler gives each transaction another session.
        """
        if self.local_parameters is not None:
            raise ConfigurationError(
                "bad setting transaction_pooling: migrations, backup and restore need a session of their own; set the "
                "URL to that of the server itself, and transaction_pooling to false"
            )

    def close(self) -> None:
        """Stop the bundled server, if there is one that nobody else uses."""
        if self.embedded is not None:
            self.embedded.close()


def open_server(settings: Settings, *, create: bool = True, space: int = 0) -> Server:
    """Find the server of the settings; start the bundled one if they mean that.

    Without `create`, the bundled one makes no database; one that is thrown away will need `space` bytes.

    Raises:
        ConfigurationError: A setting is wrong, or the extra `embedded` is not installed.
        UnavailableError: The bundled server does not start, or it has no data and `create` is off.
    """
    embedded = _open_embedded(settings, create=create, space=space)
    if embedded is None:
        local = engine.local_parameters(settings) if settings.transaction_pooling else None
        return Server(connect_arguments(settings), local_parameters=local)
    own = settings.model_copy(update={"transaction_pooling": False})
    try:
        connect = {**embedded.connect_arguments, **session_arguments(own, {}, {})}
        _create_database(connect)
    except BaseException:
        embedded.close()
        raise
    return Server(connect, embedded)


def _open_embedded(settings: Settings, *, create: bool, space: int) -> EmbeddedServer | None:
    if settings.url is None and settings.host:
        return None
    scheme, rest = ("embedded", "") if settings.url is None else split_scheme(settings.url.get_secret_value())
    if scheme not in ("memory", "embedded"):
        return None
    from mesh_storage.embedded.server import EmbeddedServer, default_home

    if scheme == "memory":
        if rest not in ("", "//"):
            raise ConfigurationError("bad setting url: nothing may follow memory:; a path goes with embedded:")
        return EmbeddedServer.throw_away(space=space)
    if settings.url is None and create and not (home := default_home()).exists():
        logger.warning(
            "no URL is set: making a database under %s; set MESH_STORAGE_URL to that of a server, or to embedded:",
            home,
            extra={"event": "create", "path": str(home)},
        )
    path = rest.removeprefix("//")
    return EmbeddedServer.open(Path(path) if path else None, create=create)


def _create_database(connect: dict[str, Any]) -> None:
    name = connect["dbname"]
    with engine.connect({**connect, "dbname": "postgres"}) as connection:
        if connection.execute("SELECT FROM pg_database WHERE datname = %s", [name]).fetchone() is None:
            # Another process that shares the server may be faster.
            with suppress(psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation):
                connection.execute(f'CREATE DATABASE "{name}"'.encode())
