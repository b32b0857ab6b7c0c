"""The service's Alembic environment, beside that of mesh_storage; each has a version table of its own."""

from alembic import context
from service import alerts, arrivals  # noqa: F401 - imported for their tables
from sqlalchemy import Connection

from mesh_storage import schema
from mesh_storage.models import Base


def run(connection: Connection) -> None:
    """Run the migrations over a connection, which the service or the command line has opened."""
    context.configure(connection=connection, target_metadata=Base.metadata, include_object=schema.include_object)
    with context.begin_transaction():
        context.run_migrations()


run(context.config.attributes["connection"])
