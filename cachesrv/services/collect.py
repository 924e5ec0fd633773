"""Garbage collection: paths that nothing keeps go out of sight at once, their NARs some time after that.

It can be interrupted anywhere. It keeps no state of its own: what was not done yet is decided anew next time.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from cachesrv.catalog.retention import Removal
from cachesrv.services import amounts
from cachesrv.services.completeness import Completeness
from cachesrv.services.marking import Marking, Policy
from cachesrv.services.removal_report import Report
from cachesrv.services.removing import Removing, objects_of, siblings_of
from cachesrv.services.sweeping import TOGETHER, Sweep

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping

    from cachesrv.catalog.base import Catalog
    from cachesrv.catalog.retention import PathSummary, UnusedNar
    from cachesrv.index.base import Index
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.marking import Plan
    from cachesrv.services.removal_report import Listener
    from cachesrv.storage.base import ObjectStore


COLLECTED = "collected"
"""The note in the catalog of when a collection in all caches came to its end last."""


_AFTER_ALL_LEASES = 2**62
"""Seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class Terms:
    """How long things are kept, in seconds. `nar_grace`: NARs stay so long after their last path; `history`: what has
    gone is remembered so long.
    """

    nar_grace: int
    history: int


class Collect:
    """Collects in those of the `caches` that are called one of `only`, in all if that is empty. `policies` by cache;
    those without one keep all their paths.
    """

    def __init__(
        self,
        storage: ObjectStore,
        catalog: Catalog,
        index: Index,
        *,
        caches: Mapping[str, ServedCache],
        policies: Mapping[str, Policy],
        terms: Terms,
        only: Collection[str] = (),
    ) -> None:
        self._catalog = catalog
        self._storage = storage
        self._removing = Removing(storage, catalog, index)
        self._caches = caches
        self._chosen = [cache for name, cache in caches.items() if not only or name in only]
        self._foreign = {cache.prefix for cache in caches.values() if cache.bucket_is_authority}
        self._policies = policies
        self._terms = terms

    async def run(self, holder: str, listener: Listener, *, by: str, pace: float = 1.0) -> Report:
        """Collect; `holder` has the lock of `cachesrv.services.maintenance`, `by` is remembered. After each step there
        is a rest, `pace` times as long, so that others get their turn. Raises LockLost, StoreError; StoreUnavailable
        where a catalog does not know who else may need what it knows.
        """
        report = Report()
        await Completeness(self._storage, self._catalog).demand(self._caches.values())
        await self._removing.finish(self._caches)
        async for cache, plan in self._plans():
            reason = partial(_reason, self._policies[cache.name], plan)
            removal = Removal(
                cache=cache.name,
                objects=partial(objects_of, cache),
                holder=holder,
                reason=reason,
                by=by,
                at=int(time.time()),
                siblings=siblings_of(cache, self._caches),
                used_before=plan.used_before,
            )
            tell = partial(report.removed, listener, cache.name, reason=reason)
            await Sweep(self._catalog, self._removing, removal, plan).run(tell, pace=pace)
            report.path_bytes += plan.size
        await self._collect_nars(holder, listener, report, pace)
        await self._count_leased(report)
        await self._catalog.forget_removals(int(time.time()) - self._terms.history)
        if len(self._chosen) == len(self._caches):
            await self._catalog.note(COLLECTED, str(int(time.time())))
        return report

    async def rehearse(self, listener: Listener) -> Report:
        """What would go now."""
        report = Report()
        async for cache, plan in self._plans():
            for numbers in plan.batches(TOGETHER):
                for path in reversed(await self._catalog.summaries(cache.name, numbers)):
                    listener.path(cache.name, path, _reason(self._policies[cache.name], plan, path))
            report.paths += plan.count
            report.path_bytes += plan.size
        async for nars in self._unused():
            report.deleted(listener, nars)
        await self._count_leased(report, going=report.nars, going_bytes=report.nar_bytes)
        return report

    async def _plans(self) -> AsyncIterator[tuple[ServedCache, Plan]]:
        for cache in self._chosen:
            policy = self._policies.get(cache.name)
            # What others write to a bucket, and what that needs, is not known here.
            if policy and cache.prefix not in self._foreign:
                yield cache, await Marking(self._catalog, cache.name).plan(policy, int(time.time()))

    async def _collect_nars(self, holder: str, listener: Listener, report: Report, pace: float) -> None:
        async for nars in self._unused():
            started = time.monotonic()
            by_key = {nar.key: nar for nar in nars}
            gone = await self._removing.nars(by_key, holder=holder, before=self._unused_before, now=int(time.time()))
            report.deleted(listener, (by_key[key] for key in gone))
            await asyncio.sleep(pace * (time.monotonic() - started))

    async def _count_leased(self, report: Report, *, going: int = 0, going_bytes: int = 0) -> None:
        """What a push may rely on of what no path needs: all that stays of it, if there is no grace."""
        if self._terms.nar_grace:
            return
        async for nars in self._unused(at=_AFTER_ALL_LEASES):
            report.leased += len(nars)
            report.leased_bytes += sum(nar.file_size for nar in nars)
        report.leased -= going
        report.leased_bytes -= going_bytes

    async def _unused(self, *, at: int | None = None) -> AsyncIterator[list[UnusedNar]]:
        """What no path needs and no lease protects now, or at another time."""
        for prefix in sorted({cache.prefix for cache in self._chosen} - self._foreign):
            after, now = "", int(time.time()) if at is None else at
            while nars := await self._catalog.unused_nars(prefix, self._unused_before, now, after):
                yield nars
                after = nars[-1].key

    @property
    def _unused_before(self) -> int:
        # Times are whole seconds: one is added to keep for long enough, but for what is kept for no time at all.
        return int(time.time()) - (self._terms.nar_grace or -1)


def _reason(policy: Policy, plan: Plan, path: PathSummary) -> str:
    used = f"last used {amounts.date(path.used_at)}"
    if policy.max_size is not None and path.used_at >= plan.oldest:
        return f"no room within retention_size = {amounts.size(policy.max_size)}, {used}"
    return f"not used for more than retention_age = {amounts.time(policy.max_age or 0)}, {used}"
