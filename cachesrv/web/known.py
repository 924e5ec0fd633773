"""Answers to requests that come again: the same bytes are asked by all who build with the same inputs.

What is here saves a look into the index. It holds for one version of the index, so that it is never out of step with
it: each change of the index, by whatever process, empties it. When it is full it stays as it is for a while: what is
asked often was most likely among the first, and nothing is spent on what is asked once.
"""

from __future__ import annotations

MAX_BYTES = 24 * 1024 * 1024
"""Of requests and answers together, and of what Python needs to hold them."""

_SECONDS = 60
"""How long it is kept at most: then others have their chance, and the use of paths is noted again."""
_OVERHEAD = 300
"""Bytes of objects around one answer."""


Answer = tuple[bytes | None, float]
"""What the index says to a request: what a GET is answered with after the status line and the common fields, None when
the path is absent; until when that holds, in seconds since the epoch. A plain tuple, which is made in a tenth of the
time that one with names takes.
"""


class Known:
    """Answers by request, `max_bytes` of them. Use what `at` gives for one go, and add to it by `remember`."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._answers: dict[bytes, Answer] = {}
        self._bytes = 0
        self.is_full = False
        self._version = -1
        self._end = 0.0

    def at(self, version: int, now: float) -> dict[bytes, Answer]:
        """The answers that hold at this version of the index; `now` in seconds since the epoch."""
        if version != self._version or now > self._end:
            self.forget()
            self._version, self._end = version, now + _SECONDS
        return self._answers

    def remember(self, request: bytes, answer: Answer) -> None:
        """Note an answer that was found at the version that `at` was called with last; not when it `is_full`."""
        self._bytes += len(request) + len(answer[0] or b"") + _OVERHEAD
        self._answers[request] = answer
        self.is_full = self._bytes > self._max_bytes

    def forget(self) -> None:
        """Other rules hold than before, or another index."""
        self._answers.clear()
        self._bytes = 0
        self.is_full = False
