"""How large the body of a request may be: as large as the server says, or less where a proxy before it takes less."""

from __future__ import annotations

from cachesrv.errors import TooLarge

SMALLEST = 64 * 1024
"""Bytes: who does not take a body of so many takes no push."""


class BodyTooLarge(TooLarge):
    """A body has more bytes than are taken; smaller ones may be."""


class BodyLimit:
    """Bytes of the largest body that may be taken: not known at first, and less after each that was not.

    It goes down to powers of two, so that who is told of the same limit later cuts a NAR into the same parts.
    """

    def __init__(self) -> None:
        self._limit = 0

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
        return True
