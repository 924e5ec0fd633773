"""Queues of which the store is a folder of files and the cache can be made to fail."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

from cachesrv.push.address import Address
from cachesrv.push.queue.entries import PATH, Entries, Entry
from cachesrv.push.queue.intake import Incoming
from cachesrv.push.queue.lock import QueueLock
from cachesrv.push.queue.pusher import Pusher, Way
from cachesrv.push.queue.spool import put
from cachesrv.push.queue.work import Work
from cachesrv.push.retry import Backoff
from cachesrv.push.run import Options
from cachesrv.push.settings import Given, Settings
from cachesrv.push.token import TokenVariable
from tests.push_doubles import PLENTY, FakeCache, TemporaryStore, store_path

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from cachesrv.push.events import Event, Summary
    from cachesrv.push.queue.outcome import Outcome

QUICK = Options(backoff=Backoff(attempts=2, first=0.01), timeouts=PLENTY, jobs=2)


def full(name: str) -> str:
    return store_path(name).full("/nix/store")


class PusherThatStumbles(Pusher):
    """Raises what the way says for a path of that name."""

    stumble: Callable[[Sequence[Entry]], None]

    async def push(self, entries: Sequence[Entry], outcome: Outcome) -> None:
        self.stumble(entries)
        await super().push(entries, outcome)


@dataclass(frozen=True)
class FakeWay(Way):
    """To a FakeCache. `errors` are raised by pushes of a path, `closed` when the store is opened."""

    folder: TemporaryStore = field(kw_only=True)
    cache: FakeCache = field(kw_only=True)
    errors: dict[str, Exception] = field(default_factory=dict)
    closed: list[Exception] = field(default_factory=list)
    pushes: list[list[str]] = field(default_factory=list)
    known_outputs: dict[str, list[str]] = field(default_factory=dict)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Pusher]:
        if self.closed:
            raise self.closed.pop(0)
        settings = Settings(Address.parse(self.cache.url), TokenVariable.of("CACHESRV_TOKEN", "secret"))
        pusher = PusherThatStumbles(self.folder, settings, self.options)
        pusher.stumble = self._stumble
        yield pusher

    async def outputs(self, entries: Sequence[Entry]) -> dict[Entry, list[Entry]]:
        return {
            entry: [replace(entry, path=path, kind=PATH) for path in self.known_outputs.get(entry.path, [])]
            for entry in entries
        }

    def _stumble(self, entries: Sequence[Entry]) -> None:
        paths = [entry.path for entry in entries]
        self.pushes.append([path.partition("-")[2] for path in paths])
        for path, error in self.errors.items():
            if path in paths:
                raise error


@dataclass
class Told:
    """A report that remembers."""

    kept_for: dict[str, list[str]] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    summaries: list[Summary] = field(default_factory=list)

    def event(self, event: Event) -> None:
        self.events.append(event)

    def pushed(self, paths: int, summary: Summary) -> None:
        self.summaries.append(summary)

    def kept(self, entry: Entry, reason: str, next_try: float) -> None:
        self.kept_for.setdefault(entry.path, []).append(reason)

    def dropped(self, entry: Entry, reason: str) -> None:
        self.gone.append(entry.path)

    def trouble(self, reason: str, delay: float) -> None:
        self.troubles.append(reason)


class FakeQueue:
    """A queue with all that it needs to be worked on."""

    def __init__(self, folder: Path, cache: FakeCache) -> None:
        (folder / "store").mkdir()
        self.directory = str(folder / "queue")
        self.lock = QueueLock(self.directory)
        self.lock.take()
        self.store = TemporaryStore(folder / "store")
        self.way = FakeWay(None, Given(), QUICK, {}, folder=self.store, cache=cache)
        self.told = Told()
        self.entries = Entries.open(self.directory)
        self.figures = folder / "figures.prom"
        self.work = Work(self.entries, [Incoming(self.directory)], self.way, self.told, figures=self.figures)

    def built(self, *names: str) -> None:
        """The store has them, and the hook has run."""
        for name in names:
            self.store.add(name, name.encode())
            put(self.directory, [full(name).encode()])

    def waiting(self) -> list[str]:
        return [entry.path for entry in self.entries.due(PATH, 1000, again=False, now=0)]

    def failed(self) -> dict[str, str | None]:
        return {entry.path: entry.reason for entry in self.entries.those_failed()}

    def close(self) -> None:
        self.entries.close()
        self.lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
