"""The repository of meshes: the networks that administrators define, and who may join them."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

from sqlalchemy import bindparam, func, select, update

from mesh_storage.aio.postgres.concurrency import in_thread
from mesh_storage.aio.postgres.connection import AsyncUnitOfWorkConnection
from mesh_storage.aio.repositories.infrastructure.base import AsyncInfrastructureRepository
from mesh_storage.errors import InvalidInputError, NotFoundError
from mesh_storage.models import Mesh
from mesh_storage.postgres.statement import Statement
from mesh_storage.repositories import checks
from mesh_storage.repositories.aggregates import Infrastructure


def _check_hash(value: object) -> str:
    """Reject a join key passed instead of its hash; the hash of another row, as in a copy, is accepted."""
    if not isinstance(value, str) or not _HASH.match(value):
        raise InvalidInputError(
            "Mesh.join_key_hash must not be set directly; call set_join_key()", field="Mesh.join_key_hash"
        )
    return value


_HASH = re.compile(r"scrypt(\$\d+){3}(\$[0-9a-f]+){2}\Z")
_MESHES = Infrastructure(Mesh, prefix="mesh")
_MESHES.checks["join_key_hash"] = checks.Check(_check_hash).optional()
_TABLE = _MESHES.table
_BY_NAME = Statement(lambda: select(_TABLE).where(_TABLE.c.mesh_name == bindparam("name")))
_ADMISSION = Statement(
    lambda: select(_TABLE.c.allow_join, _TABLE.c.mesh_join_key_hash).where(_TABLE.c.mesh_id == bindparam("id"))
)
_SET_JOIN_KEY_HASH = Statement(
    lambda: (
        update(_TABLE)
        .where(_TABLE.c.mesh_id == bindparam("id"))
        .values(mesh_join_key_hash=bindparam("hash"), updated=func.now())
    )
)

# scrypt's cost parameters for interactive use (RFC 7914, section 2): 16 MiB and about 40 ms. They are stored with each
# hash, so that they can be raised.
_COST, _BLOCK_SIZE, _PARALLELIZATION = 2**14, 8, 1


class AsyncMeshRepository(AsyncInfrastructureRepository[Mesh]):
    """The repository of meshes."""

    def __init__(self, connection: AsyncUnitOfWorkConnection) -> None:
        super().__init__(connection, _MESHES)

    async def get_by_name(self, name: str) -> Mesh:
        """Return the mesh with this name.

        Raises:
            NotFoundError: There is none.
        """
        return self._get(name, await self._fetch_one(_BY_NAME, name=checks.text("name", name, 255)))

    async def set_join_key(self, mesh_id: str, key: str | None) -> None:
        """Set the key that a node must present to join, or remove it with None; only a salted hash is stored.

        Raises:
            NotFoundError: The mesh does not exist.
        """
        hashed = None if key is None else await in_thread(_hash, checks.text("key", key), secrets.token_bytes(16))
        parameters = {"id": self._aggregate.check_key(mesh_id), "hash": hashed}
        if not await self._connection.execute(_SET_JOIN_KEY_HASH, parameters):
            raise NotFoundError(Mesh.__name__, mesh_id)

    async def admits(self, mesh_id: str, key: str | None = None) -> bool:
        """Return whether a node presenting this key may join: the mesh allows joining, and has this join key or none.

        Raises:
            NotFoundError: The mesh does not exist.
        """
        if key is not None:
            checks.text("key", key, empty=True)
        row = await self._connection.fetch_one(_ADMISSION, {"id": self._aggregate.check_key(mesh_id)})
        if row is None:
            raise NotFoundError(Mesh.__name__, mesh_id)
        allow_join, hashed = row
        if not allow_join or hashed is None:
            return bool(allow_join)
        return key is not None and await in_thread(_matches, key, hashed)


def _hash(
    key: str, salt: bytes, cost: int = _COST, block_size: int = _BLOCK_SIZE, lanes: int = _PARALLELIZATION
) -> str:
    digest = hashlib.scrypt(key.encode(), salt=salt, n=cost, r=block_size, p=lanes, maxmem=2**27)
    return f"scrypt${cost}${block_size}${lanes}${salt.hex()}${digest.hex()}"


def _matches(key: str, hashed: str) -> bool:
    _, cost, block_size, lanes, salt, _ = hashed.split("$")
    return hmac.compare_digest(hashed, _hash(key, bytes.fromhex(salt), int(cost), int(block_size), int(lanes)))
