"""Writes the record of what is pushed while the push goes on, and never holds it up: a record that cannot be written
is told of, once, and the push goes on without.
"""

from __future__ import annotations

import asyncio
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from cachesrv.errors import StoreError
from cachesrv.push.events import Noted, Published
from cachesrv.push.inspection import Inspection
from cachesrv.push.record import PushedPath, Record, SeenNar

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from cachesrv.nix.hashes import Hash
    from cachesrv.nix.path_info import PathInfo
    from cachesrv.push.events import Emit, Event
    from cachesrv.push.inspection import Seen, Tap

_WRITE_AT = 1024 * 1024
"""Bytes that wait in memory, at most; then the thread that comes with more writes them."""
_PRUNE_AT = 64 * 1024 * 1024
"""Bytes written, after which the record is brought back to its limits, also before the end."""


class Recorder:
    """Takes what is seen, from any thread, and events of the push; `close` it when that is over."""

    def __init__(self, file: Path, cache: str, store_dir: str, emit: Emit) -> None:
        """`cache`: its URL."""
        self._file = file
        self._cache = cache
        self._store_dir = store_dir
        self._emit = emit
        self._infos: dict[str, PathInfo] = {}
        self._published: list[PushedPath] = []
        self._nars: list[SeenNar] = []
        self._size = 0
        self._written = 0
        self._waiting = threading.Lock()
        self._writing = threading.Lock()
        self._record: Record | None = None
        self._trouble: StoreError | None = None
        self._task: asyncio.Task[None] | None = None

    def expect(self, infos: Iterable[PathInfo]) -> None:
        """Paths that may be published."""
        self._infos.update((info.store_path.base_name, info) for info in infos)

    def tap(self, info: PathInfo) -> Tap:
        """For the NAR of a path."""
        return Inspection(partial(self._see, info.nar_hash))

    def __call__(self, event: Event) -> None:
        """An `Emit`: passes the event on, and notes what was published."""
        if isinstance(event, Published) and event.path in self._infos:
            info = self._infos[event.path]
            path = info.store_path.full(self._store_dir)
            pushed = PushedPath(path, self._cache, info.nar_hash.nix32, info.nar_size, int(time.time()))
            with self._waiting:
                self._published.append(pushed)
            if self._task is None:
                self._task = asyncio.create_task(self._write_soon())
        self._emit(event)

    async def close(self) -> None:
        """All that was seen is on record, or it was told why not."""
        if self._task is not None:
            await asyncio.wait([self._task])
        await asyncio.to_thread(self._end)
        if self._trouble is not None:
            self._emit(Noted(str(self._trouble)))

    def _see(self, nar_hash: Hash, seen: Seen) -> None:
        nar = SeenNar.of(nar_hash, seen)
        with self._waiting:
            self._nars.append(nar)
            self._size += nar.size
            enough = self._size >= _WRITE_AT
        if enough:
            self._write()

    async def _write_soon(self) -> None:
        """Paths are published in batches: once for all of them."""
        while self._published:
            await asyncio.to_thread(self._write)
        self._task = None

    def _write(self) -> None:
        with self._writing:
            with self._waiting:
                nars, self._nars = self._nars, []
                paths, self._published = self._published, []
                size, self._size = self._size, 0
            if self._trouble is not None or not (nars or paths):
                return
            try:
                if self._record is None:
                    self._record = Record.open(self._file)
                self._record.write(nars, paths)
                self._written += size
                if self._written >= _PRUNE_AT:
                    self._record.prune()
                    self._written = 0
            except StoreError as error:
                self._trouble = error

    def _end(self) -> None:
        self._write()
        if self._record is None:
            return
        try:
            self._record.prune()
        except StoreError as error:
            self._trouble = error
        self._record.close()
