"""An object that is fetched from afar for one client, past the disk cache: where that has no room for it."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager, nullcontext
from typing import TYPE_CHECKING

from cachesrv.errors import StoreError
from cachesrv.services.fetch import Fetch

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from typing import NoReturn

    from cachesrv.services.fetch import Remote
    from cachesrv.storage.base import ByteRange

_WINDOW = 1024 * 1024
"""Bytes that have come and are not taken yet, about."""


async def read_alone(remote: Remote, part: ByteRange) -> AsyncGenerator[bytes, None]:
    """The part as it comes, at the pace of its reader; the last byte of the object is held back as in a Fetch that is
    shared. Raises what ends the fetch.
    """
    fetch = Fetch(remote, keep=False)
    running = asyncio.create_task(fetch.run(_Window(part.start), nullcontext()))
    try:
        async with aclosing(fetch.read(part)) as chunks:
            async for chunk in chunks:
                yield chunk
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


class _Window:
    """An `ObjectCache` of one object, and that object on its way (`IncomingObject`): it is held as far as its one
    reader has not taken it yet, who reads it from `begin` to the end.
    """

    def __init__(self, begin: int) -> None:
        self.written = 0
        self._begin = begin
        self._data = bytearray()
        self._taken = asyncio.Event()

    async def get(self, key: str) -> None:
        """See ObjectCache."""

    def at_once(self, key: str, *, limit: int) -> None:
        """See ObjectCache."""

    def warm_file(self, key: str, *, limit: int) -> None:
        """See ObjectCache."""

    async def discard(self, key: str) -> None:
        """See ObjectCache."""

    @asynccontextmanager
    async def incoming(self, _key: str, _size: int | None = None) -> AsyncIterator[_Window]:
        """See ObjectCache."""
        yield self

    async def write(self, data: bytes) -> None:
        """See IncomingObject."""
        while len(self._data) >= _WINDOW:
            self._taken.clear()
            await self._taken.wait()
        self._data += data[max(0, self._begin - self.written) :]
        self.written += len(data)

    async def read(self, position: int, length: int) -> bytes:
        """See IncomingObject."""
        assert position == self._begin
        data = bytes(self._data[:length])
        del self._data[:length]
        self._begin += len(data)
        self._taken.set()
        return data

    def reopened(self) -> NoReturn:
        """See IncomingObject."""
        raise StoreError("what passes the disk cache lies in no file")

    async def commit(self) -> None:
        """See IncomingObject."""
