"""The roles of the document: a migrator, a service and a reader have what they need, and no more."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy
from alembic import command

from mesh_storage import (
    ConfigurationError,
    ConflictError,
    InvalidInputError,
    MeshStorage,
    MeshStorageError,
    SchemaMismatchError,
    Settings,
    backup,
    schema,
)
from mesh_storage.aio import AsyncMeshStorage
from mesh_storage.cli import Exit, main
from mesh_storage.postgres.server import open_server
from mesh_storage.testing import (
    ConfigEntryFactory,
    Databases,
    LogEntryFactory,
    MeshFactory,
    MessageFactory,
    NodeStateFactory,
    RouteFactory,
    RoutingEntryFactory,
    StateEntryFactory,
)
from tests.processes import ROOT

BEFORE, PRINTED = re.findall(
    r"^```text\n((?:CREATE ROLE|GRANT CONNECT).*?)^```",
    (ROOT / "docs" / "operations.md").read_text(),
    re.MULTILINE | re.DOTALL,
)
ROLES = ("mesh_migrator", "mesh_service", "mesh_reader")
LOGIN = "hush"

As = Callable[[str], str]


@pytest.fixture
def url(mesh_storage_databases: Databases) -> Iterator[str]:
    """Yield the URL of an empty database."""
    with mesh_storage_databases.fresh(with_schema=False) as made:
        yield made


def adapted(statements: str, database: str) -> bytes:
    """Return statements of the document for roles of this process only."""
    for role in ROLES:
        statements = re.sub(rf"\b{role}\b", f"{role}_{os.getpid()}", statements)
    return statements.replace("DATABASE mesh ", f"DATABASE {database} ").encode()


@pytest.fixture
def admin(url: str) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """Yield a connection of a superuser, after the roles have been made."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(adapted(BEFORE, connection.info.dbname))
        for role in ROLES:
            connection.execute(f"ALTER ROLE {role}_{os.getpid()} PASSWORD '{LOGIN}'".encode())
        yield connection
        for role in ROLES:
            connection.execute(f"DROP OWNED BY {role}_{os.getpid()} CASCADE".encode())
            connection.execute(f"DROP ROLE {role}_{os.getpid()}".encode())


@pytest.fixture
def log_in(url: str, admin: object) -> As:
    """Return what makes the URL of a role."""
    del admin

    def make(role: str) -> str:
        address = sqlalchemy.make_url(url).set(username=f"mesh_{role}_{os.getpid()}", password=LOGIN)
        return address.render_as_string(hide_password=False)

    return make


def grant(log_in: As, *, apply: bool = True) -> tuple[str, ...]:
    """Grant the service and the reader what they need, as the migrator, and return the statements."""
    service, reader = (f"mesh_{role}_{os.getpid()}" for role in ("service", "reader"))
    return schema.grants(log_in("migrator"), service=service, reader=reader, apply=apply)


def use(url: str) -> None:
    """Do what a service does: add, change and delete in every repository."""
    with MeshStorage.open(url) as storage:
        assert storage.health().ok
        with storage.begin() as uow:
            mesh = MeshFactory.create(uow=uow)
            uow.meshes.set_join_key(mesh.id, "key")
            route = RouteFactory.create(uow=uow)
            message = MessageFactory.create(uow=uow)
            uow.messages.store(message)
            for _ in range(2):
                uow.messages.send(MessageFactory.build(to_node="b"), key="k")
            uow.messages.ack(uow.messages.claim("b"))
            entry = StateEntryFactory.create(uow=uow)
            uow.state.put(entry.key, b"again")
            state = NodeStateFactory.create(uow=uow)
            uow.node_states.merge(state.node_id, {"a": 1})
            log = LogEntryFactory.create(uow=uow)
            routing = RoutingEntryFactory.create(uow=uow)
            uow.routing_table.put(routing.destination, {"next_hop": "b"})
            config = ConfigEntryFactory.create(uow=uow)
            uow.runtime_config.put(config.key, 2)
        with storage.begin() as uow:
            uow.routing_table.replace_all({})
            uow.runtime_config.delete(config.key)
            uow.consensus_log.delete_range(log.index, log.index)
            uow.node_states.delete(state.node_id)
            uow.state.delete(entry.key)
            uow.messages.delete(message.id)
            uow.routes.delete(route.id)
            uow.nodes.delete(route.source_node_id)
            uow.meshes.delete(mesh.id)


def test_each_role_has_what_it_needs_and_keeps_it(log_in: As, tmp_path: Path) -> None:
    schema.upgrade(log_in("migrator"))
    grant(log_in)
    use(log_in("service"))
    backup.backup(open_server(Settings(url=log_in("reader"))), tmp_path / "first")
    command.downgrade(schema.alembic_config(open_server(Settings(url=log_in("migrator"))).connect), "0001")
    schema.upgrade(log_in("migrator"))
    use(log_in("service"))
    made = backup.backup(open_server(Settings(url=log_in("reader"))), tmp_path / "second", verify=True)
    assert "mesh_consensus_log_stale" in made.rows


def test_the_document_shows_what_is_granted(admin: psycopg.Connection[tuple[object, ...]], log_in: As) -> None:
    schema.upgrade(log_in("migrator"))
    printed = adapted(PRINTED, admin.info.dbname).decode()
    assert "".join(f"{each};\n" for each in grant(log_in, apply=False)) == printed
    with pytest.raises(ConfigurationError, match="permission denied"):
        use(log_in("service"))


def test_what_a_service_has_by_default_on_a_new_table_is_taken_the_next_time(
    admin: psycopg.Connection[tuple[object, ...]], log_in: As
) -> None:
    schema.upgrade(log_in("migrator"))
    grant(log_in)
    command.downgrade(schema.alembic_config(open_server(Settings(url=log_in("migrator"))).connect), "base")
    schema.upgrade(log_in("migrator"))
    use(log_in("service"))
    may = "SELECT has_table_privilege(%s, 'mesh_consensus_log_stale', 'SELECT')"
    service = f"mesh_service_{os.getpid()}"
    assert admin.execute(may, [service]).fetchone() == (True,)
    grant(log_in)
    use(log_in("service"))
    assert admin.execute(may, [service]).fetchone() == (False,)


def test_what_is_not_for_the_migrator_to_grant_is_told(
    admin: psycopg.Connection[tuple[object, ...]], log_in: As
) -> None:
    service = f"mesh_service_{os.getpid()}"
    schema.upgrade(log_in("migrator"))
    admin.execute(f"REVOKE USAGE ON SCHEMA public FROM PUBLIC, {service}".encode())
    with pytest.raises(ConfigurationError, match=f"{service} would still lack USAGE ON the schema"):
        grant(log_in)
    may = "SELECT has_table_privilege(%s, 'nodes', 'SELECT')"
    assert admin.execute(may, [service]).fetchone() == (False,)
    admin.execute(f"GRANT USAGE ON SCHEMA public TO {service}".encode())
    grant(log_in)
    use(log_in("service"))


def test_roles_that_cannot_be_granted_anything_are_refused(url: str) -> None:
    with pytest.raises(SchemaMismatchError):
        schema.grants(url, service="anybody")
    schema.upgrade(url)
    for name in ("", "public", "none", "x" * 64, "a\0", 5):
        with pytest.raises(InvalidInputError, match="service must be"):
            schema.grants(url, service=name)  # type: ignore[arg-type] # it is checked
    for names in ({}, {"service": "a", "reader": "a"}):
        with pytest.raises(InvalidInputError):
            schema.grants(url, **names)
    with pytest.raises(ConfigurationError, match='there is no role No Body; run: CREATE ROLE "No Body" LOGIN'):
        schema.grants(url, reader="No Body", apply=True)
    assert "GRANT CONNECT ON DATABASE" in schema.grants(url, reader='a"; DROP TABLE nodes; --')[0]
    assert schema.grants(url, reader='a"b')[0].endswith('TO "a""b"')


def test_the_owner_of_the_tables_keeps_all(admin: psycopg.Connection[tuple[object, ...]], log_in: As) -> None:
    migrator = f"mesh_migrator_{os.getpid()}"
    schema.upgrade(log_in("migrator"))
    with pytest.raises(ConfigurationError, match=f"{migrator} owns the tables"):
        schema.grants(log_in("migrator"), service=migrator, apply=True)
    owner = admin.execute("SELECT session_user").fetchone()
    assert owner is not None
    admin.execute(f"ALTER TABLE mesh_changes OWNER TO {owner[0]}".encode())
    with pytest.raises(ConfigurationError, match=f"{owner[0]} owns the tables"):
        schema.grants(log_in("migrator"), reader=str(owner[0]), apply=True)
    admin.execute(f"ALTER TABLE mesh_changes OWNER TO {migrator}".encode())
    use(log_in("migrator"))


def test_the_command(
    admin: psycopg.Connection[tuple[object, ...]],
    log_in: As,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MESH_STORAGE_URL", log_in("migrator"))
    schema.upgrade()
    names = ["--service", f"mesh_service_{os.getpid()}", "--reader", f"mesh_reader_{os.getpid()}"]
    assert main(["roles", *names]) == Exit.OK
    assert capsys.readouterr().out == adapted(PRINTED, admin.info.dbname).decode()
    assert main(["roles", *names, "--apply"]) == Exit.OK
    assert capsys.readouterr().out == f"granted to {names[1]} and {names[3]}\n"
    use(log_in("service"))
    assert main(["roles", "--json", *names]) == Exit.OK
    answer = json.loads(capsys.readouterr().out)
    assert (answer["applied"], tuple(answer["statements"])) == (False, grant(log_in, apply=False))
    assert main(["roles"]) == Exit.FAILED


def test_policies_of_row_level_security_stay_and_are_obeyed(
    admin: psycopg.Connection[tuple[object, ...]], log_in: As, tmp_path: Path
) -> None:
    service, reader = (f"mesh_{role}_{os.getpid()}" for role in ("service", "reader"))
    schema.upgrade(log_in("migrator"))
    admin.execute("ALTER TABLE mesh_messages ENABLE ROW LEVEL SECURITY")
    admin.execute(f"CREATE POLICY own ON mesh_messages TO {service} USING (to_node = 'own')".encode())
    policies = "SELECT polname, polroles, pg_get_expr(polqual, polrelid) FROM pg_policy"
    before = admin.execute(policies).fetchall()
    grant(log_in)
    with MeshStorage.open(log_in("service")) as storage:
        with storage.begin() as uow:
            uow.messages.send(MessageFactory.build(id="seen", to_node="own"))
            assert [delivery.message.id for delivery in uow.messages.claim("own")] == ["seen"]
        admin.execute(
            "INSERT INTO mesh_messages (id, from_node, to_node, content, timestamp) VALUES ('hidden', 'a', 'b', '', 1)"
        )
        with storage.begin() as uow:
            assert [message.id for message in uow.messages.stream()] == ["seen"]
            assert uow.messages.find("hidden") is None
        with pytest.raises(ConfigurationError, match="row-level security"), storage.begin() as uow:
            uow.messages.store(MessageFactory.build(to_node="b"))
    with pytest.raises(MeshStorageError) as refused:
        backup.backup(open_server(Settings(url=log_in("reader"))), tmp_path / "refused")
    assert "row-level security" in str(refused.value)
    admin.execute(f"ALTER ROLE {reader} BYPASSRLS".encode())
    made = backup.backup(open_server(Settings(url=log_in("reader"))), tmp_path / "whole")
    assert made.rows["mesh_messages"] == 2
    command.downgrade(schema.alembic_config(open_server(Settings(url=log_in("migrator"))).connect), "0006")
    schema.upgrade(log_in("migrator"))
    assert admin.execute(policies).fetchall() == before


def test_health_tells_which_privileges_a_role_lacks(
    admin: psycopg.Connection[tuple[object, ...]], log_in: As, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema.upgrade(log_in("migrator"))
    grant(log_in)
    service = f"mesh_service_{os.getpid()}"
    with MeshStorage.open(log_in("service")) as storage, MeshStorage.open(log_in("reader")) as reader:
        assert (storage.health().ok, storage.health().missing_privileges) == (True, ())
        health = reader.health()
        assert health.ok
        assert len(health.missing_privileges) == 11
        assert {"INSERT, UPDATE, DELETE ON nodes", "INSERT, DELETE ON mesh_messages"} < {*health.missing_privileges}
        admin.execute(f"REVOKE INSERT, UPDATE ON nodes FROM {service}".encode())
        admin.execute(f"GRANT UPDATE (port) ON nodes TO {service}".encode())
        assert (storage.health().ok, storage.health().missing_privileges) == (True, ("INSERT ON nodes",))
        admin.execute(f"REVOKE SELECT ON nodes, mesh_state FROM {service}".encode())
        lacking = ("SELECT, INSERT ON nodes", "SELECT ON mesh_state")
        assert (storage.health().ok, storage.health().missing_privileges) == (False, lacking)
    assert asyncio.run(health_of(log_in("service"))) == (False, lacking)
    monkeypatch.setenv("MESH_STORAGE_URL", log_in("service"))
    assert main(["health"]) == Exit.CONFIGURATION


async def health_of(url: str) -> tuple[bool, tuple[str, ...]]:
    async with AsyncMeshStorage.open(url) as storage:
        health = await storage.health()
    return health.ok, health.missing_privileges


def test_health_tells_that_a_downgrade_has_dropped_the_grants(
    admin: psycopg.Connection[tuple[object, ...]], log_in: As
) -> None:
    """Those that ALTER DEFAULT PRIVILEGES does not restore."""
    migrator = f"mesh_migrator_{os.getpid()}"
    schema.upgrade(log_in("migrator"))
    grant(log_in)
    tables = f"DEFAULT PRIVILEGES FOR ROLE {migrator} IN SCHEMA public REVOKE ALL ON TABLES FROM"
    admin.execute(f"ALTER {tables} mesh_service_{os.getpid()}".encode())
    with MeshStorage.open(log_in("service")) as storage:
        assert storage.health().ok
        command.downgrade(schema.alembic_config(open_server(Settings(url=log_in("migrator"))).connect), "base")
        schema.upgrade(log_in("migrator"))
        health = storage.health()
    assert (health.ok, len(health.missing_privileges), health.error) == (False, 11, None)


def test_no_role_has_more(log_in: As) -> None:
    schema.upgrade(log_in("migrator"))
    grant(log_in)
    command.downgrade(schema.alembic_config(open_server(Settings(url=log_in("migrator"))).connect), "0006")
    for role in ("service", "reader"):
        with pytest.raises(ConflictError, match="may not alter it"):
            schema.upgrade(log_in(role))
    schema.upgrade(log_in("migrator"))
    with MeshStorage.open(log_in("reader")) as storage:
        with storage.unit_of_work(read_only=True) as uow:
            assert uow.messages.count() == 0
        with pytest.raises(ConfigurationError, match="permission denied"), storage.begin() as uow:
            MessageFactory.create(uow=uow)
    for statement in ("UPDATE mesh_alembic_version SET version_num = ''", "UPDATE mesh_messages SET to_node = 'x'"):
        with psycopg.connect(log_in("service")) as session, pytest.raises(psycopg.errors.InsufficientPrivilege):
            session.execute(statement.encode())


def test_grants_that_a_downgrade_drops_are_announced(
    admin: psycopg.Connection[tuple[object, ...]], log_in: As, caplog: pytest.LogCaptureFixture
) -> None:
    schema.upgrade(log_in("migrator"))
    admin.execute(f"GRANT SELECT ON mesh_consensus_log_stale TO mesh_reader_{os.getpid()} WITH GRANT OPTION".encode())
    admin.execute("GRANT INSERT, SELECT ON mesh TO PUBLIC")
    configuration = schema.alembic_config(open_server(Settings(url=log_in("migrator"))).connect)
    with caplog.at_level(logging.WARNING, "mesh_storage"):
        command.downgrade(configuration, "0005")
    stale, *_ = sorted(caplog.records, key=lambda record: "stale" not in record.getMessage())
    granted = f"GRANT SELECT ON mesh_consensus_log_stale TO mesh_reader_{os.getpid()} WITH GRANT OPTION"
    assert granted in vars(stale)["grants"]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "mesh_storage"):
        command.downgrade(configuration, "base")
    (base,) = caplog.records
    assert "GRANT INSERT, SELECT ON mesh TO PUBLIC" in base.getMessage()
