"""What a push was told is here stays until the push is done, or has had time enough."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from cachesrv.catalog.base import Catalog
    from cachesrv.services.caches import ServedCache

_STEPS = 16


class Leases:
    """Grants leases of `seconds`."""

    def __init__(self, catalog: Catalog, seconds: int) -> None:
        self._catalog = catalog
        self._seconds = seconds

    async def grant(self, cache: ServedCache, hash_parts: Collection[str], nar_hashes: Collection[str]) -> None:
        """Let those of these paths and NARs stay that are here. To be called before it is looked which of them are."""
        until = self._until()
        await self._catalog.lease(cache.name, hash_parts, until)
        await self._catalog.lease_nars(cache.prefix, nar_hashes, until)

    def _until(self) -> int:
        """In steps, so that pushes that follow each other do not write all of it again each time."""
        step = max(1, self._seconds // _STEPS)
        return -(-(int(time.time()) + self._seconds) // step) * step
