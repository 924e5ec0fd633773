"""Where the bytes of a NAR come from, cut into frames of equal size and hashed on the way.

Where a frame ends depends on the NAR alone, never on the chunks in which it came.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Protocol

from cachesrv.nix.hashes import Hash
from cachesrv.nix.seekable import cut

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from concurrent.futures import Executor


class NarSource(Protocol):
    """A NAR, read once, frame by frame."""

    async def read(self) -> bytes | bytearray:
        """The next frame; only the last one is shorter than the others, and an empty one says that there is no more.
        Raises whatever the source does; nothing can be read afterwards.
        """

    def digest(self) -> Hash:
        """sha256 of all that has been read."""

    async def close(self) -> None:
        """Let go of files and connections; waits for a thread that is reading."""


class LocalNar:
    """From an iterator that reads files, in threads."""

    def __init__(self, chunks: Iterator[bytes], frame_size: int, threads: Executor) -> None:
        self._frames = cut(chunks, frame_size)
        self._threads = threads
        self._sha256 = hashlib.sha256()
        self._reading: asyncio.Future[bytearray] | None = None

    async def read(self) -> bytearray:
        self._reading = asyncio.get_running_loop().run_in_executor(self._threads, self._read)
        return await asyncio.shield(self._reading)

    def digest(self) -> Hash:
        return Hash("sha256", self._sha256.digest())

    async def close(self) -> None:
        if self._reading is not None:
            await asyncio.wait([self._reading])
            if not self._reading.cancelled():
                self._reading.exception()  # nobody may have waited for it
        self._frames = iter(())  # a generator closes its files when it goes

    def _read(self) -> bytearray:
        frame = next(self._frames, None) or bytearray()
        self._sha256.update(frame)
        return frame


class StreamedNar:
    """From an asynchronous iterator, such as the Nix daemon's answer."""

    def __init__(self, chunks: AsyncIterator[bytes], frame_size: int, threads: Executor) -> None:
        self._chunks = chunks
        self._frame_size = frame_size
        self._threads = threads
        self._rest: bytes | memoryview = b""
        self._sha256 = hashlib.sha256()

    async def read(self) -> bytearray:
        frame = bytearray()
        while room := self._frame_size - len(frame):
            try:
                chunk = self._rest or await anext(self._chunks)
            except StopAsyncIteration:
                break
            frame += chunk[:room]
            self._rest = memoryview(chunk)[room:]
        await asyncio.get_running_loop().run_in_executor(self._threads, self._sha256.update, frame)
        return frame

    def digest(self) -> Hash:
        return Hash("sha256", self._sha256.digest())

    async def close(self) -> None:
        close = getattr(self._chunks, "aclose", None)
        if close is not None:
            await close()
