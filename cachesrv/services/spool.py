"""A NAR from elsewhere, in a file of this host until it is known what it is: nothing is replaced by what is unknown."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import IO, TYPE_CHECKING

from cachesrv.errors import Mismatch, PeerError, StoreError, StoreFull, StoreUnavailable
from cachesrv.nix.compression import SUFFIXES
from cachesrv.nix.seekable import compress_zstd
from cachesrv.services.in_thread import consumed
from cachesrv.services.verify_nar import VerifiedNar, verify

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from concurrent.futures import Executor
    from pathlib import Path

    from cachesrv.services.copies import Copy
    from cachesrv.storage.base import ObjectStore

_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class Spooled:
    """A compressed NAR that was verified, and the file that it is in."""

    compression: str
    nar: VerifiedNar
    file: IO[bytes]

    @property
    def name(self) -> str:
        """What Nix would call it."""
        return f"{self.nar.file_hash.bare_nix32}.nar{SUFFIXES[self.compression]}"

    async def store(self, storage: ObjectStore, key: str) -> None:
        """Put it into storage, in the place of what is there. Raises StoreError."""
        self.file.seek(0)
        async with storage.writer(key, size=self.nar.file_size) as writer:
            while chunk := await asyncio.to_thread(self.file.read, _CHUNK):
                await writer.write(chunk)
            await writer.commit(replace=True)


class Spool:
    """`folder` is where the files are, that have no names; `threads` are for the work on them."""

    def __init__(self, folder: Path, threads: Executor) -> None:
        self._folder = folder
        self._threads = threads

    @asynccontextmanager
    async def fetched(self, copy: Copy, nar_hash: str, nar_size: int) -> AsyncIterator[Spooled]:
        """The NAR of a copy, which has to have this hash and size. Raises BadInput when it is none or another one,
        PeerError and NotFound when it cannot be read, StoreFull.
        """
        try:
            file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  closed below
        except OSError as error:
            raise StoreError(f"no file can be made in {self._folder}: {error.strerror}") from error
        with file:
            found = await self._taken_in(copy, file, nar_size)
            if found.nar_hash.nix32 != nar_hash:
                raise Mismatch(f"the NAR of {copy.where} has the hash {found.nar_hash.nix32}, not {nar_hash}")
            yield Spooled("zstd" if copy.pack else copy.compression, found, file)

    async def _taken_in(self, copy: Copy, file: IO[bytes], nar_size: int) -> VerifiedNar:
        take_in = partial(_packed if copy.pack else _kept, file, copy.compression, nar_size)
        try:
            return await consumed(self._threads, take_in, copy.read())
        except (StoreFull, StoreUnavailable):
            raise
        except StoreError as error:
            # Of this copy alone, wherever it is.
            raise PeerError(f"{copy.where} cannot be read: {error}") from error


def _kept(file: IO[bytes], compression: str, nar_size: int, chunks: Iterator[bytes]) -> VerifiedNar:
    return verify(compression, _written(file, chunks), nar_limit=nar_size)


def _packed(file: IO[bytes], _compression: str, nar_size: int, chunks: Iterator[bytes]) -> VerifiedNar:
    return verify("zstd", _written(file, compress_zstd(chunks)), nar_limit=nar_size)


def _written(file: IO[bytes], chunks: Iterator[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        try:
            file.write(chunk)
        except OSError as error:
            raise StoreFull(f"a NAR cannot be kept while it is verified: {error.strerror}") from error
        yield chunk
