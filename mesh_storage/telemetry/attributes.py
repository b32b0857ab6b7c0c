"""The attributes of spans and metrics: what the configuration tells of the database, and what an error tells."""

from __future__ import annotations

from opentelemetry.util.types import AttributeValue

from mesh_storage.postgres.server import Server

_DEFAULT_PORT = "5432"

Attributes = dict[str, AttributeValue]


def of_database(server: Server) -> Attributes:
    """Return the attributes of a database, without asking the server."""
    attributes: Attributes = {"db.system.name": "postgresql"}
    if server.connect.get("dbname"):
        attributes["db.namespace"] = str(server.connect["dbname"])
    hosts = str(server.connect.get("host") or server.connect.get("hostaddr") or "").split(",")
    if not all(hosts):
        return attributes
    ports = [port or _DEFAULT_PORT for port in str(server.connect.get("port") or "").split(",")]
    if len(ports) == 1:
        ports *= len(hosts)
    if len(set(ports)) > 1:
        places = [f"[{host}]" if ":" in host else host for host in hosts]
        hosts = [f"{place}:{port}" for place, port in zip(places, ports, strict=True)]
    elif ports[0] != _DEFAULT_PORT:
        attributes["server.port"] = int(ports[0])
    attributes["server.address"] = ",".join(hosts)
    return attributes


def of_pool(database: Attributes) -> Attributes:
    """Return the attribute of a pool: the name that the semantic conventions propose for one that has none."""
    place = ":".join(str(database[name]) for name in ("server.address", "server.port") if name in database)
    name = "/".join(filter(None, [place, str(database.get("db.namespace", ""))]))
    return {"db.client.connection.pool.name": name or "postgresql"}


def of_failure(error: BaseException) -> Attributes:
    """Return the attributes of an error: its class and SQLSTATE, but no message, which may quote a key."""
    attributes: Attributes = {"error.type": type(error).__qualname__}
    sqlstate = getattr(error, "sqlstate", None)
    if isinstance(sqlstate, str):
        attributes["db.response.status_code"] = sqlstate
    return attributes
