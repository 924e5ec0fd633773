"""Pushes what the queue holds: all that waits in one push after another, the oldest first.

What fails by itself is kept with its reason and tried again, later each time, apart from what has not failed yet; so it
holds nobody up. A push that breaks off for a reason that may lie in one of its paths is repeated with half of them,
until that one is alone. What concerns all paths (no server, no permission, no store) is raised.
"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Protocol

import structlog

from cachesrv.errors import BadInput, CachesrvError, StoreError, StoreUnavailable
from cachesrv.limits import no_thread
from cachesrv.push.queue.entries import LONGEST_DELAY, OUTPUTS, PATH
from cachesrv.push.queue.figures import Figures, write_figures
from cachesrv.push.queue.outcome import Outcome
from cachesrv.push.retry import Backoff
from cachesrv.push.upload import concerns_all

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

    from cachesrv.push.changes import Changes
    from cachesrv.push.queue.entries import Counts, Entries, Entry
    from cachesrv.push.queue.pusher import Way
    from cachesrv.push.queue.report import Report

_log = structlog.get_logger()

MOST = 500
"""Entries in one push, with all they need."""

AGAIN = Backoff(first=60.0, longest=LONGEST_DELAY)
"""For what has failed by itself."""

_REFRESH = 1.0
"""Seconds from one look at what a push has done so far to the next."""


class Source(Protocol):
    """Where entries come from."""

    def watch(self, changes: Changes) -> None:
        """Wake whoever waits for `changes` when there may be something new."""

    async def take_in(self, entries: Entries) -> None:
        """Add what is new. Raises StoreError."""


class CannotPush(Exception):
    """What concerns all paths; `error` is why."""

    def __init__(self, error: CachesrvError) -> None:
        super().__init__(str(error))
        self.error = error


class Work:
    """On the entries of one queue, by the process that holds its lock. Methods raise StoreError about the queue itself,
    and CannotPush. `figures` is a file for Prometheus.
    """

    def __init__(
        self, entries: Entries, sources: Sequence[Source], way: Way, report: Report, *, figures: Path | None = None
    ) -> None:
        self.entries = entries
        self.sources = sources
        self.report = report
        self.figures = Figures()
        self._way = way
        self._figures_file = figures
        self._most = MOST
        self._failed_first = False

    async def step(self, until: float) -> bool:
        """Take in what is new, and push once: of what waits or, every other time, of what has failed and is to be tried
        again by then. Whether there was something to do.
        """
        await self.take_in()
        resolved = await self._find_outputs(until)
        for failed in (self._failed_first, not self._failed_first):
            entries = await asyncio.to_thread(self.entries.due, PATH, self._most, again=failed, now=until)
            if entries:
                self._failed_first = not failed
                await self._push(entries)
                return True
        return resolved

    async def take_in(self) -> None:
        """What the sources have."""
        for source in self.sources:
            await source.take_in(self.entries)

    async def show(self, *, in_trouble: bool = False) -> Counts:
        """The state of the queue, also to Prometheus."""
        counts = await asyncio.to_thread(self.entries.counts)
        if self._figures_file is not None:
            try:
                write_figures(self._figures_file, self.figures.render(counts, in_trouble=in_trouble))
            except StoreError as error:
                _log.error("no figures for Prometheus", error=str(error))
        return counts

    async def _find_outputs(self, until: float) -> bool:
        """Put paths in the place of derivations; whether there were any."""
        waiting = await asyncio.to_thread(self.entries.due, OUTPUTS, MOST, again=False, now=until)
        entries = waiting or await asyncio.to_thread(self.entries.due, OUTPUTS, MOST, again=True, now=until)
        if not entries:
            return False
        try:
            outputs = await self._way.outputs(entries)
        except (BadInput, StoreError) as error:
            await self._keep(dict.fromkeys(entries, str(error)))
            return True
        await asyncio.to_thread(self.entries.replace, outputs)
        for entry, found in outputs.items():
            if not found:
                self._drop(entry, "no path that is valid came out of it")
        return True

    async def _push(self, entries: Sequence[Entry]) -> None:
        await asyncio.to_thread(self.entries.claim, entries)
        outcome = Outcome(entries, self.report.event)
        try:
            complete = await self._try(entries, outcome)
        except BaseException:
            self._break_off(outcome)
            raise
        if complete:
            self._most = min(2 * self._most, MOST)
            for entry in outcome.unsettled:
                outcome.fail(entry, "the push ended without it")
        done = outcome.settled if complete else outcome.published
        # Told first: whoever is stopped from here on has pushed all the same.
        self.figures.count_push(len(done), outcome.summary)
        if outcome.summary.paths:
            self.report.pushed(len(entries), outcome.summary)
        await asyncio.to_thread(self.entries.done, done)
        gone = await asyncio.to_thread(self.entries.gone, outcome.gone)
        await asyncio.to_thread(self.entries.claim, ())
        await self._keep(outcome.failures)
        for entry in gone:
            self._drop(entry, "the store has it no more")

    def _break_off(self, outcome: Outcome) -> None:
        """Also when it was cancelled. What cannot be noted here is found to be in the cache by the next push."""
        self.figures.count_push(len(outcome.published), outcome.summary)
        with suppress(StoreError):
            self.entries.done(outcome.published)
            self.entries.claim(())

    async def _try(self, entries: Sequence[Entry], outcome: Outcome) -> bool:
        """Whether the push came to its end."""
        opened = False
        try:
            async with self._way.open() as pusher, self._looking_on(outcome):
                opened = True
                await pusher.push(entries, outcome)
        except CachesrvError as error:
            if not opened or concerns_all(error):
                raise CannotPush(error) from error
            self._halve(outcome, str(error))
        except Exception as error:  # a defect that one path brings to light must not hold up the others
            if refused := no_thread(error):
                raise CannotPush(StoreUnavailable(refused)) from error
            _log.exception("a push failed by a defect")
            self._halve(outcome, f"defect, please report it: {type(error).__name__}: {error}")
        else:
            return True
        return False

    def _halve(self, outcome: Outcome, reason: str) -> None:
        rest = outcome.unsettled
        if len(rest) == 1:
            outcome.fail(rest[0], reason)
        self._most = max(1, len(rest) // 2)

    async def _keep(self, failures: Mapping[Entry, str]) -> None:
        now = time.time()
        next_try = {
            entry: now + AGAIN.delay(entry.attempts + 1, 0.0, random.random())  # noqa: S311  jitter is no secret
            for entry in failures
        }
        kept = {entry: (reason, next_try[entry]) for entry, reason in failures.items()}
        await asyncio.to_thread(self.entries.failed, kept)
        self.figures.failures += len(kept)
        for entry, (reason, when) in kept.items():
            self.report.kept(entry, reason, when)

    def _drop(self, entry: Entry, reason: str) -> None:
        self.figures.dropped += 1
        self.report.dropped(entry, reason)

    @asynccontextmanager
    async def _looking_on(self, outcome: Outcome) -> AsyncIterator[None]:
        """Meanwhile, forget what has been published, and take in what is new."""
        task = asyncio.create_task(self._look_on(outcome))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _look_on(self, outcome: Outcome) -> None:
        seen = 0
        while True:
            await asyncio.sleep(_REFRESH)
            with suppress(StoreError):  # it is met again after the push
                published = outcome.published
                if len(published) > seen:
                    await asyncio.to_thread(self.entries.done, published)
                    seen = len(published)
                await self.take_in()
                await self.show()
