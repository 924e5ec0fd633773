"""A compressed NAR cut into parts of one size, each in a buffer of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from cachesrv.push.part_memory import Share
    from cachesrv.push.pipeline import CompressedNar


@dataclass(frozen=True, slots=True)
class Part:
    """`number` from 1; `data` lies in `buffer`, which the share wants back; `nar_bytes` of the NAR came with it; `last`
    says that no other follows.
    """

    number: int
    buffer: memoryview
    size: int
    nar_bytes: int
    last: bool

    @property
    def data(self) -> memoryview:
        """The bytes of the part."""
        return self.buffer[: self.size]


async def cut(nar: CompressedNar, share: Share, size: int) -> AsyncGenerator[Part, None]:
    """Parts of `size` bytes, which a buffer has to hold; the last one is not empty, and comes only when all of the NAR
    has been found to be right. Raises what the NAR does.
    """
    number, filled, told = 1, 0, 0
    buffer = await share.take()
    async for chunk in nar:
        rest = memoryview(chunk)
        while rest:
            if filled == size:
                yield Part(number, buffer, size, nar.nar_sent - told, last=False)
                number, filled, told = number + 1, 0, nar.nar_sent
                buffer = await share.take()
            taken = rest[: size - filled]
            buffer[filled : filled + len(taken)] = taken
            filled += len(taken)
            rest = rest[len(taken) :]
    yield Part(number, buffer, filled, nar.nar_sent - told, last=True)
