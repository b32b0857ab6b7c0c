"""The role of a service, by which the tests of the contract run on the sync side.

With `MESH_STORAGE_TEST_AS_SERVICE=1`, all that open their storage by a fixture do.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psycopg
import sqlalchemy

from mesh_storage import schema

if TYPE_CHECKING:  # a plugin of pytest, whose assertions are rewritten
    from mesh_storage.testing import Databases

AS_SERVICE = bool(os.environ.get("MESH_STORAGE_TEST_AS_SERVICE"))
NAME = f"mesh_storage_test_service_{os.getpid()}"
PASSWORD = "hush"  # noqa: S105 - of a role that lives for a test run


class Service:
    """A role, and the databases that it may use."""

    def __init__(self) -> None:
        self._grants: list[bytes] = []

    def url(self, url: str) -> str:
        """Return the URL of a database for the service, after granting what it needs, and nothing else."""
        if not self._grants:  # The same for every database, which all may connect to.
            statements = schema.grants(url, service=NAME)
            self._grants = [each.encode() for each in statements if "ON DATABASE" not in each]
        with psycopg.connect(url, autocommit=True) as admin:
            for grant in self._grants:  # Citus takes no more than one in a string.
                admin.execute(grant)
        return sqlalchemy.make_url(url).set(username=NAME, password=PASSWORD).render_as_string(hide_password=False)


@contextmanager
def service_role(databases: Databases) -> Generator[Service]:
    """Create the role for a block."""
    with databases.fresh(with_schema=False) as url, psycopg.connect(url, autocommit=True) as admin:
        admin.execute(f"CREATE ROLE {NAME} LOGIN PASSWORD '{PASSWORD}'".encode())
        try:
            yield Service()
        finally:
            admin.execute(f"DROP ROLE {NAME}".encode())
