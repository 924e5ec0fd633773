"""What becomes valid in a store, as a source of entries.

Nix numbers the paths of its database in the order in which they become valid, and never uses a number twice. So what
is new is what has a greater number than was seen last: nothing is missed, however many events the kernel drops, and a
process that is started again goes on where it ended. A path is waited for until Nix has unlocked it, which is to remove
the file `<path>.lock`; that is also what wakes us. [Nix, src/libstore/schema.sql, local-store.cc, pathlocks.cc]
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import TYPE_CHECKING

from cachesrv.errors import BadInput
from cachesrv.nix.store_path import StorePath
from cachesrv.push.changes import DELETED
from cachesrv.push.queue.entries import PATH, Entry
from cachesrv.push.store_db import StoreDatabase

if TYPE_CHECKING:
    from cachesrv.push.changes import Changes
    from cachesrv.push.queue.entries import Entries
    from cachesrv.push.store_location import StoreLocation

LOCK_PATIENCE = 60.0
"""Seconds to wait for Nix to unlock a path that is valid; one that was killed leaves its lock file for ever."""

GATHER = 0.5
"""Seconds from a sign of something new to a look at it: outputs of one build come together."""

_BATCH = 1000


class Registered:
    """Paths of a store that become valid after the first call of `take_in`, ever, for this queue. `derivations`:
    those as well.
    """

    def __init__(self, location: StoreLocation, *, derivations: bool = False) -> None:
        self._location = location
        self._database = StoreDatabase(location)
        self._derivations = derivations
        self._fact = f"registered in {self._database.file}"
        self._seen: int | None = None
        self._locked: dict[str, tuple[int, float]] = {}

    def check(self) -> None:
        """Raises StoreError where there is no database that can be read."""
        self._database.check()

    def watch(self, changes: Changes) -> None:
        """Wake whoever waits for `changes` when Nix has unlocked a path."""
        changes.add(self._location.real_store_dir, DELETED)

    async def take_in(self, entries: Entries) -> None:
        """Queue what is new. Raises StoreError."""
        await asyncio.to_thread(self._take_in, entries)

    def _take_in(self, entries: Entries) -> None:
        newest = self._database.newest()
        if self._seen is None:
            self._seen = self._begin(entries, newest)
        elif newest < self._seen:  # made anew while we looked on: all that it has became valid since
            self._locked.clear()
            self._seen = 0
        self._queue(entries, [name for name, _ in self._locked.items() if not self._is_locked(name)])
        while found := self._database.registered_after(self._seen, _BATCH):
            free = []
            for number, path in found:
                name = self._wanted(path)
                if name is None:
                    continue
                self._locked[name] = (number, time.monotonic())
                if not self._is_locked(name):
                    free.append(name)
            self._seen = found[-1][0]
            self._queue(entries, free)

    def _begin(self, entries: Entries, newest: int) -> int:
        """The number from which to go on: noted, unless the database has been made anew since."""
        noted = entries.fact(self._fact)
        if noted is not None and (seen := int(json.loads(noted))) <= newest:
            return seen
        entries.note(self._fact, json.dumps(newest))
        return newest

    def _wanted(self, path: str) -> str | None:
        try:
            parsed = StorePath.parse_full(path, self._location.store_dir)
        except BadInput:  # what no Nix writes
            return None
        return None if parsed.is_derivation and not self._derivations else parsed.base_name

    def _is_locked(self, name: str) -> bool:
        if time.monotonic() - self._locked[name][1] > LOCK_PATIENCE:
            return False
        return os.access(f"{self._location.real_store_dir}/{name}.lock", os.F_OK)

    def _queue(self, entries: Entries, names: list[str]) -> None:
        """Queue these, and note how far we are: before the first one that is still locked."""
        for name in names:
            del self._locked[name]
        assert self._seen is not None
        place = min([self._seen, *(number - 1 for number, _ in self._locked.values())])
        found = [Entry(f"{self._location.store_dir}/{name}", PATH, None, time.time()) for name in names]
        if found or entries.fact(self._fact) != json.dumps(place):
            entries.note(self._fact, json.dumps(place), found)
