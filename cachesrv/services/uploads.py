"""NARs that are sent in parts: taken up after any interruption, checked as a whole before they count.

What is here of a NAR is what storage has (`cachesrv.services.part_store`); nothing of it is known only to this process,
and several processes may take parts of one NAR. What this process adds is speed: it begins to put a NAR together while
its parts arrive.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING

import structlog

from cachesrv.api import MAX_PARTS
from cachesrv.errors import BadInput, Conflict, Mismatch, NotFound, StoreError, TooLarge
from cachesrv.nix.compression import SUFFIXES
from cachesrv.nix.hashes import Hash
from cachesrv.services.assembly import Assembly, GivenUp
from cachesrv.services.in_thread import coalesced
from cachesrv.services.part_store import Begun, Part, PartStore, Place
from cachesrv.services.upload_room import Room

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence

    from cachesrv.catalog.base import NarRecord
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.ingest import Ingest
    from cachesrv.storage.base import ObjectStore

_log = structlog.get_logger()

_ASSEMBLIES = 8
"""NARs that are put together while their parts arrive; others are when all of theirs are there."""
_PATIENCE = 300.0
"""Seconds that one of them waits for a part."""
_RECEIVING = 32
"""Parts that are received at the same time, each of which may be in memory on its way to a bucket."""
_REMEMBERED = 60.0
"""Seconds for which it is remembered that a NAR could not be made of its parts."""


@dataclass(frozen=True, slots=True)
class Limits:
    """part_size: bytes of a part, at most; size: bytes of the parts of all uploads together, about; uploads: how many
    there may be, about; seconds: for which an upload is kept to which nothing is added.
    """

    part_size: int = 32 * 2**20
    size: int = 256 * 2**30
    uploads: int = 10_000
    seconds: int = 3 * 86400


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

    def __init__(self, storage: ObjectStore, ingest: Ingest, limits: Limits) -> None:
        self.limits = limits
        self._store = PartStore(storage)
        self._ingest = ingest
        self._receiving = asyncio.Semaphore(_RECEIVING)
        self._assemblies: dict[Place, Assembly] = {}
        self._completing: dict[Place, asyncio.Task[NarRecord | Missing]] = {}
        self._room = Room(self._store, size=limits.size, uploads=limits.uploads)

    async def begin(
        self, cache: ServedCache, upload: str, nar_hash: Hash, nar_size: int, pusher: str
    ) -> list[Part] | None:
        """The parts that are there already, None when the whole NAR is.

        Raises BadInput, TooLarge, Conflict when an upload of this name is for another NAR, StoreError.
        """
        place = Place.of(cache.name, upload)
        self._ingest.check_size(nar_size)
        if await self._ingest.known(cache, _file_name(nar_hash)):
            return None
        begun = await self._store.begun(place)
        if begun is None:
            await self._room.for_upload()
        elif begun.nar_hash != nar_hash.nix32:
            raise Conflict(f"the upload {upload} is for another NAR, {begun.nar_hash}: choose another name")
        await self._store.begin(place, Begun(nar_hash.nix32, nar_size, pusher))
        completing = self._completing.get(place)
        if completing and completing.done():
            self._forget(place, completing)
        parts = await self._store.parts(place)
        if parts:
            self._assemble_early(cache, place, nar_hash)
        if assembly := self._assemblies.get(place):
            for number, digest in _by_number(parts).items():
                assembly.arrived(number, digest)
        return parts

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
            raise NotFound("there is no such upload: begin it, or look whether the NAR is there by now")
        await self._room.for_part(part.size)
        async with self._receiving:
            await self._write(place, part, chunks)
        await self._arrived(cache, place, part)

    async def _write(self, place: Place, part: Part, chunks: AsyncIterable[bytes]) -> None:
        async with self._store.writer(place, part) as writer:
            hasher, received = sha256(), 0
            async for piece in coalesced(chunks):
                received += len(piece)
                if received > part.size:
                    raise BadInput(f"part {part.number} has more than the {part.size} bytes that were stated")
                await asyncio.to_thread(hasher.update, piece)
                await writer.write(piece)
            if received != part.size:
                raise BadInput(f"part {part.number} has {received} bytes, {part.size} were stated")
            if hasher.hexdigest() != part.sha256:
                raise Mismatch(f"part {part.number} is not what its Content-Digest says: it was altered on the way")
            await writer.commit()

    async def complete(
        self, cache: ServedCache, upload: str, nar_hash: Hash, parts: Sequence[str], *, patience: float
    ) -> NarRecord | Missing | Verifying:
        """Make the NAR of parts with these sha256 (base-16), in order, and wait for it for `patience` seconds. When it
        is there, its parts are not any more.

        Raises BadInput when they do not make up this NAR: then they are gone, too. StoreError.
        """
        place = Place.of(cache.name, upload)
        if not 1 <= len(parts) <= MAX_PARTS:
            raise BadInput(f"a NAR of {len(parts)} parts: it has 1 to {MAX_PARTS}")
        if place not in self._completing:
            task = asyncio.create_task(self._complete(cache, place, nar_hash, list(parts)))
            self._completing[place] = task
            task.add_done_callback(partial(self._completed, place))
        task = self._completing[place]
        await asyncio.wait([task], timeout=patience)
        if not task.done():
            assembly = self._assemblies.get(place)
            return Verifying(assembly.read if assembly else 0)
        return task.result()

    async def abort(self, cache: ServedCache, upload: str) -> None:
        """Forget its parts; nothing happens when there are none. Raises BadInput, StoreError."""
        place = Place.of(cache.name, upload)
        if assembly := self._assemblies.pop(place, None):
            await assembly.close()
        await self._store.remove(place)

    async def sweep(self) -> int:
        """Forget uploads to which nothing was added for long; how many there were. Raises StoreError."""
        places = await self._store.silent_since(time.time() - self.limits.seconds)
        for place in places:
            await self._store.remove(place)
        return len(places)

    async def close(self) -> None:
        """Stop what is under way; the parts stay."""
        for task in self._completing.values():
            task.cancel()
        await asyncio.gather(*self._completing.values(), return_exceptions=True)
        await asyncio.gather(*(assembly.close() for assembly in self._assemblies.values()))

    async def _arrived(self, cache: ServedCache, place: Place, part: Part) -> None:
        if place not in self._assemblies and part.number == 1 and (begun := await self._store.begun(place)):
            self._assemble_early(cache, place, Hash.parse(begun.nar_hash))
        if assembly := self._assemblies.get(place):
            assembly.arrived(part.number, part.sha256)

    def _assemble_early(self, cache: ServedCache, place: Place, nar_hash: Hash) -> None:
        """Unless it has begun, or too many have."""
        if place not in self._assemblies and len(self._assemblies) < _ASSEMBLIES:
            self._assemble(cache, place, nar_hash)

    def _assemble(self, cache: ServedCache, place: Place, nar_hash: Hash) -> Assembly:
        async def receive(chunks: AsyncIterator[bytes]) -> NarRecord:
            return await self._ingest.receive(cache, _file_name(nar_hash), chunks, None)

        assembly = Assembly(partial(self._store.read, place), receive, patience=_PATIENCE)
        self._assemblies[place] = assembly
        assembly.result.add_done_callback(lambda _: self._let_go(place, assembly))
        return assembly

    def _let_go(self, place: Place, assembly: Assembly) -> None:
        if self._assemblies.get(place) is assembly:
            del self._assemblies[place]

    async def _complete(
        self, cache: ServedCache, place: Place, nar_hash: Hash, parts: list[str]
    ) -> NarRecord | Missing:
        record = await self._ingest.known(cache, _file_name(nar_hash))
        if record is None:
            if missing := await self._missing(place, parts):
                return Missing(missing)
            try:
                record = await self._put_together(cache, place, nar_hash, parts)
            except NotFound:
                # Somebody has removed them meanwhile: another process, maybe, that was quicker.
                record = await self._ingest.known(cache, _file_name(nar_hash))
                if record is None:
                    return Missing(await self._missing(place, parts))
            except BadInput:
                await self._remove(place)
                raise
        await self._remove(place)
        return record

    async def _missing(self, place: Place, parts: Sequence[str]) -> list[int]:
        there = {(part.number, part.sha256) for part in await self._store.parts(place)}
        return [number for number, digest in enumerate(parts, 1) if (number, digest) not in there]

    async def _put_together(self, cache: ServedCache, place: Place, nar_hash: Hash, parts: list[str]) -> NarRecord:
        assembly = self._assemblies.get(place)
        if assembly and assembly.follow(parts):
            with suppress(GivenUp):  # just before it heard of these
                return await assembly.result
        if assembly:
            await assembly.close()
        assembly = self._assemble(cache, place, nar_hash)
        assembly.follow(parts)
        return await assembly.result

    async def _remove(self, place: Place) -> None:
        """What stays because this fails goes with a sweep."""
        try:
            await self._store.remove(place)
        except StoreError as error:
            _log.warning("the parts of a NAR could not be removed", upload=place.upload, error=str(error))

    def _completed(self, place: Place, task: asyncio.Task[NarRecord | Missing]) -> None:
        """Who asks again is to hear what was wrong, if anything was."""
        if not task.cancelled() and isinstance(task.exception(), BadInput):
            asyncio.get_running_loop().call_later(_REMEMBERED, self._forget, place, task)
        else:
            self._forget(place, task)

    def _forget(self, place: Place, task: asyncio.Task[NarRecord | Missing] | None) -> None:
        if task and self._completing.get(place) is task:
            del self._completing[place]


def _file_name(nar_hash: Hash) -> str:
    return f"{nar_hash.bare_nix32}.nar{SUFFIXES['zstd']}"


def _by_number(parts: Sequence[Part]) -> Mapping[int, str]:
    """Those parts of which there is but one of their number."""
    digests: dict[int, str] = {}
    for part in parts:
        digests[part.number] = "" if part.number in digests else part.sha256
    return {number: digest for number, digest in digests.items() if digest}
