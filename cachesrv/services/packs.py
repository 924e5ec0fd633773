"""Many small NARs at once: each is judged as one that comes alone, and all are stored together.

What packs are for is that the paths of the NARs are published at once: their listings go straight to storage, and are
kept in the catalog only for NARs whose paths come later.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from cachesrv.budget import Budget
from cachesrv.catalog.base import NarRecord
from cachesrv.errors import BadInput, CachesrvError, Mismatch, StoreError, TooLarge
from cachesrv.nix.compression import SUFFIXES
from cachesrv.nix.seekable import compress_frame
from cachesrv.pack import LIMITS, largest
from cachesrv.services.disk_room import DiskRoom
from cachesrv.services.ingest import DEFAULT_LEASE
from cachesrv.services.publish import FreshNar
from cachesrv.services.verify_nar import verify_small

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping, Sequence

    from cachesrv.catalog.base import Catalog
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.candidate import Candidate
    from cachesrv.services.ingest import Ingest
    from cachesrv.services.publish import Outcome, Publish
    from cachesrv.storage.base import ObjectStore
    from cachesrv.telemetry import Metrics

_COMPRESSION = "zstd"
_SUFFIX = f".nar{SUFFIXES[_COMPRESSION]}"
_MEMORY = 64 * 1024 * 1024
"""Bytes of all packs that are in memory, most of them on their way in."""

_Judged = FreshNar | CachesrvError
"""A NAR, or why it is none."""


@dataclass(frozen=True, slots=True)
class SentNar:
    """A NAR as it came: what its sender says of it (`sha256:<nix32>`, bytes), and the zstd-compressed file."""

    nar_hash: str
    nar_size: int
    file: bytes


class Packs:
    """Takes packs in, and works on at most `parallel` at a time; `max_nar_size` in bytes, of each NAR, 0 for no limit
    of its own.
    """

    def __init__(
        self,
        storage: ObjectStore,
        catalog: Catalog,
        ingest: Ingest,
        publish: Publish,
        metrics: Metrics,
        *,
        max_nar_size: int = 0,
        parallel: int = 4,
        lease: int = DEFAULT_LEASE,
        room: DiskRoom | None = None,
    ) -> None:
        self._room = room or DiskRoom.unlimited()
        self._storage = storage
        self._catalog = catalog
        self._ingest = ingest
        self._publish = publish
        self._metrics = metrics
        self._lease = lease
        self._slots = asyncio.Semaphore(parallel)
        self._memory = Budget(_MEMORY)
        self.limits = msgspec.structs.replace(LIMITS, nar_size=min(LIMITS.nar_size, max_nar_size or LIMITS.nar_size))
        self.largest = largest(self.limits)
        """Bytes of a pack, at most."""

    @asynccontextmanager
    async def memory(self, size: int) -> AsyncIterator[None]:
        """For a pack of so many bytes, from the first of them on: who sends slowly takes no more than that."""
        lease = self._memory.lease()
        await lease.take(min(size, self.largest))
        try:
            yield
        finally:
            lease.close()

    async def receive(
        self, cache: ServedCache, nars: Sequence[SentNar], paths: Sequence[Candidate], pusher: str
    ) -> tuple[list[Outcome], list[Outcome]]:
        """Store NARs, then publish paths as `Publish.many` does: the outcomes of both, in their order. Raises
        StoreError when the store fails for all of them; any of them may be there then.
        """
        async with self._slots:
            return await self._receive(cache, nars, paths, pusher)

    async def _receive(
        self, cache: ServedCache, nars: Sequence[SentNar], paths: Sequence[Candidate], pusher: str
    ) -> tuple[list[Outcome], list[Outcome]]:
        await self._room.for_nar(sum(len(sent.file) for sent in nars))
        of_paths = {path.nar_hash.nix32 for path in paths}
        judged = await asyncio.to_thread(self._judge_all, cache, nars, of_paths)
        files = {one.record.key: sent.file for sent, one in zip(nars, judged, strict=True) if isinstance(one, FreshNar)}
        stored = await self._store(cache, files, {one.record.key: one for one in judged if isinstance(one, FreshNar)})
        outcomes = [stored[one.record.key] if isinstance(one, FreshNar) else one for one in judged]
        fresh = {one.record.nar_hash: one for one in stored.values() if isinstance(one, FreshNar)}
        published = await self._publish.many(cache, paths, pusher, fresh)
        return [one if isinstance(one, CachesrvError) else None for one in outcomes], published

    def _judge_all(self, cache: ServedCache, nars: Sequence[SentNar], of_paths: Collection[str]) -> list[_Judged]:
        now = int(time.time())
        return [self._judge(cache, sent, now, keep_listing=sent.nar_hash not in of_paths) for sent in nars]

    def _judge(self, cache: ServedCache, sent: SentNar, now: int, *, keep_listing: bool) -> _Judged:
        if sent.nar_size > self.limits.nar_size:
            return TooLarge(f"{sent.nar_size} bytes are more than the {self.limits.nar_size} of a NAR in a pack")
        try:
            found = verify_small(sent.file, sent.nar_size)
        except BadInput as error:
            return error
        nar_hash = found.nar_hash.nix32
        if nar_hash != sent.nar_hash:
            return Mismatch(f"the NAR has the hash {nar_hash}, not {sent.nar_hash[:200]}")
        record = NarRecord(
            key=cache.key(f"nar/{nar_hash.removeprefix('sha256:')}{_SUFFIX}"),
            scope=cache.prefix,
            compression=_COMPRESSION,
            file_hash=found.file_hash.nix32,
            file_size=len(sent.file),
            nar_hash=nar_hash,
            nar_size=sent.nar_size,
            listing=compress_frame(found.listing) if keep_listing and found.listing else None,
            verified_at=now,
        )
        return FreshNar(record, found.listing)

    async def _store(
        self, cache: ServedCache, files: Mapping[str, bytes], nars: Mapping[str, FreshNar]
    ) -> dict[str, _Judged]:
        """What is there afterwards, by key, or why not."""
        fence = await self._catalog.fence(files)
        created = await self._storage.put_many(files)
        records = [nars[key].record for key in created]
        if await self._catalog.put_nars(records, leased_until=int(time.time()) + self._lease) != fence:
            await self._ingest.check_still_there(created)
        self._metrics.add("nars_stored", len(nars))
        self._metrics.add("received_bytes", sum(map(len, files.values())))
        return {key: nar if key in created else await self._found(cache, nar) for key, nar in nars.items()}

    async def _found(self, cache: ServedCache, sent: FreshNar) -> _Judged:
        """What was there already in the place of this one."""
        record = sent.record
        try:
            there = await self._ingest.there(cache, record.key.rpartition("/")[2], _COMPRESSION, record.nar_hash)
        except StoreError:
            raise
        except CachesrvError as error:
            return error
        return FreshNar(there, sent.listing)
