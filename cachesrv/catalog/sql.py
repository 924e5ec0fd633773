"""The catalog in SQL. The queries stand in the modules beside this one, by what they are about."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

from cachesrv.catalog import nars, paths, publishing, refused, tokens
from cachesrv.catalog.sql_retention import SqlRetention
from cachesrv.catalog.sqlite import open_database, open_glance

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping, Sequence

    from cachesrv.catalog.base import ConflictRecord, NarRecord, PathRecord, RefusalRecord, TokenRecord
    from cachesrv.catalog.database import Database
    from cachesrv.catalog.glance import Glance
    from cachesrv.catalog.retention import Reliance

DEFAULT_POOL_SIZE = 4


class SqlCatalog(SqlRetention):
    """Implements `cachesrv.catalog.base.Catalog`."""

    def __init__(self, database: Database, glance: Glance) -> None:
        self._database = database
        self._glance = glance

    @classmethod
    async def open(cls, url: str, *, pool_size: int = DEFAULT_POOL_SIZE) -> Self:
        """The catalog at `sqlite:///<path>`, made or migrated where needed; `pool_size` reads can run at once. Raises
        ConfigError for a URL that is none or a database that is not ours or of a newer version; StoreError.
        """
        database = await asyncio.to_thread(open_database, url, readers=pool_size)
        try:
            return cls(database, await asyncio.to_thread(open_glance, url))
        except BaseException:
            await database.close()
            raise

    async def publish(self, records: Sequence[PathRecord], reliance: Reliance | None = None) -> int:
        return await self._database.write(publishing.publish, records, reliance)

    async def restore(
        self, records: Sequence[PathRecord], *, used_at: int, objects: Collection[str] = ()
    ) -> dict[str, PathRecord]:
        return await self._database.write(publishing.restore, records, used_at, objects)

    async def path(self, cache: str, hash_part: str) -> PathRecord | None:
        return (await self.paths(cache, [hash_part])).get(hash_part)

    async def paths(self, cache: str, hash_parts: Collection[str]) -> dict[str, PathRecord]:
        return await self._database.read(paths.find, cache, hash_parts)

    async def present(self, cache: str, hash_parts: Collection[str]) -> set[str]:
        return await self._database.read(paths.present, cache, hash_parts)

    async def nar_hashes(self, cache: str, hash_parts: Collection[str]) -> dict[str, str]:
        return await self._database.read(paths.nar_hashes, cache, hash_parts)

    def lacks(self, cache: str, hash_part: str) -> bool:
        return self._glance.lacks(cache, hash_part)

    async def scan(self, cache: str, after: str = "") -> AsyncIterator[PathRecord]:
        while page := await self._database.read(paths.page, cache, after):
            for record in page:
                yield record
            after = page[-1].hash_part

    async def referrers(self, cache: str, hash_part: str) -> set[str]:
        return await self._database.read(paths.referrers, cache, hash_part)

    async def dangling(self, cache: str, limit: int) -> list[tuple[str, str]]:
        return await self._database.read(paths.dangling, cache, limit)

    async def remove(self, cache: str, hash_parts: Collection[str]) -> None:
        await self._database.write(publishing.remove, cache, hash_parts)

    async def remove_dangling(self, cache: str, hash_parts: Collection[str]) -> set[str]:
        return await self._database.write(publishing.remove_dangling, cache, hash_parts)

    async def count(self, cache: str) -> tuple[int, int]:
        return await self._database.read(paths.count, cache)

    async def touch(self, cache: str, last_used: Mapping[str, int]) -> None:
        await self._database.write(publishing.touch, cache, last_used)

    async def touch_nars(self, keys: Collection[str], at: int) -> None:
        await self._database.write(publishing.touch_nars, keys, at)

    async def put_nar(self, record: NarRecord, *, leased_until: int | None = None) -> int:
        return await self.put_nars([record], leased_until=leased_until)

    async def put_nars(self, records: Collection[NarRecord], *, leased_until: int | None = None) -> int:
        return await self._database.write(nars.put, records, leased_until)

    async def nar(self, key: str) -> NarRecord | None:
        return await self._database.read(nars.find, key)

    async def listings(self, keys: Collection[str]) -> dict[str, bytes]:
        return await self._database.read(nars.listings, keys)

    async def nars_by_hash(self, scope: str, nar_hashes: Collection[str]) -> dict[str, NarRecord]:
        return await self._database.read(nars.by_hash, scope, nar_hashes)

    async def nars_alike(self, scope: str, nar_hash: str) -> list[NarRecord]:
        return await self._database.read(nars.alike, scope, nar_hash)

    async def remove_nars(self, keys: Collection[str]) -> None:
        await self._database.write(nars.remove, keys)

    async def record_conflicts(self, records: Sequence[ConflictRecord]) -> None:
        if records:
            await self._database.write(refused.record_conflicts, records)

    async def conflicts(self, cache: str, hash_part: str | None = None) -> list[ConflictRecord]:
        return await self._database.read(refused.find_conflicts, cache, hash_part)

    async def record_refusals(self, records: Sequence[RefusalRecord]) -> None:
        await self._database.write(refused.record_refusals, records)

    async def refusal(self, cache: str, hash_part: str) -> RefusalRecord | None:
        return await self._database.read(refused.find_refusal, cache, hash_part)

    async def put_token(self, record: TokenRecord) -> None:
        await self._database.write(tokens.put, record)

    async def token(self, sha256: str) -> TokenRecord | None:
        return await self._database.read(tokens.find, sha256)

    async def tokens(self) -> list[TokenRecord]:
        return await self._database.read(tokens.find_all)

    async def revoke_token(self, name: str, at: int) -> bool:
        return await self._database.write(tokens.revoke, name, at)

    async def close(self) -> None:
        self._glance.close()
        await self._database.close()
