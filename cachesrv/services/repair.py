"""Repair: what a verification found wrong is mended from other copies, or taken out of sight.

Each flaw is looked at anew before anything is done about it. What can be learned from another store of ours, or from a
copy elsewhere, is; a path that cannot be mended goes, with all that need it, and that is remembered.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

from cachesrv.errors import BadInput, Conflict
from cachesrv.nix import narinfo
from cachesrv.nix.store_path import is_hash_part
from cachesrv.services.adopting import Adopting
from cachesrv.services.flaws import Kind
from cachesrv.services.importing import Importing
from cachesrv.services.keeping_removed import KeepingRemoved
from cachesrv.services.mending import NAR_KINDS, NARINFO_KINDS, Mending, Sources
from cachesrv.services.mending_metadata import MendingMetadata
from cachesrv.services.metadata_check import MetadataCheck
from cachesrv.services.path_check import PathCheck
from cachesrv.services.path_judge import PathJudge
from cachesrv.services.removing import Removing, objects_of
from cachesrv.services.taking_away import TakingAway

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from cachesrv.catalog.base import PathRecord
    from cachesrv.nix.signing import PublicKey
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.copies import Copies
    from cachesrv.services.flaws import Flaw
    from cachesrv.services.ingest import Ingest
    from cachesrv.services.nar_check import NarCheck
    from cachesrv.services.path_check import Stores
    from cachesrv.services.publish import Publish
    from cachesrv.services.spool import Spool

BY = "cachesrv verify --repair"

_STEPS = 8
"""What is done about one path, at most: each step may show what else is wrong."""
_MOST_ADOPTED = 10_000
"""Paths that the catalog has lost; for more of them there is a quicker way."""

_NOT_FOR_US = (Kind.UNDECIDED.label, Kind.UNTRUSTED_NARINFO.label)
"""Flaws about which nothing can be done here."""

_OF_REALISATIONS = (Kind.BAD_REALISATION.label, Kind.DANGLING_REALISATION.label)

_OF_OTHERS = "others write to this storage, and it is for them to mend it"

_MANY_SIGNATURES = 10
"""Signatures that do not hold, or realisations that are no good; with more, it is the key that is wrong."""

MENDED, REMOVED, LEFT = "mended", "removed", "left"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a path or an object. `result` is MENDED, REMOVED or LEFT; `get_back` says how what was removed can
    be had again.
    """

    result: str
    cache: str
    path: str
    what: str
    get_back: str = ""


class Listener(Protocol):
    """Hears of each."""

    def outcome(self, outcome: Outcome) -> None:
        """One is done."""


@dataclass(frozen=True, slots=True)
class Means:
    """What repair needs beside the stores. `places` may have other copies; `keys`, by cache and name, tell right
    signatures from wrong; narinfos and realisations that are of no use are moved to the folder `removed`; temporary
    files are `abandoned` after so many seconds; `forced`: however many paths have to go.
    """

    ingest: Ingest
    publish: Publish
    spool: Spool
    places: Sequence[Copies]
    keys: Mapping[str, Mapping[str, PublicKey]]
    contents: NarCheck | None
    removed: Path
    abandoned: float
    forced: bool


class Repair:
    """Repairs caches; `caches` are all of them by name. `holder` has the lock of `cachesrv.services.maintenance`."""

    def __init__(self, stores: Stores, caches: Mapping[str, ServedCache], means: Means, *, holder: str) -> None:
        self._stores = stores
        self._caches = caches
        self._means = means
        self._holder = holder
        self._many_signatures = False
        self._many_realisations = False
        self._keeping = KeepingRemoved(stores.storage, means.removed)
        self._removing = Removing(stores.storage, stores.catalog, stores.index)
        self._taking = TakingAway(stores.catalog, self._removing, caches, holder=holder, by=BY, forced=means.forced)

    async def run(self, flaws: Callable[[], Iterator[Flaw]], listener: Listener) -> dict[str, int]:
        """Repair all that was found; `flaws` gives it anew each time. How often each result came about."""
        counts = dict.fromkeys((MENDED, REMOVED, LEFT), 0)

        def tell(outcomes: Iterable[Outcome]) -> None:
            for outcome in outcomes:
                counts[outcome.result] += 1
                listener.outcome(outcome)

        await self._removing.finish(self._caches)
        # What the catalog has lost comes first: others may need nothing else. What lacks something then comes again.
        wrong_signatures = sum(flaw.kind == Kind.WRONG_SIGNATURE.label for flaw in flaws())
        self._many_signatures = wrong_signatures > _MANY_SIGNATURES and not self._means.forced
        realisations = sum(flaw.kind in _OF_REALISATIONS for flaw in flaws())
        self._many_realisations = realisations > _MANY_SIGNATURES and not self._means.forced
        many = sum(flaw.kind == Kind.UNPUBLISHED.label for flaw in flaws()) > _MOST_ADOPTED
        for again in (False, True):
            for flaw in flaws():
                if flaw.kind == Kind.UNPUBLISHED.label:
                    tell(await self._adopt(flaw, many=many, again=again))
            if not again:
                for (cache, path), found in groupby(flaws(), key=lambda flaw: (flaw.cache, flaw.path)):
                    tell(await self._group(cache, path, [*found]))
        return counts

    async def _group(self, cache: str, path: str, flaws: list[Flaw]) -> list[Outcome]:
        """Do something about flaws that stand together: of one path, or of none."""
        outcomes: list[Outcome] = []
        of_path = False
        for flaw in flaws:
            match flaw.kind:
                case Kind.UNPUBLISHED.label:
                    pass
                case Kind.ORPHAN_NAR.label:
                    await self._stores.catalog.release_strays([flaw.object], int(time.time()))
                    outcomes.append(Outcome(MENDED, cache, flaw.object, "it is left to the next collection"))
                case Kind.LEFTOVER.label:
                    outcomes += await self._sweep(flaw)
                case kind if kind in _OF_REALISATIONS:
                    outcomes.append(await self._realisation(flaw))
                case Kind.FOREIGN_OBJECT.label:
                    outcomes.append(Outcome(LEFT, cache, flaw.object, flaw.what))
                case Kind.DANGLING_INDEX_ENTRY.label:
                    how = await self._of(cache).mending.index([path])
                    outcomes.append(Outcome(MENDED, cache, path, how))
                case _:
                    of_path = True
        if of_path:
            outcomes += await self._path(self._of(cache), path)
        return outcomes

    async def _sweep(self, flaw: Flaw) -> list[Outcome]:
        await self._stores.storage.sweep(older_than=self._means.abandoned)
        return [Outcome(MENDED, flaw.cache, flaw.object, "the temporary file is gone")]

    async def _realisation(self, flaw: Flaw) -> Outcome:
        cache = self._caches[flaw.cache]
        if cache.bucket_is_authority:
            return Outcome(LEFT, cache.name, flaw.object, f"{flaw.what}; {_OF_OTHERS}")
        if self._many_realisations:
            what = f"{flaw.what}, as many others: was the key changed? --force takes them away all the same"
            return Outcome(LEFT, cache.name, flaw.object, what)
        sharing = [other.name for other in self._sharing(cache)]
        check = MetadataCheck(self._stores, cache, self._means.keys[cache.name], sharing)
        mending = MendingMetadata(cache, check, self._removing, self._keeping, holder=self._holder)
        back = await mending.take_away(flaw.object)
        if back is None:
            return Outcome(MENDED, cache.name, flaw.object, "it is well by now")
        return Outcome(REMOVED, cache.name, flaw.object, flaw.what, back)

    def _of(self, cache: str) -> _OfCache:
        return _OfCache(self._stores, self._caches[cache], self._means)

    async def _adopt(self, flaw: Flaw, *, many: bool, again: bool) -> list[Outcome]:
        """Publish what lies in storage, if all that it needs is there; when it is not the second time, it goes."""
        if many or len(self._sharing(self._caches[flaw.cache])) > 1:
            why = (
                "the catalog lost many" if many else "several caches have this storage, and it does not say whose it is"
            )
            return [Outcome(LEFT, flaw.cache, flaw.path, f"{why}: run `cachesrv reindex`")] if again else []
        of = self._of(flaw.cache)
        published = await self._stores.catalog.present(flaw.cache, [flaw.path[:32]])
        if not published and await of.adopting.path(flaw.path[:32]):
            return [Outcome(MENDED, flaw.cache, flaw.path, "it was published as it lies in storage")]
        return await self._path(of, flaw.path) if again and not published else []

    def _sharing(self, cache: ServedCache) -> list[ServedCache]:
        return [other for other in self._caches.values() if other.prefix == cache.prefix]

    async def _path(self, of: _OfCache, path: str) -> list[Outcome]:
        """Mend a path, or take it away."""
        hash_part = path[:32] if is_hash_part(path[:32]) else path
        done: list[str] = []
        flaws: list[Flaw] = []
        try:
            for _ in range(_STEPS):
                flaws = (await of.check.found([hash_part])).get(hash_part, [])
                record = await self._stores.catalog.path(of.cache.name, hash_part)
                if not flaws:
                    what = ", ".join(done) or "it is well by now"
                    return [Outcome(MENDED, of.cache.name, path, what)]
                if all(flaw.kind in _NOT_FOR_US for flaw in flaws):
                    return [Outcome(LEFT, of.cache.name, path, flaws[0].what)]
                if record is None:
                    return await self._stray(of, path, hash_part, flaws)
                how = await of.step(record, flaws)
                if how is None:
                    break
                done.append(how)
                if _has_bad_nar(flaws):  # its path may have another one now
                    await self._removing.damaged([record.nar_key], holder=self._holder)
        except (BadInput, Conflict) as error:
            of.sources.failed(error)
        if self._many_signatures and flaws[0].kind == Kind.WRONG_SIGNATURE.label:
            what = f"{flaws[0].what}, as many others: if the key was changed, `cachesrv reindex --sign` signs anew"
            return [Outcome(LEFT, of.cache.name, path, what)]
        return await self._take_away(of, path, hash_part, flaws)

    async def _take_away(self, of: _OfCache, path: str, hash_part: str, flaws: list[Flaw]) -> list[Outcome]:
        tried = f" ({'; '.join(of.sources.tried)})" if of.sources.tried else ""
        reason = f"{flaws[0].what}, and no other copy was found{tried}"
        record = await self._stores.catalog.path(of.cache.name, hash_part)
        gone = await self._taking.path(of.cache, hash_part, reason)
        if gone is None:
            what = f"{reason}; it stays, since more than a tenth of the cache would have to go: is all storage there?"
            return [Outcome(LEFT, of.cache.name, path, f"{what} --force takes it away all the same")]
        if record and _has_bad_nar(flaws):
            await self._removing.damaged([record.nar_key], holder=self._holder)
        return [
            Outcome(
                REMOVED,
                of.cache.name,
                summary.base_name,
                reason if summary.hash_part == hash_part else f"it needs {path}",
                _how_to_get_back(of.cache, summary.base_name, record if summary.hash_part == hash_part else None),
            )
            for summary in gone
        ]

    async def _stray(self, of: _OfCache, path: str, hash_part: str, flaws: list[Flaw]) -> list[Outcome]:
        """A narinfo in storage that cannot be served, of a path that the catalog does not have."""
        if of.cache.bucket_is_authority:
            return [Outcome(LEFT, of.cache.name, path, f"{flaws[0].what}; {_OF_OTHERS}")]
        if all(flaw.kind == Kind.UNPUBLISHED.label for flaw in flaws):
            return [Outcome(LEFT, of.cache.name, path, "what it needs is not published")]
        info = await of.adopting.described(hash_part)
        key = of.cache.narinfo_key(hash_part)
        kept = await self._keeping.object(of.cache, key, limit=narinfo.DEFAULT_LIMIT)
        objects = {hash_part: objects_of(of.cache, hash_part)}
        await self._removing.unpublished(self._sharing(of.cache), objects, holder=self._holder)
        if info and _has_bad_nar(flaws):
            await self._removing.damaged([of.cache.key(info.url)], holder=self._holder)
        elif info:
            await self._stores.catalog.release_strays([of.cache.key(info.url)], int(time.time()))
        if is_hash_part(hash_part) and (where := await of.importing.path(hash_part)):
            return [Outcome(MENDED, of.cache.name, path, f"it was taken from {where}")]
        return [Outcome(REMOVED, of.cache.name, path, flaws[0].what, kept)]


class _OfCache:
    """What it takes for one cache."""

    def __init__(self, stores: Stores, cache: ServedCache, means: Means) -> None:
        keys = means.keys[cache.name]
        judge = PathJudge(cache, keys)
        self.cache = cache
        self.check = PathCheck(stores, cache, keys, means.contents)
        self.sources = Sources(means.places, means.keys)
        self.mending = Mending(stores, cache, judge)
        self.adopting = Adopting(stores, cache, self.check, judge)
        self.importing = Importing(
            cache, self.check, self.sources, means.spool, ingest=means.ingest, publish=means.publish, by=BY
        )
        self._spool = means.spool

    async def step(self, record: PathRecord, flaws: Sequence[Flaw]) -> str | None:
        """Mend one thing; what was done, None when there is no way."""
        kinds = {flaw.kind for flaw in flaws}
        if kinds & NARINFO_KINDS:
            return await self.mending.narinfo(record, self.sources)
        if kinds & NAR_KINDS:
            return await self.mending.nar(record, self.sources, self._spool)
        if Kind.MISSING_REFERENCE.label in kinds:
            whole = await self.importing.references(narinfo.parse(record.narinfo))
            return "what it refers to was brought back" if whole else None
        return await self.mending.index([record.hash_part])


def _has_bad_nar(flaws: Iterable[Flaw]) -> bool:
    return any(flaw.kind in NAR_KINDS for flaw in flaws)


def _how_to_get_back(cache: ServedCache, base_name: str, record: PathRecord | None) -> str:
    built = f"; it was built by {record.deriver}" if record and record.deriver else ""
    return f"cachesrv push {cache.store_dir}/{base_name}{built}"
