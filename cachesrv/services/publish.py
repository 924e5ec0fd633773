"""Making paths visible: checked, signed, written to storage, then to the catalog, then to the index, then acknowledged.

A crash in between leaves a narinfo in storage that is right but not yet served; the same push, or a reindex, completes
it. Several pushes at once share their syncs to disk.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachesrv.catalog.base import ConflictRecord, PathRecord
from cachesrv.errors import BadInput, CachesrvError, Conflict, MissingNar, MissingReferences, StoreError
from cachesrv.index.base import IndexEntry
from cachesrv.nix import narinfo
from cachesrv.nix.compression import decompress
from cachesrv.nix.store_path import HASH_PART_LENGTH
from cachesrv.services import admission
from cachesrv.services.answer import present
from cachesrv.services.batch import Batcher
from cachesrv.services.caches import ReferencePolicy
from cachesrv.services.content import needs_reading
from cachesrv.services.locks import NamedLocks
from cachesrv.services.verify_nar import LISTING_LIMIT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cachesrv.catalog.base import Catalog, NarRecord
    from cachesrv.index.base import Index
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.candidate import Candidate
    from cachesrv.services.ingest import Ingest
    from cachesrv.services.upstream import Upstreams
    from cachesrv.storage.base import ObjectStore
    from cachesrv.telemetry import Metrics

Outcome = CachesrvError | None
"""Why a path was not published, or None when it is."""


@dataclass(frozen=True, slots=True)
class _Admitted:
    """A path that passed all checks. `listing` is its `.ls` object, None where it has or can have none."""

    cache: ServedCache
    record: PathRecord
    listing: bytes | None


class Publish:
    """Publishes paths whose NARs are in storage."""

    def __init__(
        self,
        storage: ObjectStore,
        catalog: Catalog,
        index: Index,
        ingest: Ingest,
        metrics: Metrics,
        *,
        upstreams: Upstreams | None = None,
    ) -> None:
        self._upstreams = upstreams
        self._storage = storage
        self._catalog = catalog
        self._index = index
        self._ingest = ingest
        self._metrics = metrics
        self._locks = NamedLocks()
        self._batches: Batcher[list[_Admitted]] = Batcher(self._flush)
        self._described: dict[str, bytes] = {}

    async def one(self, cache: ServedCache, path: Candidate, pusher: str) -> None:
        """Publish a path as `many` does. Raises why not."""
        (outcome,) = await self.many(cache, [path], pusher)
        if outcome:
            raise outcome

    async def many(self, cache: ServedCache, paths: Sequence[Candidate], pusher: str) -> list[Outcome]:
        """Publish paths, each after those that it refers to; one that cannot be published fails those that need it,
        and no others. `pusher` is the name of who asks.
        """
        async with self._locks.hold(f"{cache.name}/{path.store_path.hash_part}" for path in paths):
            known = await self._known(cache, paths)
            nars = await self._nars_by_hash(cache, paths)
            outcomes: list[Outcome] = [None] * len(paths)
            admitted: dict[int, _Admitted] = {}
            for number, path in enumerate(paths):
                try:
                    admitted[number] = await self._admit(cache, path, known, nars)
                    known.setdefault(path.store_path.hash_part, None)
                except CachesrvError as error:
                    outcomes[number] = error
            for number, failure in (await self._write(paths, admitted)).items():
                outcomes[number] = failure
        for path, outcome in zip(paths, outcomes, strict=True):
            if outcome:
                await self._refused(cache, path, outcome, pusher)
        return outcomes

    async def remember_conflict(self, published: PathRecord, nar_hash: str, pusher: str) -> None:
        """Note that somebody has another NAR, with the hash `sha256:<nix32>`, for a published path."""
        await self._catalog.record_conflict(
            ConflictRecord(
                cache=published.cache,
                hash_part=published.hash_part,
                name=published.name,
                published_nar_hash=published.nar_hash,
                refused_nar_hash=nar_hash,
                pusher=pusher,
                at=int(time.time()),
            )
        )

    async def close(self) -> None:
        """Finish what has been admitted."""
        await self._batches.close()

    async def _known(self, cache: ServedCache, paths: Sequence[Candidate]) -> dict[str, PathRecord | None]:
        """The published ones among the paths and all that they refer to, by hash part."""
        own = {path.store_path.hash_part for path in paths}
        wanted = {reference.hash_part for path in paths for reference in path.references} - own
        records: dict[str, PathRecord | None] = {**await self._catalog.paths(cache.name, own)}
        resolved = await self._catalog.present(cache.name, wanted)
        if self._upstreams and cache.references is ReferencePolicy.UPSTREAM:
            resolved |= await self._upstreams.resolve(cache, wanted - resolved)
        return records | dict.fromkeys(resolved)

    async def _nars_by_hash(self, cache: ServedCache, paths: Sequence[Candidate]) -> dict[str, NarRecord]:
        hashes = {path.nar_hash.nix32 for path in paths if path.file is None}
        return await self._catalog.nars_by_hash(cache.prefix, hashes) if hashes else {}

    async def _admit(
        self, cache: ServedCache, path: Candidate, known: dict[str, PathRecord | None], nars: dict[str, NarRecord]
    ) -> _Admitted:
        admission.check_claims(cache, path)
        record = known.get(path.store_path.hash_part)
        published = narinfo.parse(record.narinfo) if record else None
        admission.check_immutable(path, published)
        admission.check_references(cache, path, known)
        nar = await self._nar(cache, path, nars)
        admission.check_nar(path, nar)
        if path.ca and needs_reading(path.ca, path):
            await self._ingest.check_contents(nar, path.ca, path)
        admission.check_trust(cache, path, content_addressed=path.ca is not None)
        info = admission.to_publish(cache, path, nar, published)
        return _Admitted(cache, _record(cache, info, nar), await self._listing(cache, path, nar))

    async def _nar(self, cache: ServedCache, path: Candidate, nars: dict[str, NarRecord]) -> NarRecord:
        """What is known of the path's NAR; read now when the catalog does not know it. Raises MissingNar."""
        if path.file:
            known = await self._ingest.known(cache, path.file.name)
            return known or await self._ingest.adopt(cache, path.file.name, path.file.compression)
        nar = nars.get(path.nar_hash.nix32)
        if nar is None or await self._storage.head(nar.key) is None:
            raise MissingNar(f"there is no NAR with the hash {path.nar_hash.nix32}: send it before its path")
        return nar

    async def _listing(self, cache: ServedCache, path: Candidate, nar: NarRecord) -> bytes | None:
        """The listing that was made when the NAR was read; another path with the same NAR may have taken it."""
        if await self._storage.head(cache.listing_key(path.store_path.hash_part)):
            return None
        listing = await self._ingest.listing(cache, nar)
        return decompress("zstd", listing, LISTING_LIMIT) if listing else None

    async def _write(self, paths: Sequence[Candidate], admitted: dict[int, _Admitted]) -> dict[int, CachesrvError]:
        """Write admitted paths, all together; if that fails, one by one, and not those whose references failed."""
        if not admitted:
            return {}
        try:
            await self._batches.submit(list(admitted.values()))
        except CachesrvError as error:
            if len(admitted) == 1:
                return dict.fromkeys(admitted, error)
        else:
            return {}
        failed: dict[int, CachesrvError] = {}
        for number, path in admitted.items():
            gone = {paths[other].store_path for other in failed}
            try:
                if not gone.isdisjoint(paths[number].references):
                    raise MissingReferences(f"{paths[number].store_path} refers to a path that could not be published")
                await self._batches.submit([path])
            except CachesrvError as error:
                failed[number] = error
        return failed

    async def _flush(self, groups: list[list[_Admitted]]) -> None:
        batch = [path for group in groups for path in group]
        await self._describe({path.cache.name: path.cache for path in batch})
        listings = {path.cache.listing_key(path.record.hash_part): path.listing for path in batch if path.listing}
        await self._storage.put_many(listings)
        for records in _levels(batch):
            await self._write_narinfos(records)
        await self._catalog.publish([path.record for path in batch])
        entries = [IndexEntry(path.cache.name, path.record.hash_part, present(path.record.narinfo)) for path in batch]
        await asyncio.to_thread(self._index.put, entries)
        self._metrics.add("paths_published", len(batch))

    async def _describe(self, caches: dict[str, ServedCache]) -> None:
        """The objects of a cache are one without us as well: they begin with what it says of itself."""
        for cache in caches.values():
            if self._described.get(cache.name) != cache.info:
                await self._storage.put(cache.key("nix-cache-info"), cache.info, replace=True)
                self._described[cache.name] = cache.info

    async def _write_narinfos(self, records: dict[str, PathRecord]) -> None:
        """Create them. One that is there already is replaced when it is of the same NAR (it gains signatures), or is no
        narinfo. One of another NAR, which the catalog does not know, was left by a crash or put there by somebody else.
        """
        created = await self._storage.put_many({key: record.narinfo for key, record in records.items()})
        for key in records.keys() - created:
            there = await self._storage.get(key, limit=narinfo.DEFAULT_LIMIT)
            if there is None:
                raise StoreError(f"{key} was there a moment ago and is gone; try again")
            if there == records[key].narinfo:
                continue
            other = _nar_hash(there)
            if other and other != records[key].nar_hash:
                raise Conflict(
                    f"{records[key].name} lies in storage with the NAR hash {other} and was pushed with "
                    f"{records[key].nar_hash}; `cachesrv reindex` publishes what lies in storage"
                )
            await self._storage.put(key, records[key].narinfo, replace=True)

    async def _refused(self, cache: ServedCache, path: Candidate, error: CachesrvError, pusher: str) -> None:
        self._metrics.add("pushes_refused")
        if not isinstance(error, Conflict):
            return
        published = await self._catalog.path(cache.name, path.store_path.hash_part)
        if published is not None and published.nar_hash != path.nar_hash.nix32:
            await self.remember_conflict(published, path.nar_hash.nix32, pusher)


def _levels(batch: Sequence[_Admitted]) -> list[dict[str, PathRecord]]:
    """Narinfos by key: those that need no other one of the batch, those that need only these, and so on. Storage writes
    many in any order; by levels, a crash between two leaves none without those that it refers to.

    In the batch each path comes after those that it refers to.
    """
    depths: dict[str, int] = {}
    levels: list[dict[str, PathRecord]] = []
    for path in batch:
        needed = (path.cache.narinfo_key(reference[:HASH_PART_LENGTH]) for reference in path.record.references)
        depth = max((depths[key] + 1 for key in needed if key in depths), default=0)
        key = path.cache.narinfo_key(path.record.hash_part)
        depths[key] = depth
        if depth == len(levels):
            levels.append({})
        levels[depth][key] = path.record
    return levels


def _nar_hash(text: bytes) -> str | None:
    try:
        return narinfo.parse(text).nar_hash.nix32
    except BadInput:
        return None


def _record(cache: ServedCache, info: narinfo.NarInfo, nar: NarRecord) -> PathRecord:
    return PathRecord(
        cache=cache.name,
        hash_part=info.store_path.hash_part,
        name=info.store_path.name,
        narinfo=narinfo.render(info),
        nar_key=nar.key,
        nar_hash=nar.nar_hash,
        nar_size=nar.nar_size,
        file_size=nar.file_size,
        references=tuple(path.base_name for path in info.references),
        deriver=info.deriver.base_name if info.deriver else None,
        ca=info.ca.render() if info.ca else None,
        registered_at=int(time.time()),
    )
