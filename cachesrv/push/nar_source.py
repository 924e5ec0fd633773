"""Where the bytes of a NAR come from: hashed on the way, and filled into buffers that the caller owns.

How much a buffer gets depends on the NAR alone, never on the chunks in which it came.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from cachesrv.nix.hashes import Hash

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from concurrent.futures import Executor

    from cachesrv.push.inspection import Tap

Result = TypeVar("Result")


class NarSource(Protocol):
    """A NAR, read once, one buffer after the other."""

    async def read_into(self, buffer: memoryview) -> int:
        """Fill the buffer with what comes next; how many bytes there were, which is less than it holds only at the
        end. Raises whatever the source does; nothing can be read afterwards. When this is cancelled, the buffer is
        still in use until `close` has returned.
        """

    def digest(self) -> Hash:
        """sha256 of all that has been read."""

    async def accept(self) -> None:
        """It has been read to its end, and is what it should be: whoever looked on may keep what was seen."""

    async def close(self) -> None:
        """Let go of files, connections and buffers."""


class LocalNar:
    """From an iterator that reads files, in threads."""

    def __init__(self, chunks: Iterator[bytes], threads: Executor, taps: Sequence[Tap] = ()) -> None:
        self._chunks = chunks
        self._work = _InThread(threads)
        self._rest = memoryview(b"")
        self._seen = _Seen(taps)

    async def read_into(self, buffer: memoryview) -> int:
        return await self._work.run(lambda: self._read_into(buffer))

    def read_now(self, most: int) -> bytes:
        """All of it at once, in the calling thread, instead of `read_into`; of more than `most` bytes, some more."""
        chunks, size = [], 0
        while size <= most and (chunk := next(self._chunks, None)) is not None:
            chunks.append(chunk)
            size += len(chunk)
        nar = b"".join(chunks)
        self._seen.feed(memoryview(nar))
        return nar

    def digest(self) -> Hash:
        return self._seen.digest()

    def accept_now(self) -> None:
        """As `accept`, in the calling thread."""
        self._seen.accept()

    def close_now(self) -> None:
        """As `close`, in the calling thread; after `read_now`."""
        self._seen.close()
        self._chunks = iter(())

    async def accept(self) -> None:
        if self._seen.watched:
            await self._work.run(self._seen.accept)

    async def close(self) -> None:
        await self._work.end()
        self._seen.close()
        self._chunks = iter(())  # a generator closes its files when it goes

    def _read_into(self, buffer: memoryview) -> int:
        free = buffer
        while free:
            if not self._rest:
                chunk = next(self._chunks, None)
                if chunk is None:
                    break
                self._rest = memoryview(chunk)
            free, self._rest = _move(self._rest, free)
        size = len(buffer) - len(free)
        self._seen.feed(buffer[:size])
        return size


class StreamedNar:
    """From an asynchronous iterator, such as the Nix daemon's answer."""

    def __init__(self, chunks: AsyncIterator[bytes], threads: Executor, taps: Sequence[Tap] = ()) -> None:
        self._chunks = chunks
        self._work = _InThread(threads)
        self._rest = memoryview(b"")
        self._seen = _Seen(taps)

    async def read_into(self, buffer: memoryview) -> int:
        free = buffer
        while free:
            if not self._rest:
                try:
                    self._rest = memoryview(await anext(self._chunks))
                except StopAsyncIteration:
                    break
            free, self._rest = _move(self._rest, free)
        size = len(buffer) - len(free)
        await self._work.run(lambda: self._seen.feed(buffer[:size]))
        return size

    def digest(self) -> Hash:
        return self._seen.digest()

    async def accept(self) -> None:
        if self._seen.watched:
            await self._work.run(self._seen.accept)

    async def close(self) -> None:
        await self._work.end()
        self._seen.close()
        close = getattr(self._chunks, "aclose", None)
        if close is not None:
            await close()


class _Seen:
    """All that looks on while a NAR is read, first of all its hash."""

    def __init__(self, taps: Sequence[Tap]) -> None:
        self._sha256 = hashlib.sha256()
        self._taps = taps

    @property
    def watched(self) -> bool:
        return bool(self._taps)

    def feed(self, data: memoryview) -> None:
        self._sha256.update(data)
        for tap in self._taps:
            tap.feed(data)

    def digest(self) -> Hash:
        return Hash("sha256", self._sha256.digest())

    def accept(self) -> None:
        taps, self._taps = self._taps, ()
        for tap in taps:
            tap.accept()

    def close(self) -> None:
        for tap in self._taps:
            tap.drop()
        self._taps = ()


class _InThread:
    """One call at a time in a thread, which cannot be interrupted, but waited for."""

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._running: asyncio.Future[Any] | None = None

    async def run(self, call: Callable[[], Result]) -> Result:
        running = asyncio.get_running_loop().run_in_executor(self._threads, call)
        self._running = running
        return await asyncio.shield(running)

    async def end(self) -> None:
        if self._running is not None:
            await asyncio.wait([self._running])
            if not self._running.cancelled():
                self._running.exception()  # whoever began it may not have waited for it


def _move(chunk: memoryview, free: memoryview) -> tuple[memoryview, memoryview]:
    """Copy what fits; the rest of both."""
    size = min(len(chunk), len(free))
    free[:size] = chunk[:size]
    return free[size:], chunk[size:]
