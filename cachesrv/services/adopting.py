"""Paths that lie in storage and that the catalog has lost: published as they are, each after what it refers to."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from cachesrv.catalog.base import PathRecord
from cachesrv.errors import CachesrvError, StoreInaccessible
from cachesrv.nix import narinfo
from cachesrv.services.flaws import Kind

if TYPE_CHECKING:
    from cachesrv.nix.narinfo import NarInfo
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.path_check import PathCheck, Stores
    from cachesrv.services.path_judge import PathJudge


class Adopting:
    """Publishes what lies in the storage of one cache."""

    def __init__(self, stores: Stores, cache: ServedCache, check: PathCheck, judge: PathJudge) -> None:
        self._storage = stores.storage
        self._catalog = stores.catalog
        self._index = stores.index
        self._cache = cache
        self._check = check
        self._judge = judge

    async def path(self, hash_part: str) -> bool:
        """Publish a path, and before it those that it needs and that lie there too; whether it is published then."""
        ahead = [hash_part]
        while ahead:
            flaws = (await self._check.found(ahead[-1:])).get(ahead[-1], [])
            kinds = {flaw.kind for flaw in flaws}
            if kinds - {Kind.UNPUBLISHED.label}:
                return False
            info = await self.described(ahead[-1]) if kinds else None
            missing = await self._check.missing(info) if info else set()
            if not missing.isdisjoint(ahead):
                return False
            if missing:
                ahead += sorted(missing)
                continue
            if info:
                await self._publish(info)
            ahead.pop()
        return bool(await self._catalog.present(self._cache.name, [hash_part]))

    async def described(self, hash_part: str) -> NarInfo | None:
        """What is said in storage of a path, if that can be served."""
        try:
            text = await self._storage.get(self._cache.narinfo_key(hash_part), limit=narinfo.DEFAULT_LIMIT)
        except StoreInaccessible:
            raise
        except CachesrvError:
            return None
        return self._judge.usable(hash_part, text)

    async def _publish(self, info: NarInfo) -> None:
        nar_key = self._cache.key(info.url)
        nar = await self._storage.head(nar_key)
        if nar is None:
            return
        record = PathRecord(
            cache=self._cache.name,
            hash_part=info.store_path.hash_part,
            name=info.store_path.name,
            narinfo=narinfo.render(info),
            nar_key=nar_key,
            nar_hash=info.nar_hash.nix32,
            nar_size=info.nar_size,
            file_size=nar.size,
            references=tuple(reference.base_name for reference in info.references),
            deriver=info.deriver.base_name if info.deriver else None,
            ca=info.ca.render() if info.ca else None,
            registered_at=int(time.time()),
        )
        await self._catalog.publish([record])
        await asyncio.to_thread(self._index.delete, [(self._cache.name, record.hash_part)])
