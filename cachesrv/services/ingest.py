"""A NAR on its way in: checked while it streams, stored when it is what it says, noted in the catalog."""

from __future__ import annotations

import asyncio
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachesrv.catalog.base import NarRecord
from cachesrv.errors import BadInput, BeingRemoved, Mismatch, MissingNar, TooLarge
from cachesrv.nix.compression import SUFFIXES
from cachesrv.services.content import check_contents
from cachesrv.services.disk_room import DiskRoom
from cachesrv.services.in_thread import coalesced, consumed
from cachesrv.services.verify_nar import VerifiedNar, verify

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Collection

    from cachesrv.catalog.base import Catalog
    from cachesrv.nix.content_address import ContentAddress
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.candidate import Candidate
    from cachesrv.storage.base import ObjectStore
    from cachesrv.telemetry import Metrics

_NAME = re.compile(r"(?P<hash>[0-9a-df-np-sv-z]{52})\.nar(?P<suffix>\.[a-z0-9]+)?\Z")
_COMPRESSIONS = {suffix: name for name, suffix in SUFFIXES.items() if suffix}
DEFAULT_LEASE = 24 * 3600
"""Seconds for which a NAR stays that no path needs yet."""
_LOOKED_AT_AGAIN = 4 * 1024 * 1024
"""Bytes of a NAR of unknown size between two looks whether there is room."""
_SMALL = 1024 * 1024
"""Bytes up to which a NAR is taken in whole: one hop to a thread instead of several."""


@dataclass(frozen=True, slots=True)
class NarName:
    """The file name of a NAR that is to be stored: the nix-base-32 hash in it (of the file or of the NAR) and how the
    suffix says it is compressed; None where it says nothing (gzip and uncompressed NARs have no suffix).
    """

    hash: str
    compression: str | None

    @classmethod
    def parse(cls, name: str) -> NarName:
        """From `<52 characters>.nar[.<suffix>]`. Raises BadInput."""
        match = _NAME.match(name)
        if not match:
            raise BadInput("a NAR is called nar/<52 characters of nix-base-32>.nar, .nar.zst, .nar.xz or the like")
        suffix = match["suffix"]
        if suffix and suffix not in _COMPRESSIONS:
            raise BadInput(f"a NAR with the suffix {suffix} is not known; there are {', '.join(sorted(_COMPRESSIONS))}")
        return cls(match["hash"], _COMPRESSIONS[suffix] if suffix else None)


@dataclass(frozen=True, slots=True)
class _Put:
    """A NAR that was checked and put into storage some time after the fence; `created`: it was not there before."""

    compression: str
    verified: VerifiedNar
    fence: int
    created: bool


class Ingest:
    """Takes NARs into storage."""

    def __init__(
        self,
        storage: ObjectStore,
        catalog: Catalog,
        metrics: Metrics,
        *,
        max_nar_size: int = 0,
        parallel: int = 32,
        lease: int = DEFAULT_LEASE,
        room: DiskRoom | None = None,
    ) -> None:
        self._room = room or DiskRoom.unlimited()
        self._lease = lease
        self._storage = storage
        self._catalog = catalog
        self._metrics = metrics
        self._max_nar_size = max_nar_size
        self._slots = asyncio.Semaphore(parallel)
        self._executor = ThreadPoolExecutor(parallel, thread_name_prefix="verify-nar")

    async def known(self, cache: ServedCache, name: str) -> NarRecord | None:
        """The verified NAR of this name, when it is noted in the catalog and lies in storage."""
        record = await self._catalog.nar(cache.key(f"nar/{name}"))
        return record if record and await self._storage.head(record.key) else None

    async def receive(
        self,
        cache: ServedCache,
        name: str,
        chunks: AsyncIterable[bytes],
        size: int | None,
        *,
        nar_size: int | None = None,
    ) -> NarRecord:
        """Store a NAR that comes in as `chunks`, `size` bytes in all if that was said, and `nar_size` uncompressed.

        A NAR that is there already is left as it is; the new bytes are checked all the same, and thrown away.
        Raises BadInput (and its kin) for what is not what it says, and StoreError; then nothing has changed. Where
        there is no room for it, StoreFull is raised before anything is read.
        """
        parsed = NarName.parse(name)
        self.check_size(size or 0)
        await self._room.for_nar(size or 0)
        key = cache.key(f"nar/{name}")
        async with self._slots:
            if size is not None and size <= _SMALL:
                put = await self._put_small(parsed, key, chunks, size, nar_size)
            else:
                put = await self._put_streaming(parsed, key, chunks, size, nar_size)
        # What was there already may have to be read, which takes a turn of its own.
        record = await self._stored(cache, key, put)
        self._metrics.add("nars_stored")
        self._metrics.add("received_bytes", record.file_size)
        return record

    async def take_over(
        self,
        cache: ServedCache,
        name: str,
        chunks: AsyncIterator[bytes],
        publish: Callable[[str], Awaitable[bool]],
    ) -> NarRecord:
        """Store a NAR that lies in storage under another key, and comes as `chunks` from there: `publish` is called
        with the key that it is to have, and says whether it created that object. Raises as `receive`.
        """
        key = cache.key(f"nar/{name}")
        compression, verified = await self.examine(name, chunks)
        fence = await self._catalog.fence([key])
        record = await self._stored(cache, key, _Put(compression, verified, fence, created=await publish(key)))
        self._metrics.add("nars_stored")
        self._metrics.add("received_bytes", record.file_size)
        return record

    def check_size(self, size: int) -> None:
        """Raises TooLarge when a NAR of so many bytes is not taken."""
        if self._max_nar_size and size > self._max_nar_size:
            raise TooLarge(f"{size} bytes are more than the {self._max_nar_size} that this server takes in one NAR")

    async def adopt(self, cache: ServedCache, name: str, compression: str) -> NarRecord:
        """Note a NAR that lies in storage without the catalog knowing: put there by somebody else, or by a crash.

        Raises MissingNar when it is not there, and BadInput when its bytes are not a NAR.
        """
        key = cache.key(f"nar/{name}")
        fence = await self._catalog.fence([key])
        info = await self._storage.head(key)
        if info is None:
            raise MissingNar(f"there is no nar/{name}: send the NAR before the narinfo")
        async with self._slots:
            verified = await self._verified(compression, coalesced(self._storage.read(key)))
        return await self._note(cache, key, compression, verified, fence)

    async def there(self, cache: ServedCache, name: str, compression: str, nar_hash: str) -> NarRecord:
        """What is stored under this name, which somebody has just sent again; it stays for a while from now on. Raises
        Mismatch when it does not have this NAR hash, and as `adopt` does.
        """
        # First: what is looked at before that may go until then.
        await self._catalog.lease_nars(cache.prefix, [nar_hash], int(time.time()) + self._lease)
        record = await self._catalog.nar(cache.key(f"nar/{name}")) or await self.adopt(cache, name, compression)
        if record.nar_hash != nar_hash:
            raise Mismatch(f"another NAR is stored under this name: {record.nar_hash}; {nar_hash} was sent")
        return record

    async def check_still_there(self, keys: Collection[str]) -> None:
        """They may have been removed before they were noted; they cannot be any more. Raises BeingRemoved."""
        gone = [key for key in keys if await self._storage.head(key) is None]
        if gone:
            await self._catalog.remove_nars(gone)
            raise BeingRemoved(f"{gone[0]} was just being removed: send it again")

    async def examine(self, name: str, chunks: AsyncIterator[bytes]) -> tuple[str, VerifiedNar]:
        """Read a NAR called `name`, storing nothing; how it is compressed, and what it is. Raises BadInput when that is
        not what the name says.
        """
        parsed = NarName.parse(name)
        pieces = coalesced(chunks)
        first = await anext(pieces, b"")
        compression = parsed.compression or _guess(first)
        async with self._slots:
            verified = await self._verified(compression, _preceded(first, pieces))
        _check_name(parsed, verified)
        return compression, verified

    async def listing(self, cache: ServedCache, nar: NarRecord) -> bytes | None:
        """The zstd-compressed listing of a stored NAR; made anew when the first one was given away to a path."""
        if nar.listing is None:
            stored = await self._catalog.nar(nar.key)
            nar = (
                stored
                if stored and stored.listing
                else await self.adopt(cache, nar.key.rsplit("/", 1)[1], nar.compression)
            )
        return nar.listing

    async def check_contents(self, nar: NarRecord, address: ContentAddress, path: Candidate) -> None:
        """Read a stored NAR; raises Mismatch unless it has this content address."""
        async with self._slots:
            await consumed(
                self._executor,
                lambda pieces: check_contents(address, path, nar.compression, pieces),
                coalesced(self._storage.read(nar.key)),
            )

    async def close(self) -> None:
        """Let go of the threads."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    async def _verified(
        self, compression: str, chunks: AsyncIterator[bytes], nar_size: int | None = None
    ) -> VerifiedNar:
        limit = self._limit(nar_size)
        return await consumed(self._executor, lambda pieces: verify(compression, pieces, nar_limit=limit), chunks)

    def _limit(self, nar_size: int | None) -> int:
        """Bytes that a NAR may have, 0 for any number; of what is said to have fewer, no more are decompressed."""
        return min(filter(None, (self._max_nar_size, nar_size)), default=0)

    async def _put_small(
        self, name: NarName, key: str, chunks: AsyncIterable[bytes], size: int, nar_size: int | None
    ) -> _Put:
        body = b"".join([chunk async for chunk in chunks])
        _check_length(len(body), size)
        compression = name.compression or _guess(body)
        verified = await asyncio.get_running_loop().run_in_executor(
            self._executor, lambda: verify(compression, [body], nar_limit=self._limit(nar_size))
        )
        _check_name(name, verified)
        fence = await self._catalog.fence([key])
        return _Put(compression, verified, fence, created=await self._storage.put(key, body))

    async def _put_streaming(
        self, name: NarName, key: str, chunks: AsyncIterable[bytes], size: int | None, nar_size: int | None
    ) -> _Put:
        most = self._limit(_most_compressed(nar_size))
        # Where there is no room, no body is asked for.
        async with self._storage.writer(key, size=size) as writer:
            pieces = coalesced(chunks)
            first = await anext(pieces, b"")
            compression = name.compression or _guess(first)

            async def written() -> AsyncIterator[bytes]:
                received = looked_at = 0
                piece = first
                while piece:
                    received += len(piece)
                    if size is None and received - looked_at >= _LOOKED_AT_AGAIN:
                        looked_at = received
                        await self._room.for_nar()
                    if most and received > most:
                        raise TooLarge(f"more than the {most} bytes that are taken of this NAR at most")
                    await writer.write(piece)
                    yield piece
                    piece = await anext(pieces, b"")
                if size is not None:
                    _check_length(received, size)

            verified = await self._verified(compression, written(), nar_size)
            _check_name(name, verified)
            fence = await self._catalog.fence([key])
            return _Put(compression, verified, fence, created=await writer.commit())

    async def _stored(self, cache: ServedCache, key: str, put: _Put) -> NarRecord:
        """What the catalog says of the object under `key`: the one just made, or the one that was there before."""
        if not put.created:
            return await self.there(cache, key.rsplit("/", 1)[1], put.compression, put.verified.nar_hash.nix32)
        return await self._note(cache, key, put.compression, put.verified, put.fence)

    async def _note(
        self, cache: ServedCache, key: str, compression: str, verified: VerifiedNar, fence: int
    ) -> NarRecord:
        """Have the catalog know a NAR that lies in storage, and did at some time after the fence was there."""
        record = NarRecord(
            key=key,
            scope=cache.prefix,
            compression=compression,
            file_hash=verified.file_hash.nix32,
            file_size=verified.file_size,
            nar_hash=verified.nar_hash.nix32,
            nar_size=verified.nar_size,
            listing=verified.listing,
            verified_at=int(time.time()),
        )
        if await self._catalog.put_nar(record, leased_until=record.verified_at + self._lease) != fence:
            await self.check_still_there([key])
        return record


async def _preceded(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    if first:
        yield first
    async for chunk in rest:
        yield chunk


def _most_compressed(nar_size: int | None) -> int | None:
    """Bytes that the file of such a NAR may have: some formats have room for any number of them that mean nothing."""
    return None if nar_size is None else nar_size + nar_size // 8 + _SMALL


def _guess(start: bytes) -> str:
    """Nix gives gzip and uncompressed NARs the same suffix: none. The first bytes tell them apart (RFC 1952, 2.3.1)."""
    return "gzip" if start.startswith(b"\x1f\x8b") else "none"


def _check_length(received: int, size: int) -> None:
    if received != size:
        raise BadInput(f"the body has {received} bytes, Content-Length said {size}")


def _check_name(name: NarName, verified: VerifiedNar) -> None:
    if name.hash not in {verified.file_hash.bare_nix32, verified.nar_hash.bare_nix32}:
        raise Mismatch(
            f"the name says {name.hash}, but the file's hash is {verified.file_hash.bare_nix32} "
            f"and its NAR's is {verified.nar_hash.bare_nix32}"
        )
