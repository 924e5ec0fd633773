"""How far a long piece of work is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import TextIO

    from rich.progress import TaskID

_EVERY = 10.0


class Counting(Protocol):
    """Shows counts; a context in which it may use the terminal."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """So much is done, of so much where that is known; `what` names the part of the work."""


def counting(err: TextIO) -> Counting:
    """As it fits what stderr is."""
    return Bars(err) if err.isatty() else Lines(err, Pace())


class Pace:
    """Says when another ten seconds are over."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._next = clock() + _EVERY

    def is_due(self) -> bool:
        """Whether they are; then they begin anew."""
        now = self._clock()
        if now < self._next:
            return False
        self._next = now + _EVERY
        return True


class Lines:
    """A line now and then: `main: read 20000 of 100000`."""

    def __init__(self, err: TextIO, pace: Pace) -> None:
        self._err = err
        self._pace = pace

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """See Counting."""
        if self._pace.is_due():
            self._err.write(f"{what} {done}\n" if total is None else f"{what} {done} of {total}\n")
            self._err.flush()


class Bars:
    """A bar for each part of the work."""

    def __init__(self, err: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            console=Console(file=err),
            transient=True,
        )
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, what: str, done: int, total: int | None) -> None:
        """See Counting."""
        if what not in self._bars:
            self._bars[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._bars[what], completed=done, total=total)
