"""Answers to requests that come again: the same bytes are asked by all who build with the same inputs.

What is here saves a look into the index. It holds for one version of the index, so that it is never out of step with
it: each change of the index, by whatever process, empties it. When it is full it stays as it is for a while: what is
asked often was most likely among the first, and nothing is spent on what is asked once. Most questions are for what is
absent, and such answers take least: they may take room that others may not.
"""

from __future__ import annotations

MAX_BYTES = 24 * 1024 * 1024
"""Of requests and answers together, and of what Python needs to hold them."""

_SHARE_OF_PATHS = 2 / 3
_SECONDS = 60
"""How long it is kept at most: then others have their chance, and the use of paths is noted again."""
_OVERHEAD = 250
"""Bytes of objects around one answer."""

ABSENT = b""
"""What stands for the answer that the path is absent."""


class Known:
    """Answers by request, `max_bytes` of them: what a GET is answered with after the status line and the common fields,
    or `ABSENT`. Use what `at` gives for one go, and add to it by `remember`.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._answers: dict[bytes, bytes] = {}
        self._bytes = 0
        self._version = -1
        self._begin = self._end = 0.0

    def at(self, version: int, now: float) -> dict[bytes, bytes]:
        """The answers that hold at this version of the index; `now` in seconds since the epoch."""
        if version != self._version or not self._begin <= now <= self._end:
            self.forget()
            self._version, self._begin, self._end = version, now, now + _SECONDS
        return self._answers

    def remember(self, request: bytes, answer: bytes, until: float) -> None:
        """Note an answer that was found at the version that `at` was called with last, if there is room for it, and if
        it holds for as long as all the others: `until` is in seconds since the epoch.
        """
        room = self._max_bytes * _SHARE_OF_PATHS if answer else self._max_bytes
        if self._bytes < room and until > self._end:
            self._bytes += len(request) + len(answer) + _OVERHEAD
            self._answers[request] = answer

    def forget(self) -> None:
        """Other rules hold than before, or another index."""
        self._answers.clear()
        self._bytes = 0
