"""The grants for the roles of a service and of a reader: as statements, or carried out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import psycopg
from psycopg import sql

from mesh_storage.errors import ConfigurationError, InvalidInputError, translate
from mesh_storage.postgres import engine
from mesh_storage.postgres.server import Server, open_server
from mesh_storage.schema import deploy, privileges, tables
from mesh_storage.settings import settings_of

logger = logging.getLogger("mesh_storage")

_LONGEST_NAME_BYTES = 63
_EVERYBODY = ("public", "none")
"""No names of roles, not even in quotes (PostgreSQL's gram.y, RoleSpec)."""
_WHERE = """
    SELECT quote_ident(current_database()), quote_ident(nspname), quote_ident(pg_get_userbyid(relowner))
    FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace WHERE pg_class.oid = %s
"""
_OWNERS = """
    SELECT pg_get_userbyid(relowner) FROM pg_class
    WHERE relname = ANY(%s) AND relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = %s)
"""
_OIDS = """
    SELECT relname, oid FROM pg_class
    WHERE relname = ANY(%s) AND relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = %s)
"""
_ENTERS = """
    SELECT has_database_privilege(%(role)s, current_database(), 'CONNECT'),
        has_schema_privilege(%(role)s, (SELECT relnamespace FROM pg_class WHERE oid = %(table)s), 'USAGE')
"""


def grants(
    url: str | None = None, *, service: str | None = None, reader: str | None = None, apply: bool = False
) -> tuple[str, ...]:
    """Return the statements that grant two roles what they need, and with `apply`, carry them out in one transaction.

    The service may do all that this library does but migrate; the reader may read all tables, and take backups. Both
    keep it in later versions. Connect as the owner of the tables, and do it again after an upgrade, which takes from
    the service what it does not need on new tables. Without a URL, the settings come from the environment.

    Args:
        url: The URL of the database.
        service: The name of the role of a service.
        reader: The name of a role that only reads.
        apply: Whether to carry them out.

    Raises:
        ConfigurationError: A role does not exist, owns the tables, or lacks something that is not for this one to
            grant.
        InvalidInputError: No role is named, or a name is invalid.
        SchemaMismatchError: The schema is older or newer than this code requires, or missing.
        UnavailableError: The database cannot be reached.
    """
    server = open_server(settings_of(url))
    try:
        return grants_on(server, service=service, reader=reader, apply=apply)
    finally:
        server.close()


def grants_on(server: Server, *, service: str | None, reader: str | None, apply: bool) -> tuple[str, ...]:
    """Return the statements for a server that is already open, and with `apply`, carry them out."""
    given = [("service", service, privileges.SERVICE), ("reader", reader, privileges.READER)]
    roles = {_checked(field, name): needed for field, name, needed in given if name is not None}
    if not roles:
        raise InvalidInputError("name the role of a service, or of a reader, or both", field="service")
    if service == reader:
        raise InvalidInputError("a service and a reader need roles of their own", field="reader")
    server.require_session()
    try:
        with engine.connect(server.connect) as connection:
            location = tables.locate_during_upgrade(tables.by_psycopg(connection))
            deploy.check(location.revision)
            anchor = location.tables[location.version_table or tables.VERSION_TABLE]
            statements = [each for role in roles for each in _statements(connection, anchor, role, roles[role])]
            if apply:
                _check_roles(connection, anchor, roles)
                with connection.transaction():
                    for statement in statements:
                        connection.execute(statement.encode())
                    for role, needed in roles.items():
                        _check_granted(connection, anchor, role, needed)
                logger.info("granted", extra={"event": "grant", "roles": list(roles)})
    except psycopg.Error as error:
        raise translate(error) from error
    return tuple(statements)


def _checked(field: str, name: object) -> str:
    if (
        not isinstance(name, str)
        or not 0 < len(name.encode(errors="replace")) <= _LONGEST_NAME_BYTES
        or "\0" in name
        or name in _EVERYBODY
    ):
        raise InvalidInputError(f"{field} must be the name of a role, of 1 to {_LONGEST_NAME_BYTES} bytes", field=field)
    return name


def _statements(
    connection: psycopg.Connection[Any], anchor: int, role: str, needed: Mapping[str, tuple[str, ...]]
) -> list[str]:
    database, namespace, owner = connection.execute(_WHERE, [anchor]).fetchone() or ("", "", "")
    (quoted,) = connection.execute("SELECT quote_ident(%s)", [role]).fetchone() or ("",)
    made = privileges.grants(needed, namespace=namespace, owner=owner, role=quoted)
    return [f"GRANT CONNECT ON DATABASE {database} TO {quoted}", *made]


def _check_roles(connection: psycopg.Connection[Any], anchor: int, roles: Iterable[str]) -> None:
    """Raise for a role that does not exist, or that owns the tables, whose triggers run by its privileges."""
    found = {name for (name,) in connection.execute("SELECT rolname FROM pg_roles")}
    owners = {name for (name,) in connection.execute(_OWNERS, [list(tables.TABLES), anchor])}
    for role in roles:
        if role not in found:
            made = sql.Identifier(role).as_string(connection)
            raise ConfigurationError(f"there is no role {role}; run: CREATE ROLE {made} LOGIN")
        if role in owners:
            raise ConfigurationError(f"{role} owns the tables, so it needs no grants; name another role")


def _check_granted(
    connection: psycopg.Connection[Any], anchor: int, role: str, needed: Mapping[str, tuple[str, ...]]
) -> None:
    """Raise if something could not be granted, of which PostgreSQL only warns."""
    connects, enters = connection.execute(_ENTERS, {"role": role, "table": anchor}).fetchone() or (False, False)
    oids = dict(connection.execute(_OIDS, [list(tables.TABLES), anchor]).fetchall())
    name = sql.Literal(role).as_string(connection)
    lacking = [
        *([] if connects else ["CONNECT ON the database"]),
        *([] if enters else ["USAGE ON the schema"]),
        *privileges.missing(tables.by_psycopg(connection), oids, needed, name),
    ]
    if lacking:
        raise ConfigurationError(
            f"{role} would still lack {'; '.join(lacking)}: nothing was granted, since this is for the owners of these "
            "to grant"
        )
