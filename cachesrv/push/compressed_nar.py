"""One pass over a NAR: dump, hash, compress in frames, hand out for sending.

The output is a sequence of independent zstd frames of FRAME_SIZE bytes of NAR each, and a seek table: the same bytes
for the same NAR, level and version of zstd, however many threads there are.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from cachesrv.errors import Mismatch, TooLarge
from cachesrv.nix.seekable import FrameSize, seek_table
from cachesrv.push.arrived import OtherBytes
from cachesrv.push.frame import FRAME_SIZE
from cachesrv.push.load import Leaving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from cachesrv.budget import Lease
    from cachesrv.nix.hashes import Hash
    from cachesrv.nix.path_info import PathInfo
    from cachesrv.push.arrived import FrameAt
    from cachesrv.push.frame import Frame
    from cachesrv.push.nar_source import NarSource
    from cachesrv.push.pipeline import Pipeline, Work


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

    def _work(self, buffer: memoryview, arrived: FrameAt | None) -> Work:
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


def check(info: PathInfo, found: Hash, size: int) -> None:
    """Raises Mismatch unless the NAR that was found, with this hash and so many bytes, is that of the path."""
    if found != info.nar_hash:
        stated = info.nar_hash.nix32
        raise Mismatch(f"{info.store_path}: its NAR has hash {found.nix32}, not the {stated} {_STATED}")
    if info.nar_size not in (0, size):
        raise Mismatch(f"{info.store_path}: its NAR has {size} bytes, not {info.nar_size}")


_STATED = "that the store's database states: the path is damaged or changes (see nix-store --verify-path)"
