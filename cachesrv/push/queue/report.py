"""What the queue tells while it works: to a log, or to people who wait for it to end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TextIO

import structlog

from cachesrv.push.events import Failed, Noted, Published, Retrying, Stored
from cachesrv.push.progress import Lines
from cachesrv.services import amounts

if TYPE_CHECKING:
    from cachesrv.push.events import Event, Summary
    from cachesrv.push.queue.entries import Entry

_log = structlog.get_logger()


class Report(Protocol):
    """Takes what happens; it must not block and must not raise."""

    def event(self, event: Event) -> None:
        """Of a push that is going on, but for its summary."""

    def pushed(self, paths: int, summary: Summary) -> None:
        """A push has ended, that was for so many paths of the queue."""

    def kept(self, entry: Entry, reason: str, next_try: float) -> None:
        """It has failed and is tried again at that time."""

    def dropped(self, entry: Entry, reason: str) -> None:
        """It is forgotten."""

    def trouble(self, reason: str, delay: float) -> None:
        """Nothing can be pushed, for so many seconds at least."""


class LogReport:
    """For services."""

    def event(self, event: Event) -> None:
        match event:
            case Failed():
                _log.warning("a path failed", path=event.path, error=event.error)
            case Noted():
                _log.warning("noted", text=event.text)
            case Retrying():
                _log.warning("trying again", what=event.what, error=event.error, seconds=event.delay)
            case Stored():
                _log.debug("stored", path=event.path, nar_size=event.nar_size, sent_bytes=event.sent_bytes)
            case Published():
                _log.debug("published", path=event.path)

    def pushed(self, paths: int, summary: Summary) -> None:
        _log.info(
            "pushed",
            queued=paths,
            uploaded=summary.uploaded,
            present=summary.present,
            failed=summary.failed,
            sent_bytes=summary.sent_bytes,
            seconds=summary.seconds,
        )

    def kept(self, entry: Entry, reason: str, next_try: float) -> None:
        when = amounts.moment(next_try)
        _log.warning("kept", path=entry.path, reason=reason, attempts=entry.attempts + 1, next_try=when)

    def dropped(self, entry: Entry, reason: str) -> None:
        _log.warning("dropped", path=entry.path, reason=reason)

    def trouble(self, reason: str, delay: float) -> None:
        _log.error("nothing can be pushed", reason=reason, seconds=round(delay))


class LinesReport:
    """For people who wait for the end, on stderr."""

    def __init__(self, err: TextIO) -> None:
        self._err = err
        self._lines = Lines(err, err)

    def event(self, event: Event) -> None:
        self._lines(event)

    def pushed(self, paths: int, summary: Summary) -> None:  # noqa: ARG002  the summary says it
        self._lines(summary)

    def kept(self, entry: Entry, reason: str, next_try: float) -> None:
        """What is left over is told at the end."""

    def dropped(self, entry: Entry, reason: str) -> None:
        self._print(f"dropped: {entry.path}: {reason}")

    def trouble(self, reason: str, delay: float) -> None:  # noqa: ARG002  nobody waits for that
        self._print(f"nothing can be pushed: {reason}")

    def _print(self, line: str) -> None:
        self._err.write(line + "\n")
        self._err.flush()
