"""Where the bytes of a NAR come from: hashed on the way, and filled into buffers that the caller owns.

How much a buffer gets depends on the NAR alone, never on the chunks in which it came.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Protocol

from cachesrv.nix.hashes import Hash

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from cachesrv.push.inspection import Tap

_STEP = 256 * 1024
"""Bytes that are hashed as soon as they are read, while they are in the processor's nearest caches."""


class NarSource(Protocol):
    """A NAR, read once, one buffer after the other: `gather` and `fill` by turns."""

    async def begin(self) -> None:
        """Await what it takes to begin, such as a connection for which others are in line, who may be waiting for
        memory: to be called before any is taken. Raises whatever the source does.
        """

    async def gather(self, buffer: memoryview) -> None:
        """Await what has to be awaited before this buffer can be filled. Raises whatever the source does."""

    def fill(self, buffer: memoryview) -> int:
        """Fill the buffer with what comes next; how many bytes there were, which is less than it holds only at the
        end. Blocks. Raises whatever the source does; nothing can be read afterwards.
        """

    def digest(self) -> Hash:
        """sha256 of all that has been read."""

    @property
    def watched(self) -> bool:
        """Whether there is anybody whom `accept` tells something."""

    def accept(self) -> None:
        """It has been read to its end, and is what it should be: whoever looked on may keep what was seen. Blocks."""

    async def close(self) -> None:
        """Let go of files and connections. Nothing may be reading."""


class Reading(Protocol):
    """As `cachesrv.nix.nar_writer.NarDump` is."""

    def read_into(self, buffer: memoryview) -> int: ...
    def close(self) -> None: ...


class LocalNar:
    """Read from files."""

    def __init__(self, nar: Reading, taps: Sequence[Tap] = ()) -> None:
        self._nar = nar
        self._seen = _Seen(taps)

    @property
    def watched(self) -> bool:
        return self._seen.watched

    async def begin(self) -> None:
        """There is nobody in line."""

    async def gather(self, buffer: memoryview) -> None:
        """There is nothing to wait for but the disk."""

    def fill(self, buffer: memoryview) -> int:
        filled = 0
        while filled < len(buffer):
            free = buffer[filled : filled + _STEP]
            size = self._nar.read_into(free)
            self._seen.feed(free[:size])
            filled += size
            if size < len(free):
                break
        return filled

    def digest(self) -> Hash:
        return self._seen.digest()

    def accept(self) -> None:
        self._seen.accept()

    def close_now(self) -> None:
        """As `close`."""
        self._seen.close()
        self._nar.close()

    async def close(self) -> None:
        self.close_now()


class StreamedNar:
    """From an asynchronous iterator, such as the Nix daemon's answer."""

    def __init__(self, chunks: AsyncIterator[bytes], taps: Sequence[Tap] = ()) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")
        self._gathered = 0
        self._seen = _Seen(taps)

    @property
    def watched(self) -> bool:
        return self._seen.watched

    async def begin(self) -> None:
        self._rest = memoryview(await anext(self._chunks, b""))

    async def gather(self, buffer: memoryview) -> None:
        free = buffer
        while free:
            if not self._rest:
                try:
                    self._rest = memoryview(await anext(self._chunks))
                except StopAsyncIteration:
                    break
            free, self._rest = _move(self._rest, free)
        self._gathered = len(buffer) - len(free)

    def fill(self, buffer: memoryview) -> int:
        self._seen.feed(buffer[: self._gathered])
        return self._gathered

    def digest(self) -> Hash:
        return self._seen.digest()

    def accept(self) -> None:
        self._seen.accept()

    async def close(self) -> None:
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


def _move(chunk: memoryview, free: memoryview) -> tuple[memoryview, memoryview]:
    """Copy what fits; the rest of both."""
    size = min(len(chunk), len(free))
    free[:size] = chunk[:size]
    return free[size:], chunk[size:]
