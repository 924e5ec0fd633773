"""Making paths visible: checked, signed, written to storage, then to the catalog, then to the index, then acknowledged.

A crash in between leaves a narinfo in storage that is right but not yet served; the same push, or a reindex, completes
it. Several pushes at once share their syncs to disk.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import structlog

from cachesrv.catalog.base import ConflictRecord, PathRecord, RefusalRecord
from cachesrv.errors import (
    BadInput,
    BeingRemoved,
    CachesrvError,
    Conflict,
    MissingNar,
    MissingReferences,
    Refused,
    StoreFull,
    StoreUnavailable,
    TooLarge,
)
from cachesrv.nix import narinfo
from cachesrv.nix.compression import decompress
from cachesrv.services import admission
from cachesrv.services.batch import Batcher
from cachesrv.services.caches import ReferencePolicy
from cachesrv.services.content import needs_reading
from cachesrv.services.disk_room import DiskRoom
from cachesrv.services.locks import NamedLocks
from cachesrv.services.unhurried import unhurried
from cachesrv.services.verify_nar import LISTING_LIMIT
from cachesrv.services.writing import Admitted, Writing

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from cachesrv.catalog.base import Catalog, NarRecord
    from cachesrv.index.base import Index
    from cachesrv.nix.store_path import StorePath
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.candidate import Candidate
    from cachesrv.services.ingest import Ingest
    from cachesrv.services.taking import Taking
    from cachesrv.services.upstream import Upstreams
    from cachesrv.storage.base import ObjectStore
    from cachesrv.telemetry import Metrics

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class FreshNar:
    """A NAR that was judged and stored a moment ago; `listing` is its `.ls` object, None where there can be none."""

    record: NarRecord
    listing: bytes | None


@dataclass(frozen=True, slots=True)
class _Stored:
    """What is here for some paths: NARs by their hashes, keys of NARs and listings in storage, and listings that the
    catalog keeps, by the keys of their NARs.
    """

    nars: Mapping[str, NarRecord]
    objects: Collection[str]
    listings: Mapping[str, bytes]


Outcome = CachesrvError | None
"""Why a path was not published, or None when it is."""

_NONE: Mapping[str, FreshNar] = MappingProxyType({})
_LONGEST_REASON = 500
_TRIES = 40
_PAUSE = 0.25
"""Seconds between two tries, while what is to be published is just being removed."""


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
        tries: int = _TRIES,
        room: DiskRoom | None = None,
        taking: Taking | None = None,
    ) -> None:
        """`tries`: how often what is to be published is tried while it is just being removed, a moment apart."""
        self._tries = tries
        self._room = room or DiskRoom.unlimited()
        self._taking = taking
        self._upstreams = upstreams
        self._storage = storage
        self._catalog = catalog
        self._ingest = ingest
        self._metrics = metrics
        self._locks = NamedLocks()
        self._writing = Writing(storage, catalog, index, ingest)
        self._batches: Batcher[list[Admitted]] = Batcher(self._flush)

    async def one(self, cache: ServedCache, path: Candidate, pusher: str) -> None:
        """Publish a path as `many` does. Raises why not."""
        (outcome,) = await self.many(cache, [path], pusher)
        if outcome:
            raise outcome

    async def many(
        self, cache: ServedCache, paths: Sequence[Candidate], pusher: str, fresh: Mapping[str, FreshNar] = _NONE
    ) -> list[Outcome]:
        """Publish paths, each after those that it refers to; one that cannot be published fails those that need it,
        and no others. `pusher` is the name of who asks; `fresh` are NARs by their hash, which need not be looked for.
        Raises StoreFull when there is no room for any.
        """
        await self._room.for_records()
        async with self._locks.hold(f"{cache.name}/{path.store_path.hash_part}" for path in paths):
            known, elsewhere = await self._known(cache, paths)
            stored = await self._stored(cache, [path for path in paths if _is_stored(path, fresh)])
            outcomes: list[Outcome] = [None] * len(paths)
            admitted: dict[int, Admitted] = {}
            async for number, path in unhurried(enumerate(paths)):
                try:
                    record, listing = await self._admit(cache, path, known, stored, fresh)
                    record = replace(record, pusher=pusher)
                    admitted[number] = Admitted(cache, record, listing, _relied_on(cache, path) - elsewhere)
                    known[path.store_path.hash_part] = record
                except CachesrvError as error:
                    outcomes[number] = error
            for number, failure in (await self._write(paths, admitted)).items():
                outcomes[number] = failure
        refused = [(path, outcome) for path, outcome in zip(paths, outcomes, strict=True) if outcome]
        if refused:
            await self._remember_refusals(cache, refused, pusher)
        return outcomes

    async def remember_conflicts(self, refused: Iterable[tuple[PathRecord, str]], pusher: str) -> None:
        """Note that somebody has other NARs for published paths: each with the hash (`sha256:<nix32>`) of the other."""
        at = int(time.time())
        await self._catalog.record_conflicts(
            [
                ConflictRecord(
                    cache=published.cache,
                    hash_part=published.hash_part,
                    name=published.name,
                    published_nar_hash=published.nar_hash,
                    refused_nar_hash=nar_hash,
                    pusher=pusher,
                    at=at,
                    publisher=published.pusher,
                )
                for published, nar_hash in refused
            ]
        )

    async def close(self) -> None:
        """Finish what has been admitted."""
        await self._batches.close()

    async def _known(
        self, cache: ServedCache, paths: Sequence[Candidate]
    ) -> tuple[dict[str, PathRecord | None], set[str]]:
        """The published ones among the paths and all that they refer to, by hash part; those that are so elsewhere."""
        own = {path.store_path.hash_part for path in paths}
        wanted = set().union(*map(_references, paths)) - own
        records: dict[str, PathRecord | None] = {**await self._catalog.paths(cache.name, own)}
        resolved = await self._catalog.present(cache.name, wanted)
        if self._taking:
            resolved |= await self._taking.take(cache, wanted - resolved)
        elsewhere: set[str] = set()
        if self._upstreams and cache.references is ReferencePolicy.UPSTREAM:
            elsewhere = await self._upstreams.resolve(cache, wanted - resolved)
        return records | dict.fromkeys(resolved | elsewhere), elsewhere

    async def _stored(self, cache: ServedCache, paths: Sequence[Candidate]) -> _Stored:
        """What is here for these paths."""
        if not paths:
            return _Stored({}, frozenset(), {})
        listed = [(path.nar_hash.nix32, cache.listing_key(path.store_path.hash_part)) for path in paths]
        nars = await self._catalog.nars_by_hash(cache.prefix, {nar_hash for nar_hash, _ in listed})
        keys = {nar.key for nar in nars.values()}.union(key for _, key in listed)
        objects = await self._storage.existing(keys)
        unlisted = nars.keys() & {nar_hash for nar_hash, key in listed if key not in objects}
        listings = await self._catalog.listings([nars[nar_hash].key for nar_hash in unlisted])
        return _Stored(nars, objects, listings)

    async def _admit(
        self,
        cache: ServedCache,
        path: Candidate,
        known: dict[str, PathRecord | None],
        stored: _Stored,
        fresh: Mapping[str, FreshNar],
    ) -> tuple[PathRecord, bytes | None]:
        """Its record and its listing. Raises what speaks against it."""
        admission.check_claims(cache, path)
        record = known.get(path.store_path.hash_part)
        published = narinfo.parse(record.narinfo) if record else None
        admission.check_immutable(path, published)
        admission.check_references(cache, path, known)
        just_sent = fresh.get(path.nar_hash.nix32) if path.file is None else None
        nar = just_sent.record if just_sent else await self._nar(cache, path, stored)
        admission.check_nar(path, nar)
        if path.ca and needs_reading(path.ca, path):
            await self._ingest.check_contents(nar, path.ca, path)
        admission.check_trust(cache, path, content_addressed=path.ca is not None)
        info = admission.to_publish(cache, path, nar, published)
        return _record(cache, info, nar), just_sent.listing if just_sent else await self._listing(
            cache, path, nar, stored
        )

    async def _listing(self, cache: ServedCache, path: Candidate, nar: NarRecord, stored: _Stored) -> bytes | None:
        """To be written to storage, None when it is there or there can be none."""
        hash_part = path.store_path.hash_part
        if path.file:
            return await self._writing.listing(cache, hash_part, nar)
        if cache.listing_key(hash_part) in stored.objects:
            return None
        kept = stored.listings.get(nar.key) or await self._ingest.listing(cache, nar)
        return decompress("zstd", kept, LISTING_LIMIT) if kept else None

    async def _nar(self, cache: ServedCache, path: Candidate, stored: _Stored) -> NarRecord:
        """What is known of the path's NAR; read now when the catalog does not know it. Raises MissingNar."""
        if path.file:
            known = await self._ingest.known(cache, path.file.name)
            return known or await self._ingest.adopt(cache, path.file.name, path.file.compression)
        nar = stored.nars.get(path.nar_hash.nix32)
        if nar is None or nar.key not in stored.objects:
            raise MissingNar(f"there is no NAR with the hash {path.nar_hash.nix32}: send it before its path")
        return nar

    async def _write(self, paths: Sequence[Candidate], admitted: dict[int, Admitted]) -> dict[int, CachesrvError]:
        """Write admitted paths, all together; if that fails, one by one, and not those whose references failed."""
        if not admitted:
            return {}
        try:
            await self._submit(list(admitted.values()))
        except CachesrvError as error:
            if len(admitted) == 1 or _concerns_all(error):
                return dict.fromkeys(admitted, error)
        else:
            return {}
        failed: dict[int, CachesrvError] = {}
        gone: set[StorePath] = set()
        for number, path in admitted.items():
            try:
                if not gone.isdisjoint(paths[number].references):
                    raise MissingReferences(f"{paths[number].store_path} refers to a path that could not be published")
                await self._submit([path])
            except CachesrvError as error:
                if _concerns_all(error):
                    return failed | {other: error for other in admitted if other >= number}
                failed[number] = error
                gone.add(paths[number].store_path)
        return failed

    async def _submit(self, paths: list[Admitted]) -> None:
        """Have them written; what is just being removed is made anew when it has gone."""
        for _ in range(self._tries - 1):
            try:
                return await self._batches.submit(paths)
            except BeingRemoved:
                await asyncio.sleep(_PAUSE)
        return await self._batches.submit(paths)

    async def _flush(self, groups: list[list[Admitted]]) -> None:
        batch = [path for group in groups for path in group]
        await self._writing.write(batch)
        self._metrics.add("paths_published", len(batch))
        # one line for all: pushes bring many at once
        names = [f"{path.cache.name}/{path.record.hash_part}-{path.record.name}" for path in batch]
        _log.debug("published", paths=names)

    async def _remember_refusals(
        self, cache: ServedCache, refused: list[tuple[Candidate, CachesrvError]], pusher: str
    ) -> None:
        self._metrics.add("pushes_refused", len(refused))
        for path, error in refused:
            _log.debug(
                "a path was refused", cache=cache.name, path=str(path.store_path), pusher=pusher, error=str(error)
            )
        # A store that fails says nothing of the path.
        told = [(path, error) for path, error in refused if isinstance(error, BadInput | Refused)]
        await self._catalog.record_refusals([_refusal(cache, path, error, pusher) for path, error in told])
        others = {
            path.store_path.hash_part: path.nar_hash.nix32 for path, error in refused if isinstance(error, Conflict)
        }
        if others:
            published = await self._catalog.paths(cache.name, others)
            conflicts = [
                (record, others[part]) for part, record in published.items() if record.nar_hash != others[part]
            ]
            await self.remember_conflicts(conflicts, pusher)


def _concerns_all(error: CachesrvError) -> bool:
    """Whether no other path would fare better now: a store does not answer, or is full."""
    return isinstance(error, StoreUnavailable | StoreFull) and not isinstance(error, BeingRemoved)


def _refusal(cache: ServedCache, path: Candidate, error: CachesrvError, pusher: str) -> RefusalRecord:
    return RefusalRecord(
        cache=cache.name,
        hash_part=path.store_path.hash_part,
        name=path.store_path.name,
        reason=" ".join(str(error).split())[:_LONGEST_REASON],
        pusher=pusher,
        at=int(time.time()),
    )


def _is_stored(path: Candidate, fresh: Mapping[str, FreshNar]) -> bool:
    """Whether its NAR, known by its hash alone, came earlier."""
    return path.file is None and path.nar_hash.nix32 not in fresh


def _relied_on(cache: ServedCache, path: Candidate) -> set[str]:
    """What has to be there when it is published."""
    return set() if cache.references is ReferencePolicy.ANY else _references(path)


def _references(path: Candidate) -> set[str]:
    """Hash parts of all that it refers to but itself."""
    return {reference.hash_part for reference in path.references if reference != path.store_path}


def _record(cache: ServedCache, info: narinfo.NarInfo, nar: NarRecord) -> PathRecord:
    """Raises TooLarge for a narinfo that nobody here would read again."""
    text = narinfo.render(info)
    if len(text) > narinfo.DEFAULT_LIMIT:
        raise TooLarge(
            f"{info.store_path} has {len(info.references)} references: its narinfo would have {len(text)} bytes, at"
            f" most {narinfo.DEFAULT_LIMIT} are taken"
        )
    return PathRecord(
        cache=cache.name,
        hash_part=info.store_path.hash_part,
        name=info.store_path.name,
        narinfo=text,
        nar_key=nar.key,
        nar_hash=nar.nar_hash,
        nar_size=nar.nar_size,
        file_size=nar.file_size,
        references=tuple(path.base_name for path in info.references),
        deriver=info.deriver.base_name if info.deriver else None,
        ca=info.ca.render() if info.ca else None,
        registered_at=int(time.time()),
    )
