"""A NAR that is put together from its parts, and checked, while they arrive: when all are there, little is left to do.

The parts are read from storage, in order. Until it is said which parts make up the NAR, the ones that arrive are taken
for those; it does not end before that is said, and is given up when no part comes for a while.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from cachesrv.errors import CachesrvError, NotFound

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Sequence

    from cachesrv.catalog.base import NarRecord

ReadPart = Callable[[int, str], "AsyncIterator[bytes]"]
"""A part by its number and sha256 (base-16)."""

Receive = Callable[["AsyncIterator[bytes]"], "Coroutine[None, None, NarRecord]"]
"""Checks and stores a compressed NAR."""


class GivenUp(CachesrvError):
    """No part came for too long."""


class Assembly:
    """`read_part` gives the bytes of a part, `receive` takes those of the NAR; `patience` in seconds."""

    def __init__(self, read_part: ReadPart, receive: Receive, *, patience: float) -> None:
        self._read_part = read_part
        self._patience = patience
        self._arrived: dict[int, str] = {}
        self._used: list[str] = []
        self._parts: Sequence[str] | None = None
        self._changed = asyncio.Event()
        self.read = 0
        """Bytes so far."""
        self.result = asyncio.create_task(receive(self._chunks()))
        self.result.add_done_callback(_look_at)

    def arrived(self, number: int, sha256: str) -> None:
        """A part is there."""
        self._arrived[number] = sha256
        self._changed.set()

    def follow(self, parts: Sequence[str]) -> bool:
        """These are the parts, and all of them are there. False when others were taken for them: then this is of no
        more use.
        """
        if self.result.done() or self._used != parts[: len(self._used)]:
            return False
        self._parts = parts
        self._changed.set()
        return True

    async def made(self) -> NarRecord:
        """Wait for it. Raises what `receive` does, GivenUp, and NotFound when it was closed meanwhile."""
        await asyncio.wait([self.result])
        if self.result.cancelled():
            raise NotFound("the parts of this NAR were given up: begin it again")
        return self.result.result()

    async def close(self) -> None:
        """Give up, and wait until nothing is at work."""
        self.result.cancel()
        await asyncio.wait([self.result])

    async def _chunks(self) -> AsyncIterator[bytes]:
        while (sha256 := await self._next()) is not None:
            self._used.append(sha256)
            async for chunk in self._read_part(len(self._used), sha256):
                self.read += len(chunk)
                yield chunk

    async def _next(self) -> str | None:
        """The sha256 of the part that comes next, None when there is none."""
        number = len(self._used) + 1
        while self._parts is None:
            if number in self._arrived:
                return self._arrived.pop(number)
            self._changed.clear()
            try:
                async with asyncio.timeout(self._patience):
                    await self._changed.wait()
            except TimeoutError:
                raise GivenUp(f"part {number} has not come") from None
        return self._parts[number - 1] if number <= len(self._parts) else None


def _look_at(result: asyncio.Future[NarRecord]) -> None:
    """What fails before anybody waits for it is found out again when the parts are all there."""
    if not result.cancelled():
        result.exception()
