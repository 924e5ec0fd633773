"""What hooks have written, read for the queue. See `spool` for its form."""

from __future__ import annotations

import asyncio
import heapq
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from cachesrv.errors import StoreError
from cachesrv.push.changes import MOVED_IN
from cachesrv.push.queue.directory import INCOMING
from cachesrv.push.queue.entries import OUTPUTS, PATH, Entry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cachesrv.push.changes import Changes
    from cachesrv.push.queue.entries import Entries

_log = structlog.get_logger()

_LARGEST = 1024 * 1024
"""Bytes of a file; the environment of a hook cannot be larger, by far."""

_ABANDONED = 3600.0
"""Seconds after which a file that still has a dot is taken for one of a hook that was killed."""

BATCH = 1000
"""Files that are taken in at once."""


class Incoming:
    """What hooks write, as a source of entries."""

    def __init__(self, queue: str) -> None:
        self._queue = queue

    def watch(self, changes: Changes) -> None:
        """Wake whoever waits for `changes` when a hook has written."""
        changes.add(f"{self._queue}/{INCOMING}", MOVED_IN)

    async def take_in(self, entries: Entries) -> None:
        """Move what there is to the queue. Raises StoreError."""
        await asyncio.to_thread(self._take_in, entries)

    def _take_in(self, entries: Entries) -> None:
        try:
            while taken := written(self._queue):
                entries.add(entry for one in taken for entry in one.entries())
                remove(taken)
            sweep(self._queue)
        except OSError as error:
            raise StoreError(f"what hooks wrote to {self._queue} cannot be taken in: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class Written:
    """What one hook wrote; `at` is the time, in seconds. Without outputs it is for those of `deriver`."""

    file: Path
    at: float
    deriver: str | None
    outputs: tuple[str, ...]

    def entries(self) -> list[Entry]:
        """What there is to push."""
        if not self.outputs and self.deriver:
            return [Entry(self.deriver, OUTPUTS, None, self.at)]
        return [Entry(path, PATH, self.deriver, self.at) for path in self.outputs]


def written(queue: str) -> list[Written]:
    """The oldest of what hooks wrote, at most BATCH files. Blocks; raises OSError."""
    incoming = Path(queue, INCOMING)
    names = heapq.nsmallest(BATCH, (name for name in _names(incoming) if not name.startswith(".")))
    found = []
    for name in names:
        try:
            found.append(_read(incoming / name))
        except FileNotFoundError:  # it has just been taken in
            continue
        except OSError as error:
            _log.error("what a hook wrote cannot be read", file=str(incoming / name), error=error.strerror)
    return found


def number_written(queue: str) -> int:
    """How many hooks' files there are. Blocks; raises OSError."""
    return sum(not name.startswith(".") for name in _names(Path(queue, INCOMING)))


def remove(taken: list[Written]) -> None:
    """Remove what the queue has by now. Blocks; raises OSError."""
    for entry in taken:
        entry.file.unlink(missing_ok=True)


def sweep(queue: str) -> None:
    """Remove what hooks that were killed left unfinished. Blocks; raises OSError."""
    incoming = Path(queue, INCOMING)
    for name in _names(incoming):
        if name.startswith("."):
            with suppress(FileNotFoundError):  # that hook has just finished
                if incoming.joinpath(name).lstat().st_mtime < time.time() - _ABANDONED:
                    incoming.joinpath(name).unlink()


def _names(incoming: Path) -> Iterator[str]:
    try:
        with os.scandir(incoming) as found:
            for entry in found:
                yield entry.name
    except FileNotFoundError:  # no hook has written yet
        return


def _read(file: Path) -> Written:
    with file.open("rb") as opened:
        lines = opened.read(_LARGEST).decode("ascii", "replace").splitlines()
    outputs = tuple(line[4:] for line in lines if line.startswith("out "))
    deriver = next((line[4:] for line in lines if line.startswith("drv ")), None)
    at = file.name.partition("-")[0]
    return Written(file, int(at) / 1e9 if at.isdigit() and len(at) <= 20 else time.time(), deriver, outputs)
