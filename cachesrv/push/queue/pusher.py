"""Pushes entries of the queue: from a store, to a cache, by `cachesrv.push.run`."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cachesrv.errors import BadInput, NotFound
from cachesrv.nix.store_path import StorePath
from cachesrv.push.local_store import open_store
from cachesrv.push.queue.entries import PATH, Entry
from cachesrv.push.run import push
from cachesrv.push.settings import find_settings
from cachesrv.push.store_db import StoreDatabase
from cachesrv.push.store_location import locate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from cachesrv.push.local_store import LocalStore
    from cachesrv.push.queue.outcome import Outcome
    from cachesrv.push.run import Options
    from cachesrv.push.settings import Given, Settings


@dataclass(frozen=True, slots=True)
class Way:
    """From where to where, found anew for each push: files with URL and token may change, a daemon may be restarted."""

    store: str | None
    given: Given
    options: Options
    environ: Mapping[str, str]

    def check(self) -> None:
        """Raises ConfigError for what no waiting will mend."""
        locate(self.store, self.environ)
        find_settings(self.given, self.environ)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Pusher]:
        """Raises, before the block: ConfigError, DaemonError, StoreError, which concern all paths."""
        settings = find_settings(self.given, self.environ)
        store = await open_store(self.store, self.environ)
        try:
            yield Pusher(store, settings, self.options)
        finally:
            await store.close()

    async def outputs(self, entries: Sequence[Entry]) -> dict[Entry, list[Entry]]:
        """What came out of derivations and is valid; nothing for what is none. Raises StoreError and BadInput of the
        store's database.
        """
        location = locate(self.store, self.environ)
        derivers: dict[Entry, StorePath] = {}
        for entry in entries:
            with suppress(BadInput):
                derivers[entry] = StorePath.parse_full(entry.path, location.store_dir)
        outputs = await asyncio.to_thread(StoreDatabase(location).outputs, set(derivers.values()))
        return {
            entry: [
                Entry(path.full(location.store_dir), PATH, entry.path, entry.queued)
                for path in (outputs[derivers[entry]] if entry in derivers else ())
            ]
            for entry in entries
        }


class Pusher:
    """One store and one cache."""

    def __init__(self, store: LocalStore, settings: Settings, options: Options) -> None:
        self._store = store
        self._settings = settings
        self._options = options

    async def push(self, entries: Sequence[Entry], outcome: Outcome) -> None:
        """Push them at once, and tell `outcome`; what is gone from the store is left out. Raises as `run.push` does."""
        valid = [entry.path for entry in entries if await self._is_valid(entry, outcome)]
        if valid:
            await push(valid, self._store, self._settings, self._options, outcome)

    async def _is_valid(self, entry: Entry, outcome: Outcome) -> bool:
        try:
            await self._store.path_info(StorePath.parse_full(entry.path, self._store.store_dir))
        except BadInput as error:
            # not dropped: it may be that this is the wrong store
            outcome.fail(entry, str(error))
        except NotFound:
            outcome.drop(entry)
        else:
            return True
        return False
