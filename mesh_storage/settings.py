"""Where the database is and how to reach it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from mesh_storage.errors import ConfigurationError, InvalidInputError

Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
SslMode = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]
SSL_MODES: tuple[SslMode, ...] = get_args(SslMode)

ENV_PREFIX = "MESH_STORAGE_"
_OF_TESTS = "TEST_"
"""How the names behind the prefix begin that are for `mesh_storage.testing`."""


class _Checked(BaseSettings):
    """Settings whose problems are told as one error that names them.

    Apart from `Settings`, which so has for type checkers the constructor that its fields make.
    """

    def __init__(self, **values: Any) -> None:
        problem = _unknown(values, set(type(self).model_fields))
        if problem is None:
            try:
                super().__init__(**values)
            except UnicodeError:
                problem = ".env: it is no UTF-8"
            except OSError as error:
                problem = f".env: it cannot be read: {error.strerror}; let this user read it, or start elsewhere"
            except ValidationError as error:
                problem = "; ".join(
                    f"{'.'.join(str(part) for part in detail['loc'][:1])}: {detail['msg']}"
                    for detail in error.errors(include_input=False, include_context=False, include_url=False)
                )
        if problem is not None:
            # Outside of the handler: the validation error carries the values, passwords among them.
            raise ConfigurationError(
                f"bad setting {problem} (in code by this name, in the environment as {ENV_PREFIX}...)"
            )


class Settings(_Checked):
    """The settings of a storage, from arguments, the environment (prefix `MESH_STORAGE_`) and a file `.env`.

    An argument goes before the environment, which goes before `.env`. What the URL says goes before the separate
    fields, which fill in what it leaves out. Without a URL and a host, the bundled PostgreSQL is used.

    Raises:
        ConfigurationError: A setting is unknown or has a bad value; the message names the setting, never its value.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_file=".env",
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        defer_build=True,
    )

    url: SecretStr | None = None
    """`postgresql://`, `postgres://` or `postgresql+psycopg://` (several hosts, libpq's parameters), `embedded:`,
    `embedded:PATH` or `memory:`."""
    host: str | None = None
    """Host name, address or socket directory; several with commas."""
    port: str | int | None = None
    """Port; several with commas, as many as hosts."""
    user: str | None = None
    password: SecretStr | None = None
    database: str | None = None
    sslmode: SslMode | None = None
    """How TLS is used and checked (PostgreSQL manual, 34.19); the default of libpq is `prefer`."""
    application_name: str = "mesh_storage"
    """How the connections show in `pg_stat_activity`."""
    pool_size: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Connections at most; as many units of work may be open at once."""
    pool_timeout: Seconds = 10.0
    """Seconds to wait for a free connection of the pool."""
    connect_timeout: Seconds = 5.0
    """Seconds to wait for a server to answer; libpq rounds up to whole seconds, at least 2."""
    statement_timeout: Seconds = 30.0
    """Seconds that one statement may take; 0 for no limit."""
    lock_timeout: Seconds = 10.0
    """Seconds that a statement may wait for a lock; 0 for no limit."""
    idle_in_transaction_timeout: Seconds = 60.0
    """Seconds that a transaction may wait for its caller before the server ends it and frees its locks; 0 for none."""
    transaction_pooling: bool = False
    """Whether a pooler between here and the server gives each transaction another session, as PgBouncer does in
    transaction mode; without effect on the bundled PostgreSQL, which has no pooler before it."""
    slow_unit_of_work: Seconds = 1.0
    """Seconds from which a unit of work is logged as slow; 0 to log none."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources in their order, once no variable in them is misspelt.

        Raises:
            ConfigurationError: A variable has our prefix and names no setting.
        """
        del settings_cls
        for source in (env_settings, dotenv_settings):
            if isinstance(source, EnvSettingsSource):
                _check_variables(source.env_vars, set(cls.model_fields))
        return init_settings, env_settings, dotenv_settings, file_secret_settings


def settings_of(url: str | None) -> Settings:
    """Return the settings of the environment, with a URL in the place of theirs where one is given.

    Raises:
        InvalidInputError: The URL is no str.
        ConfigurationError: A setting is wrong.
    """
    if url is None:
        return Settings()
    if not isinstance(url, str):
        raise InvalidInputError(f"url must be a str, not {type(url).__name__}", field="url")
    return Settings(url=SecretStr(url))


def _unknown(values: dict[str, Any], known: set[str]) -> str | None:
    unknown = sorted(name for name in values if name not in known and not name.startswith("_"))
    return _no_such(unknown, known) if unknown else None


def _check_variables(variables: Iterable[str], known: set[str]) -> None:
    ours = {name.upper().removeprefix(ENV_PREFIX) for name in variables if name.upper().startswith(ENV_PREFIX)}
    known = {name.upper() for name in known}
    unknown = sorted(name for name in ours - known if not name.startswith(_OF_TESTS))
    if unknown:
        raise ConfigurationError(f"bad setting {_no_such(unknown, known, ENV_PREFIX)}")


def _no_such(names: list[str], known: set[str], prefix: str = "") -> str:
    problems: list[str] = []
    for name in names:
        close = difflib.get_close_matches(name, known, n=1)
        proposal = f"; did you mean {prefix}{close[0]}?" if close else ""
        problems.append(f"{prefix}{name}: there is no such setting{proposal}")
    return "; ".join(problems)
