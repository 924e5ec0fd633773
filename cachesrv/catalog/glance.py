"""A look into a catalog on this machine that takes microseconds, from the thread that asks.

Most of what clients ask for is not there, and nobody has asked for it before: the index knows nothing of it. To go to
a thread and back costs ten times what the question itself does.
"""

from __future__ import annotations

import sqlite3
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_ABSENT = "SELECT NOT EXISTS (SELECT 1 FROM paths WHERE cache = ? AND hash_part = ?)"
_MEMORY = 8 * 1024
"""KiB of the database that are kept."""
_SLOW = 0.02
"""Seconds after which an answer is taken to have waited for a disk."""
_PAUSE = 0.25
"""Seconds for which nothing is asked then: others do not wait for that disk as well."""


class Glance:
    """At the catalog in the SQLite file `path`, which other connections of this process keep open for as long as this.
    For one thread at a time. To open it may wait `timeout` seconds for a lock, and raises sqlite3.Error; `clock`
    gives seconds.
    """

    def __init__(self, path: str, *, timeout: float = 30, clock: Callable[[], float] = time.monotonic) -> None:
        self._connection = sqlite3.connect(path, timeout=timeout, isolation_level=None, check_same_thread=False)
        self._connection.execute("PRAGMA query_only = ON")
        self._connection.execute(f"PRAGMA cache_size = -{_MEMORY}")
        # From now on it waits for no lock.
        self._connection.execute("PRAGMA busy_timeout = 0")
        self._execute = self._connection.cursor().execute
        self._clock = clock
        self._not_before = 0.0

    def lacks(self, cache: str, hash_part: str) -> bool:
        """Whether a path is not published. False too when that cannot be told at once."""
        begin = self._clock()
        if begin < self._not_before:
            return False
        try:
            (absent,) = self._execute(_ABSENT, (cache, hash_part)).fetchone()
        except sqlite3.Error:
            return False
        end = self._clock()
        if end - begin > _SLOW:
            self._not_before = end + _PAUSE
        return bool(absent)

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()
