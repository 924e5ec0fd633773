"""Blocking work on a stream of chunks, in a thread, fed from the event loop with bounded memory."""

from __future__ import annotations

import asyncio
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from cachesrv.errors import BadInput

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
    from concurrent.futures import Executor

Result = TypeVar("Result")

_IN_FLIGHT = 8
"""Chunks of one stream that wait for its thread, at most."""

_CHUNK = 256 * 1024


async def coalesced(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in chunks of at least 256 KiB, but for the last: each one costs a hop to a thread."""
    gathered: list[bytes] = []
    size = 0
    async for chunk in chunks:
        gathered.append(chunk)
        size += len(chunk)
        if size >= _CHUNK:
            yield b"".join(gathered) if len(gathered) > 1 else chunk
            gathered, size = [], 0
    if size:
        yield b"".join(gathered)


async def consumed(
    executor: Executor, consume: Callable[[Iterator[bytes]], Result], chunks: AsyncIterator[bytes]
) -> Result:
    """What `consume`, called in a thread with an iterator of the chunks, returns or raises."""
    consumer = _Consumer(executor, consume)
    try:
        async for chunk in chunks:
            await consumer.feed(chunk)
        return await consumer.finish()
    except BaseException:
        await consumer.abandon()
        raise


class _Consumer(Generic[Result]):
    def __init__(self, executor: Executor, consume: Callable[[Iterator[bytes]], Result]) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._room = asyncio.Semaphore(_IN_FLIGHT)
        self._result = self._loop.run_in_executor(executor, lambda: consume(self._chunks()))

    async def feed(self, chunk: bytes) -> None:
        """Hand over a chunk; waits while the thread is behind. Raises what it raised, as soon as it has."""
        if self._room.locked():
            await self._wait_for_room()
        else:
            await self._room.acquire()
        if self._result.done():
            self._result.result()
            raise BadInput("there are bytes after the end")
        self._queue.put(chunk)

    async def finish(self) -> Result:
        """All chunks were fed."""
        self._queue.put(None)
        return await self._result

    async def abandon(self) -> None:
        """The chunks end here, whatever they were to become; returns when the thread has let go of them."""
        self._queue.put(None)
        # Also when this is cancelled: nobody else asks what became of it.
        self._result.add_done_callback(_forget)
        await asyncio.wait([self._result])

    async def _wait_for_room(self) -> None:
        room = asyncio.ensure_future(self._room.acquire())
        try:
            waited: list[asyncio.Future[Any]] = [room, self._result]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not room.done():
                room.cancel()

    def _chunks(self) -> Iterator[bytes]:
        while (chunk := self._queue.get()) is not None:
            yield chunk
            self._loop.call_soon_threadsafe(self._room.release)


def _forget(result: asyncio.Future[Any]) -> None:
    if not result.cancelled():
        result.exception()
