"""What compresses NARs: threads, and memory, for one pass over each of them.

A thread that has read a frame compresses it at once, while it is in the nearest caches of its core; the next frame of
that NAR is read by another thread meanwhile. There are as many threads as cores.

Memory is bounded for all NARs in flight together: a part of it is buffers for what is read and compressed, the rest a
budget for what waits to be sent. A NAR alone may have as much of both as keeps every core busy.
"""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple, Self

from cachesrv.budget import Budget
from cachesrv.nix.seekable import FrameSize
from cachesrv.push.buffers import Buffers
from cachesrv.push.compressed_nar import CompressedNar
from cachesrv.push.frame import FRAME_SIZE, Compressors, Frame
from cachesrv.push.level import DEFAULT_LEVEL, levels
from cachesrv.push.load import Load
from cachesrv.push.memory import Shares

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from cachesrv.nix.path_info import PathInfo
    from cachesrv.push.arrived import FrameAt
    from cachesrv.push.level import Level
    from cachesrv.push.nar_source import NarSource


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
        self._compressors = Compressors()
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

    def work(self, source: NarSource, buffer: memoryview, level: int, arrived: FrameAt | None = None) -> Work:
        """Have a thread fill the buffer and compress what is in it, unless that has arrived, as soon as one is free."""
        loop = asyncio.get_running_loop()
        read: asyncio.Future[int] = loop.create_future()
        begun = False

        def work() -> Frame:
            size = source.fill(buffer)
            loop.call_soon_threadsafe(was_read, size)
            if arrived is not None:
                return Frame((), FrameSize(arrived.size, size))
            return self._compressors.frame(buffer[:size], level)

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
        return Work(read, frame)


class Work(NamedTuple):
    """A frame in the making: how many bytes were read is known first. Both have the exception of a failed reading."""

    read: asyncio.Future[int]
    frame: asyncio.Future[Frame]
