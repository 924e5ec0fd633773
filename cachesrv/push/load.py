"""Who waits for whom in a push: how long threads had nothing to compress, and how long nothing was on its way."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cachesrv.push.level import Observed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Load:
    """Of `threads` that compress, and of what is on its way to the server, until the server has it. To be used from one
    thread; `now` gives seconds.
    """

    def __init__(self, threads: int, now: Callable[[], float] = time.monotonic) -> None:
        self._threads = threads
        self._now = now
        self._since = now()
        self._compressing = 0
        self._leaving = 0
        self._observed = Observed()

    @property
    def observed(self) -> Observed:
        """All up to now."""
        self._advance()
        return self._observed

    def begin(self) -> None:
        """A piece of work is there for a thread."""
        self._advance()
        self._compressing += 1

    def end(self) -> None:
        """It is done."""
        self._advance()
        self._compressing -= 1

    @contextmanager
    def compressing(self) -> Iterator[None]:
        """From `begin` to `end`."""
        self.begin()
        try:
            yield
        finally:
            self.end()

    @contextmanager
    def leaving(self) -> Iterator[None]:
        """Something is on its way meanwhile."""
        leaving = Leaving(self)
        leaving.start()
        try:
            yield
        finally:
            leaving.stop()

    def leave(self, more: int) -> None:
        """So much more, or less, is on its way from now on."""
        self._advance()
        self._leaving += more

    def _advance(self) -> None:
        now = self._now()
        seconds, self._since = now - self._since, now
        if not self._compressing and not self._leaving:
            return
        busy = min(self._compressing / self._threads, 1.0)
        seen = self._observed
        idle, starved = (1.0 - busy, 0.0) if self._leaving else (0.0, busy)
        self._observed = Observed(seen.work + seconds, seen.idle + seconds * idle, seen.starved + seconds * starved)


class Leaving:
    """One thing that is on its way now and then."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._now = False
        self._over = False

    def start(self) -> None:
        """It is, if it was not already."""
        if not self._now and not self._over:
            self._now = True
            self._load.leave(1)

    def stop(self) -> None:
        """It is not, if it was."""
        if self._now:
            self._now = False
            self._load.leave(-1)

    def close(self) -> None:
        """It never is again, whatever a request that was given up still asks for."""
        self.stop()
        self._over = True
