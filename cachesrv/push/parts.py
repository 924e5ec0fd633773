"""A compressed NAR cut into parts of one size, each in a buffer of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Container

    from cachesrv.push.compressed_nar import CompressedNar
    from cachesrv.push.part_memory import Share


@dataclass(frozen=True, slots=True)
class Part:
    """`number` from 1; `data` lies in `buffer`, which the share wants back; a part that has arrived before has none.
    `nar_bytes` of the NAR came with it; `last` says that no other follows.
    """

    number: int
    buffer: memoryview | None
    size: int
    nar_bytes: int
    last: bool

    @property
    def data(self) -> memoryview:
        """The bytes of a part that has not arrived."""
        assert self.buffer is not None
        return self.buffer[: self.size]


async def cut(
    nar: CompressedNar, share: Share, size: int, arrived: Container[int] = frozenset()
) -> AsyncGenerator[Part, None]:
    """Parts of `size` bytes, which a buffer has to hold; the last one is not empty, and comes only when all of the NAR
    has been found to be right. Those whose numbers are in `arrived` have no bytes. Raises what the NAR does.
    """
    number, filled, told = 1, 0, 0
    buffer = None if number in arrived else await share.take()
    async for chunk in nar:
        # What the NAR has passed over comes before the chunk.
        left = nar.file_size - (number - 1) * size - filled
        while left:
            if filled == size:
                yield Part(number, buffer, size, nar.nar_sent - told, last=False)
                number, filled, told = number + 1, 0, nar.nar_sent
                buffer = None if number in arrived else await share.take()
            taken = min(left, size - filled)
            if buffer is not None:
                at = len(chunk) - left
                buffer[filled : filled + taken] = memoryview(chunk)[at : at + taken]
            filled += taken
            left -= taken
    yield Part(number, buffer, filled, nar.nar_sent - told, last=True)
