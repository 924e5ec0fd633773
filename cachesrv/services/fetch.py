"""An object that is fetched from afar: once, however many clients wait for it, and passed on to them while it comes.

What comes is written to the disk cache, and clients follow the file as it grows. The last byte is held back until size
and contents are found to be what they should be: what was cut or altered on its way never reaches a client as a whole
answer, and is not kept. A transfer that breaks is resumed where it broke.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING, Protocol

import structlog

from cachesrv.errors import CachesrvError, Mismatch, PeerError, StoreError, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

    from cachesrv.storage.base import ByteRange, IncomingObject, ObjectCache

_log = structlog.get_logger()

_READ = 256 * 1024
_TRIES = 5
_PAUSE = 0.2
"""Seconds before the first resumption; twice as many before each one after it."""


class Remote(Protocol):
    """An object somewhere else. `key` is what it is called in the disk cache, `size` its bytes; `keep` says whether it
    stays there.
    """

    @property
    def key(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def keep(self) -> bool: ...

    @property
    def read(self) -> Callable[[int], AsyncGenerator[bytes, None]]:
        """Gives its bytes from a position on. Raises StoreError or PeerError when it breaks."""

    @property
    def receive(self) -> Callable[[AsyncIterator[bytes]], Awaitable[None]]:
        """Takes in all of its bytes, as they are written to the disk cache. Returns when they are found right, and
        kept wherever they are to be kept for good. Raises BadInput when they are not right.
        """


class Fetch:
    """One object on its way; made by Fetches."""

    def __init__(self, remote: Remote) -> None:
        self.size = remote.size
        self._remote = remote
        self._incoming: IncomingObject | None = None
        self._verified = False
        self._error: Exception | None = None
        self._followers = 0
        self._moved = asyncio.Event()

    async def read(self, part: ByteRange) -> AsyncGenerator[bytes, None]:
        """The part, as it comes. Raises what ended the fetch."""
        self._followers += 1
        try:
            position = part.start
            while position < part.end:
                available = await self._wait_beyond(position)
                assert self._incoming is not None
                data = await self._incoming.read(position, min(_READ, available - position, part.end - position))
                position += len(data)
                yield data
        finally:
            self._followers -= 1
            self._announce()

    async def _wait_beyond(self, position: int) -> int:
        """Where the bytes end that may be passed on; beyond `position`."""
        while True:
            if self._error:
                raise self._error
            written = self._incoming.written if self._incoming else 0
            available = written if self._verified else min(written, self.size - 1)
            if available > position:
                return available
            await self._moved.wait()

    def _announce(self) -> None:
        """Wake all who wait; each looks for itself."""
        self._moved.set()
        self._moved = asyncio.Event()

    async def run(self, cache: ObjectCache) -> None:
        """Fetch, verify and keep; then wait until nobody follows any more."""
        async with AsyncExitStack() as stack:
            try:
                self._incoming = await stack.enter_async_context(cache.incoming(self._remote.key, self.size))
                async with aclosing(self._written(self._incoming)) as chunks:
                    await self._remote.receive(chunks)
                if self._remote.keep:
                    await self._incoming.commit()
                self._verified = True
            except CachesrvError as error:
                _log.warning("a fetch failed", key=self._remote.key, error=str(error))
                self._error = error
            except BaseException:
                self._error = StoreUnavailable("the fetch was ended")
                self._announce()
                raise
            self._announce()
            while self._followers:
                await self._moved.wait()

    async def _written(self, incoming: IncomingObject) -> AsyncGenerator[bytes, None]:
        """The bytes as they come, each chunk in the file before it is handed on."""
        async with aclosing(self._resumed(incoming)) as chunks:
            async for chunk in chunks:
                if incoming.written + len(chunk) > self.size:
                    raise Mismatch(f"more than the {self.size} bytes came that were announced")
                await incoming.write(chunk)
                self._announce()
                yield chunk

    async def _resumed(self, incoming: IncomingObject) -> AsyncGenerator[bytes, None]:
        """The bytes from where they broke off, until all have come or no more do. Raises PeerError, StoreError."""
        in_vain = 0
        while incoming.written < self.size:
            before = incoming.written
            failure: PeerError | StoreError = PeerError(f"the transfer ended after {before} of {self.size} bytes")
            chunks = self._remote.read(before)
            try:
                while chunk := await anext(chunks, b""):
                    yield chunk
            except (PeerError, StoreError) as error:
                failure = error
            finally:
                await chunks.aclose()
            if incoming.written < self.size:
                in_vain = 0 if incoming.written > before else in_vain + 1
                if in_vain == _TRIES:
                    raise failure
                _log.info("a transfer is resumed", key=self._remote.key, at=incoming.written, error=str(failure))
                await asyncio.sleep(_PAUSE * 2**in_vain)


class Fetches:
    """All that are under way in this process."""

    def __init__(self, cache: ObjectCache) -> None:
        self._cache = cache
        self._under_way: dict[str, Fetch] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def under_way(self, key: str) -> Fetch | None:
        """The one of this object, to be followed."""
        return self._under_way.get(key)

    def start(self, remote: Remote) -> Fetch:
        """Begin one, or join the one that is under way."""
        if fetch := self._under_way.get(remote.key):
            return fetch
        fetch = self._under_way[remote.key] = Fetch(remote)
        task = asyncio.create_task(self._run(remote.key, fetch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return fetch

    async def close(self) -> None:
        """End what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, key: str, fetch: Fetch) -> None:
        try:
            await fetch.run(self._cache)
        finally:
            del self._under_way[key]
