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
from cachesrv.services.completing import Completing
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
class Sent:
    """What is to become a NAR: `parts`, in order, by their sha256 (base-16) or, where the client wrote them to storage
    itself, by their tags and, if they are known, their `md5` (base-16). `size`: bytes of the only one, where that was
    written there in one piece.
    """

    parts: Sequence[str]
    md5: Sequence[str] = ()
    size: int = 0

    def check(self) -> None:
        """Raises BadInput when there is no such NAR."""
        if not 1 <= len(self.parts) <= MAX_PARTS:
            raise BadInput(f"a NAR of {len(self.parts)} parts: it has 1 to {MAX_PARTS}")
        if len(self.md5) not in {0, len(self.parts)}:
            raise BadInput(f"the MD5 of {len(self.md5)} parts of a NAR that has {len(self.parts)}")
        if self.size and not len(self.parts) == len(self.md5) == 1:
            raise BadInput("a NAR in one piece has one part, which comes with its MD5")


@dataclass(frozen=True, slots=True)
class Missing:
    """Not all parts are there: these numbers are not."""

    numbers: list[int]


@dataclass(frozen=True, slots=True)
class Known:
    """The NAR is there."""


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
        self._completing: Completing[NarRecord | Missing] = Completing()
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

    async def sign_whole(
        self, cache: ServedCache, upload: str, nar_hash: Hash, size: int, md5: bytes
    ) -> SignedPut | Known | None:
        """How the client can write the NAR to storage itself in one piece, as a file of so many bytes with this MD5.
        None where that is not offered, or not for so many bytes, or there is no room. Raises BadInput, TooLarge,
        StoreError.
        """
        place = Place.of(cache.name, upload)
        self._ingest.check_size(size)
        if await self._ingest.known(cache, file_name(nar_hash)):
            return Known()
        await self._disk_room.for_nar()
        if self._direct is None or not self.offers_direct or size > self._direct.largest_piece:
            return None
        if not await self._room.takes_piece(size):
            return None
        return await self._direct.sign_whole(place, size, md5)

    async def complete(
        self, cache: ServedCache, upload: str, nar_hash: Hash, sent: Sent, *, patience: float
    ) -> NarRecord | Missing | Verifying:
        """Make the NAR of what was sent; wait for it for `patience` seconds. When it is there, its parts are not any
        more.

        Raises BadInput when they do not make up this NAR: then they are gone, too. Conflict when the upload is for
        another NAR, StoreError.
        """
        place = Place.of(cache.name, upload)
        sent.check()
        begun = None if sent.size else await self._store.begun(place)
        _check_nar(place, begun, nar_hash)
        key = (place, nar_hash, *((*sent.parts, *sent.md5, sent.size) if sent.size else ()))
        if begun or (self._completing.has_failed(key) and await self._is_there_whole(place, sent)):
            # anew, since what was wrong is removed
            self._completing.forget_failure(key)
        work = partial(self._complete, cache, place, nar_hash, sent)
        outcome = await self._completing.outcome(key, work, patience=patience)
        if outcome is None:
            return Verifying(self._through.progress(place) + (self._direct.progress(place) if self._direct else 0))
        return outcome

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
        await self._completing.close()
        await self._through.close()

    async def _amount(self) -> Amount:
        amount = await self._store.amount()
        return Amount(amount.uploads, amount.size + (await self._direct.announced() if self._direct else 0))

    async def _complete(self, cache: ServedCache, place: Place, nar_hash: Hash, sent: Sent) -> NarRecord | Missing:
        record = await self._ingest.known(cache, file_name(nar_hash))
        if record is None:
            made = await self._make(cache, place, nar_hash, sent)
            if isinstance(made, Missing):
                return made
            record = made
        try:
            await self._remove_sent(place, sent)
        except StoreError as error:
            # They go with a sweep.
            _log.warning("the parts of a NAR could not be removed", upload=place.upload, error=str(error))
        return record

    async def _make(self, cache: ServedCache, place: Place, nar_hash: Hash, sent: Sent) -> NarRecord | Missing:
        try:
            if sent.size:
                return await self._make_whole(cache, place, nar_hash, sent)
            return await self._make_of_parts(cache, place, nar_hash, sent)
        except (NotFound, StoreUnavailable) as error:
            # Another process may have been quicker.
            if record := await self._ingest.known(cache, file_name(nar_hash)):
                return record
            if isinstance(error, StoreUnavailable):
                raise
            return Missing([*range(1, len(sent.parts) + 1)])
        except BadInput:
            await self._remove_sent(place, sent)
            raise

    async def _make_of_parts(self, cache: ServedCache, place: Place, nar_hash: Hash, sent: Sent) -> NarRecord | Missing:
        begun = await self._store.begun(place)
        if begun and begun.staged and self._direct:
            staged = await self._direct.complete(place, begun, sent.parts, sent.md5)
            if isinstance(staged, list):
                return Missing(staged)
            return await self._direct.make(cache, place, nar_hash, staged)
        missing = await self._through.missing(place, sent.parts)
        return Missing(missing) if missing else await self._through.make(cache, place, nar_hash, sent.parts)

    async def _make_whole(self, cache: ServedCache, place: Place, nar_hash: Hash, sent: Sent) -> NarRecord | Missing:
        staged = await self._direct.whole(place, sent.size, sent.md5[0]) if self._direct else None
        if self._direct is None or staged is None or staged.parts[0].tag != sent.parts[0]:
            return Missing([1])
        return await self._direct.make(cache, place, nar_hash, staged)

    async def _is_there_whole(self, place: Place, sent: Sent) -> bool:
        return self._direct is not None and await self._direct.has_whole(place, sent.size, sent.md5[0])

    async def _remove_sent(self, place: Place, sent: Sent) -> None:
        if sent.size and self._direct:
            await self._direct.forget_whole(place, sent.size, sent.md5[0])
        else:
            await self._remove(place)

    async def _remove(self, place: Place) -> None:
        begun = await self._store.begun(place)
        if begun and begun.staged and self._direct:
            await self._direct.abort(place, begun.staged)
        await self._store.remove(place)


def _check_nar(place: Place, begun: Begun | None, nar_hash: Hash) -> None:
    """Raises Conflict when an upload is for another NAR."""
    if begun and begun.nar_hash != nar_hash.nix32:
        raise Conflict(f"the upload {place.upload} is for another NAR, {begun.nar_hash}: choose another name")
