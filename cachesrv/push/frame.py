"""A piece of a NAR, compressed by itself by whichever thread is free."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import zstandard

from cachesrv.nix.seekable import Frames, FrameSize

if TYPE_CHECKING:
    from collections.abc import Sequence

FRAME_SIZE = 2 * 1024 * 1024
"""Bytes of NAR in a frame. Files are 1 to 2 % larger than with frames of 4 MiB, and made a fifth faster in half the
memory. It is part of what is sent: another value makes other files.
"""

_CHUNK_SIZE = 128 * 1024


@dataclass(frozen=True, slots=True)
class Frame:
    """A compressed frame in chunks, and how many bytes it has with and without compression; no chunks when it has
    arrived.
    """

    chunks: Sequence[bytes]
    sizes: FrameSize


class Compressors(threading.local):
    """One for each thread, used over and over."""

    def __init__(self) -> None:
        self._level = 0
        self._frames = Frames(self._level)

    def frame(self, data: memoryview, level: int) -> Frame:
        """Of this data, by the one of this thread."""
        if level != self._level:
            self._level, self._frames = level, Frames(level)
        # Copied, since what zstd returns keeps the memory of the largest that it could have become; in pieces of one
        # size, since those leave no holes when they are freed.
        made = memoryview(self._frames.compress(data))
        chunks = [bytes(made[start : start + _CHUNK_SIZE]) for start in range(0, len(made), _CHUNK_SIZE)]
        return Frame(chunks, FrameSize(len(made), len(data)))


def recipe(level: int) -> str:
    """All that the bytes of a file depend on beside its NAR."""
    return f"zstd {'.'.join(map(str, zstandard.ZSTD_VERSION))}, level {level}, frames of {FRAME_SIZE}"
