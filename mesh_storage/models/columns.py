"""Column types and constraints shared by several models."""

from datetime import datetime
from typing import Annotated

from sqlalchemy import BigInteger, CheckConstraint, DateTime, FetchedValue, LargeBinary, String, Text, func, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import mapped_column

from mesh_storage.models.base import JSON

_NOW = text("CURRENT_TIMESTAMP")

CreatedAt = Annotated[datetime | None, mapped_column(DateTime(timezone=True), server_default=_NOW)]
"""When the row was inserted, by the database's clock; None before that."""
UpdatedAt = Annotated[datetime | None, mapped_column(DateTime(timezone=True), server_default=_NOW, onupdate=func.now())]
"""When the row was last updated, by the database's clock; None before it is stored."""
Version = Annotated[
    int | None,
    mapped_column(BigInteger, nullable=False, server_default=text("1"), server_onupdate=FetchedValue()),
]
"""Given by the database at every write of the row, whoever writes; for one key it only grows, and is never used again.
None before the row is stored."""
ExpiresAt = Annotated[datetime | None, mapped_column(DateTime(timezone=True))]
"""When the entry expires, by the database's clock; None if never."""
ULID = {"ulid": True}
"""Marks a column of prefixed ULIDs."""
NOT_EMPTY = {"not_empty": True}
"""Marks a column of non-empty strings; its table has the check constraint `not_empty`."""
NOT_REFLECTED = {"not_reflected": True}
"""Marks an index whose collation SQLAlchemy does not reflect, so that `alembic check` cannot compare it."""

Key = Annotated[str, mapped_column(String(255), primary_key=True, info=NOT_EMPTY)]
Id64 = Annotated[str, mapped_column(String(64), primary_key=True, info=NOT_EMPTY)]
NodeName = Annotated[str, mapped_column(String(64), info=NOT_EMPTY)]
Content = Annotated[bytes, mapped_column(LargeBinary)]
JsonValue = Annotated[JSON, mapped_column(JSONB, nullable=False)]
PENDING = "STATUS_PENDING"
Status = Annotated[str | None, mapped_column(String(255), server_default=PENDING)]
"""Status of the object: `STATUS_` followed by capital letters and underscores, such as `STATUS_CONNECTED`."""
ULIDKey = Annotated[str, mapped_column(Text, primary_key=True, info=ULID)]


def ulid(column: str) -> CheckConstraint:
    """Return a check constraint for prefixed ULIDs, equivalent to the earlier Go service's domain `ulid`."""
    return CheckConstraint(f"{column} ~ '^[a-z]{{2,10}}_[0-9A-HJKMNP-TV-Z]{{26}}$'", name=column)


def status() -> CheckConstraint:
    """Return a check constraint for the format of status values, as in the mesh services."""
    return CheckConstraint("status ~ '^STATUS_[A-Z_]+$'", name="status")


def not_empty(column: str) -> CheckConstraint:
    """Return a check constraint for non-empty strings."""
    return CheckConstraint(f"{column} <> ''", name=column)
