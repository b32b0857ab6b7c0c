"""Settings: where the database is and how to connect to it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from dotenv.parser import parse_stream
from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from mesh_storage.errors import ConfigurationError, InvalidInputError

Seconds = Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
"""A time limit, in seconds: from 0 to a day."""
SslMode = Literal["disable", "allow", "prefer", "require", "verify-ca", "verify-full"]
"""The values of libpq's `sslmode`."""
SSL_MODES: tuple[SslMode, ...] = get_args(SslMode)

ENV_PREFIX = "MESH_STORAGE_"
_TEST_PREFIX = "TEST_"
"""Prefix, after `MESH_STORAGE_`, of the variables that configure `mesh_storage.testing`."""


class _Checked(BaseSettings):
    """Settings whose validation errors are raised as one `ConfigurationError` that names them.

    A base class, so that type checkers see in `Settings` the constructor generated from its fields.
    """

    def __init__(self, **values: Any) -> None:
        problem = _unknown(values, set(type(self).model_fields))
        if problem is None:
            try:
                super().__init__(**values)
            except UnicodeError:
                problem = "'.env': it is not valid UTF-8"
            except OSError as error:
                problem = f"'.env': cannot read the file: {error.strerror}; fix its permissions, or change directory"
            except ValidationError as error:
                problem = "; ".join(
                    f"'{'.'.join(str(part) for part in detail['loc'][:1])}': {detail['msg']}"
                    for detail in error.errors(include_input=False, include_context=False, include_url=False)
                )
        if problem is not None:
            # Raise outside the handler: the validation error contains the values, passwords included.
            raise ConfigurationError(f"invalid setting {problem} (environment variables have the prefix {ENV_PREFIX})")


class Settings(_Checked):
    """The settings of a storage: from arguments, the environment (prefix `MESH_STORAGE_`) and a `.env` file.

    Arguments take precedence over the environment, which takes precedence over `.env`. The URL takes precedence over
    the separate fields, which fill in what it omits. Without a URL and a host, the bundled PostgreSQL is used.

    Raises:
        ConfigurationError: A setting is unknown or invalid; the message names the setting, never its value.
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
    """`postgresql://`, `postgres://` or `postgresql+psycopg://` (with multiple hosts and libpq parameters),
    `embedded:`, `embedded:PATH` or `memory:`."""
    host: str | None = None
    """Host name, address or socket directory; a comma-separated list for multiple hosts."""
    port: str | int | None = None
    """Port number; a comma-separated list of one port per host."""
    user: str | None = None
    """The role to log in as."""
    password: SecretStr | None = None
    """The password of that role; it shows in no log, error or representation."""
    database: str | None = None
    """The database to connect to."""
    sslmode: SslMode | None = None
    """TLS mode (PostgreSQL manual, 34.19); libpq's default is `prefer`."""
    application_name: str = "mesh_storage"
    """The name of the connections in `pg_stat_activity`."""
    pool_size: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Maximum number of connections, and so of concurrent units of work."""
    pool_timeout: Seconds = 10.0
    """Seconds to wait for a pooled connection."""
    connect_timeout: Seconds = 5.0
    """Seconds to wait for a connection to a server; libpq rounds up to whole seconds, at least 2."""
    statement_timeout: Seconds = 30.0
    """Maximum duration of a statement in seconds; 0 for no limit."""
    lock_timeout: Seconds = 10.0
    """Seconds a statement waits for a lock; 0 for no limit."""
    idle_in_transaction_timeout: Seconds = 60.0
    """Seconds a session may be idle in a transaction before the server terminates it and releases its locks; 0 for no
    limit."""
    transaction_pooling: bool = False
    """Whether a pooler assigns a session per transaction, as PgBouncer does in transaction mode; ignored with the
    bundled PostgreSQL, which has no pooler."""
    replica_url: SecretStr | None = None
    """`postgresql://` with the hosts of the replicas, for `begin(replica=True)`; what it leaves out is as in `url`,
    but for the ports."""
    replica_pool_size: Annotated[int, Field(ge=1, le=10_000)] = 10
    """Maximum number of connections to each replica."""
    replica_timeout: Annotated[Seconds, Field(gt=0)] = 1.0
    """Seconds to wait for a replica that is good enough, before the primary answers."""
    slow_unit_of_work: Seconds = 1.0
    """Threshold in seconds for logging slow units of work; 0 to disable."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return the sources in order of precedence, after checking the names of the variables.

        Raises:
            ConfigurationError: A variable has our prefix but names no setting, or a line of `.env` is malformed.
        """
        del settings_cls
        if isinstance(dotenv_settings, DotEnvSettingsSource):
            _check_lines(dotenv_settings.env_file)
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
    return _describe_unknown(unknown, known) if unknown else None


def _check_lines(env_file: Path | str | Sequence[Path | str] | None) -> None:
    """Reject a malformed line with our prefix, which python-dotenv would skip: another database might be used."""
    files = [env_file] if isinstance(env_file, (str, Path)) else env_file or ()
    for file in map(Path, files):
        if file.is_file():
            with file.open(encoding="utf-8") as stream:
                for binding in parse_stream(stream):
                    if binding.error and ENV_PREFIX in binding.original.string.upper():
                        raise ConfigurationError(
                            f"invalid setting '{file.name}': line {binding.original.line} is not NAME=VALUE"
                        )


def _check_variables(variables: Iterable[str], known: set[str]) -> None:
    ours = {name.upper().removeprefix(ENV_PREFIX) for name in variables if name.upper().startswith(ENV_PREFIX)}
    known = {name.upper() for name in known}
    unknown = sorted(name for name in ours - known if not name.startswith(_TEST_PREFIX))
    if unknown:
        raise ConfigurationError(f"invalid setting {_describe_unknown(unknown, known, ENV_PREFIX)}")


def _describe_unknown(names: list[str], known: set[str], prefix: str = "") -> str:
    problems: list[str] = []
    for name in names:
        close = difflib.get_close_matches(name, known, n=1)
        proposal = f"; did you mean '{prefix}{close[0]}'?" if close else ""
        problems.append(f"'{prefix}{name}': no such setting{proposal}")
    return "; ".join(problems)
