"""Settings: where they come from, what is refused by name, and that a password never shows."""

from __future__ import annotations

import io
import logging
import traceback
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from mesh_storage import ConfigurationError, MeshStorage, MeshStorageError, Settings, UnavailableError
from mesh_storage.engine import connect_arguments

CANARY = "c4n4ry-s3cr3t"


def url_of(settings: Settings) -> dict[str, Any]:
    return connect_arguments(settings)


def test_an_argument_goes_before_the_environment_and_that_before_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("MESH_STORAGE_POOL_SIZE=3\nMESH_STORAGE_HOST=of-file\nMESH_STORAGE_USER=of-file\nOTHER=1\n")
    monkeypatch.setenv("MESH_STORAGE_POOL_SIZE", "4")
    monkeypatch.setenv("MESH_STORAGE_HOST", "of-environment")
    settings = Settings(pool_size=5)
    assert (settings.pool_size, settings.host, settings.user) == (5, "of-environment", "of-file")


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
    ],
)
def test_a_bad_setting_is_named_and_its_value_is_not_shown(name: str, value: object, monkeypatch: Any) -> None:
    with pytest.raises(ConfigurationError, match=name):
        Settings(**{name: value})
    monkeypatch.setenv(f"MESH_STORAGE_{name.upper()}", str(value))
    with pytest.raises(ConfigurationError, match=name):
        MeshStorage.open()


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
    "beside a bad setting": {"url": f"postgresql://me:{CANARY}@h/mesh", "pool_size": 0},
    "as an unknown setting's value": {"secret": CANARY},
    "sslpassword": {"url": f"postgresql://127.0.0.1:1/mesh?sslpassword={CANARY}"},
}


def everything_said(error: BaseException) -> str:
    """Give all that a log or a debugger would show of an error and of all that led to it."""
    seen: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        each = todo.pop()
        if each is not None and each not in seen:
            seen.append(each)
            todo += [each.__cause__, each.__context__]
    said = [f"{each!r} {each} {each.args!r} {vars(each)!r}" for each in seen]
    return "\n".join([*said, *traceback.format_exception(error)])


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
