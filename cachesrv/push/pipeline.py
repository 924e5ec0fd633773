"""One pass over a NAR: dump, hash, compress in frames on all cores, hash again, hand out for sending.

The output is a sequence of independent zstd frames of FRAME_SIZE bytes of NAR each, and a seek table: the same bytes
for the same NAR, level and version of zstd, however many threads there are. Memory is bounded by one budget that all
NARs in flight share; a NAR alone may have as much of it as keeps every core busy.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from cachesrv.errors import Mismatch, TooLarge
from cachesrv.nix.hashes import Hash
from cachesrv.nix.seekable import FrameSize, compress_frame, seek_table
from cachesrv.push.budget import Budget

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cachesrv.nix.path_info import PathInfo
    from cachesrv.push.budget import Lease
    from cachesrv.push.nar_source import NarSource

FRAME_SIZE = 2 * 1024 * 1024
"""Bytes of NAR in a frame. Files are 1 to 2 % larger than with frames of 4 MiB, and made a fifth faster in half the
memory. It is part of what is sent: another value makes other files.
"""

DEFAULT_LEVEL = 3
DEFAULT_MEMORY = 128 * 1024 * 1024

_FRAME_COST = FRAME_SIZE * 2 + FRAME_SIZE // 128
"""Bytes that a frame takes while it is compressed: itself, and the most that may become of it."""

_CHUNK_SIZE = 128 * 1024


@dataclass(frozen=True, slots=True)
class Frame:
    """A compressed frame, and how many bytes of NAR are in it."""

    data: bytes
    nar_size: int


class Pipeline:
    """Threads and budget, shared by all NARs of a push. `memory` in bytes; `cores` of None means those we may use."""

    def __init__(
        self, *, level: int = DEFAULT_LEVEL, memory: int = DEFAULT_MEMORY, cores: int | None = None, readers: int = 8
    ) -> None:
        self.cores = cores or len(os.sched_getaffinity(0))
        self.budget = Budget(max(memory, _FRAME_COST))
        self.readers = ThreadPoolExecutor(readers, "cachesrv-read")
        self._compressors = ThreadPoolExecutor(self.cores, "cachesrv-zstd")
        self._level = level

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.readers.shutdown(cancel_futures=True)
        self._compressors.shutdown(cancel_futures=True)

    @asynccontextmanager
    async def nar(self, source: NarSource, info: PathInfo, *, limit: int = 0) -> AsyncIterator[CompressedNar]:
        """The NAR of `info`; `limit` in bytes of the compressed file, 0 for none. Closes the source."""
        nar = CompressedNar(self, source, info, limit)
        feeder = asyncio.create_task(nar.feed())
        try:
            yield nar
        finally:
            feeder.cancel()
            await asyncio.wait([feeder])
            await nar.close()

    def compress(self, frame: bytes | bytearray) -> asyncio.Future[Frame]:
        """As soon as a thread is free for it."""
        return asyncio.get_running_loop().run_in_executor(self._compressors, self._compress, frame)

    def _compress(self, frame: bytes | bytearray) -> Frame:
        return Frame(compress_frame(frame, self._level), len(frame))


class CompressedNar:
    """A NAR on its way: an asynchronous iterable of the chunks of its compressed file, to be iterated once.

    The last chunk comes only after hash and size were found to be those of the path info. Iteration raises Mismatch
    when they are not, TooLarge beyond the limit, and what the source raises; `failure` keeps it for those who see it
    only through a library's eyes.

    In bytes, so far: `nar_size` of the NAR have been read, `nar_sent` of it and `file_size` of the file handed out.
    """

    def __init__(self, pipeline: Pipeline, source: NarSource, info: PathInfo, limit: int) -> None:
        self.info = info
        self.nar_size = 0
        self.nar_sent = 0
        self.file_size = 0
        self.failure: Exception | None = None
        self._pipeline = pipeline
        self._source = source
        self._limit = limit
        self._file_sha256 = hashlib.sha256()
        self._lease: Lease = pipeline.budget.lease()
        # twice the cores: while one half is compressed, the other is read or waits to be sent
        self._frames: asyncio.Queue[asyncio.Future[Frame] | None] = asyncio.Queue(2 * pipeline.cores)
        self._compressing: set[asyncio.Future[Frame]] = set()
        self._iterator: AsyncIterator[memoryview] | None = self._chunks()

    @property
    def file_hash(self) -> Hash:
        """sha256 of what has been handed out."""
        return Hash("sha256", self._file_sha256.digest())

    def __aiter__(self) -> AsyncIterator[memoryview]:
        iterator, self._iterator = self._iterator, None
        if iterator is None:
            raise RuntimeError("a NAR on its way is iterated once")
        return iterator

    async def feed(self) -> None:
        """Read and hash the NAR and have it compressed, as far ahead of the iteration as memory allows."""
        try:
            while frame := await self._read():
                compressed = self._pipeline.compress(frame)
                self._compressing.add(compressed)
                compressed.add_done_callback(self._compressed)
                await self._frames.put(compressed)
            self._check()
        except Exception as error:  # noqa: BLE001  the iteration raises it
            self.failure = error
        await self._frames.put(None)

    async def close(self) -> None:
        """Wait for the threads, give back what is held."""
        await self._source.close()
        if self._compressing:
            await asyncio.wait(self._compressing)
        self._lease.close()

    async def _read(self) -> bytes | bytearray:
        await self._lease.take(_FRAME_COST)
        frame = await self._source.read()
        self.nar_size += len(frame)
        if 0 < self.info.nar_size < self.nar_size:
            raise Mismatch(f"{self.info.store_path}: its NAR has more than the {self.info.nar_size} bytes {_STATED}")
        return frame

    def _check(self) -> None:
        stated, found = self.info.nar_hash, self._source.digest()
        if found != stated:
            raise Mismatch(f"{self.info.store_path}: its NAR has hash {found.nix32}, not the {stated.nix32} {_STATED}")
        if self.info.nar_size not in (0, self.nar_size):
            raise Mismatch(f"{self.info.store_path}: its NAR has {self.nar_size} bytes, not {self.info.nar_size}")

    def _compressed(self, done: asyncio.Future[Frame]) -> None:
        self._compressing.discard(done)
        if not done.cancelled() and not done.exception():
            self._lease.give(_FRAME_COST - len(done.result().data))

    async def _chunks(self) -> AsyncIterator[memoryview]:
        try:
            table: list[FrameSize] = []
            while (compressing := await self._frames.get()) is not None:
                frame = await asyncio.shield(compressing)
                table.append(FrameSize(len(frame.data), frame.nar_size))
                for chunk in self._hand_out(frame.data):
                    yield chunk
                self._lease.give(len(frame.data))
                self.nar_sent += frame.nar_size
            for chunk in self._hand_out(self._last(table)):
                yield chunk
        except Exception as error:
            self.failure = error
            raise

    def _last(self, table: list[FrameSize]) -> bytes:
        if self.failure is not None:
            raise self.failure
        return seek_table(table)

    def _hand_out(self, data: bytes) -> list[memoryview]:
        self.file_size += len(data)
        if 0 < self._limit < self.file_size:
            raise TooLarge(
                f"{self.info.store_path}: compressed it has more than the {self._limit} bytes that the cache takes"
            )
        self._file_sha256.update(data)
        view = memoryview(data)
        return [view[start : start + _CHUNK_SIZE] for start in range(0, len(data), _CHUNK_SIZE)]


_STATED = "that the store's database states: the path is damaged or changes (see nix-store --verify-path)"
