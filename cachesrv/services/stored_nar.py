"""A NAR in a store that is not of this host, on its way here."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

from cachesrv.errors import BadInput, Mismatch
from cachesrv.nix.hashes import Hash
from cachesrv.services.ingest import NarName
from cachesrv.storage.base import ByteRange

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from cachesrv.catalog.base import NarRecord
    from cachesrv.services.ingest import Ingest
    from cachesrv.storage.base import ObjectStore


class StoredNar:
    """A `cachesrv.services.fetch.Remote`; `record` is what the catalog knows of it, if anything."""

    def __init__(self, storage: ObjectStore, ingest: Ingest, key: str, *, size: int, record: NarRecord | None) -> None:
        self.key = key
        self.size = size
        self.keep = record is not None or _says_something(key)
        self._storage = storage
        self._ingest = ingest
        self._record = record

    async def read(self, start: int) -> AsyncGenerator[bytes, None]:
        """See Remote. What breaks is resumed by the store."""
        async for chunk in self._storage.read(self.key, ByteRange(start, self.size)):
            yield chunk

    async def part(self, part: ByteRange) -> AsyncGenerator[bytes, None]:
        """A part of it by itself, of which nothing can be verified."""
        async for chunk in self._storage.read(self.key, part):
            yield chunk

    async def receive(self, chunks: AsyncIterator[bytes]) -> None:
        """See Remote. A NAR that somebody else put there is judged by its name, which has one of its hashes; if it has
        none, nothing but the size can be told.
        """
        if self._record:
            await self._compare(self._record, chunks)
        elif self.keep:
            await self._ingest.examine(_name(self.key), chunks)
        else:
            async for _ in chunks:
                pass

    async def is_stored(self) -> bool:
        """See Remote."""
        return await self._storage.head(self.key) is not None

    async def _compare(self, record: NarRecord, chunks: AsyncIterator[bytes]) -> None:
        hasher = sha256()
        async for chunk in chunks:
            hasher.update(chunk)
        found = Hash("sha256", hasher.digest()).nix32
        if found != record.file_hash:
            raise Mismatch(f"{self.key} has the hash {found}, not {record.file_hash}")


def _name(key: str) -> str:
    return key.rpartition("/")[2]


def _says_something(key: str) -> bool:
    try:
        NarName.parse(_name(key))
    except BadInput:
        return False
    return True
