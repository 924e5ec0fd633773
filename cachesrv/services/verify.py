"""Verification: whether all that is published, stored and indexed is whole, and agrees.

Nothing is changed. The stores are gone through page by page, in stages: the paths that the catalog has; what lies in
storage beyond that; realisations and build logs; what the index says beyond that; what writers left behind. Others
publish and remove meanwhile, so that whatever looks wrong is looked at once more after a while.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from cachesrv.errors import BeingRemoved
from cachesrv.index.base import Present
from cachesrv.services.flaws import Flaw, Kind
from cachesrv.services.metadata_check import MetadataCheck
from cachesrv.services.path_check import PathCheck
from cachesrv.services.verify_journal import Position

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence

    from cachesrv.nix.signing import PublicKey
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.nar_check import NarCheck
    from cachesrv.services.path_check import Stores
    from cachesrv.services.verify_journal import Counts, Journal
    from cachesrv.storage.base import ObjectInfo

Item = TypeVar("Item")

VERIFIED = "verified"
"""The note in the catalog that says when all caches were looked at last."""
FLAWS_FOUND = "flaws"
"""The note that says how many flaws were found then."""

PUBLISHED, STORED, BESIDE, INDEXED, LEFT = STAGES = (
    "published paths",
    "storage",
    "realisations and build logs",
    "the index",
    "temporary files",
)

YOUNG = 3600
"""Seconds for which what lies in storage may be on its way to be published."""

_TOGETHER = 500
_READ_TOGETHER = 64
"""Paths between two notes when NARs are read: so much is done again after an interruption."""
_FROM_UPSTREAM = b"?path="
"""In the narinfos of paths that are offered and not here yet."""
_DIGITS = "0123456789abcdfghijklmnpqrsvwxyz"


class Listener(Protocol):
    """Hears what is going on."""

    def stage(self, cache: str, stage: str, total: int | None) -> None:
        """A stage begins; `total` paths are ahead, where that is known."""

    def flaw(self, flaw: Flaw) -> None:
        """Something is wrong."""

    def progress(self, counts: Counts) -> None:
        """So much was looked at."""


@dataclass(frozen=True, slots=True)
class Allowances:
    """Seconds: what looks wrong is looked at again after `patience`; what is `young` may be on its way, and what nobody
    knows of it is no flaw; temporary files are `abandoned` after that time.
    """

    patience: float = 2.0
    young: float = YOUNG
    abandoned: float = 24 * 3600.0


@dataclass(frozen=True, slots=True)
class _Step:
    """What is wrong with the next `paths` or whatever else was looked at; `after` says up to where in the order of the
    stage, None where it has no order to go on in. Besides there were `young` objects that nobody knows.
    """

    flaws: Sequence[Flaw] = ()
    paths: int = 0
    young: int = 0
    after: str | None = None


class Verify:
    """Looks at caches. `caches` are all of them by name, `keys` by cache and name those that signatures are checked
    with. With `contents`, all NARs are read.
    """

    def __init__(
        self,
        stores: Stores,
        caches: Mapping[str, ServedCache],
        keys: Mapping[str, Mapping[str, PublicKey]],
        *,
        contents: NarCheck | None,
        allowances: Allowances,
    ) -> None:
        self._stores = stores
        self._caches = caches
        self._keys = keys
        self._contents = contents
        self._allow = allowances

    async def run(self, chosen: Collection[str], journal: Journal, listener: Listener) -> Counts:
        """Look at these caches, from where the journal ends. Raises StoreError when that cannot go on."""
        for flaw in journal.flaws():
            listener.flaw(flaw)
        run = _Run(journal, listener, self._contents)
        started = time.monotonic() - journal.counts.seconds
        for cache, stage, after in _ahead(self._stages(chosen), journal.position):
            total = (await self._stores.catalog.count(cache))[0] if stage == PUBLISHED else None
            listener.stage(cache, stage, total)
            await run.note(Position(cache, stage, after), _Step(), time.monotonic() - started)
            async for step in self._stage(cache, stage, after):
                position = None if step.after is None else Position(cache, stage, step.after)
                await run.note(position, step, time.monotonic() - started)
        return journal.counts

    def _stages(self, chosen: Collection[str]) -> Iterator[tuple[str, str]]:
        prefixes: set[str] = set()
        for cache in self._caches.values():
            if cache.name in chosen:
                yield cache.name, PUBLISHED
                if cache.prefix not in prefixes:
                    yield cache.name, STORED
                    yield cache.name, BESIDE
                prefixes.add(cache.prefix)
                yield cache.name, INDEXED
        yield "", LEFT

    def _stage(self, name: str, stage: str, after: str) -> AsyncIterator[_Step]:
        if stage == LEFT:
            return self._leftovers()
        cache = self._caches[name]
        check = PathCheck(self._stores, cache, self._keys[name], self._contents)
        if stage == PUBLISHED:
            return self._published(cache, check, after)
        if stage == STORED:
            return self._stored(cache, check, after)
        if stage == BESIDE:
            return self._beside(cache)
        return self._indexed(cache, check, after)

    async def _published(self, cache: ServedCache, check: PathCheck, after: str) -> AsyncIterator[_Step]:
        size = _READ_TOGETHER if self._contents else _TOGETHER
        async for records in _batches(self._stores.catalog.scan(cache.name, after), size):
            flaws = await self._confirmed(check, await check.published(records))
            yield _Step(flaws, len(records), after=records[-1].hash_part)

    async def _confirmed(self, check: PathCheck, suspected: Mapping[str, Sequence[Flaw]]) -> list[Flaw]:
        """Those flaws that are still there after a while."""
        if not suspected:
            return []
        await asyncio.sleep(self._allow.patience)
        kinds = {hash_part: {flaw.kind for flaw in flaws} for hash_part, flaws in suspected.items()}
        again = await check.found(suspected)
        return [flaw for hash_part, flaws in again.items() for flaw in flaws if flaw.kind in kinds[hash_part]]

    async def _stored(self, cache: ServedCache, check: PathCheck, after: str) -> AsyncIterator[_Step]:
        """Narinfos that the catalog does not know, and NARs that nobody does. Where storage is the authority, all
        narinfos are looked at, those that begin with one digit at a time when their NARs are read.
        """
        sliced = self._contents is not None and cache.bucket_is_authority
        for digit in _DIGITS if sliced else ("",):
            if digit and digit <= after:
                continue
            async for unknown in _batches(self._unknown_narinfos(cache, digit), _TOGETHER):
                old = [hash_part for hash_part, is_old in unknown if is_old]
                flaws = await self._confirmed(check, await check.found(old))
                yield _Step(flaws, len(old), len(unknown) - len(old))
            if digit:
                yield _Step(after=digit)
        if not cache.bucket_is_authority and not check.more_unpublished:
            async for step in self._strays(cache, check.unpublished_nars):
                yield step

    async def _beside(self, cache: ServedCache) -> AsyncIterator[_Step]:
        check = MetadataCheck(self._stores, cache, self._keys[cache.name], self._sharing(cache))
        async for flaws in check.all(self._allow.patience):
            yield _Step(flaws)

    def _sharing(self, cache: ServedCache) -> list[str]:
        return [other.name for other in self._caches.values() if other.prefix == cache.prefix]

    async def _unknown_narinfos(self, cache: ServedCache, digit: str) -> AsyncIterator[tuple[str, bool]]:
        """What narinfos in storage are called that no cache publishes which has them, and whether they are old enough
        to be judged.
        """
        sharing = self._sharing(cache)
        prefix = cache.key("")
        old = time.time() - (0 if cache.bucket_is_authority else self._allow.young)

        def name(info: ObjectInfo) -> str | None:
            """Without its suffix."""
            called = info.key[len(prefix) :]
            ours = called.endswith(".narinfo") and "/" not in called and called.startswith(digit)
            return called.removesuffix(".narinfo") if ours else None

        async for infos in _batches(self._stores.storage.list(prefix), _TOGETHER):
            modified = {found: info.modified for info in infos if (found := name(info))}
            names = set(modified)
            for of in sharing:
                names -= await self._stores.catalog.present(of, names)
            for one in sorted(names):
                if not await self._is_going(cache.narinfo_key(one)):
                    yield one, modified[one] < old

    async def _strays(self, cache: ServedCache, named: Collection[str]) -> AsyncIterator[_Step]:
        old = time.time() - self._allow.young
        async for infos in _batches(self._stores.storage.list(cache.key("nar/")), _TOGETHER):
            sizes = {info.key: info.size for info in infos if info.key not in named}
            young = {info.key for info in infos if info.modified >= old}
            strays = await self._stores.catalog.stray_nars(sizes)
            unjudged = len(strays & young)
            strays -= young
            if strays:
                await asyncio.sleep(self._allow.patience)
                strays = await self._stores.catalog.stray_nars(strays)
            there = [key for key in sorted(strays) if await self._stores.storage.head(key)]
            what = "a NAR of {} bytes that no path has"
            flaws = [Flaw(Kind.ORPHAN_NAR.label, cache.name, what.format(sizes[key]), "", key) for key in there]
            yield _Step(flaws, young=unjudged)

    async def _indexed(self, cache: ServedCache, check: PathCheck, after: str) -> AsyncIterator[_Step]:
        """Answers for paths that are not there."""
        async for answers in _batches(_aiter(self._stores.index.scan(cache.name, after)), _TOGETHER):
            suspected = await self._unfounded(cache, check, [*_answered(answers)])
            if suspected:
                await asyncio.sleep(self._allow.patience)
                get = self._stores.index.get
                still = _answered((hash_part, get(cache.name, hash_part)) for hash_part in suspected)
                suspected = await self._unfounded(cache, check, [*still])
            what = "the index answers for a path that is not there"
            flaws = [Flaw(Kind.DANGLING_INDEX_ENTRY.label, cache.name, what, one) for one in sorted(suspected)]
            yield _Step(flaws, after=answers[-1][0])

    async def _unfounded(self, cache: ServedCache, check: PathCheck, hash_parts: Collection[str]) -> set[str]:
        unfounded = set(hash_parts) - await self._stores.catalog.present(cache.name, hash_parts)
        if unfounded and cache.bucket_is_authority:
            unfounded -= await check.lying(unfounded)
        return unfounded

    async def _leftovers(self) -> AsyncIterator[_Step]:
        async for infos in _batches(self._stores.storage.leftovers(older_than=self._allow.abandoned), _TOGETHER):
            what = "{} bytes that somebody began to write and left"
            yield _Step([Flaw(Kind.LEFTOVER.label, "", what.format(info.size), "", info.key) for info in infos])

    async def _is_going(self, key: str) -> bool:
        """Whether it is about to be deleted."""
        try:
            await self._stores.catalog.fence([key])
        except BeingRemoved:
            return True
        return False


class _Run:
    """Keeps count."""

    def __init__(self, journal: Journal, listener: Listener, contents: NarCheck | None) -> None:
        self._journal = journal
        self._listener = listener
        self._contents = contents
        self._read = (journal.counts.nars, journal.counts.bytes)

    async def note(self, position: Position | None, step: _Step, seconds: float) -> None:
        """Note what was looked at, then tell of it."""
        counts = self._journal.counts
        counts.paths += step.paths
        counts.young += step.young
        counts.seconds = round(seconds, 1)
        if self._contents:
            counts.nars = self._read[0] + self._contents.nars
            counts.bytes = self._read[1] + self._contents.bytes
        for flaw in step.flaws:
            counts.flaws[flaw.kind] = counts.flaws.get(flaw.kind, 0) + 1
        await asyncio.to_thread(self._journal.note, position, step.flaws)
        for flaw in step.flaws:
            self._listener.flaw(flaw)
        self._listener.progress(counts)


def _ahead(stages: Iterator[tuple[str, str]], done: Position | None) -> Iterator[tuple[str, str, str]]:
    """The stages from there on, each with where it begins."""
    for cache, stage in stages:
        if done is None:
            yield cache, stage, ""
        elif (cache, stage) == (done.cache, done.stage):
            yield cache, stage, done.after
            done = None


def _answered(answers: Iterator[tuple[str, object]] | Sequence[tuple[str, object]]) -> Iterator[str]:
    """Those that the index answers for as if they were here."""
    for hash_part, answer in answers:
        if isinstance(answer, Present) and _FROM_UPSTREAM not in answer.body:
            yield hash_part


async def _aiter(items: Iterator[Item]) -> AsyncIterator[Item]:
    for item in items:
        yield item


async def _batches(items: AsyncIterator[Item], size: int) -> AsyncIterator[list[Item]]:
    batch: list[Item] = []
    async for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
