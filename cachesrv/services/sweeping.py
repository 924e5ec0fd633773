"""Carrying out a plan of what may go, a few paths at a time, those that refer to others before them.

Numbers grow as paths are published, and what a path refers to is mostly published before it: so the largest go first.
What is met too early is kept by what still refers to it, and comes again when that has gone.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from cachesrv.catalog.retention import Keeper
from cachesrv.services.marking import Bitmap

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cachesrv.catalog.base import Catalog
    from cachesrv.catalog.retention import Removal, Removed
    from cachesrv.services.marking import Plan
    from cachesrv.services.removing import Removing

TOGETHER = 250
"""Paths in one transaction."""


class Sweep:
    """Removes what is in the plan."""

    def __init__(self, catalog: Catalog, removing: Removing, removal: Removal, plan: Plan) -> None:
        self._catalog = catalog
        self._removing = removing
        self._removal = removal
        self._plan = plan
        self._postponed = Bitmap()
        self._due: list[int] = []

    async def run(self, tell: Callable[[Removed], None], *, pace: float) -> None:
        """Each step is told. After it there is a rest, `pace` times as long. Raises LockLost, StoreError."""
        for batch in self._batches():
            started = time.monotonic()
            summaries = await self._catalog.summaries(self._removal.cache, batch)
            # The NARs of those that go late in a long run stay for as long as those of the first.
            removal = replace(self._removal, at=int(time.time()))
            removed = await self._removing.paths(removal, {path.number: path.hash_part for path in summaries})
            self._postponed.add_new(number for number, why in removed.kept.items() if why is Keeper.REFERRER)
            self._take_up(removed.referred)
            tell(removed)
            await asyncio.sleep(pace * (time.monotonic() - started))

    def _batches(self) -> Iterator[list[int]]:
        for batch in self._plan.batches(TOGETHER):
            yield batch
            while self._due:
                due, self._due = self._due[:TOGETHER], self._due[TOGETHER:]
                yield due

    def _take_up(self, numbers: set[int]) -> None:
        """Those that had to wait for what has just gone."""
        due = [number for number in numbers if number in self._postponed]
        self._postponed.discard(due)
        self._due += due
