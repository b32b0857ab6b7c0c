"""The base class of the two repositories whose entries may expire: compare-and-set by version, and expiry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta

from mesh_storage.aio.repositories.runtime.prefix import AsyncPrefixRepository
from mesh_storage.errors import ConflictError
from mesh_storage.repositories import checks
from mesh_storage.repositories.expiring import check_ttl
from mesh_storage.repositories.loading import M
from mesh_storage.repositories.prefixes import key_range


class AsyncExpiringRepository(AsyncPrefixRepository[M]):
    """A kind of entry that may expire; what has expired is not there for any method."""

    async def get_many(self, keys: Iterable[str]) -> dict[str, M]:
        """Return the entries of these keys by key, in the order given, without those that are not there."""
        wanted = self._aggregate.check_key.column(checks.many("keys", keys))
        found = await self._fetch_all(self._expiring.select_many, key=list(dict.fromkeys(wanted)))
        by_key = {vars(entry)[self._aggregate.key_name]: entry for entry in found}
        return {key: by_key[key] for key in wanted if key in by_key}

    async def delete(self, key: str, *, if_version: int | None = None) -> None:
        """Delete the entry with this key, if given only in this version.

        Raises:
            NotFoundError: There is none, and no version was given.
            ConflictError: The entry has another version, or there is none; see `actual`.
        """
        if if_version is None:
            await super().delete(key)
            return
        checks.integer("if_version", if_version, 1)
        parameters = {"key": self._aggregate.check_key(key), "expected_version": if_version}
        if not await self._connection.execute(self._expiring.delete_expected, parameters):
            raise await self._conflict(key, if_version)

    async def delete_prefix(self, prefix: str) -> int:
        """Delete all entries whose key starts with `prefix`, in one statement, and return their number."""
        return await self._connection.execute(self._expiring.delete_range, key_range(prefix))

    async def touch(self, key: str, *, if_version: int, ttl: timedelta | None) -> M:
        """Let the entry of this version expire after `ttl` from now, or never if None; it keeps its version.

        Raises:
            ConflictError: The entry has another version, or there is none; see `actual`.
        """
        checks.integer("if_version", if_version, 1)
        touched = await self._fetch_one(
            self._expiring.touch,
            key=self._aggregate.check_key(key),
            expected_version=if_version,
            ttl=check_ttl(ttl),
        )
        if touched is None:
            raise await self._conflict(key, if_version)
        return touched

    async def _put_if(self, key: str, value: object, if_version: int | None, ttl: timedelta | None) -> M:
        """Store a value, if given only in place of this version, and let it expire."""
        if if_version is None and ttl is None:
            return await self._put(key, value)
        check_ttl(ttl)
        if if_version is None:
            made = await self._put_by(self._expiring.put_expiring, key, value, ttl=ttl)
        elif checks.integer("if_version", if_version, 0) == 0:
            made = await self._put_by(self._expiring.put_new, key, value, ttl=ttl)
        else:
            made = await self._put_by(self._expiring.put_expected, key, value, ttl=ttl, expected_version=if_version)
        if made is None:
            assert if_version is not None, "without a condition, an upsert returns its row"
            raise await self._conflict(key, if_version)
        return made

    async def _put_many_until(self, entries: Mapping[str, object], ttl: timedelta | None) -> list[M]:
        if ttl is None:
            return await self._put_many(entries)
        return await self._put_many_by(self._expiring.put_many_expiring, entries, ttl=check_ttl(ttl))

    async def _conflict(self, key: str, expected: int) -> ConflictError:
        """Return the error for an entry that has not the expected version."""
        row = await self._connection.fetch_one(self._expiring.version, {"key": key})
        actual = 0 if row is None else row[0]
        there = "there is no such entry" if row is None else f"it has version {actual}"
        wanted = f"version {expected} of {self._aggregate.name} {key!r} was expected"
        if not expected:
            wanted = f"no {self._aggregate.name} {key!r} was expected"
        return ConflictError(f"{wanted}, but {there}", actual=actual)
