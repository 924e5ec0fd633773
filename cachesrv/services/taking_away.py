"""Paths that are broken, taken out of sight with all that need them, those that refer to others before them."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from cachesrv.catalog.retention import Removal
from cachesrv.services.marking import Bitmap, Plan
from cachesrv.services.referrers import Referrers
from cachesrv.services.removing import objects_of, siblings_of
from cachesrv.services.sweeping import Sweep

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cachesrv.catalog.base import Catalog
    from cachesrv.catalog.retention import PathSummary, Removed
    from cachesrv.services.caches import ServedCache
from cachesrv.services.removing import Removing

_ALWAYS = 50
"""Paths that may go, however few there are."""
_SHARE = 10
"""Of so many paths, one may go."""


class TakingAway:
    """Takes paths away, in the name of `by`; `holder` has the lock of `cachesrv.services.maintenance`. Unless it is
    `forced`, it stops before it has taken more than a tenth of a cache: then something else is wrong.
    """

    def __init__(
        self,
        catalog: Catalog,
        removing: Removing,
        caches: Mapping[str, ServedCache],
        *,
        holder: str,
        by: str,
        forced: bool,
    ) -> None:
        self._catalog = catalog
        self._removing = removing
        self._caches = caches
        self._holder = holder
        self._by = by
        self._forced = forced
        self._left: dict[str, int] = {}

    async def path(self, cache: ServedCache, hash_part: str, reason: str) -> list[PathSummary] | None:
        """Take away a path and those that need it, for this reason; those that have gone, None when that would be too
        many.
        """
        number = (await self._catalog.numbers(cache.name, [hash_part])).get(hash_part)
        if number is None:
            return []
        going = (await Referrers.of(self._catalog, [number])).numbers
        room = await self._room(cache)
        if len(going) > room:
            return None
        (broken,) = await self._catalog.summaries(cache.name, [number])
        gone: list[PathSummary] = []

        def because(path: PathSummary) -> str:
            return reason if path.number == number else f"it needs {broken.base_name}: {reason}"

        def tell(removed: Removed) -> None:
            gone.extend(removed.gone)

        removal = Removal(
            cache=cache.name,
            objects=partial(objects_of, cache),
            holder=self._holder,
            reason=because,
            by=self._by,
            at=int(time.time()),
            siblings=siblings_of(cache, self._caches),
            despite_leases=True,
            despite_pins=True,
        )
        plan = Plan(going, Bitmap(), size=0, used_before=0, oldest=0)
        await Sweep(self._catalog, self._removing, removal, plan).run(tell, pace=0)
        self._left[cache.name] = room - len(gone)
        return gone

    async def _room(self, cache: ServedCache) -> int:
        """How many of its paths may still go."""
        if cache.name not in self._left:
            count, _ = await self._catalog.count(cache.name)
            self._left[cache.name] = count if self._forced else max(_ALWAYS, count // _SHARE)
        return self._left[cache.name]
