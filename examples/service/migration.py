"""Migrates the service's own tables; the library's tables are migrated by `mesh-storage upgrade`."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, text

from mesh_storage.aio import AsyncMeshStorage

_LOCK = 0x6D65_7368  # of this service: its processes may start at the same time


def config(connection: Connection) -> Config:
    """Return Alembic's configuration for a connection."""
    made = Config(attributes={"connection": connection})
    made.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return made


async def upgrade(storage: AsyncMeshStorage) -> None:
    """Bring the service's own tables up to date, in one transaction."""

    def run(connection: Connection) -> None:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        command.upgrade(config(connection), "head")

    async with storage.begin() as uow:
        connection = await uow.session.connection()
        await connection.run_sync(run)
