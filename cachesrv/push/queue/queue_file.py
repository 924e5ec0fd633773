"""The SQLite file of a queue, which survives kill -9 and loss of power."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING
from urllib.parse import quote

from cachesrv.errors import StoreError, StoreFull
from cachesrv.push.queue.directory import give_to_owner
from cachesrv.push.store_db import NEEDS_WRITING
from cachesrv.push.transaction import transaction

if TYPE_CHECKING:
    from collections.abc import Iterator

FILE = "queue.sqlite"

_VERSION = 1
_SCHEMA = f"""
CREATE TABLE entries (
    path TEXT NOT NULL,
    kind TEXT NOT NULL,
    deriver TEXT,
    queued REAL NOT NULL,
    pushing INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    next_try REAL NOT NULL DEFAULT 0,
    reason TEXT,
    PRIMARY KEY (path, kind)
) STRICT;
CREATE INDEX entries_by_age ON entries (kind, queued, path);
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
PRAGMA user_version = {_VERSION};
"""

_LOCK_PATIENCE = 30.0
_LOCK_PAUSE = 0.02
_DAMAGED = ("SQLITE_NOTADB", "SQLITE_CORRUPT")


class QueueFile:
    """Open, and made if it was not there. Everything blocks, may be called by any thread, and raises StoreError. One
    that was moved away, because it is damaged, is followed by a new one.
    """

    def __init__(self, queue: str, *, read_only: bool = False) -> None:
        """What is `read_only` waits for no writer, and needs no right to write where that can be helped."""
        self._file = f"{queue}/{FILE}"
        self._one = threading.Lock()
        self._connect = _connect_to_read if read_only else _connect
        with _our_errors(self._file):
            self._db = self._connect(self._file)
            self._identity = _identity(self._file)

    def close(self) -> None:
        """To be called once."""
        self._db.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All that is done in the block, or nothing."""
        with self.reading() as db, transaction(db):
            yield db

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """For one thread at a time."""
        with self._one, _our_errors(self._file):
            # without its directory there can be no other one: a command may remove all that is temporary
            if _identity(self._file) != self._identity and os.path.isdir(os.path.dirname(self._file)):  # noqa: PTH112, PTH120  as text
                self._db.close()  # before there is another: it removes the log beside the file
                self._db = self._connect(self._file)
                self._identity = _identity(self._file)
            yield self._db


def _connect(file: str) -> sqlite3.Connection:
    _create(file)
    database = sqlite3.connect(file, timeout=_LOCK_PATIENCE, isolation_level=None, check_same_thread=False)
    try:
        _set_wal(database)
        database.execute("PRAGMA synchronous = FULL")
        with transaction(database):
            _prepare(database, file)
    except BaseException:
        database.close()
        raise
    return database


def _connect_to_read(file: str) -> sqlite3.Connection:
    try:
        return _open_to_read(file, "mode=ro")
    except sqlite3.OperationalError as error:
        # Beside a file that nobody has open, SQLite would have to make others.
        if error.sqlite_errorname.startswith(NEEDS_WRITING) and not _is_open(file):
            return _open_to_read(file, "mode=ro&immutable=1")
        raise


def _open_to_read(file: str, how: str) -> sqlite3.Connection:
    database = sqlite3.connect(
        f"file:{quote(os.fsencode(file))}?{how}",
        uri=True,
        timeout=_LOCK_PATIENCE,
        isolation_level=None,
        check_same_thread=False,
    )
    try:
        if _version_of(database, file) == 0:  # whoever makes it has just begun
            database.close()
            database = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            _prepare(database, file)
    except BaseException:
        database.close()
        raise
    return database


def _is_open(file: str) -> bool:
    """Whether some process has it open, or had when it died: then what was written last may be in the log."""
    return any(os.path.exists(f"{file}-{suffix}") for suffix in ("wal", "shm"))  # noqa: PTH110  as text


def _version_of(database: sqlite3.Connection, file: str) -> int:
    """0 while there is nothing in it. Raises StoreError if it is none of ours."""
    version: int = database.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, _VERSION):
        raise StoreError(f"{file} is of another version of cachesrv: update it, or move the file away")
    return version


def _prepare(database: sqlite3.Connection, file: str) -> None:
    if _version_of(database, file) == 0:
        for statement in _SCHEMA.split(";"):
            database.execute(statement)


def _identity(file: str) -> tuple[int, int] | None:
    """Of the file that is there now."""
    with suppress(FileNotFoundError):
        found = os.stat(file)  # noqa: PTH116  as text
        return found.st_dev, found.st_ino
    return None


def _create(file: str) -> None:
    """Private from the start; SQLite gives its other files the same mode and owner."""
    try:
        made = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    directory = os.open(os.path.dirname(file), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # noqa: PTH120  as text
    try:
        give_to_owner(made, directory)
        os.fsync(directory)
    finally:
        os.close(directory)
        os.close(made)


def _set_wal(database: sqlite3.Connection) -> None:
    """The mode is kept in the file. Of several processes that set it at once, SQLite fails all but one, without
    waiting.
    """
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(_LOCK_PAUSE)
        else:
            return


@contextmanager
def _our_errors(file: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"the queue {file} cannot be made: {error.strerror}") from error
    except sqlite3.Error as error:
        raise _explain(file, error) from error


def _explain(file: str, error: sqlite3.Error) -> StoreError:
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith("SQLITE_FULL"):
        return StoreFull(f"there is no room for the queue {file}")
    remedy = ": move it away, and push again what it may have held" if name.startswith(_DAMAGED) else ""
    return StoreError(f"the queue {file} cannot be used: {error}{remedy}")
