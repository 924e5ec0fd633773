"""How large the body of a request may be: as large as the server says, or less where a proxy before it takes less.

Most proxies say that a body is too large. Some end the connection instead, or give a request less time than a large
body takes: that is concluded from connections that break, again and again, under bodies larger than any that got
through.
"""

from __future__ import annotations

from cachesrv.errors import Refused, TooLarge

SMALLEST = 64 * 1024
"""Bytes: who does not take a body of so many takes no push."""

BREAKS = 3
"""In a row, until bodies are taken to be too large. A network that fails breaks connections as well."""


class BodyTooLarge(TooLarge):
    """A body has more bytes than are taken; smaller ones may be."""


class LengthWanted(Refused):
    """A body is not taken unless its length is said beforehand."""


class BodyLimit:
    """Bytes of the largest body that may be taken: not known at first, and less after each that was not.

    It goes down to powers of two, so that who is told of the same limit later cuts a NAR into the same parts.
    `lengths` says that no body is taken unless its length is said beforehand.
    """

    def __init__(self) -> None:
        self.lengths = False
        self._limit = 0
        self._taken = 0
        self._breaks = 0
        self._in_a_row = 0
        self._largest = 0

    def within(self, size: int) -> int:
        """`size`, or what may be taken if that is less."""
        return min(size, self._limit or size)

    def said(self, size: int) -> None:
        """The server's own limit; 0 for none."""
        self._limit = size

    def refused(self, size: int) -> bool:
        """A body of so many bytes was not taken: whether smaller ones are worth trying."""
        if size <= SMALLEST:
            return False
        smaller = 1 << (size - 1).bit_length() - 1
        self._limit = self.within(smaller)
        self._forget_breaks()
        return True

    def taken(self, size: int) -> None:
        """A body of so many bytes got through."""
        self._taken = max(self._taken, size)
        if size >= self._largest:
            self._forget_breaks()

    def begun(self) -> int:
        """A body begins: what `broke` wants to know."""
        return self._breaks

    def broke(self, size: int, begun: int) -> int:
        """A connection broke under a body of so many bytes: 0, or how many have come to look like too many. Those that
        were under way together break together: they count once.
        """
        if size <= max(SMALLEST, self._taken):
            return 0
        if begun == self._breaks:
            self._breaks += 1
            self._in_a_row += 1
            self._largest = max(self._largest, size)
        return self._largest if self._in_a_row >= BREAKS else 0

    def _forget_breaks(self) -> None:
        self._in_a_row = self._largest = 0
