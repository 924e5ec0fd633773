"""Deleting paths because somebody says so: what goes with them, what speaks against it, and then in the order of all
removals: those that refer to others before them, out of sight first, their NARs last.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import TYPE_CHECKING

from cachesrv.catalog.retention import Removal, UnusedNar
from cachesrv.errors import BadInput, NotFound, Refused
from cachesrv.nix.store_path import HASH_PART_LENGTH
from cachesrv.services import amounts
from cachesrv.services.completeness import Completeness
from cachesrv.services.marking import Bitmap, Plan
from cachesrv.services.referrers import Referrers
from cachesrv.services.removal_report import Report
from cachesrv.services.removing import Removing, objects_of, siblings_of
from cachesrv.services.sweeping import TOGETHER, Sweep

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping

    from cachesrv.catalog.base import Catalog
    from cachesrv.catalog.retention import PathSummary, Removed
    from cachesrv.index.base import Index
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.removal_report import Listener
    from cachesrv.storage.base import ObjectStore

_SUMMED = 10_000
_NAMED = 5
"""Paths that are named in a refusal, at most."""
_FOR_EVER = 2**62
"""Seconds since the epoch. By then no lease protects a NAR."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be deleted: paths by their hash parts; those of which the name, or the base name, matches one of the
    `patterns` (globs); or `everything` that the cache holds. `with_referrers`: and what needs it, however indirectly.
    """

    hash_parts: Collection[str] = ()
    patterns: Collection[str] = ()
    everything: bool = False
    with_referrers: bool = False


@dataclass(frozen=True, slots=True)
class Chosen:
    """What will go, by `numbers` in ascending order, each with a mark of the path that it stood for: others may delete
    that meanwhile, and the number come to stand for what somebody publishes then. `wished` says of a number whether it
    was wished for, and does not only come with something else.
    """

    plan: Plan
    numbers: array[int]
    marks: array[int]
    wished: Callable[[int], bool]

    @property
    def count(self) -> int:
        """How many paths."""
        return self.plan.count


class Delete:
    """Deletes in one of the `caches`."""

    def __init__(
        self,
        storage: ObjectStore,
        catalog: Catalog,
        index: Index,
        *,
        cache: ServedCache,
        caches: Mapping[str, ServedCache],
    ) -> None:
        self._catalog = catalog
        self._completeness = Completeness(storage, catalog)
        self._removing = Removing(storage, catalog, index)
        self._cache = cache
        self._caches = caches

    async def choose(self, wish: Wish) -> Chosen:
        """What it takes to fulfil a wish. Raises BadInput, NotFound, Refused when something needs these paths or they
        are pinned, and StoreUnavailable when the catalog does not know what may need them.
        """
        same_objects = [cache for cache in self._caches.values() if cache.prefix == self._cache.prefix]
        if any(cache.bucket_is_authority for cache in same_objects):
            raise BadInput(f"others write to the bucket of {self._cache.name}: delete it where it is written")
        await self._completeness.demand(same_objects)
        wished = await self._wished(wish)
        referrers = await Referrers.of(self._catalog, wished)
        if referrers.count and not wish.with_referrers:
            raise Refused(
                f"needed by {await self._some(referrers.direct)} ({amounts.count(referrers.count, 'path')} in all):"
                " --with-referrers deletes these as well"
            )
        await self._demand_unpinned(referrers)
        asked_for = Bitmap()
        asked_for.add_new(wished)
        numbers = referrers.numbers
        plan = Plan(numbers, Bitmap(), size=await self._size_of_nars(referrers), used_before=0, oldest=0)
        return Chosen(plan, numbers, await self._marks(numbers), asked_for.__contains__)

    async def rehearse(self, chosen: Chosen, listener: Listener, why: str = "") -> Report:
        """What would go."""
        report = Report(paths=chosen.count, path_bytes=chosen.plan.size)
        for numbers in chosen.plan.batches(TOGETHER):
            for path in reversed(await self._catalog.summaries(self._cache.name, numbers)):
                listener.path(self._cache.name, path, _reason(chosen, why, path))
        return report

    async def run(
        self,
        chosen: Chosen,
        holder: str,
        listener: Listener,
        *,
        by: str,
        why: str = "",
        now: bool = False,
        pace: float = 0,
    ) -> Report:
        """Delete; `holder` has the lock of `cachesrv.services.maintenance`, `by` and `why` are remembered. With `now`,
        their NARs go as well, as far as no other path has them. After each step there is a rest, `pace` times as long.
        Raises LockLost, StoreError.
        """
        report = Report(path_bytes=chosen.plan.size)
        nars: dict[str, int] = {}
        removal = Removal(
            cache=self._cache.name,
            objects=partial(objects_of, self._cache),
            holder=holder,
            reason=partial(_reason, chosen, why),
            by=by,
            at=int(time.time()),
            siblings=siblings_of(self._cache, self._caches),
            despite_leases=True,
        )

        def tell(removed: Removed) -> None:
            report.removed(listener, self._cache.name, removed, removal.reason)
            nars.update((path.nar_key, path.file_size) for path in removed.gone)

        await self._removing.finish(self._caches)
        await Sweep(self._catalog, self._removing, removal, await self._unchanged(chosen)).run(tell, pace=pace)
        report.kept = chosen.count - report.paths
        if now:
            await self._delete_nars(nars, holder, report, listener, pace)
        return report

    async def _unchanged(self, chosen: Chosen) -> Plan:
        """The same without numbers that stand for something else by now, or for nothing."""
        changed = Bitmap()
        marks = zip(chosen.numbers, chosen.marks, await self._marks(chosen.numbers), strict=True)
        changed.add_new(number for number, before, after in marks if before != after)
        return Plan(chosen.numbers, changed, size=chosen.plan.size, used_before=0, oldest=0)

    async def _marks(self, numbers: array[int]) -> array[int]:
        """What tells paths of these numbers from others, 0 where there is none."""
        marks = array("q")
        for start in range(0, len(numbers), _SUMMED):
            some = numbers[start : start + _SUMMED]
            paths = await self._catalog.summaries(self._cache.name, some)
            known = {path.number: hash(path.base_name) for path in paths}
            marks.extend(known.get(number, 0) for number in some)
        return marks

    async def _delete_nars(
        self, nars: Mapping[str, int], holder: str, report: Report, listener: Listener, pace: float
    ) -> None:
        keys = sorted(nars)
        for start in range(0, len(keys), TOGETHER):
            started, moment = time.monotonic(), int(time.time())
            some = keys[start : start + TOGETHER]
            gone = await self._removing.nars(some, holder=holder, before=moment + 1, now=_FOR_EVER)
            report.deleted(listener, (UnusedNar(key, nars[key], moment) for key in gone))
            await asyncio.sleep(pace * (time.monotonic() - started))

    async def _wished(self, wish: Wish) -> list[int]:
        found = await self._catalog.numbers(self._cache.name, wish.hash_parts)
        if missing := set(wish.hash_parts) - found.keys():
            raise NotFound(f"{min(missing)} is not in the cache {self._cache.name}; `cachesrv why` may know more")
        numbers = list(found.values())
        if wish.everything:
            async for page in self._numbers():
                numbers += page
        elif wish.patterns:
            numbers += await self._matching(wish.patterns)
        return numbers

    async def _matching(self, patterns: Collection[str]) -> list[int]:
        numbers: list[int] = []
        unmatched = set(patterns)
        async for page in self._numbers():
            for path in await self._catalog.summaries(self._cache.name, page):
                if matched := {one for one in patterns if _matches(path, one)}:
                    numbers.append(path.number)
                    unmatched -= matched
        if unmatched:
            raise NotFound(f"no path in the cache {self._cache.name} matches {min(unmatched)}")
        return numbers

    async def _numbers(self) -> AsyncIterator[list[int]]:
        now, after = int(time.time()), 0
        while page := await self._catalog.uses(self._cache.name, now, after):
            yield [use.number for use in page]
            after = page[-1].number

    async def _demand_unpinned(self, referrers: Referrers) -> None:
        now, cache = int(time.time()), self._cache.name
        if not any(number in referrers for number in await self._catalog.pinned(cache, now)):
            return
        names = []
        for pin in await self._catalog.pins(cache):
            hash_parts = [generation.base_name[:HASH_PART_LENGTH] for generation in pin.generations]
            numbers = await self._catalog.numbers(cache, hash_parts)
            if (pin.expires_at is None or pin.expires_at > now) and any(one in referrers for one in numbers.values()):
                names.append(pin.name)
        raise Refused(f"these paths are pinned as {_listed(names)}: `cachesrv pin remove` these pins first")

    async def _size_of_nars(self, referrers: Referrers) -> int:
        """The bytes of the NARs that only these paths of the cache have."""
        twins = await self._catalog.twins(self._cache.name)
        needed = {first for number, first in twins.items() if number not in referrers or first not in referrers}
        alone = [number for number in referrers.numbers if number not in twins and number not in needed]
        size = 0
        for start in range(0, len(alone), _SUMMED):
            some = await self._catalog.summaries(self._cache.name, alone[start : start + _SUMMED])
            size += sum(path.file_size for path in some)
        return size

    async def _some(self, numbers: Iterable[int]) -> str:
        paths = await self._catalog.summaries(self._cache.name, list(numbers)[: _NAMED + 1])
        return _listed(sorted(path.name for path in paths))


def _matches(path: PathSummary, pattern: str) -> bool:
    return fnmatchcase(path.name, pattern) or fnmatchcase(path.base_name, pattern)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (" and others" if len(names) > _NAMED else "")


def _reason(chosen: Chosen, why: str, path: PathSummary) -> str:
    what = "deleted" if chosen.wished(path.number) else "deleted with what it needs"
    return f"{what}: {why}" if why else what
