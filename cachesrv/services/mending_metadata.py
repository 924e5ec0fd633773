"""Realisations that are no good, taken out of sight: who builds their outputs pushes better ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachesrv.nix import realisation

if TYPE_CHECKING:
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.keeping_removed import KeepingRemoved
    from cachesrv.services.metadata_check import MetadataCheck
    from cachesrv.services.removing import Removing


class MendingMetadata:
    """Of one cache. Only for who holds the lock of `cachesrv.services.maintenance`, as `holder`."""

    def __init__(
        self, cache: ServedCache, check: MetadataCheck, removing: Removing, keeping: KeepingRemoved, *, holder: str
    ) -> None:
        self._cache = cache
        self._check = check
        self._removing = removing
        self._keeping = keeping
        self._holder = holder

    async def take_away(self, key: str) -> str | None:
        """Remove an object if something is wrong with it still: how to get it back, None when it is well by now."""

        async def is_wrong() -> bool:
            return bool(await self._check.flaws([key]))

        if not await is_wrong():
            return None
        back = await self._keeping.object(self._cache, key, limit=realisation.DEFAULT_LIMIT)
        return back if await self._removing.metadata(key, is_wrong, holder=self._holder) else None
