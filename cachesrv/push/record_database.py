"""The SQLite file of a record: opened, made for its owner alone, set aside when it is broken; by any number of
processes at once.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK_PATIENCE = 20.0
"""Seconds to wait for another process that writes."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS nars (
    nar_hash TEXT PRIMARY KEY, at INTEGER NOT NULL, bytes INTEGER NOT NULL, listing BLOB
);
CREATE INDEX IF NOT EXISTS nars_by_age ON nars (at, bytes);
CREATE TABLE IF NOT EXISTS files (
    nar_hash TEXT NOT NULL, name TEXT NOT NULL, kind TEXT NOT NULL, size INTEGER NOT NULL, executable INTEGER NOT NULL,
    sha256 TEXT, content BLOB, target TEXT, PRIMARY KEY (nar_hash, name)
);
CREATE TABLE IF NOT EXISTS paths (
    path TEXT NOT NULL, cache TEXT NOT NULL, nar_hash TEXT NOT NULL, nar_size INTEGER NOT NULL, at INTEGER NOT NULL,
    PRIMARY KEY (path, cache)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS paths_by_age ON paths (at);
CREATE INDEX IF NOT EXISTS paths_by_nar ON paths (nar_hash);
CREATE TABLE IF NOT EXISTS reads (source TEXT PRIMARY KEY, count INTEGER NOT NULL, bytes INTEGER NOT NULL);
"""


def connect(file: Path) -> sqlite3.Connection:
    """The database, made if it is not there, for any one thread at a time. Raises sqlite3.Error, OSError."""
    os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # SQLite would make it for everybody
    db = sqlite3.connect(file, timeout=LOCK_PATIENCE, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA synchronous = NORMAL")
        if not _is_made(db):
            with _lock(file):
                _make(db)
    except BaseException:
        db.close()
        raise
    return db


def _is_made(db: sqlite3.Connection) -> bool:
    return bool(db.execute("SELECT 1 FROM sqlite_master WHERE name = 'reads'").fetchall())


def _make(db: sqlite3.Connection) -> None:
    if not _is_made(db):
        db.execute("PRAGMA journal_mode = WAL")  # writers and readers do not wait for each other, nor for the disk
        db.executescript(f"BEGIN; {_SCHEMA} COMMIT;")


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    """One process at a time."""
    lock = os.open(f"{file}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def is_broken(error: sqlite3.DatabaseError) -> bool:
    """Whether it says that the file is no database, or a damaged one."""
    return getattr(error, "sqlite_errorname", "").startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB"))


def set_aside(file: Path) -> sqlite3.Connection:
    """A new database in the place of a broken one, which is kept beside it; once only, however many find it broken."""
    with _lock(file):
        if not _is_sound(file):
            for suffix in ("-wal", "-shm"):
                Path(f"{file}{suffix}").unlink(missing_ok=True)
            file.replace(f"{file}.broken")
    return connect(file)


def _is_sound(file: Path) -> bool:
    try:
        with closing(sqlite3.connect(file, timeout=LOCK_PATIENCE)) as db:
            return bool(db.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
    except sqlite3.DatabaseError as error:
        if is_broken(error):
            return False
        raise
