"""The level of compression that the next NAR gets: the one that was stated, or one that follows the link.

A NAR keeps the level with which it began: its bytes depend on it. So what was seen of the NARs before decides about the
next one. While threads that could compress have nothing to do because what is ready waits for the link, a higher level
costs no time and leaves less to send; while nothing is ready because they are all busy, a lower one is faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

Level = int | Literal["auto"]
"""A level of zstd from 1 to STRONGEST, or `auto`."""

STRONGEST = 19
"""Beyond are levels that take more memory to decompress."""

AUTO: Literal["auto"] = "auto"
DEFAULT_LEVEL = 3

LOWEST, HIGHEST = 1, 9
"""Of `auto`. Higher ones take twice the memory and time for what makes files a hundredth smaller."""

_IDLE = 0.5
_STARVED = 0.25
"""Parts of the time from which on the level changes. They are further apart than a level is from the next: one that is
up to twice as slow as the one before keeps the link as busy as it was.
"""

PATIENCE = 1.0
_MOST_PATIENCE = 32.0
"""Seconds of work that have to be seen before the level changes, at first and at most."""


@dataclass(frozen=True, slots=True)
class Observed:
    """Seconds since a push began: `work` in which anything was compressed or on its way; of them `idle` in which
    threads had nothing to compress while something was on its way, `starved` in which they were busy and nothing was.
    The latter two count in part when that was so for a part of the threads.
    """

    work: float = 0.0
    idle: float = 0.0
    starved: float = 0.0

    def since(self, before: Observed) -> Observed:
        """What has been seen after `before`."""
        return Observed(self.work - before.work, self.idle - before.idle, self.starved - before.starved)


class FixedLevel:
    """Always the same one."""

    def __init__(self, level: int) -> None:
        self.possible: Sequence[int] = (level,)

    def choose(self, _observed: Observed) -> int:
        """See AdaptiveLevel."""
        return self.possible[0]


class AdaptiveLevel:
    """A step at a time, each after enough was seen since the one before. A step back is waited for twice as long as for
    the one before it, so that where two levels are equally good, it stays with one of them more and more.
    """

    possible: Sequence[int] = range(LOWEST, HIGHEST + 1)

    def __init__(self) -> None:
        self._level = DEFAULT_LEVEL
        self._before = Observed()
        self._last = 0
        self._patience = PATIENCE

    def choose(self, observed: Observed) -> int:
        """The level for what begins now, after so much was seen since the push began."""
        seen = observed.since(self._before)
        step = _step(seen)
        patience = min(2 * self._patience, _MOST_PATIENCE) if step * self._last < 0 else PATIENCE
        if seen.work < patience:
            return self._level
        self._before = observed
        if step and LOWEST <= self._level + step <= HIGHEST:
            self._level += step
            self._last, self._patience = step, patience
        return self._level


def _step(seen: Observed) -> int:
    if seen.idle > _IDLE * seen.work:
        return 1
    return -1 if seen.starved > _STARVED * seen.work else 0


def levels(stated: Level) -> FixedLevel | AdaptiveLevel:
    """What chooses the levels of one push."""
    return AdaptiveLevel() if stated == AUTO else FixedLevel(stated)
