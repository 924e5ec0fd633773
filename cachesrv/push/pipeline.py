"""One pass over a NAR: dump, hash, compress in frames on all cores, hand out for sending.

A thread that has read a frame compresses it at once, while it is in the nearest caches of its core; the next frame of
that NAR is read by another thread meanwhile. There are as many threads as cores.

The output is a sequence of independent zstd frames of FRAME_SIZE bytes of NAR each, and a seek table: the same bytes
for the same NAR, level and version of zstd, however many threads there are.

Memory is bounded for all NARs in flight together: a part of it is buffers for what is read and compressed, the rest a
budget for what waits to be sent. A NAR alone may have as much of both as keeps every core busy.
"""

from __future__ import annotations

import asyncio
import os
import threading
from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import zstandard

from cachesrv.budget import Budget
from cachesrv.errors import Mismatch, TooLarge
from cachesrv.nix.seekable import Frames, FrameSize, seek_table
from cachesrv.push.arrived import OtherBytes
from cachesrv.push.buffers import Buffers
from cachesrv.push.level import DEFAULT_LEVEL, levels
from cachesrv.push.load import Leaving, Load
from cachesrv.push.memory import Shares

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from cachesrv.budget import Lease
    from cachesrv.nix.hashes import Hash
    from cachesrv.nix.path_info import PathInfo
    from cachesrv.push.arrived import FrameAt
    from cachesrv.push.level import Level
    from cachesrv.push.nar_source import NarSource

FRAME_SIZE = 2 * 1024 * 1024
"""Bytes of NAR in a frame. Files are 1 to 2 % larger than with frames of 4 MiB, and made a fifth faster in half the
memory. It is part of what is sent: another value makes other files.
"""

_CHUNK_SIZE = 128 * 1024


@dataclass(frozen=True, slots=True)
class Frame:
    """A compressed frame in chunks, and how many bytes it has with and without compression; no chunks when it has
    arrived.
    """

    chunks: Sequence[bytes]
    sizes: FrameSize


class Pipeline:
    """Threads and memory, shared by all NARs of a push. `level` as in `level`; `memory` in bytes, see `memory`; `cores`
    of None means those that this process may use; `jobs`: NARs that are read at once, about.
    """

    def __init__(
        self, *, level: Level = DEFAULT_LEVEL, memory: int | None = None, cores: int | None = None, jobs: int = 8
    ) -> None:
        self._levels = levels(level)
        shares = Shares.of(
            memory,
            frame_size=FRAME_SIZE,
            level=max(self.levels),
            cores=cores or len(os.sched_getaffinity(0)),
            jobs=jobs,
        )
        self.shares = shares
        self.buffers = Buffers(shares.buffers, FRAME_SIZE)
        self.budget = Budget(shares.budget)
        self.threads = ThreadPoolExecutor(shares.threads, "cachesrv-nar")
        self._compressors = _Compressors()
        self.load = Load(shares.threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.threads.shutdown(cancel_futures=True)

    @property
    def levels(self) -> Sequence[int]:
        """Those that it may choose, in order."""
        return self._levels.possible

    def choose_level(self) -> int:
        """The level for what begins now."""
        return self._levels.choose(self.load.observed)

    @asynccontextmanager
    async def nar(
        self,
        source: NarSource,
        info: PathInfo,
        *,
        limit: int = 0,
        level: int | None = None,
        arrived: Mapping[int, FrameAt] | None = None,
    ) -> AsyncIterator[CompressedNar]:
        """The NAR of `info`; `limit` in bytes of the compressed file, 0 for none; `level` where it is not to be chosen;
        `arrived`: frames that need not be made, by index. Closes the source.
        """
        chosen = self.choose_level() if level is None else level
        nar = CompressedNar(self, source, info, limit=limit, level=chosen, arrived=arrived or {})
        feeder = asyncio.create_task(nar.feed())
        try:
            yield nar
        finally:
            feeder.cancel()
            await asyncio.wait([feeder])
            await nar.close()

    def work(self, source: NarSource, buffer: memoryview, level: int, arrived: FrameAt | None = None) -> _Work:
        """Have a thread fill the buffer and compress what is in it, unless that has arrived, as soon as one is free."""
        loop = asyncio.get_running_loop()
        read: asyncio.Future[int] = loop.create_future()
        begun = False

        def work() -> Frame:
            size = source.fill(buffer)
            loop.call_soon_threadsafe(was_read, size)
            if arrived is not None:
                return Frame((), FrameSize(arrived.size, size))
            return _compress(self._compressors.of(level), buffer[:size])

        def was_read(size: int) -> None:
            nonlocal begun
            begun = True
            self.load.begin()
            if not read.done():  # whoever waited may have been cancelled
                read.set_result(size)

        def done(frame: asyncio.Future[Frame]) -> None:
            if begun:
                self.load.end()
            elif frame.cancelled():
                read.cancel()
            elif (error := frame.exception()) and not read.done():
                read.set_exception(error)

        frame = loop.run_in_executor(self.threads, work)
        frame.add_done_callback(done)
        return _Work(read, frame)


class _Work(NamedTuple):
    """A frame in the making: how many bytes were read is known first. Both have the exception of a failed reading."""

    read: asyncio.Future[int]
    frame: asyncio.Future[Frame]


class _Compressors(threading.local):
    """One for each thread, used over and over."""

    def __init__(self) -> None:
        self._level = 0
        self._frames = Frames(self._level)

    def of(self, level: int) -> Frames:
        """The one of this thread."""
        if level != self._level:
            self._level, self._frames = level, Frames(level)
        return self._frames


class CompressedNar:
    """A NAR on its way: an asynchronous iterable of the chunks of its compressed file, to be iterated once.

    The last chunk comes only after hash and size were found to be those of the path info. Iteration raises Mismatch
    when they are not, TooLarge beyond the limit, and what the source raises; `failure` keeps it for those who see it
    only through a library's eyes.

    `level` is that of its compression; `leaving` notes when what is ready waits to be taken.

    In bytes, so far: `nar_size` of the NAR have been read, `nar_sent` of it and `file_size` of the file handed out, or
    passed over, for the frames that have `arrived`.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        source: NarSource,
        info: PathInfo,
        *,
        limit: int,
        level: int,
        arrived: Mapping[int, FrameAt],
    ) -> None:
        self.info = info
        self.level = level
        self.leaving = Leaving(pipeline.load)
        self.nar_size = 0
        self.nar_sent = 0
        self.file_size = 0
        self.failure: Exception | None = None
        self._pipeline = pipeline
        self._source = source
        self._limit = limit
        self._arrived = arrived
        self._read = 0
        self._table: list[FrameSize] = []
        self._starts: list[int] = []
        self._lease: Lease = pipeline.budget.lease()
        # twice the threads: while one half is compressed, the other is read or waits to be sent
        self._frames: asyncio.Queue[asyncio.Future[Frame] | None] = asyncio.Queue(2 * pipeline.shares.threads)
        self._working: set[asyncio.Future[Any]] = set()
        self._iterator: AsyncIterator[bytes] | None = self._chunks()

    def __aiter__(self) -> AsyncIterator[bytes]:
        iterator, self._iterator = self._iterator, None
        if iterator is None:
            raise RuntimeError("a NAR on its way is iterated once")
        return iterator

    def frames_from(self, start: int, end: int) -> tuple[int, int, list[int]]:
        """The frames that begin in these bytes of the file, which were handed out: the index of the first one, where it
        begins, and the sizes of all.
        """
        first, last = bisect_left(self._starts, start), bisect_left(self._starts, end)
        sizes = [frame.compressed for frame in self._table[first:last]]
        return first, self._starts[first] if sizes else 0, sizes

    async def feed(self) -> None:
        """Read and hash the NAR and have it compressed, as far ahead of the iteration as memory allows."""
        try:
            await self._source.begin()
            while await self._next_frame() == FRAME_SIZE:
                pass
            check(self.info, self._source.digest(), self.nar_size)
            if self._source.watched:
                await self._accept()
        except Exception as error:  # noqa: BLE001  the iteration raises it
            self.failure = error
        await self._frames.put(None)

    async def close(self) -> None:
        """Wait for the threads, give back what is held."""
        self.leaving.close()
        if self._working:
            await asyncio.wait(self._working)
        try:
            await self._source.close()
        finally:
            self._lease.close()

    async def _next_frame(self) -> int:
        """Bytes of the NAR in it."""
        await self._lease.take(self._pipeline.shares.bound)
        buffer = await self._pipeline.buffers.take()
        try:
            await self._source.gather(buffer)
        except BaseException:
            self._pipeline.buffers.give(buffer)
            raise
        work = self._work(buffer, self._arrived.get(self._read))
        self._read += 1
        size = await work.read
        self.nar_size += size
        if 0 < self.info.nar_size < self.nar_size:
            raise Mismatch(f"{self.info.store_path}: its NAR has more than the {self.info.nar_size} bytes {_STATED}")
        if size:
            await self._frames.put(work.frame)
        return size

    def _work(self, buffer: memoryview, arrived: FrameAt | None) -> _Work:
        """The buffer is no longer ours, and back in its place when the frame is done."""
        work = self._pipeline.work(self._source, buffer, self.level, arrived)
        self._working.add(work.frame)

        def done(frame: asyncio.Future[Frame]) -> None:
            self._working.discard(frame)
            self._pipeline.buffers.give(buffer)
            if not frame.cancelled() and not frame.exception():
                self._lease.give(self._pipeline.shares.bound - frame.result().sizes.compressed)

        work.frame.add_done_callback(done)
        return work

    async def _accept(self) -> None:
        accepting = asyncio.get_running_loop().run_in_executor(self._pipeline.threads, self._source.accept)
        self._working.add(accepting)
        accepting.add_done_callback(self._working.discard)
        await asyncio.shield(accepting)

    async def _chunks(self) -> AsyncIterator[bytes]:
        try:
            while (compressing := await self._frames.get()) is not None:
                frame = await asyncio.shield(compressing)
                self._starts.append(self.file_size)
                self._table.append(frame.sizes)
                self.leaving.start()
                for chunk in frame.chunks:
                    yield self._counted(chunk)
                self.leaving.stop()
                if not frame.chunks:
                    self._pass_over(len(self._table) - 1)
                self._lease.give(frame.sizes.compressed)
                self.nar_sent += frame.sizes.decompressed
                del frame, compressing  # not to be held while the next one is waited for
            yield self._counted(self._last())
        except Exception as error:
            self.failure = error
            raise

    def _last(self) -> bytes:
        if self.failure is not None:
            raise self.failure
        return seek_table(self._table)

    def _pass_over(self, index: int) -> None:
        frame = self._arrived[index]
        if frame.start != self.file_size:
            raise OtherBytes(f"{self.info.store_path}: what was sent of it before was made otherwise")
        self.file_size += frame.size

    def _counted(self, chunk: bytes) -> bytes:
        self.file_size += len(chunk)
        if 0 < self._limit < self.file_size:
            path = self.info.store_path
            raise TooLarge(f"{path}: compressed it has more than the {self._limit} bytes that the cache takes")
        return chunk


def recipe(level: int) -> str:
    """All that the bytes of a file depend on beside its NAR."""
    return f"zstd {'.'.join(map(str, zstandard.ZSTD_VERSION))}, level {level}, frames of {FRAME_SIZE}"


def _compress(frames: Frames, data: memoryview) -> Frame:
    # Copied, since what zstd returns keeps the memory of the largest that it could have become; in pieces of one size,
    # since those leave no holes when they are freed.
    compressed = memoryview(frames.compress(data))
    chunks = [bytes(compressed[start : start + _CHUNK_SIZE]) for start in range(0, len(compressed), _CHUNK_SIZE)]
    return Frame(chunks, FrameSize(len(compressed), len(data)))


def check(info: PathInfo, found: Hash, size: int) -> None:
    """Raises Mismatch unless the NAR that was found, with this hash and so many bytes, is that of the path."""
    if found != info.nar_hash:
        stated = info.nar_hash.nix32
        raise Mismatch(f"{info.store_path}: its NAR has hash {found.nix32}, not the {stated} {_STATED}")
    if info.nar_size not in (0, size):
        raise Mismatch(f"{info.store_path}: its NAR has {size} bytes, not {info.nar_size}")


_STATED = "that the store's database states: the path is damaged or changes (see nix-store --verify-path)"
