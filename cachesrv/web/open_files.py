"""Files that are kept open for a while because they are asked for again and again."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

SECONDS = 5.0
"""How long one is kept open; after that it is opened anew, if it is still there and still in memory."""
MANY = 256


@dataclass(frozen=True, slots=True)
class OpenFile:
    """`head` is what precedes its `size` bytes in an answer, without what changes from second to second."""

    descriptor: int
    size: int
    head: bytes
    until: float


class OpenFiles:
    """By request line. A descriptor is good until the event loop goes on: who needs it longer duplicates it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._files: dict[bytes, OpenFile] = {}
        self.get = self._files.get

    def add(self, line: bytes, descriptor: int, size: int, head: bytes) -> OpenFile:
        """Take over a descriptor."""
        if len(self._files) >= MANY:
            self.close()
        file = self._files[line] = OpenFile(descriptor, size, head, self._clock() + SECONDS)
        return file

    def expire(self) -> None:
        """Close those whose time is over."""
        now = self._clock()
        for line, file in list(self._files.items()):
            if file.until <= now:
                os.close(self._files.pop(line).descriptor)

    def close(self) -> None:
        """Close all."""
        for file in self._files.values():
            os.close(file.descriptor)
        self._files.clear()
