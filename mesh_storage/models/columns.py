"""The column types and constraints that several models use."""

from datetime import datetime
from typing import Annotated

from sqlalchemy import CheckConstraint, DateTime, LargeBinary, String, Text, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import mapped_column

from mesh_storage.models.base import JSON

_NOW = text("CURRENT_TIMESTAMP")

CreatedAt = Annotated[datetime | None, mapped_column(DateTime(timezone=True), server_default=_NOW)]
"""When the row was first stored, by the database's clock; None until then."""
UpdatedAt = Annotated[datetime | None, mapped_column(DateTime(timezone=True), server_default=_NOW, onupdate=func.now())]
"""When the row was last stored, by the database's clock; None until then."""
ULID = {"ulid": True}
"""Marks a column of prefixed ULIDs."""
NOT_EMPTY = {"not_empty": True}
"""Marks a column whose texts must have at least one character; its table has the check `not_empty`."""
NOT_REFLECTED = {"not_reflected": True}
"""Marks an index whose collation SQLAlchemy does not read back, so that `alembic check` cannot compare it."""

Key = Annotated[str, mapped_column(String(255), primary_key=True, info=NOT_EMPTY)]
Id64 = Annotated[str, mapped_column(String(64), primary_key=True, info=NOT_EMPTY)]
NodeName = Annotated[str, mapped_column(String(64), info=NOT_EMPTY)]
Content = Annotated[bytes, mapped_column(LargeBinary)]
JsonValue = Annotated[JSON, mapped_column(JSONB, nullable=False)]
PENDING = "STATUS_PENDING"
Status = Annotated[str | None, mapped_column(String(255), server_default=PENDING)]
"""Its state: `STATUS_`, then capitals and underscores, as in `STATUS_CONNECTED`."""
ULIDKey = Annotated[str, mapped_column(Text, primary_key=True, info=ULID)]


def ulid(column: str) -> CheckConstraint:
    """Make the check that a column holds a prefixed ULID, by the rule of the earlier Go service's domain."""
    return CheckConstraint(f"{column} ~ '^[a-z]{{2,10}}_[0-9A-HJKMNP-TV-Z]{{26}}$'", name=column)


def status() -> CheckConstraint:
    """Make the check that a status is written the way the mesh services write theirs."""
    return CheckConstraint("status ~ '^STATUS_[A-Z_]+$'", name="status")


def not_empty(column: str) -> CheckConstraint:
    """Make the check that a column holds a text of at least one character."""
    return CheckConstraint(f"{column} <> ''", name=column)
