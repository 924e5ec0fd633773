"""Sorted tables on local disk for one job, larger than memory, that survive the process which made them.

One process has them open at a time. A transaction is on disk when it has ended. Files that cannot be used are begun
anew: whatever is in them can be found out again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import contextmanager
from itertools import islice
from threading import Lock
from typing import TYPE_CHECKING, Protocol

import lmdb

from cachesrv.errors import StoreError, StoreFull, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

_MAP_SIZE = 2**38
"""Bytes that all of it may have: address space, not disk."""
_LONGEST_KEY = 511


class Changes(Protocol):
    """A transaction: what it reads includes what it has written."""

    def get(self, table: str, key: bytes) -> bytes | None:
        """A value, None when there is none, as for a key that none can have."""

    def put(self, table: str, key: bytes, value: bytes) -> None:
        """Write a value; keys have 1 to 511 bytes."""

    def put_many(self, table: str, items: Iterable[tuple[bytes, bytes]]) -> None:
        """Write values."""

    def scan(self, table: str, after: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        """The next items by key, beyond `after`, at most `limit`."""


class Scratch:
    """`path` is a folder, made when it is missing; `tables` are names. Blocks. Raises StoreError, and StoreUnavailable
    while another process has it open.
    """

    def __init__(self, path: Path, tables: Sequence[str]) -> None:
        self._path = path
        self._tables = tables
        self._alone = Lock()
        self._closed = False
        with _in_words(path):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                self._lock()
                self._open()
            except BaseException:
                os.close(self._folder)
                raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreUnavailable(f"another process is at the same job, with {self._path}") from None

    def _open(self) -> None:
        try:
            self._open_files()
        except lmdb.Error:
            for name in ("data.mdb", "lock.mdb"):
                (self._path / name).unlink(missing_ok=True)
            self._open_files()

    def _open_files(self) -> None:
        self._env = lmdb.open(str(self._path), map_size=_MAP_SIZE, max_dbs=len(self._tables), mode=0o600)
        self._dbs = {name: self._env.open_db(name.encode("ascii")) for name in self._tables}

    @contextmanager
    def changing(self) -> Iterator[Changes]:
        """A transaction, done when it is left without an error."""
        with self._transaction() as transaction:
            yield _Changes(transaction, self._dbs)

    def clear(self, table: str) -> None:
        """Forget all that is in a table."""
        with self._transaction() as transaction:
            transaction.drop(self._dbs[table], delete=False)

    @contextmanager
    def _transaction(self) -> Iterator[lmdb.Transaction[bytes]]:
        with self._alone, _in_words(self._path):
            if self._closed:
                raise StoreError(f"{self._path} is closed")
            with self._env.begin(write=True) as transaction:
                yield transaction

    def close(self) -> None:
        """Let go of the files, when the transaction is done that is under way in another thread."""
        with self._alone:
            self._closed = True
            self._env.close()
            os.close(self._folder)

    def discard(self) -> None:
        """The job is done: nothing of it is left."""
        with _in_words(self._path):
            shutil.rmtree(self._path)


class _Changes:
    def __init__(self, transaction: lmdb.Transaction[bytes], dbs: dict[str, lmdb._Database]) -> None:
        self._transaction = transaction
        self._dbs = dbs

    def get(self, table: str, key: bytes) -> bytes | None:
        return self._transaction.get(key, db=self._dbs[table]) if 0 < len(key) <= _LONGEST_KEY else None

    def put(self, table: str, key: bytes, value: bytes) -> None:
        self._transaction.put(key, value, db=self._dbs[table])

    def put_many(self, table: str, items: Iterable[tuple[bytes, bytes]]) -> None:
        with self._transaction.cursor(self._dbs[table]) as cursor:
            cursor.putmulti(sorted(items))

    def scan(self, table: str, after: bytes, limit: int) -> list[tuple[bytes, bytes]]:
        with self._transaction.cursor(self._dbs[table]) as cursor:
            if not cursor.set_range(after + b"\0"):
                return []
            return [*islice(cursor.iternext(), limit)]


@contextmanager
def _in_words(path: Path) -> Iterator[None]:
    try:
        yield
    except (lmdb.MapFullError, lmdb.DiskError) as error:
        raise StoreFull(f"no room for {path}: {error}") from error
    except (lmdb.Error, OSError) as error:
        raise StoreError(f"cannot use {path}: {error}") from error
