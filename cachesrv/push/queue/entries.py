"""What the queue holds, in a SQLite file that survives kill -9 and loss of power.

An entry is a store path that is to be pushed with all it needs, or a derivation whose outputs are. It waits, or has
failed and is to be tried again at `next_try`, and meanwhile the process that holds the queue's lock may be pushing it.
Times are seconds since 1970.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from cachesrv.push.queue.queue_file import QueueFile

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Mapping

PATH, OUTPUTS = "path", "outputs"
"""Kinds of entries: the path itself, or the outputs of the derivation that it is."""

TROUBLE = "trouble"
"""Fact: why nothing can be pushed at present, in JSON."""

LONGEST_DELAY = 6 * 3600.0
"""Seconds after which what has failed is tried again, at the latest."""

_LONGEST_REASON = 1000


@dataclass(frozen=True, slots=True)
class Entry:
    """`attempts` is how often it has failed; `reason` why it did the last time."""

    path: str
    kind: str = PATH
    deriver: str | None = None
    queued: float = 0.0
    attempts: int = 0
    next_try: float = 0.0
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """How many entries there are; `oldest` is when the first of them was queued, `next_try` when the first of those
    that failed is to be tried again.
    """

    waiting: int = 0
    pushing: int = 0
    failed: int = 0
    oldest: float | None = None
    next_try: float | None = None


class Entries:
    """The entries of one queue. Methods block, may be called by any thread, and raise StoreError."""

    def __init__(self, file: QueueFile) -> None:
        self._file = file

    @classmethod
    def open(cls, queue: str, *, read_only: bool = False) -> Self:
        """Made if there are none, unless they are only to be read. Raises StoreError."""
        return cls(QueueFile(queue, read_only=read_only))

    def close(self) -> None:
        """To be called once."""
        self._file.close()

    def add(self, entries: Iterable[Entry]) -> None:
        """One that is there already stays as it is, but that it is not being pushed any more: see `gone`."""
        with self._file.transaction() as db:
            _insert(db, entries)

    def due(self, kind: str, most: int, *, again: bool, now: float) -> list[Entry]:
        """The oldest that wait, or of those that failed and are to be tried again by `now`. Those that would have to
        wait longer than anything has to were noted by a clock that was wrong, and count as well.
        """
        with self._file.reading() as db:
            if again:
                which = "kind = ? AND attempts > 0 AND (next_try <= ? OR next_try > ?)"
                return _select(db, which, kind, now, time.time() + LONGEST_DELAY, most=most)
            return _select(db, "kind = ? AND attempts = 0", kind, most=most)

    def claim(self, entries: Iterable[Entry]) -> None:
        """These are being pushed, and no others: there is one process that pushes, and what it does not push (any
        more) waits or has failed.
        """
        with self._file.transaction() as db:
            db.execute("UPDATE entries SET pushing = 0 WHERE pushing = 1")
            db.executemany(
                "UPDATE entries SET pushing = 1 WHERE path = ? AND kind = ?", [(e.path, e.kind) for e in entries]
            )

    def done(self, entries: Iterable[Entry]) -> None:
        """They are in the cache, or will never be: forget them."""
        with self._file.transaction() as db:
            _delete(db, entries)

    def gone(self, entries: Iterable[Entry]) -> list[Entry]:
        """The store has them no more: forget them, but not those that were queued again since they were claimed, for
        which it may have them by now. Returns the former.
        """
        with self._file.transaction() as db:
            delete = "DELETE FROM entries WHERE path = ? AND kind = ? AND pushing = 1"
            return [entry for entry in entries if db.execute(delete, (entry.path, entry.kind)).rowcount]

    def replace(self, others: Mapping[Entry, Iterable[Entry]]) -> None:
        """Others in the place of each."""
        with self._file.transaction() as db:
            _delete(db, others)
            for entries in others.values():
                _insert(db, entries)

    def failed(self, failures: Mapping[Entry, tuple[str, float]]) -> None:
        """For this reason; each is to be tried again at that time."""
        with self._file.transaction() as db:
            db.executemany(
                "UPDATE entries SET attempts = attempts + 1, reason = ?, next_try = ? WHERE path = ? AND kind = ?",
                [(why[:_LONGEST_REASON], when, entry.path, entry.kind) for entry, (why, when) in failures.items()],
            )

    def retry(self, paths: Iterable[str] | None = None) -> int:
        """Let what has failed be tried again at once: these paths, or all. How many that are."""
        names = None if paths is None else json.dumps(list(paths))
        with self._file.transaction() as db:
            db.execute("DELETE FROM facts WHERE name = ?", (TROUBLE,))
            return db.execute(
                "UPDATE entries SET next_try = 0 WHERE attempts > 0"
                " AND (?1 IS NULL OR path IN (SELECT value FROM json_each(?1)))",
                (names,),
            ).rowcount

    def forget(self, paths: Iterable[str]) -> int:
        """Those of these paths that have failed, and are not being tried again just now. How many that are."""
        with self._file.transaction() as db:
            return db.execute(
                "DELETE FROM entries WHERE attempts > 0 AND pushing = 0 AND path IN (SELECT value FROM json_each(?))",
                (json.dumps(list(paths)),),
            ).rowcount

    def counts(self) -> Counts:
        """As of now."""
        with self._file.reading() as db:
            row = db.execute(
                "SELECT total(NOT pushing AND attempts = 0), total(pushing), total(NOT pushing AND attempts > 0),"
                " min(queued), min(next_try) FILTER (WHERE NOT pushing AND attempts > 0) FROM entries"
            ).fetchone()
            return Counts(int(row[0]), int(row[1]), int(row[2]), row[3], row[4])

    def unknown(self, entries: Iterable[Entry]) -> int:
        """How many of these are not there."""
        with self._file.reading() as db:
            row: tuple[int] = db.execute(
                "SELECT count(*) FROM json_each(?) WHERE NOT EXISTS (SELECT 1 FROM entries"
                " WHERE path = json_extract(value, '$[0]') AND kind = json_extract(value, '$[1]'))",
                (json.dumps([(entry.path, entry.kind) for entry in entries]),),
            ).fetchone()
            return row[0]

    def those_claimed(self) -> list[Entry]:
        """The oldest first."""
        with self._file.reading() as db:
            return _select(db, "pushing = 1")

    def those_failed(self) -> list[Entry]:
        """The oldest first."""
        with self._file.reading() as db:
            return _select(db, "pushing = 0 AND attempts > 0")

    def fact(self, name: str) -> str | None:
        """What was noted under this name."""
        with self._file.reading() as db:
            row = db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
            return row[0] if row else None

    def note(self, name: str, value: str | None, also: Iterable[Entry] = ()) -> None:
        """Note something, or forget it, and in the same moment add entries."""
        with self._file.transaction() as db:
            db.execute("DELETE FROM facts WHERE name = ?", (name,))
            if value is not None:
                db.execute("INSERT INTO facts VALUES (?, ?)", (name, value))
            _insert(db, also)


def _insert(db: sqlite3.Connection, entries: Iterable[Entry]) -> None:
    db.executemany(
        "INSERT INTO entries (path, kind, deriver, queued) VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET pushing = 0",
        ((entry.path, entry.kind, entry.deriver, entry.queued) for entry in entries),
    )


def _delete(db: sqlite3.Connection, entries: Iterable[Entry]) -> None:
    db.executemany("DELETE FROM entries WHERE path = ? AND kind = ?", ((e.path, e.kind) for e in entries))


def _select(db: sqlite3.Connection, which: str, *values: object, most: int = -1) -> list[Entry]:
    columns = "path, kind, deriver, queued, attempts, next_try, reason"
    query = f"SELECT {columns} FROM entries WHERE {which} ORDER BY queued, path LIMIT ?"  # noqa: S608  words of ours
    return [Entry(*row) for row in db.execute(query, (*values, most))]
