"""Parts of NARs that come through the server: stored one by one, and put together while they arrive.

What is known only to this process is speed: other processes take parts of the same NAR, and can complete it.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING

from cachesrv.errors import BadInput, Mismatch
from cachesrv.nix.compression import SUFFIXES
from cachesrv.nix.hashes import Hash
from cachesrv.services.assembly import Assembly, GivenUp
from cachesrv.services.in_thread import coalesced

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence

    from cachesrv.catalog.base import NarRecord
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.ingest import Ingest
    from cachesrv.services.part_store import Part, PartStore, Place

_ASSEMBLIES = 8
"""NARs that are put together while their parts arrive; others are when all of theirs are there."""
_PATIENCE = 300.0
"""Seconds that one of them waits for a part."""
_RECEIVING = 32
"""Parts that are received at the same time, each of which may be in memory on its way to a bucket."""


def file_name(nar_hash: Hash) -> str:
    """What a NAR is called that comes in parts."""
    return f"{nar_hash.bare_nix32}.nar{SUFFIXES['zstd']}"


class Through:
    """All of it raises StoreError."""

    def __init__(self, parts: PartStore, ingest: Ingest) -> None:
        self._parts = parts
        self._ingest = ingest
        self._receiving = asyncio.Semaphore(_RECEIVING)
        self._assemblies: dict[Place, Assembly] = {}

    async def begin(self, cache: ServedCache, place: Place, nar_hash: Hash) -> list[Part]:
        """The parts that are there."""
        parts = await self._parts.parts(place)
        if parts:
            self._assemble_early(cache, place, nar_hash)
        if assembly := self._assemblies.get(place):
            for number, digest in _by_number(parts).items():
                assembly.arrived(number, digest)
        return parts

    async def receive(self, cache: ServedCache, place: Place, part: Part, chunks: AsyncIterable[bytes]) -> None:
        """Store a part. It is there, and stays, when this returns. Raises BadInput, Mismatch."""
        async with self._receiving:
            await self._write(place, part, chunks)
        if place not in self._assemblies and part.number == 1 and (begun := await self._parts.begun(place)):
            self._assemble_early(cache, place, Hash.parse(begun.nar_hash))
        if assembly := self._assemblies.get(place):
            assembly.arrived(part.number, part.sha256)

    async def missing(self, place: Place, digests: Sequence[str]) -> list[int]:
        """Numbers of the parts with these sha256 (base-16), in order, that are not there."""
        there = {(part.number, part.sha256) for part in await self._parts.parts(place)}
        return [number for number, digest in enumerate(digests, 1) if (number, digest) not in there]

    async def make(self, cache: ServedCache, place: Place, nar_hash: Hash, digests: Sequence[str]) -> NarRecord:
        """The NAR out of these parts. Raises BadInput when they are something else, NotFound when one has gone."""
        assembly = self._assemblies.get(place)
        if assembly and assembly.follow(digests):
            with suppress(GivenUp):  # just before it heard of these
                return await assembly.made()
        if assembly:
            await assembly.close()
        assembly = self._assemble(cache, place, nar_hash)
        assembly.follow(digests)
        return await assembly.made()

    def progress(self, place: Place) -> int:
        """Bytes of its parts that have been read."""
        assembly = self._assemblies.get(place)
        return assembly.read if assembly else 0

    async def abort(self, place: Place) -> None:
        """Nothing is to be made of its parts."""
        if assembly := self._assemblies.pop(place, None):
            await assembly.close()

    async def close(self) -> None:
        """Stop what is under way."""
        await asyncio.gather(*(assembly.close() for assembly in self._assemblies.values()))

    async def _write(self, place: Place, part: Part, chunks: AsyncIterable[bytes]) -> None:
        async with self._parts.writer(place, part) as writer:
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

    def _assemble_early(self, cache: ServedCache, place: Place, nar_hash: Hash) -> None:
        """Unless it has begun, or too many have."""
        if place not in self._assemblies and len(self._assemblies) < _ASSEMBLIES:
            self._assemble(cache, place, nar_hash)

    def _assemble(self, cache: ServedCache, place: Place, nar_hash: Hash) -> Assembly:
        async def receive(chunks: AsyncIterator[bytes]) -> NarRecord:
            return await self._ingest.receive(cache, file_name(nar_hash), chunks, None)

        assembly = Assembly(partial(self._parts.read, place), receive, patience=_PATIENCE)
        self._assemblies[place] = assembly
        assembly.result.add_done_callback(lambda _: self._let_go(place, assembly))
        return assembly

    def _let_go(self, place: Place, assembly: Assembly) -> None:
        if self._assemblies.get(place) is assembly:
            del self._assemblies[place]


def _by_number(parts: Sequence[Part]) -> Mapping[int, str]:
    """Those parts of which there is but one of their number."""
    digests: dict[int, str] = {}
    for part in parts:
        digests[part.number] = "" if part.number in digests else part.sha256
    return {number: digest for number, digest in digests.items() if digest}
