"""What became of the paths that were asked to be pushed, from the events of that push."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachesrv.push.events import Failed, Planned, Published, Summary
from cachesrv.push.plan import Decision

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cachesrv.push.events import Emit, Event
    from cachesrv.push.queue.entries import Entry

_NEED_NOTHING = (Decision.PRESENT.value, Decision.UPSTREAM.value)


class Outcome:
    """Takes the events of one push and passes them on, but for its summary. `entries` are those whose paths are pushed,
    `failures` those that failed and why, `gone` those that the store does not have any more.
    """

    def __init__(self, entries: Iterable[Entry], emit: Emit) -> None:
        self._entries = {entry.path: entry for entry in entries}
        self._by_name = {path.rpartition("/")[2]: entry for path, entry in self._entries.items()}
        self._emit = emit
        self._published: set[Entry] = set()
        self._planned: dict[Entry, str] = {}
        self.failures: dict[Entry, str] = {}
        self.gone: list[Entry] = []
        self.summary = Summary()

    def __call__(self, event: Event) -> None:
        match event:
            case Planned():
                if event.path in self._by_name:
                    self._planned[self._by_name[event.path]] = event.decision
            case Published():
                if event.path in self._by_name:
                    self._published.add(self._by_name[event.path])
            case Failed():
                # a name that was not understood is told as it was given
                entry = self._entries.get(event.path) or self._by_name.get(event.path)
                if entry is not None:
                    self.failures[entry] = event.error
            case Summary():
                self.summary = event
                return
        self._emit(event)

    def fail(self, entry: Entry, reason: str) -> None:
        """It cannot even be tried."""
        self.failures[entry] = reason

    def drop(self, entry: Entry) -> None:
        """There is nothing to push."""
        self.gone.append(entry)

    @property
    def published(self) -> set[Entry]:
        """Those that this push has made visible so far."""
        return self._published - self.failures.keys()

    @property
    def settled(self) -> set[Entry]:
        """Those that are in the cache, or need not be, once the push has come to its end."""
        there = {entry for entry, decision in self._planned.items() if decision in _NEED_NOTHING}
        return (self._published | there) - self.failures.keys()

    @property
    def unsettled(self) -> list[Entry]:
        """Those of which nothing has been heard."""
        known = self.settled | self.failures.keys() | set(self.gone)
        return [entry for entry in self._entries.values() if entry not in known]
