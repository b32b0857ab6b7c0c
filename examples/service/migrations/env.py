"""The service's Alembic environment, beside that of mesh_storage; each has a version table of its own."""

from alembic import context
from service.alerts import Alert
from sqlalchemy import Connection

from mesh_storage import schema


def run(connection: Connection) -> None:
    """Run the migrations over a connection, which the service or the command line has opened."""
    context.configure(connection=connection, target_metadata=Alert.metadata, include_object=schema.include_object)
    with context.begin_transaction():
        context.run_migrations()


run(context.config.attributes["connection"])
