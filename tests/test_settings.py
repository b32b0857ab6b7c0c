"""Settings: where they come from, what is refused by name, and that a password never shows."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from pydantic import SecretStr
from sqlalchemy import text

from mesh_storage import ConfigurationError, MeshStorage, MeshStorageError, Settings, UnavailableError, schema
from mesh_storage.embedded.server import EmbeddedServer
from mesh_storage.postgres.engine import connect_arguments, replica_arguments
from mesh_storage.testing import databases

CANARY = "c4n4ry-s3cr3t"
ROOT = Path(__file__).parent.parent
HOST = {"host": "127.0.0.1", "port": 1}


def url_of(settings: Settings) -> dict[str, Any]:
    return connect_arguments(settings)


def everything_said(error: BaseException) -> str:
    """Return all that a log or a debugger would show of an error and of all that led to it."""
    seen: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        each = todo.pop()
        if each is not None and each not in seen:
            seen.append(each)
            todo += [each.__cause__, each.__context__]
    said = [f"{each!r} {each} {each.args!r} {vars(each)!r}" for each in seen]
    return "\n".join([*said, *traceback.format_exception(error)])


def refused(**values: Any) -> str:
    """Return what is said when a storage is opened with these settings, which must be refused."""
    with pytest.raises(ConfigurationError) as error:
        MeshStorage.open(settings=Settings(**values))
    assert CANARY not in everything_said(error.value)
    return str(error.value)


SETTINGS: dict[str, tuple[object, object]] = {
    "host": ("db", "other"),
    "port": (5433, 5434),
    "user": ("me", "other"),
    "database": ("mesh", "other"),
    "sslmode": ("require", "disable"),
    "application_name": ("service", "other"),
    "transaction_pooling": (True, False),
    "pool_size": (3, 4),
    "pool_timeout": (1.5, 2),
    "connect_timeout": (2.5, 3),
    "statement_timeout": (3.5, 4),
    "lock_timeout": (4.5, 5),
    "idle_in_transaction_timeout": (5.5, 6),
    "slow_unit_of_work": (6.5, 7),
    "replica_pool_size": (5, 6),
    "replica_timeout": (7.5, 8),
}


def test_these_are_all_settings() -> None:
    assert {*SETTINGS, "url", "password", "replica_url"} == set(Settings.model_fields)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_has_three_sources_in_their_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, other = SETTINGS[name]
    Path(".env").write_text(f"MESH_STORAGE_{name.upper()}={value}\nOTHER=1\n")
    assert str(getattr(Settings(), name)) == str(value)
    monkeypatch.setenv(f"MESH_STORAGE_{name.upper()}", str(other))
    assert float(getattr(Settings(), name)) == other if isinstance(other, int) else getattr(Settings(), name) == other
    assert getattr(Settings(**{name: value}), name) == value


def test_the_limits_reach_the_server(mesh_storage_url: str) -> None:
    limits = {"statement_timeout": 1.5, "lock_timeout": 2, "idle_in_transaction_timeout": 3}
    settings = Settings(url=SecretStr(mesh_storage_url), application_name="my service", **limits)
    with psycopg.connect(**connect_arguments(settings)) as connection:
        shown = [
            connection.execute(f"SHOW {name}").fetchone()
            for name in (
                "statement_timeout",
                "lock_timeout",
                "idle_in_transaction_session_timeout",
                "application_name",
                "timezone",
            )
        ]
    assert shown == [("1500ms",), ("2s",), ("3s",), ("my service",), ("UTC",)]


def test_of_several_hosts_the_one_that_answers_is_used(mesh_storage_url: str, tmp_path: Path) -> None:
    there = conninfo_to_dict(mesh_storage_url)
    hosts = f"{tmp_path},{there['host']}"
    url = f"postgresql+psycopg://{there['user']}@/{there['dbname']}?host={quote(hosts, '')}&port=1,{there['port']}"
    with MeshStorage.open(url) as storage:
        assert storage.health().ok


@pytest.mark.parametrize("port", ["abc", "70000", "0", -1, 0, "1,2", "1,x", "٣", "9" * 5000])
def test_a_port_that_is_none_is_refused_by_name(port: object) -> None:
    assert "port" in refused(host="127.0.0.1", port=port, password=CANARY)


@pytest.mark.parametrize(
    "rest",
    [
        f"me:{CANARY}@127.0.0.1:99999/mesh",
        f"me:{CANARY}@127.0.0.1:0/mesh",
        f"me:{CANARY}@127.0.0.1/mesh?port=1,2",
        f"me:{CANARY}@127.0.0.1:1/mesh?sslmode=maybe",
        f"me:{CANARY}@127.0.0.1:1/mesh?connect_timeout=soon",
        f"me:12/{CANARY}@127.0.0.1:1/mesh",
        f"me/you:{CANARY}@127.0.0.1:1/mesh",
        f"me:{CANARY}\0@127.0.0.1:1/mesh",
        f"me:{CANARY}%00@127.0.0.1:1/mesh",
    ],
)
def test_a_url_with_a_bad_part_is_refused_before_anybody_connects(rest: str) -> None:
    assert refused(url=f"postgresql://{rest}").startswith("invalid setting")


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({**HOST, "password": f"{CANARY}\ud800"}, "password"),
        ({**HOST, "password": f"{CANARY}\0"}, "password"),
        ({**HOST, "user": "\ud800", "password": CANARY}, "user"),
        ({**HOST, "user": "me\0", "password": CANARY}, "user"),
        ({**HOST, "database": "mesh\0", "password": CANARY}, "database"),
        ({**HOST, "application_name": "a\0", "password": CANARY}, "application_name"),
        ({"host": f"postgresql://me:{CANARY}@db/mesh"}, "host"),
        ({"url": f"postgresql://me:{CANARY}\ud800@127.0.0.1:1/mesh"}, "url"),
        ({"url": "embedded:/a\0b"}, "url"),
        ({"url": "embedded:~no_such_user/mesh"}, "url"),
        ({"url": f"memory:{CANARY}"}, "url"),
    ],
    ids=str,
)
def test_a_text_that_cannot_be_sent_is_refused_by_name(values: dict[str, Any], name: str) -> None:
    assert name in refused(**values)


def test_bytes_of_another_encoding_in_the_environment_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_STORAGE_PASSWORD", os.fsdecode(f"{CANARY}é".encode("latin-1")))
    assert "password" in refused(**HOST)


def test_bytes_of_another_encoding_in_the_file_are_refused() -> None:
    Path(".env").write_bytes(f"MESH_STORAGE_USER=é\nMESH_STORAGE_PASSWORD={CANARY}\n".encode("latin-1"))
    assert ".env" in refused(**HOST)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pool_size", 0),
        ("pool_size", "many"),
        ("pool_timeout", -1),
        ("connect_timeout", float("inf")),
        ("statement_timeout", "soon"),
        ("lock_timeout", float("nan")),
        ("sslmode", "maybe"),
        ("idle_in_transaction_timeout", -0.1),
        ("slow_unit_of_work", "x"),
        ("transaction_pooling", "x"),
        ("replica_pool_size", 0),
        ("replica_timeout", 0),
    ],
)
def test_a_bad_setting_is_named_and_its_value_is_not_shown(name: str, value: object, monkeypatch: Any) -> None:
    with pytest.raises(ConfigurationError, match=name):
        Settings(**{name: value})
    monkeypatch.setenv(f"MESH_STORAGE_{name.upper()}", str(value))
    with pytest.raises(ConfigurationError, match=name):
        MeshStorage.open()


@pytest.mark.parametrize(
    "rest",
    [
        f"//me:{CANARY}@127.0.0.1:99999/mesh",
        f"//me:{CANARY}@db1,db2/mesh?port=1,2,3",
        f"//me:{CANARY}@/mesh",
        f"//me:{CANARY}@db1,db2/mesh?hostaddr=127.0.0.1,127.0.0.2,127.0.0.3",
        f"//me:{CANARY}@db1/mesh?sslmode=maybe",
        f"//me:12/{CANARY}@127.0.0.1:1/mesh",
        f"//me:{CANARY}%00@127.0.0.1:1/mesh",
        f"//me:{CANARY}@db1/mesh?no_such_parameter=1",
    ],
)
def test_a_bad_url_of_replicas_is_named(rest: str) -> None:
    said = refused(url="postgresql://127.0.0.1:1/mesh", replica_url=f"postgresql:{rest}")
    assert said.startswith("invalid setting 'replica_url'")


@pytest.mark.parametrize("url", ["memory:", "embedded:", f"mysql://me:{CANARY}@db/mesh", ""])
def test_replicas_are_servers(url: str) -> None:
    assert "invalid setting 'replica_url'" in refused(url="postgresql://127.0.0.1:1/mesh", replica_url=url)


def test_replicas_need_sessions_of_their_own() -> None:
    given = {"url": "postgresql://127.0.0.1:1/mesh", "replica_url": "postgresql://127.0.0.1:2/mesh"}
    assert "transaction_pooling" in refused(**given, transaction_pooling=True)


def test_the_url_of_the_replicas_takes_precedence_over_what_the_primary_is_reached_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PGTARGETSESSIONATTRS", "read-write")
    monkeypatch.setenv("PGHOSTADDR", "127.0.0.1")
    first = (
        "postgresql://me:secret@db1:1,db2:2/mesh?target_session_attrs=read-write&options=-cgeqo%3Doff&sslmode=require"
    )
    second = "postgresql://you@db2,db3:3,[::1]/?sslmode=disable&connect_timeout=7&application_name=reader"
    replicas, in_order = replica_arguments(Settings(url=SecretStr(first), replica_url=SecretStr(second)))
    assert not in_order
    kept = {"password": "secret", "dbname": "mesh", "user": "you", "sslmode": "disable"}
    assert [{name: value for name, value in each.items() if name in kept} for each in replicas] == [kept] * 3
    assert [(each["host"], each.get("port")) for each in replicas] == [("db2", None), ("db3", "3"), ("::1", None)]
    for each in replicas:
        assert each["connect_timeout"] == 7
        assert each["application_name"] == "reader"
        assert "geqo=off" in each["options"]
        assert (each["target_session_attrs"], each["hostaddr"]) == ("any", "")


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ConfigurationError, match="pool_sise"):
        Settings(pool_sise=1)


def test_a_url_and_settings_together_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="not both"):
        MeshStorage.open("memory:", settings=Settings())


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_a_url_may_have_several_hosts_and_the_parameters_of_libpq(scheme: str) -> None:
    arguments = url_of(
        Settings(
            url=f"{scheme}://me:p%40ss@one:5433,two:5434/mesh?target_session_attrs=read-write&options=-csearch_path%3Dm"
        )
    )
    assert (arguments["host"], arguments["port"], arguments["dbname"]) == ("one,two", "5433,5434", "mesh")
    assert (arguments["user"], arguments["password"]) == ("me", "p@ss")
    assert arguments["target_session_attrs"] == "read-write"
    assert arguments["options"].endswith("-csearch_path=m")


def test_separate_fields_fill_in_what_the_url_leaves_out() -> None:
    arguments = url_of(Settings(url="postgresql://me@one/mesh", password=CANARY, user="other", sslmode="require"))
    assert (arguments["user"], arguments["password"], arguments["sslmode"]) == ("me", CANARY, "require")


def test_separate_fields_are_enough() -> None:
    arguments = url_of(Settings(host="/run/pg", port=5433, user="me", database="mesh", application_name="svc"))
    wanted = {"host": "/run/pg", "port": 5433, "user": "me", "dbname": "mesh", "application_name": "svc"}
    assert wanted.items() <= arguments.items()


@pytest.mark.parametrize(
    "url",
    ["mysql://db/mesh", "db/mesh", "", "postgresql:db", "postgresql://h:port/mesh", "postgresql://h/mesh?nonsense=1"],
)
def test_a_url_that_is_none_is_refused_by_name(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"url|port"):
        MeshStorage.open(url)


LEAKS: dict[str, dict[str, Any]] = {
    "url": {"url": f"postgresql://me:{CANARY}@127.0.0.1:1/mesh"},
    "url parameter": {"url": f"postgresql://127.0.0.1:1/mesh?password={CANARY}"},
    "url, encoded": {"url": f"postgresql://me:%63{CANARY[1:]}@127.0.0.1:1/mesh"},
    "url, malformed port": {"url": f"postgresql://me:{CANARY}@127.0.0.1:port/mesh"},
    "url, malformed query": {"url": f"postgresql://127.0.0.1:1/mesh?passwort={CANARY}"},
    "url, two @": {"url": f"postgresql://me:x@{CANARY}@127.0.0.1:1/mesh"},
    "url, unknown scheme": {"url": f"mysql://me:{CANARY}@127.0.0.1/mesh"},
    "url, not encoded": {"url": f"postgresql://me:%zz{CANARY}@127.0.0.1/mesh"},
    "password": {"host": "127.0.0.1", "port": 1, "password": CANARY},
    "password of another type": {"host": "127.0.0.1", "password": {"x": CANARY}},
    "url of another type": {"url": [CANARY]},
    "beside an invalid setting": {"url": f"postgresql://me:{CANARY}@h/mesh", "pool_size": 0},
    "as an unknown setting's value": {"secret": CANARY},
    "sslpassword": {"url": f"postgresql://127.0.0.1:1/mesh?sslpassword={CANARY}"},
}


@pytest.mark.parametrize("source", ["arguments", "environment", ".env"])
@pytest.mark.parametrize("values", LEAKS.values(), ids=LEAKS)
def test_a_password_shows_nowhere(values: dict[str, Any], source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    logging.getLogger().addHandler(handler)
    monkeypatch.setattr(logging.getLogger(), "level", logging.DEBUG)
    said = ""
    try:
        if source == "arguments":
            settings = Settings(**values)
        else:
            lines = {f"MESH_STORAGE_{name.upper()}": str(value) for name, value in values.items()}
            if source == "environment":
                for name, value in lines.items():
                    monkeypatch.setenv(name, value)
            else:
                Path(".env").write_text("".join(f"{name}='{value}'\n" for name, value in lines.items()))
            settings = Settings()
        said += f"{settings!r} {settings} {settings.model_dump()!r} {settings.model_dump_json()}"
        if settings.url or settings.host:
            with MeshStorage.open(settings=settings) as storage:
                said += repr(vars(storage))
    except MeshStorageError as error:
        said += everything_said(error)
    finally:
        logging.getLogger().removeHandler(handler)
    assert said
    assert CANARY not in said + log.getvalue()


def test_a_password_that_the_server_refuses_shows_nowhere(
    mesh_storage_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = mesh_storage_url.replace("postgres@", f"no_such_role:{CANARY}@")
    with pytest.raises(UnavailableError, match="no_such_role") as refused:
        MeshStorage.open(url)
    assert CANARY not in everything_said(refused.value) + caplog.text


def test_an_open_storage_shows_no_password(mesh_storage_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    url = mesh_storage_url.replace("postgres@", f"postgres:{CANARY}@")
    with MeshStorage.open(url) as storage:
        with storage.begin() as uow:
            uow.state.put("k", CANARY.encode())
        said = f"{storage!r} {vars(storage)!r} {storage.health()!r} {SecretStr(CANARY)!r}"
    assert CANARY not in said + caplog.text


@pytest.fixture(scope="module")
def with_password() -> Iterator[str]:
    """Yield the host of a server on which the role `mesh` must give the canary as its password."""
    server = EmbeddedServer.throw_away()
    admin = {**server.connect_arguments, "dbname": "postgres"}
    with psycopg.connect(**admin, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE mesh LOGIN PASSWORD '{CANARY}'".encode())
        connection.execute("CREATE DATABASE mesh OWNER mesh")
        row = connection.execute("SHOW hba_file").fetchone()
        assert row is not None
        rules = Path(row[0])
        rules.write_text(f"local all mesh scram-sha-256\n{rules.read_text()}")
        connection.execute("SELECT pg_reload_conf()")
    yield quote(str(admin["host"]), "")
    server.close()


def test_a_right_password_is_taken_from_every_place_and_a_wrong_one_shown_in_none(
    with_password: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    address = f"/mesh?host={with_password}"
    schema.upgrade(f"postgresql://mesh:{CANARY}@{address}")
    said = ""
    for values in (
        {"url": f"postgresql://mesh:%63{CANARY[1:]}@{address}"},
        {"url": f"postgresql://mesh@{address}&password={CANARY}"},
        {"url": f"postgres://mesh@{address}", "password": CANARY},
    ):
        with MeshStorage.open(settings=Settings(**values)) as storage:
            assert storage.health().ok
            said += repr(vars(storage))
    for wrong in (f"mesh:{CANARY}-wrong@{address}", f"mesh@{address}&password=wrong-{CANARY}"):
        with pytest.raises(UnavailableError) as error:
            MeshStorage.open(f"postgresql://{wrong}")
        said += everything_said(error.value)
        with pytest.raises(MeshStorageError) as error:
            schema.upgrade(f"postgresql://{wrong}")
        said += everything_said(error.value)
    monkeypatch.setenv("MESH_STORAGE_PASSWORD", CANARY)
    with MeshStorage.open(f"postgresql://mesh@{address}") as storage:
        assert storage.health().ok
    assert CANARY not in said + caplog.text


def test_a_password_that_is_changed_under_an_open_storage_shows_nowhere(
    with_password: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    address = f"/mesh?host={with_password}"
    schema.upgrade(f"postgresql://mesh:{CANARY}@{address}")
    with (
        MeshStorage.open(f"postgresql://mesh:{CANARY}@{address}") as storage,
        psycopg.connect(f"postgresql://postgres@{address}", autocommit=True) as admin,
    ):
        admin.execute("ALTER ROLE mesh PASSWORD 'another'")
        try:
            with pytest.raises(UnavailableError) as error, storage.begin() as one, storage.begin() as two:
                two.state.put("k", one.state.get("k").value)
            health = storage.health()
        finally:
            admin.execute(f"ALTER ROLE mesh PASSWORD '{CANARY}'".encode())
        said = everything_said(error.value) + repr(health)
        assert health.error is None or CANARY not in everything_said(health.error)
    assert CANARY not in said + caplog.text


@pytest.mark.parametrize(
    ("command", "rest"),
    [
        ("alembic upgrade head", f"me:{CANARY}@127.0.0.1:1/mesh?sslpassword={CANARY}"),
        ("alembic check", f"127.0.0.1:1/mesh?password={CANARY}"),
        ("alembic upgrade head", f"me:{CANARY}@127.0.0.1:x/mesh"),
        ("mesh_storage health", f"me:{CANARY}@127.0.0.1:1/mesh"),
        ("mesh_storage upgrade", f"me:{CANARY}@127.0.0.1:x/mesh"),
    ],
)
def test_no_command_shows_a_password(command: str, rest: str) -> None:
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=ROOT,
        env=environment | {"MESH_STORAGE_URL": f"postgresql://{rest}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode not in (0, 2)
    assert CANARY not in done.stdout + done.stderr


@pytest.fixture
def server(mesh_storage_url: str) -> dict[str, str]:
    """Return the address of a database, as one of a server, about which libpq's environment has a say."""
    there = conninfo_to_dict(mesh_storage_url)
    return {name: str(there[name]) for name in ("host", "port", "user", "dbname")}


def url_to(server: dict[str, str], **more: str) -> str:
    return "postgresql:///?" + urlencode(server | more, quote_via=quote)


def shown(url: str | None, *names: str, **settings: Any) -> list[str]:
    """Return parameters of a session as the server has them."""
    with MeshStorage.open(settings=Settings(url=url, **settings)) as storage, storage.begin(read_only=True) as uow:
        return [str(uow.session.execute(text(f"SHOW {name}")).scalar_one()) for name in names]


@pytest.fixture(params=["PGOPTIONS", "service of the URL", "service of PGSERVICE"])
def with_options(
    request: pytest.FixtureRequest, server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Return a URL that gets options from outside."""
    options = "-c statement_timeout=7s -c work_mem=5MB"
    if request.param == "PGOPTIONS":
        monkeypatch.setenv("PGOPTIONS", options)
        return url_to(server)
    file = tmp_path / "services"
    file.write_text(f"[mesh]\noptions={options}\n")
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    if request.param == "service of the URL":
        return url_to(server, service="mesh")
    monkeypatch.setenv("PGSERVICE", "mesh")
    return url_to(server)


def test_options_from_outside_are_obeyed_as_psql_does_and_settings_go_before_them(with_options: str) -> None:
    names = ("statement_timeout", "work_mem", "lock_timeout", "timezone")
    assert shown(with_options, *names) == ["7s", "5MB", "10s", "UTC"]
    assert shown(with_options, *names, statement_timeout=3) == ["3s", "5MB", "10s", "UTC"]
    # Those of the URL take their place, as anywhere with libpq.
    assert shown(f"{with_options}&options=-c%20lock_timeout%3D4s", *names[:3]) == ["30s", "4MB", "4s"]


@pytest.mark.parametrize("variable", ["PGOPTIONS", "PGAPPNAME", "PGCONNECT_TIMEOUT"])
def test_a_default_of_ours_does_not_hide_a_variable(
    variable: str, server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, {"PGAPPNAME": "theirs", "PGCONNECT_TIMEOUT": "9"}.get(variable, ""))
    arguments = connect_arguments(Settings(url=url_to(server)))
    assert arguments["application_name"] == ("theirs" if variable == "PGAPPNAME" else "mesh_storage")
    assert arguments["connect_timeout"] == (9 if variable == "PGCONNECT_TIMEOUT" else 5)
    assert connect_arguments(Settings(url=url_to(server), application_name="ours"))["application_name"] == "ours"


@pytest.mark.parametrize("place", ["PGHOST", "PGPORT", "PGUSER", "PGDATABASE", "service"])
def test_the_address_may_come_from_outside(
    place: str, server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "service":
        (tmp_path / "services").write_text("[mesh]\n" + "".join(f"{name}={value}\n" for name, value in server.items()))
        monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
        url = "postgresql://?service=mesh"
    else:
        name = {"PGDATABASE": "dbname"}.get(place, place.removeprefix("PG").lower())
        monkeypatch.setenv(place, server.pop(name))
        url = url_to(server)
    with MeshStorage.open(url) as storage:
        assert storage.health().ok


@pytest.mark.parametrize("service", ["in no file", "in no such file", "in a broken file"])
def test_a_service_that_is_not_there_is_a_setting(service: str, tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "services"
    if service != "in no such file":
        file.write_text("[other]\n" if service == "in no file" else "[mesh]\nnonsense\n")
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    with pytest.raises(ConfigurationError, match="PGSERVICE"):
        MeshStorage.open("postgresql://127.0.0.1:1/mesh?service=mesh")


@pytest.mark.parametrize("variable", ["PGTZ", "PGDATESTYLE"])
def test_times_are_read_whatever_the_environment_says_about_them(
    variable: str, server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, {"PGTZ": "Asia/Tokyo", "PGDATESTYLE": "German"}[variable])
    for options, style in (("", "ISO, MDY"), ("-c datestyle=German,YMD", "ISO, YMD")):
        monkeypatch.setenv("PGOPTIONS", options)
        assert shown(url_to(server), "timezone", "datestyle") == ["UTC", style]
        with MeshStorage.open(url_to(server)) as storage, storage.begin() as uow:
            assert uow.state.put("k", b"v").created_at.tzname() == "UTC"
            assert uow.session.execute(text("SELECT now()")).scalar_one().tzname() == "UTC"


@pytest.mark.parametrize(
    ("address", "setting", "ports"),
    [
        ("a,b", 5433, "5433,5433"),
        ("a,b", "5433,5434", "5433,5434"),
        ("a:1,b", 5433, "1,5433"),
        ("a,b:1,c", "5,6,7", "5,1,7"),
        ("a:1,b:2", 5433, "1,2"),
        ("a", 5433, "5433"),
        ("a:1", 5433, "1"),
        ("a,b", None, ","),
    ],
)
def test_a_port_stands_where_the_url_has_none(address: str, setting: object, ports: str) -> None:
    assert str(connect_arguments(Settings(url=f"postgresql://{address}/mesh", port=setting))["port"]) == ports


def test_a_host_stands_where_the_url_has_none() -> None:
    assert url_of(Settings(url="postgresql://a,,c/mesh", host="b"))["host"] == "a,b,c"
    assert url_of(Settings(url="postgresql://:5433/mesh", host="b"))["host"] == "b"


@pytest.mark.parametrize("number", ["1,2", "1,2,3,4"])
def test_ports_that_do_not_match_the_hosts_of_the_url_are_refused(number: str) -> None:
    assert "port" in refused(url="postgresql://a,b,c/mesh", port=number)


@pytest.mark.parametrize("name", ["a@b", "@b", "a@b@c"])
def test_a_database_may_have_an_at_in_its_name(name: str, server: dict[str, str], mesh_storage_url: str) -> None:
    with psycopg.connect(mesh_storage_url, autocommit=True) as admin:
        admin.execute(f'CREATE DATABASE "{name}"'.encode())
    try:
        place = url_to({"host": server["host"], "port": server["port"]}).partition("?")[2]
        schema.upgrade(f"postgresql://postgres@/{name}?{place}")
        for values in (
            {"url": f"postgresql://postgres@/{name}?{place}"},
            {"url": f"postgresql://postgres@/{quote(name)}?{place}"},
            {"url": f"postgresql:///?{place}&user=postgres&dbname={name}"},
            {"url": f"postgresql://postgres@/?{place}", "database": name},
            {**server, "database": name},
        ):
            with MeshStorage.open(settings=Settings(**{k: v for k, v in values.items() if k != "dbname"})) as storage:
                assert storage.health().ok
    finally:
        with psycopg.connect(mesh_storage_url, autocommit=True) as admin:
            admin.execute(f'DROP DATABASE "{name}" WITH (FORCE)'.encode())


@pytest.mark.parametrize(
    "values",
    [
        {"url": "postgresql:///mesh?host=@name"},
        {"url": "postgresql://%40name/mesh"},
        {"host": "@name"},
        {"url": "postgresql://me:p%40ss@%40name/mesh"},
    ],
    ids=str,
)
def test_an_abstract_socket_is_a_host(values: dict[str, str]) -> None:
    assert url_of(Settings(**values))["host"] == "@name"
    with pytest.raises(UnavailableError, match="@name"):
        MeshStorage.open(settings=Settings(**values))


@pytest.mark.parametrize(
    "rest", [f"me:x@@{CANARY}@h/mesh", f"me:12/{CANARY}@h:1/mesh", f"me:x@1/{CANARY}@h/mesh", f"@{CANARY}@h/mesh"]
)
def test_an_at_that_was_not_encoded_in_a_password_is_none_in_a_host_or_database(rest: str) -> None:
    assert "percent-encode" in refused(url=f"postgresql://{rest}")


def test_a_plus_in_a_url_is_no_space(server: dict[str, str]) -> None:
    assert shown(url_to(server) + "&application_name=a+b%20c", "application_name") == ["a+b c"]
    assert "%20" in refused(url=url_to(server) + "&options=-c+search_path%3Dx")
    assert "%20" in refused(url=url_to(server) + "&options=-c%20a%3Db+-c+search_path%3Dx")


@pytest.fixture(params=["SQL_ASCII", "LATIN1"])
def other_encoding(request: pytest.FixtureRequest, server: dict[str, str], mesh_storage_url: str) -> Iterator[str]:
    """Yield the URL of a database that is not in UTF8."""
    with psycopg.connect(mesh_storage_url, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE encoded ENCODING '{request.param}' LOCALE 'C' TEMPLATE template0".encode())
        yield url_to(server | {"dbname": "encoded"})
        admin.execute(b"DROP DATABASE encoded WITH (FORCE)")


def test_a_database_of_another_encoding_gives_text_as_it_came(other_encoding: str) -> None:
    schema.upgrade(other_encoding)
    with MeshStorage.open(other_encoding) as storage:
        assert storage.health().revision == schema.head()
        with storage.begin() as uow:
            uow.state.put("schlüssel", b"v")
        with storage.begin(read_only=True) as uow:
            assert uow.state.get("schlüssel").key == "schlüssel"


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1", "nonsense"])
def test_the_encoding_of_a_client_is_not_for_the_environment_to_say(
    encoding: str, server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGCLIENTENCODING", encoding)
    with MeshStorage.open(url_to(server)) as storage:
        assert storage.health().revision == schema.head()
    assert shown(url_to(server, client_encoding="utf-8"), "client_encoding") == ["UTF8"]
    assert "client_encoding" in refused(url=url_to(server, client_encoding=encoding))


@pytest.mark.parametrize("url", [None, "postgresql://127.0.0.1:1/mesh"])
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be a user who may not read a file")
def test_a_file_that_cannot_be_read_is_named(url: str | None) -> None:
    code = "import os, sys\nfrom mesh_storage import ConfigurationError, MeshStorage\nos.setuid(54321)\n"
    code += "try:\n    MeshStorage.open(*sys.argv[1:])\nexcept ConfigurationError as error:\n    print(error)"
    Path(".env").write_text("MESH_STORAGE_POOL_SIZE=3\n")
    Path(".env").chmod(0o600)
    done = subprocess.run(
        [sys.executable, "-c", code, *([url] if url else [])],
        env={"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith("invalid setting '.env': cannot read the file"), done.stderr


@pytest.mark.parametrize("source", ["environment", ".env"])
@pytest.mark.parametrize(
    ("name", "proposed"),
    [
        ("MESH_STORAGE_POOLSIZE", "MESH_STORAGE_POOL_SIZE"),
        ("MESH_STORAGE_ULR", "MESH_STORAGE_URL"),
        ("mesh_storage_passwort", "MESH_STORAGE_PASSWORD"),
        ("MESH_STORAGE_XYZZY", None),
    ],
)
def test_a_misspelt_variable_is_named(name: str, proposed: str | None, source: str, monkeypatch: Any) -> None:
    if source == ".env":
        Path(".env").write_text(f"{name}={CANARY}\n")
    else:
        monkeypatch.setenv(name, CANARY)
    said = refused(url="memory:")
    assert name.upper() in said
    assert (proposed or "?") in said + ("" if proposed else "?")
    assert ("did you mean" in said) == (proposed is not None)


def test_variables_of_tests_and_of_others_are_none_of_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_STORAGE_TEST_URL", "postgresql://h/x")
    Path(".env").write_text("MESH_STORAGE_TEST_OTHER=1\nMESH=1\nmesh_storage_pool_size=3\n")
    assert Settings().pool_size == 3


def test_a_misspelt_argument_is_named_with_the_right_one() -> None:
    with pytest.raises(ConfigurationError, match=r"'pool_sise': no such setting; did you mean 'pool_size'\?"):
        Settings(pool_sise=1)


def test_without_a_url_the_first_database_is_made_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with tempfile.TemporaryDirectory() as home:
        monkeypatch.setenv("XDG_DATA_HOME", home)
        for opened in range(2):
            with MeshStorage.open():
                pass
            warned = [record for record in caplog.records if record.levelno == logging.WARNING]
            assert [home in record.getMessage() for record in warned] == [True], opened
        caplog.clear()
        with MeshStorage.open("embedded:"):
            pass
    assert "WARNING" not in [record.levelname for record in caplog.records]
    del tmp_path


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_the_fixtures_take_the_same_urls(scheme: str, server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_STORAGE_TEST_URL", url_to(server).replace("postgresql", scheme, 1))
    with databases() as made, made.fresh() as url, MeshStorage.open(url) as storage:
        assert storage.health().ok


@pytest.mark.parametrize("url", ["mysql://h/x", "memory:", "postgresql://h:port/x"])
def test_a_url_that_is_none_for_the_fixtures_is_named(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_STORAGE_TEST_URL", url)
    with pytest.raises(ConfigurationError, match="MESH_STORAGE_TEST_URL"), databases():
        pass


@pytest.mark.parametrize("line", ["MESH_STORAGE_URL: postgresql://localhost:1/x", 'MESH_STORAGE_PASSWORD="hunter2'])
def test_a_malformed_line_of_the_file_is_named_and_not_skipped(line: str) -> None:
    Path(".env").write_text(f"MESH_STORAGE_POOL_SIZE=3\n{line}\n")
    with pytest.raises(ConfigurationError, match=r"'\.env': line 2") as error:
        Settings()
    assert "hunter2" not in str(error.value)
