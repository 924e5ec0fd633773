"""An object that is fetched from afar: once, however many clients wait for it, and passed on to them while it comes.

What comes is written to the disk cache, and clients follow the file as it grows. The last byte is held back until size
and contents are found to be what they should be: what was cut or altered on its way never reaches a client as a whole
answer, and is not kept. A transfer that breaks is resumed where it broke. A client that is slow, or goes, is of no
concern to the fetch.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, ExitStack, aclosing
from typing import TYPE_CHECKING, Protocol

import structlog

from cachesrv.errors import BadInput, CachesrvError, Mismatch, PeerError, PeerUnavailable, StoreError, StoreUnavailable
from cachesrv.storage.base import ByteRange, FilePart

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from cachesrv.storage.base import IncomingObject, ObjectCache

_log = structlog.get_logger()

_READ = 256 * 1024
_FOLLOWED = 4 * 1024 * 1024
_TRIES = 5
"""Transfers in a row that may bring nothing."""
_PAUSE = 0.2
"""Seconds before the first resumption; twice as many before each one after it."""


class Remote(Protocol):
    """An object somewhere else. `key` is what it is called in the disk cache; `size` its bytes, None when nobody says
    that before its end; `keep` says whether it stays in the disk cache.
    """

    @property
    def key(self) -> str: ...

    @property
    def size(self) -> int | None: ...

    @property
    def keep(self) -> bool: ...

    @property
    def read(self) -> Callable[[int], AsyncGenerator[bytes, None]]:
        """Gives its bytes from a position on. Raises PeerUnavailable when it breaks and can be resumed, PeerError and
        StoreError when it is in vain.
        """

    @property
    def receive(self) -> Callable[[AsyncIterator[bytes]], Awaitable[None]]:
        """Takes in all of its bytes, as they are written to the disk cache; comes for the first when it has room for
        all. Returns when they are found right, and kept wherever they are to be kept for good. Raises BadInput when
        they are not right, StoreError when they cannot be kept.
        """

    @property
    def is_stored(self) -> Callable[[], Awaitable[bool]]:
        """Says whether it lies in storage, after it was received. Raises StoreError."""


class Fetch:
    """One object on its way; without `keep` it does not stay, whatever the remote says."""

    def __init__(self, remote: Remote, *, keep: bool = True) -> None:
        self.size = remote.size
        self._remote = remote
        self._keep = keep and remote.keep
        self._incoming: IncomingObject | None = None
        self._begun = False
        self._verified = False
        self._done = False
        self._error: Exception | None = None
        self._followers = 0
        self._moved = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether it is of no use any more to who comes now: found right and kept, or failed."""
        return self._done or self._error is not None

    async def begun(self) -> None:
        """Wait until there is room for it, here and wherever it is to be kept. Raises why there is none."""
        await self._until(lambda: self._begun)

    async def done(self) -> None:
        """Wait until it is found right, and kept. Raises what ended it."""
        await self._until(lambda: self._done)

    async def read(self, part: ByteRange) -> AsyncGenerator[bytes, None]:
        """The part, as it comes. Raises what ended the fetch."""
        async with aclosing(self._coming(part, _READ)) as pieces:
            async for incoming, piece in pieces:
                yield await incoming.read(piece.start, piece.length)

    async def follow(self, part: ByteRange) -> AsyncGenerator[FilePart, None]:
        """The same, as it lies in the file that it is written to."""
        with ExitStack() as stack:
            file = None
            async with aclosing(self._coming(part, _FOLLOWED)) as pieces:
                async for incoming, piece in pieces:
                    file = file or stack.enter_context(incoming.reopened())
                    yield FilePart(file, piece)

    async def _coming(self, part: ByteRange, most: int) -> AsyncGenerator[tuple[IncomingObject, ByteRange], None]:
        self._followers += 1
        try:
            position = part.start
            while position < part.end:
                await self._until(lambda: self._available > position)  # noqa: B023  it does not outlive the round
                assert self._incoming is not None
                end = min(self._available, part.end, position + most)
                yield self._incoming, ByteRange(position, end)
                position = end
        finally:
            self._followers -= 1
            self._announce()

    @property
    def _available(self) -> int:
        """Where the bytes end that may be passed on."""
        written = self._incoming.written if self._incoming else 0
        return written if self._verified else min(written, (self.size or 1) - 1)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self._error:
                raise self._error
            await self._moved.wait()

    def _announce(self) -> None:
        """Wake all who wait; each looks for itself."""
        self._moved.set()
        self._moved = asyncio.Event()

    async def run(self, cache: ObjectCache, turn: AbstractAsyncContextManager[object]) -> None:
        """Fetch, verify and keep, within `turn`; then wait until nobody follows any more."""
        async with AsyncExitStack() as stack:
            try:
                async with turn:
                    self._incoming = await stack.enter_async_context(cache.incoming(self._remote.key, self.size))
                    await self._receive(cache, self._incoming)
                self._done = True
            except CachesrvError as error:
                if self._begun:
                    _log.warning("a fetch failed", key=self._remote.key, error=str(error))
                self._error = _not_of_the_client(error)
            except BaseException:
                self._error = StoreUnavailable("the fetch was ended")
                raise
            finally:
                self._announce()
            while self._followers:
                await self._moved.wait()

    async def _receive(self, cache: ObjectCache, incoming: IncomingObject) -> None:
        async with aclosing(self._written(incoming)) as chunks:
            await self._remote.receive(chunks)
        self._verified = True
        # Clients do not wait for the disk.
        self._announce()
        if self._keep:
            await incoming.commit()
            await self._let_go_of_deleted(cache)

    async def _let_go_of_deleted(self, cache: ObjectCache) -> None:
        """Who deleted it meanwhile has looked into the disk cache before it was there."""
        try:
            stored = await self._remote.is_stored()
        except StoreError:
            stored = False
        if not stored:
            await cache.discard(self._remote.key)

    async def _written(self, incoming: IncomingObject) -> AsyncGenerator[bytes, None]:
        """The bytes as they come, each chunk in the file before it is handed on."""
        self._begun = True
        self._announce()
        async with aclosing(_arriving(self._remote)) as chunks:
            async for chunk in chunks:
                await incoming.write(chunk)
                self._announce()
                yield chunk


def _not_of_the_client(error: CachesrvError) -> CachesrvError:
    """What is wrong with what was fetched is the doing of who sent it, not of who asked for it."""
    return PeerError(f"what was fetched is not what it should be: {error}") if isinstance(error, BadInput) else error


async def _arriving(remote: Remote) -> AsyncGenerator[bytes, None]:
    """All bytes of an object, asked for again from where they broke off. Raises Mismatch when more come than should,
    and what `Remote.read` raises when no more do.
    """
    position = in_vain = 0
    while remote.size is None or position < remote.size:
        before = position
        failure = PeerUnavailable(f"the transfer ended after {position} of {remote.size} bytes")
        try:
            async with aclosing(remote.read(position)) as chunks:
                async for chunk in chunks:
                    position += len(chunk)
                    if remote.size is not None and position > remote.size:
                        raise Mismatch(f"more than the {remote.size} bytes came that were announced")
                    yield chunk
            if remote.size is None:
                return
        except PeerUnavailable as error:
            failure = error
        if position != remote.size:
            in_vain = 0 if position > before else in_vain + 1
            if in_vain == _TRIES:
                raise failure
            _log.info("a transfer is resumed", key=remote.key, at=position, error=str(failure))
            await asyncio.sleep(_PAUSE * 2**in_vain)


class Fetches:
    """All that are under way in this process, at most `parallel` at a time; others wait for their turn."""

    def __init__(self, cache: ObjectCache, *, parallel: int = 128) -> None:
        self._cache = cache
        self._turns = asyncio.Semaphore(parallel)
        self._under_way: dict[str, Fetch] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def under_way(self, key: str) -> Fetch | None:
        """The one of this object, to be followed."""
        fetch = self._under_way.get(key)
        return fetch if fetch and not fetch.ended else None

    def start(self, remote: Remote) -> Fetch:
        """Begin one, or join the one that is under way."""
        if fetch := self.under_way(remote.key):
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
            await fetch.run(self._cache, self._turns)
        finally:
            if self._under_way.get(key) is fetch:
                del self._under_way[key]
