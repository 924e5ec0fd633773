"""A SQLite file of the user's own, for what is worth keeping and never worth a failure: made for its owner alone, set
aside when it is broken, used by any number of processes at once.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cachesrv.errors import StoreError
from cachesrv.push.transaction import transaction

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Self

Result = TypeVar("Result")

LOCK_PATIENCE = 20.0
"""Seconds to wait for another process that writes."""


@dataclass(frozen=True, slots=True)
class Schema:
    """`what` the file is, for messages; `sql` makes it, `last` being the last of its tables."""

    what: str
    sql: str
    last: str


class Database:
    """An open file; blocking, for one thread at a time. Everything may raise StoreError, which names the file."""

    def __init__(self, file: Path, schema: Schema, db: sqlite3.Connection) -> None:
        self.file = file
        self._schema = schema
        self._db = db

    @classmethod
    def open(cls, file: Path, schema: Schema) -> Self:
        """Made if it is not there."""
        with _our_errors(file, schema):
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                db = _connect(file, schema)
            except sqlite3.DatabaseError as error:
                if not _is_broken(error):
                    raise
                db = _set_aside(file, schema)
            return cls(file, schema, db)

    def close(self) -> None:
        self._db.close()

    def query(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """All rows."""
        return self._whole(lambda db: db.execute(sql, values).fetchall())

    def write(self, work: Callable[[sqlite3.Connection], object]) -> None:
        """All of what `work` does, or nothing."""

        def whole(db: sqlite3.Connection) -> None:
            with transaction(db):
                work(db)

        self._whole(whole)

    def _whole(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """Done once more when the file turns out to be broken."""
        with _our_errors(self.file, self._schema):
            try:
                return work(self._db)
            except sqlite3.DatabaseError as error:
                if not _is_broken(error):
                    raise
                self._db.close()
                self._db = _set_aside(self.file, self._schema)
            return work(self._db)


@contextmanager
def _our_errors(file: Path, schema: Schema) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"{schema.what}, {file}, cannot be used: {error}") from error


def _connect(file: Path, schema: Schema) -> sqlite3.Connection:
    """The database, made if it is not there, for any one thread at a time. Raises sqlite3.Error, OSError."""
    os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # SQLite would make it for everybody
    db = sqlite3.connect(file, timeout=LOCK_PATIENCE, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA synchronous = NORMAL")
        if not _is_made(db, schema):
            with _lock(file):
                _make(db, schema)
    except BaseException:
        db.close()
        raise
    return db


def _is_made(db: sqlite3.Connection, schema: Schema) -> bool:
    return bool(db.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (schema.last,)).fetchall())


def _make(db: sqlite3.Connection, schema: Schema) -> None:
    if not _is_made(db, schema):
        db.execute("PRAGMA journal_mode = WAL")  # writers and readers do not wait for each other, nor for the disk
        db.executescript(f"BEGIN; {schema.sql} COMMIT;")


@contextmanager
def _lock(file: Path) -> Iterator[None]:
    """One process at a time."""
    lock = os.open(f"{file}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _is_broken(error: sqlite3.DatabaseError) -> bool:
    """Whether it says that the file is no database, or a damaged one."""
    return getattr(error, "sqlite_errorname", "").startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB"))


def _set_aside(file: Path, schema: Schema) -> sqlite3.Connection:
    """A new database in the place of a broken one, which is kept beside it; once only, however many find it broken."""
    with _lock(file):
        if not _is_sound(file):
            for suffix in ("-wal", "-shm"):
                Path(f"{file}{suffix}").unlink(missing_ok=True)
            file.replace(f"{file}.broken")
    return _connect(file, schema)


def _is_sound(file: Path) -> bool:
    try:
        with closing(sqlite3.connect(file, timeout=LOCK_PATIENCE)) as db:
            return bool(db.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
    except sqlite3.DatabaseError as error:
        if _is_broken(error):
            return False
        raise
