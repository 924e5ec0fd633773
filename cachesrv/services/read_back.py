"""What a client has written to storage itself, read back: each part is compared with what was sent.

Whether all of it is the NAR that it was to be is for others to say; this tells, of what is not, whether the client sent
nonsense or a part was altered in storage or on the way back.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from cachesrv.errors import Mismatch
from cachesrv.services.in_thread import coalesced

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Sequence

    from cachesrv.services.part_store import StagedPart


class Altered(Mismatch):
    """A part is not what was sent."""


class ReadBack(AsyncIterator[bytes]):
    """The chunks; those that end a part come when it is found right, else Altered is raised. `read`: bytes so far."""

    def __init__(self, chunks: AsyncIterable[bytes], parts: Sequence[StagedPart]) -> None:
        self._pieces = coalesced(chunks)
        self._parts = parts
        self._number = 0
        self._begin_part()
        self.read = 0

    async def __anext__(self) -> bytes:
        piece = await anext(self._pieces)
        await asyncio.to_thread(self._compare, piece)
        self.read += len(piece)
        return piece

    async def finish_part(self) -> None:
        """Read on to the end of the part at which the chunks were left. Raises Altered."""
        while self._in_part:
            await anext(self)

    def _begin_part(self) -> None:
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._in_part = 0

    def _compare(self, piece: bytes) -> None:
        rest = memoryview(piece)
        while rest and self._number < len(self._parts):
            part = self._parts[self._number]
            of_part = rest[: part.size - self._in_part]
            rest = rest[len(of_part) :]
            self._md5.update(of_part)
            self._in_part += len(of_part)
            if self._in_part == part.size:
                self._end_part(part)

    def _end_part(self, part: StagedPart) -> None:
        found = self._md5.hexdigest()
        self._number += 1
        self._begin_part()
        if part.md5 and part.md5 != found:
            raise Altered(
                f"part {self._number} was altered in the bucket, or on its way back from there:"
                f" it was sent with the MD5 {part.md5}, and has {found}; push again"
            )
