"""The catalog in a SQLite file: how it is made, opened, locked, and what its errors mean.

The file is private to its owner (SQLite gives its -wal and -shm the mode of the file itself). It is in WAL mode, so
that readers and the writer do not wait for each other, and synced at each commit.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import time
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool, QueuePool

from cachesrv.catalog.database import Database
from cachesrv.catalog.glance import Glance
from cachesrv.catalog.migrations import migrate
from cachesrv.errors import CachesrvError, ConfigError, StoreError, StoreFull, StoreUnavailable

LOCK_TIMEOUT = 30.0

_PRIVATE = 0o600
_WAL_LIMIT = 64 * 1024 * 1024


def open_glance(url: str) -> Glance:
    """A quick look into the database of a `sqlite:///<path>` URL, while that is open. Blocks. Raises ConfigError for
    another URL, StoreError.
    """
    path = _path(url)
    try:
        return Glance(path, timeout=LOCK_TIMEOUT)
    except sqlite3.Error as error:
        raise _explain(path, error) from error


def open_database(url: str, *, readers: int) -> Database:
    """The database of a `sqlite:///<path>` URL, made and brought to the newest schema where needed. Blocks. Raises
    ConfigError for a URL or a database that cannot be used, StoreError.
    """
    path = _path(url)
    explain = partial(_explain, path)
    try:
        _create(path)
        _set_wal(path)
        # To alter a table, SQLite makes a new one and drops the old: foreign keys would drop what refers to it too.
        with _engine(path, "BEGIN IMMEDIATE", foreign_keys=False, poolclass=NullPool).begin() as connection:
            migrate(connection)
    except (OSError, sqlite3.Error, SQLAlchemyError) as error:
        raise explain(error) from error
    return Database(
        reader=_engine(path, "BEGIN", poolclass=QueuePool, pool_size=readers, max_overflow=0),
        writer=_engine(path, "BEGIN IMMEDIATE", poolclass=QueuePool, pool_size=1, max_overflow=0),
        readers=readers,
        explain=explain,
    )


def _path(url: str) -> str:
    scheme, separator, path = url.partition(":///")
    if scheme != "sqlite" or not separator or not path or path == ":memory:":
        raise ConfigError(
            f"not a catalog URL, which is sqlite:/// and the path of a file: {url.partition('://')[0]}://…"
        )
    return path


def _create(path: str) -> None:
    """Never opens a file that is there: to close it again would drop the locks that this process has on it. SQLite
    would open one that cannot be written, and fail only later.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, _PRIVATE))
    except FileExistsError:
        if not os.access(path, os.R_OK | os.W_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, "no permission to read and write it", path) from None
        return
    folder = os.open(Path(path).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _set_wal(path: str) -> None:
    """The mode is kept in the file. Of several processes that set it at once, SQLite fails all but one, without
    waiting.
    """
    deadline = time.monotonic() + LOCK_TIMEOUT
    connection = sqlite3.connect(path, timeout=LOCK_TIMEOUT)
    try:
        while True:
            try:
                (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
                break
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
    finally:
        connection.close()
    if mode != "wal":
        raise StoreError(f"the catalog {path} cannot have a write-ahead log there: put it on a local disk")


def _engine(path: str, begin: str, *, foreign_keys: bool = True, **pool: Any) -> Engine:
    engine = create_engine(
        URL.create("sqlite", database=path),
        # Without isolation_level, Python's driver leaves BEGIN to us.
        connect_args={"timeout": LOCK_TIMEOUT, "isolation_level": None},
        hide_parameters=True,
        **pool,
    )

    @event.listens_for(engine, "connect")
    def on_connect(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA foreign_keys = {foreign_keys:d}")
        connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT}")

    @event.listens_for(engine, "begin")
    def on_begin(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _explain(path: str, error: Exception) -> CachesrvError:
    cause = getattr(error, "orig", None) or error
    if isinstance(cause, OSError):
        kind = StoreFull if cause.errno in (errno.ENOSPC, errno.EDQUOT) else StoreError
        return kind(f"the catalog {path} cannot be used: {cause.strerror}")
    match getattr(cause, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF:
        case sqlite3.SQLITE_FULL:
            return StoreFull(f"no room for the catalog {path}")
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
            return StoreError(
                f"the catalog {path} is damaged ({cause}): stop cachesrv, move {path}, {path}-wal and {path}-shm away,"
                " and run `cachesrv reindex`, which makes it anew from the objects; tokens have to be made again"
            )
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
            return StoreError(
                f"the catalog {path} cannot be written ({cause}): it, {path}-wal, {path}-shm and their folder have to"
                " be writable for the user that cachesrv runs as"
            )
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return StoreUnavailable(
                f"the catalog {path} has been kept locked by another process for {LOCK_TIMEOUT:.0f} seconds"
            )
    return StoreError(f"the catalog {path} failed: {cause}")
