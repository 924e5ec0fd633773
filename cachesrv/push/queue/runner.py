"""The service of a queue, which waits for hooks, for what is to be tried again, and for troubles to pass; and the
drain, which does all there is and ends.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import msgspec

from cachesrv.errors import CachesrvError, StoreError
from cachesrv.push.changes import Changes
from cachesrv.push.queue.entries import TROUBLE, Counts
from cachesrv.push.queue.work import CannotPush
from cachesrv.push.retry import Backoff, TryAgain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cachesrv.push.queue.entries import Entry
    from cachesrv.push.queue.work import Work

TROUBLED = Backoff(first=5.0, longest=300.0)
"""For what concerns all paths."""

_LOOK = 60.0
"""Seconds after which the sources are looked at even if nothing seems to have changed."""


def _nothing(*_: object) -> None:
    """For those who do not want to know."""


class Trouble(msgspec.Struct, frozen=True):
    """Why nothing can be pushed, since when, and when it is tried again; seconds since 1970."""

    reason: str
    since: float
    next_try: float


class Service:
    """Runs until it is cancelled or told to end, or `idle` seconds after there is nothing left to do. What wakes it is
    looked at `gather` seconds later.
    """

    def __init__(self, work: Work, *, idle: float | None = None, gather: float = 0.0) -> None:
        self._work = work
        self._entries = work.entries
        self._idle = idle
        self._gather = gather
        self._ending = False
        self._changes: Changes | None = None
        self._troubles = 0
        self._since = 0.0
        self._until = 0.0

    async def run(
        self,
        *,
        fifos: Sequence[int] = (),
        ready: Callable[[], None] = _nothing,
        show: Callable[[Counts], None] = _nothing,
    ) -> None:
        """`fifos` are read from, as one more sign of something to do; `ready` is called when hooks are heard, `show`
        when all is done that can be. Raises StoreError when the queue cannot be used at all.
        """
        with Changes() as changes, _woken_by(fifos, changes):
            self._changes = changes
            self._watch(changes)
            self._entries.claim(())  # by one that was killed
            self._entries.note(TROUBLE, None)
            ready()
            await self._run(changes, show)

    def end(self) -> None:
        """After what is being pushed just now."""
        self._ending = True
        if self._changes is not None:
            self._changes.wake()

    async def _run(self, changes: Changes, show: Callable[[Counts], None]) -> None:
        worked = time.monotonic()
        while not self._ending:
            self._watch(changes)  # again: another directory may be in the place of one of them
            if await self._round():
                worked = time.monotonic()
                continue
            counts = await self._counts()
            show(counts)
            rest = None if self._idle is None else worked + self._idle - time.monotonic()
            # what wakes us from here on is still to be read by the next one that is started
            if rest is not None and rest <= 0 and counts == Counts() and not changes.pending:
                return
            await changes.wait(self._patience(counts, rest))
            if not self._ending:
                await asyncio.sleep(self._gather)

    def _watch(self, changes: Changes) -> None:
        for source in self._work.sources:
            source.watch(changes)

    async def _round(self) -> bool:
        """Whether there was something to do."""
        try:
            if await self._is_in_trouble():
                await self._work.take_in()
                return False
            worked = await self._work.step(time.time())
            if self._troubles:
                await asyncio.to_thread(self._entries.note, TROUBLE, None)
                self._troubles = 0
        except CannotPush as stopped:
            await self._meet(stopped.error)
        except StoreError as error:
            await self._meet(error)
        else:
            return worked
        return False

    async def _is_in_trouble(self) -> bool:
        """`cachesrv queue retry` ends it before its time."""
        if time.monotonic() >= self._until:
            return False
        return await asyncio.to_thread(self._entries.fact, TROUBLE) is not None

    async def _meet(self, error: CachesrvError) -> None:
        self._troubles += 1
        self._work.figures.troubles += 1
        now = time.time()
        self._since = now if self._troubles == 1 else self._since
        after = error.retry_after if isinstance(error, TryAgain) else 0.0
        delay = TROUBLED.delay(self._troubles, min(after, TROUBLED.longest), random.random())  # noqa: S311  jitter
        self._work.report.trouble(str(error), delay)
        trouble = Trouble(str(error), self._since, now + delay)
        self._until = time.monotonic() + delay
        try:
            await asyncio.to_thread(self._entries.note, TROUBLE, msgspec.json.encode(trouble).decode())
        except StoreError:
            await asyncio.sleep(delay)  # the trouble is the queue's own disk

    async def _counts(self) -> Counts:
        try:
            return await self._work.show(in_trouble=self._troubles > 0)
        except StoreError as error:
            await self._meet(error)
            return Counts(waiting=1)

    def _patience(self, counts: Counts, rest: float | None) -> float:
        """Seconds until there may be something to do without being woken."""
        times = [_LOOK]
        if rest is not None and rest > 0:
            times.append(rest)
        if self._troubles:
            times.append(self._until - time.monotonic())
        elif counts.next_try is not None:
            times.append(counts.next_try - time.time())
        return max(0.0, min(times))


async def drain(work: Work) -> list[Entry]:
    """Push all there is, and try once more what has failed before. Returns what is left over, with the reasons. Raises
    what concerns all paths, StoreError.
    """
    try:
        await asyncio.to_thread(work.entries.retry)
        begun = time.time()
        while await work.step(begun):
            pass
        return await asyncio.to_thread(work.entries.those_failed)
    except CannotPush as stopped:
        raise stopped.error from None
    finally:
        with suppress(StoreError):
            await work.show()


@contextmanager
def _woken_by(fifos: Sequence[int], changes: Changes) -> Iterator[None]:
    loop = asyncio.get_running_loop()

    def read(fifo: int) -> None:
        with suppress(BlockingIOError):
            if not os.read(fifo, 4096):  # nobody writes to it any more
                loop.remove_reader(fifo)
        changes.wake()

    for fifo in fifos:
        os.set_blocking(fifo, False)
        loop.add_reader(fifo, read, fifo)
    try:
        yield
    finally:
        for fifo in fifos:
            loop.remove_reader(fifo)
