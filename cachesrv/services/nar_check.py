"""Whether stored NARs are what their narinfos say: read from the first to the last byte, unpacked and hashed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING

from cachetools import LRUCache

from cachesrv.errors import BadInput, NotFound, StoreError, StoreInaccessible, TooLarge
from cachesrv.nix.compression import decompressed
from cachesrv.nix.hashes import Hash
from cachesrv.services.in_thread import consumed
from cachesrv.services.locks import NamedLocks
from cachesrv.services.verify_nar import VerifiedNar, verify

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from cachesrv.nix.narinfo import NarInfo
    from cachesrv.services.pace import Pace
    from cachesrv.storage.base import ObjectStore

_REMEMBERED = 50_000
"""NARs that are found right are not read again for another path, as long as they are remembered."""
_CHUNK = 256 * 1024


class NarCheck:
    """Reads NARs, `jobs` at the same time. `bytes` counts what was read, `nars` the NARs."""

    def __init__(self, storage: ObjectStore, pace: Pace, *, jobs: int) -> None:
        self.jobs = jobs
        self.nars = 0
        self.bytes = 0
        self._storage = storage
        self._pace = pace
        self._executor = ThreadPoolExecutor(jobs, thread_name_prefix="verify")
        self._locks = NamedLocks()
        self._right: LRUCache[tuple[str, str, str], bool] = LRUCache(_REMEMBERED)

    async def flaw(self, key: str, info: NarInfo) -> str | None:
        """What is wrong with the NAR under this key, None when nothing is. Raises NotFound, StoreUnavailable."""
        async with self._locks.hold([key]):
            return await self._flaw(key, info)

    async def _flaw(self, key: str, info: NarInfo) -> str | None:
        said = key, info.nar_hash.nix32, info.file_hash.nix32 if info.file_hash else ""
        if said in self._right:
            return None
        try:
            found = await self._found(key, info)
        except (NotFound, StoreInaccessible):
            raise
        except StoreError as error:
            return f"its NAR cannot be read: {error}"
        except TooLarge:
            return f"its NAR {info.url} unpacks to more than the {info.nar_size} bytes of its narinfo"
        except BadInput as error:
            return f"its NAR {info.url} is damaged: {error}"
        wrong = _difference(info, found)
        if wrong is None:
            self._right[said] = True
        return wrong

    async def _found(self, key: str, info: NarInfo) -> VerifiedNar:
        self.nars += 1
        async with aclosing(self._paced(key)) as chunks:
            return await consumed(self._executor, partial(_read, info), chunks)

    async def _paced(self, key: str) -> AsyncGenerator[bytes, None]:
        """The object's bytes in chunks that are worth a hop to a thread."""
        gathered = bytearray()
        async for chunk in self._storage.read(key):
            await self._pace.spend(len(chunk))
            self.bytes += len(chunk)
            gathered += chunk
            if len(gathered) >= _CHUNK:
                yield bytes(gathered)
                gathered.clear()
        yield bytes(gathered)

    def close(self) -> None:
        """Let go of the threads."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def _read(info: NarInfo, chunks: Iterator[bytes]) -> VerifiedNar:
    """What a NAR is found to be; where it is compressed in a way that is not known here, what its narinfo says is taken
    for what is inside. Blocks.
    """
    try:
        decompressed(info.compression, ())
    except BadInput:
        hasher, size = sha256(), 0
        for chunk in chunks:
            hasher.update(chunk)
            size += len(chunk)
        return VerifiedNar(Hash("sha256", hasher.digest()), size, info.nar_hash, info.nar_size, None)
    return verify(info.compression, chunks, nar_limit=info.nar_size)


def _difference(info: NarInfo, found: VerifiedNar) -> str | None:
    if info.file_hash and info.file_hash != found.file_hash:
        return f"its NAR {info.url} has the hash {found.file_hash.nix32}, its narinfo says {info.file_hash.nix32}"
    if info.file_size not in (None, found.file_size):
        return f"its NAR {info.url} has {found.file_size} bytes, its narinfo says {info.file_size}"
    if info.nar_hash != found.nar_hash:
        return f"its NAR {info.url} unpacks to {found.nar_hash.nix32}, its narinfo says {info.nar_hash.nix32}"
    if info.nar_size != found.nar_size:
        return f"its NAR {info.url} unpacks to {found.nar_size} bytes, its narinfo says {info.nar_size}"
    return None
