"""NARs that are sent in parts: taken up after any interruption, checked as a whole before they count.

What is here of a NAR is what storage has (`cachesrv.services.part_store`): nothing of it is known only to this process.
The parts come through the server, or straight into storage where that is offered and the client can reach it.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import structlog
from msgspec.structs import replace

from cachesrv.api import MAX_PARTS
from cachesrv.errors import BadInput, Conflict, NotFound, StoreError, StoreUnavailable, TooLarge
from cachesrv.nix.seekable import largest_file
from cachesrv.services.disk_room import DiskRoom
from cachesrv.services.part_store import Amount, Begun, Part, PartStore, Place, Staged
from cachesrv.services.through import Through, file_name
from cachesrv.services.upload_room import Room

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Sequence

    from cachesrv.catalog.base import NarRecord
    from cachesrv.nix.hashes import Hash
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.direct import Direct
    from cachesrv.services.ingest import Ingest
    from cachesrv.storage.base import ArrivedPart, SignedPut

_log = structlog.get_logger()

_REMEMBERED = 60.0
"""Seconds for which it is remembered that a NAR could not be made of its parts."""
_NO_UPLOAD = "there is no such upload: begin it, or look whether the NAR is there by now"


@dataclass(frozen=True, slots=True)
class Limits:
    """part_size: bytes of a part that comes through the server, at most; size: bytes of all parts together, about;
    uploads: how many there may be, about; seconds: for which an upload is kept to which nothing is added.
    """

    part_size: int = 32 * 2**20
    size: int = 256 * 2**30
    uploads: int = 10_000
    seconds: int = 3 * 86400


@dataclass(frozen=True, slots=True)
class DirectParts:
    """Those that are there of a NAR that its client writes to storage itself: parts but the last have `least` bytes or
    more, there are at most `most`.
    """

    parts: list[ArrivedPart]
    least: int
    most: int


@dataclass(frozen=True, slots=True)
class Missing:
    """Not all parts are there: these numbers are not."""

    numbers: list[int]


@dataclass(frozen=True, slots=True)
class Verifying:
    """It is under way; so many bytes have been read."""

    read: int


class Uploads:
    """See the module. To be used from one event loop."""

    def __init__(
        self,
        store: PartStore,
        ingest: Ingest,
        limits: Limits,
        direct: Direct | None = None,
        *,
        disk_room: DiskRoom | None = None,
    ) -> None:
        self.limits = limits
        self._disk_room = disk_room or DiskRoom.unlimited()
        self._store = store
        self._ingest = ingest
        self._through = Through(store, ingest)
        self._direct = direct
        self._completing: dict[Place, asyncio.Task[NarRecord | Missing]] = {}
        self._room = Room(self._amount, size=limits.size, uploads=limits.uploads)

    @property
    def offers_direct(self) -> bool:
        """Whether clients may write to storage themselves."""
        return self._direct is not None and self._direct.offered

    async def begin(
        self, cache: ServedCache, upload: str, nar_hash: Hash, begun: Begun, *, direct: bool = False
    ) -> list[Part] | DirectParts | None:
        """The parts that are there already, None when the whole NAR is. `begun` is what is to be noted; `direct`: the
        client can write to storage itself.

        Raises BadInput, TooLarge, Conflict when an upload of this name is for another NAR, StoreError.
        """
        place = Place.of(cache.name, upload)
        self._ingest.check_size(begun.nar_size)
        if await self._ingest.known(cache, file_name(nar_hash)):
            return None
        await self._disk_room.for_nar()
        before = await self._store.begun(place)
        _check_nar(place, before, nar_hash)
        if before is None:
            await self._room.for_upload()
        if direct and (there := await self._begin_direct(place, begun, before.staged if before else None)):
            return there
        if before and before.staged and self._direct:
            await self._direct.abort(place, before.staged)
        await self._store.begin(place, begun)
        return await self._through.begin(cache, place, nar_hash)

    async def _begin_direct(self, place: Place, begun: Begun, staged: Staged | None) -> DirectParts | None:
        """None where that is not offered, or there is no room for all that it may become."""
        if self._direct is None or not self.offers_direct:
            return None
        parts = await self._direct.parts(place, staged) if staged else None
        if staged is None or parts is None:
            size = largest_file(begun.nar_size)
            if not begun.nar_size or not await self._room.takes(size):
                return None
            staged, parts = await self._direct.begin(place, size), []
        await self._store.begin(place, replace(begun, staged=staged))
        self._direct.remember(place, staged)
        return DirectParts(parts, self._direct.least, self._direct.most)

    async def begun(self, cache: ServedCache, uploads: Sequence[str]) -> list[str]:
        """Those of these names that there are, in their order. Raises BadInput, StoreError."""
        places = [Place.of(cache.name, upload) for upload in uploads]
        there = await asyncio.gather(*map(self._store.is_begun, places))
        return [place.upload for place, begun in zip(places, there, strict=True) if begun]

    async def receive(self, cache: ServedCache, upload: str, part: Part, chunks: AsyncIterable[bytes]) -> None:
        """Store a part. It is there, and stays, when this returns.

        Raises NotFound when there is no such upload, BadInput, Mismatch when the part has another sha256, StoreError.
        """
        place = Place.of(cache.name, upload)
        if not 1 <= part.number <= MAX_PARTS:
            raise BadInput(f"there is no part {part.number}: they are counted from 1 to {MAX_PARTS}")
        if not 0 < part.size <= self.limits.part_size:
            raise TooLarge(f"a part of {part.size} bytes: it has to have 1 to {self.limits.part_size}")
        if not await self._store.is_begun(place):
            raise NotFound(_NO_UPLOAD)
        await self._room.for_part(part.size)
        await self._disk_room.for_nar(part.size)
        await self._through.receive(cache, place, part, chunks)

    async def sign(self, cache: ServedCache, upload: str, number: int, md5: bytes) -> SignedPut:
        """How the client can write the part with this MD5 to storage itself. Raises BadInput, NotFound, StoreError."""
        place = Place.of(cache.name, upload)
        if self._direct is None:
            raise NotFound(_NO_UPLOAD)
        return await self._direct.sign(place, number, md5)

    async def complete(
        self,
        cache: ServedCache,
        upload: str,
        nar_hash: Hash,
        parts: Sequence[str],
        md5: Sequence[str] = (),
        *,
        patience: float,
    ) -> NarRecord | Missing | Verifying:
        """Make the NAR of its parts, in order, given by their sha256 (base-16) or, where the client wrote them itself,
        by their tags and, if they are known, their `md5`; wait for it for `patience` seconds. When it is there, its
        parts are not any more.

        Raises BadInput when they do not make up this NAR: then they are gone, too. Conflict when the upload is for
        another NAR, StoreError.
        """
        place = Place.of(cache.name, upload)
        if not 1 <= len(parts) <= MAX_PARTS:
            raise BadInput(f"a NAR of {len(parts)} parts: it has 1 to {MAX_PARTS}")
        if len(md5) not in {0, len(parts)}:
            raise BadInput(f"the MD5 of {len(md5)} parts of a NAR that has {len(parts)}")
        begun = await self._store.begun(place)
        _check_nar(place, begun, nar_hash)
        before = self._completing.get(place)
        if before and before.done() and begun:  # anew, since what was wrong is forgotten with its upload
            self._forget(place, before)
        if place not in self._completing:
            task = asyncio.create_task(self._complete(cache, place, nar_hash, list(parts), md5))
            self._completing[place] = task
            task.add_done_callback(partial(self._completed, place))
        task = self._completing[place]
        await asyncio.wait([task], timeout=patience)
        if not task.done():
            return Verifying(self._through.progress(place) + (self._direct.progress(place) if self._direct else 0))
        return task.result()

    async def abort(self, cache: ServedCache, upload: str) -> None:
        """Forget its parts; nothing happens when there are none. Raises BadInput, StoreError."""
        place = Place.of(cache.name, upload)
        await self._through.abort(place)
        await self._remove(place)

    async def sweep(self) -> int:
        """Forget uploads to which nothing was added for long; how many there were. Raises StoreError."""
        before = time.time() - self.limits.seconds
        removed = 0
        for place in await self._store.silent_since(before):
            begun = await self._store.begun(place)
            staged = begun.staged if begun else None
            if staged is None or self._direct is None or await self._direct.is_silent(place, staged, before):
                await self._remove(place)
                removed += 1
        return removed + (await self._direct.sweep(older_than=self.limits.seconds) if self._direct else 0)

    async def close(self) -> None:
        """Stop what is under way; the parts stay."""
        for task in self._completing.values():
            task.cancel()
        await asyncio.gather(*self._completing.values(), return_exceptions=True)
        await self._through.close()

    async def _amount(self) -> Amount:
        amount = await self._store.amount()
        return Amount(amount.uploads, amount.size + (await self._direct.announced() if self._direct else 0))

    async def _complete(
        self, cache: ServedCache, place: Place, nar_hash: Hash, parts: list[str], md5: Sequence[str]
    ) -> NarRecord | Missing:
        record = await self._ingest.known(cache, file_name(nar_hash))
        if record is None:
            made = await self._make(cache, place, nar_hash, parts, md5)
            if isinstance(made, Missing):
                return made
            record = made
        try:
            await self._remove(place)
        except StoreError as error:
            # They go with a sweep.
            _log.warning("the parts of a NAR could not be removed", upload=place.upload, error=str(error))
        return record

    async def _make(
        self, cache: ServedCache, place: Place, nar_hash: Hash, parts: list[str], md5: Sequence[str]
    ) -> NarRecord | Missing:
        begun = await self._store.begun(place)
        try:
            if begun and begun.staged and self._direct:
                staged = await self._direct.complete(place, begun, parts, md5)
                if isinstance(staged, list):
                    return Missing(staged)
                return await self._direct.make(cache, place, nar_hash, staged)
            missing = await self._through.missing(place, parts)
            return Missing(missing) if missing else await self._through.make(cache, place, nar_hash, parts)
        except (NotFound, StoreUnavailable) as error:
            # Another process may have been quicker.
            if record := await self._ingest.known(cache, file_name(nar_hash)):
                return record
            if isinstance(error, StoreUnavailable):
                raise
            return Missing([*range(1, len(parts) + 1)])
        except BadInput:
            await self._remove(place)
            raise

    async def _remove(self, place: Place) -> None:
        begun = await self._store.begun(place)
        if begun and begun.staged and self._direct:
            await self._direct.abort(place, begun.staged)
        await self._store.remove(place)

    def _completed(self, place: Place, task: asyncio.Task[NarRecord | Missing]) -> None:
        """Who asks again is to hear what was wrong, if anything was."""
        if not task.cancelled() and isinstance(task.exception(), BadInput):
            asyncio.get_running_loop().call_later(_REMEMBERED, self._forget, place, task)
        else:
            self._forget(place, task)

    def _forget(self, place: Place, task: asyncio.Task[NarRecord | Missing]) -> None:
        if self._completing.get(place) is task:
            del self._completing[place]


def _check_nar(place: Place, begun: Begun | None, nar_hash: Hash) -> None:
    """Raises Conflict when an upload is for another NAR."""
    if begun and begun.nar_hash != nar_hash.nix32:
        raise Conflict(f"the upload {place.upload} is for another NAR, {begun.nar_hash}: choose another name")
