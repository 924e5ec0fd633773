"""Counts what a push tells, for its summary."""

from __future__ import annotations

import time

from cachesrv.push.events import Emit, Event, Failed, Planned, Published, Resumed, Sent, Stored, Summary


class Tally:
    """Takes events and passes them on."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._started = time.monotonic()
        self._decisions: dict[str, str] = {}
        self._published: set[str] = set()
        self._failed: set[str] = set()
        self._nar_bytes = 0
        self._sent_bytes = 0
        self._resumed_bytes = 0

    def __call__(self, event: Event) -> None:
        match event:
            case Planned():
                self._decisions[event.path] = event.decision
            case Published():
                self._published.add(event.path)
            case Failed():
                self._failed.add(event.path)
            case Sent():
                self._sent_bytes += event.sent_bytes
            case Resumed():
                self._resumed_bytes += event.resumed_bytes
            case Stored():
                self._nar_bytes += event.nar_size
        self._emit(event)

    def summary(self) -> Summary:
        """As of now."""
        decisions = list(self._decisions.values())
        return Summary(
            paths=len(self._decisions.keys() | self._failed),
            uploaded=len(self._published),
            present=decisions.count("present"),
            upstream=decisions.count("upstream"),
            failed=len(self._failed),
            nar_bytes=self._nar_bytes,
            sent_bytes=self._sent_bytes,
            resumed_bytes=self._resumed_bytes,
            seconds=round(time.monotonic() - self._started, 3),
        )
