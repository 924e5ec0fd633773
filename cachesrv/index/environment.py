"""An LMDB environment that several processes share, and that is begun anew when it cannot be used.

Whoever has it open holds a shared lock (flock) on its folder. Only a process that holds the lock alone judges the
files and throws them away; so nobody ever works on files that others no longer see.

Thrown away are files that LMDB refuses, that were cut off, that hold another format, or in which a process met
damage and left the mark `damaged`. Damage in the middle of the file shows only when its page is read.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import lmdb

from cachesrv.errors import StoreDamaged, StoreError, StoreFull

if TYPE_CHECKING:
    from collections.abc import Iterator

# Raised by one with every change of what keys or values mean.
FORMAT = b"2"

_DATA = "data.mdb"
_LOCKS = "lock.mdb"
_FILES = (_DATA, _LOCKS, "damaged")
_MAX_READERS = 1024
_DAMAGE = (
    lmdb.BadTxnError,  # what a lookup gives when the root of a database cannot be read
    lmdb.CorruptedError,
    lmdb.InvalidError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.VersionMismatchError,
)

_PIECE = 16 * 2**20
"""Bytes that the kernel is asked for at a time."""

# A write that was cut short for want of room comes out of LMDB as an input/output error.
_FULL_DISK = 2**20


def _available_memory() -> int:
    """Bytes, as proc_meminfo(5) estimates them. Raises OSError."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


class _Unusable(Exception):
    """These files cannot be used, whoever opens them."""


class SharedEnvironment:
    """An open environment of four databases: `entries`, `absences`, `held` and one about itself. Open it after a fork,
    never across one; one process can open a folder only once at a time. The files are for their owner only.

    `fresh` says that there was nothing of use in the folder, so that everything has to be learnt anew. Raises
    StoreError, and StoreDamaged for files that are unusable while others have them open.
    """

    def __init__(self, path: str, *, map_size: int) -> None:
        self._path = Path(path)
        with self._in_words(f"open the index {path}"):
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with self._in_words(f"open the index {path}"):
                self._open(map_size)
        except BaseException:
            os.close(self._folder)
            raise

    def _open(self, map_size: int) -> None:
        alone = self._lock()
        if alone:
            self._allocate_locks()
        try:
            self._open_files(map_size, alone=alone)
        except _Unusable as error:
            if not alone:
                raise StoreDamaged(f"the index is in use by others and cannot be shared: {error}") from error
            self._throw_away()
            self._allocate_locks()
            self._open_files(map_size, alone=alone)
        if alone:
            os.fsync(self._folder)
            fcntl.flock(self._folder, fcntl.LOCK_SH)

    def _lock(self) -> bool:
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fcntl.flock(self._folder, fcntl.LOCK_SH)
            return False
        return True

    def _allocate_locks(self) -> None:
        """LMDB maps a file with holes, and writes to them when there are more readers: on a full disk that kills the
        process. Only alone: to close it would drop the locks that this process has on it.
        """
        descriptor = os.open(self._path / _LOCKS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # The size that LMDB gives it, or less.
            with suppress(OSError):
                os.posix_fallocate(descriptor, 0, _MAX_READERS * 64)
        finally:
            os.close(descriptor)

    def _throw_away(self) -> None:
        for name in _FILES:
            (self._path / name).unlink(missing_ok=True)
        os.fsync(self._folder)

    def _open_files(self, map_size: int, *, alone: bool) -> None:
        if (self._path / "damaged").exists():
            raise _Unusable("it is marked as damaged")
        try:
            self.env = lmdb.open(
                str(self._path),
                map_size=map_size,
                max_dbs=4,
                max_readers=_MAX_READERS,
                # The next lookup takes up the ended transaction of the last: no lock, no search for a reader's slot.
                max_spare_txns=1,
                # Lookups come in no order: what lies beside a page is of no use.
                readahead=False,
                mode=0o600,
            )
        except lmdb.Error as error:
            # Positive codes are those of the operating system; they say nothing about the contents.
            if error.code > 0:
                raise
            raise _Unusable(str(error)) from error
        try:
            self._use(alone=alone)
        except BaseException:
            self.env.close()
            raise

    def _use(self, *, alone: bool) -> None:
        env = self.env
        env.reader_check()
        # To touch a page beyond the end of the file kills the process.
        if alone and self._missing() > 0:
            raise _Unusable("its file is cut off")
        self.complete()
        try:
            self.fresh = env.stat()["entries"] == 0
            with env.begin(write=True) as txn:
                self.about = env.open_db(b"about", txn, create=self.fresh)
                if self.fresh:
                    txn.put(b"format", FORMAT, db=self.about)
                elif txn.get(b"format", db=self.about) != FORMAT:
                    raise _Unusable("its format is another")
                self.entries = env.open_db(b"entries", txn, create=self.fresh)
                self.absences = env.open_db(b"absences", txn, create=self.fresh)
                self.held = env.open_db(b"held", txn)
        except (lmdb.NotFoundError, *_DAMAGE) as error:
            raise _Unusable(str(error)) from error

    def complete(self) -> None:
        """After a commit: LMDB leaves the last pages out when they were freed before they were ever written, and the
        file would look as if it had been cut off.
        """
        if (missing := self._missing()) > 0:
            # Without the room for it, it may be begun anew at the next start.
            with suppress(OSError):
                descriptor = os.open(self._path / _DATA, os.O_RDWR | os.O_CLOEXEC)
                try:
                    # Unlike truncate, this never shortens what others have made longer meanwhile.
                    os.posix_fallocate(descriptor, os.fstat(descriptor).st_size, missing)
                finally:
                    os.close(descriptor)

    def _missing(self) -> int:
        """Bytes of the file that should be there after its end."""
        pages: int = self.env.info()["last_pgno"] + 1
        needed: int = pages * self.env.stat()["psize"]
        return needed - (self._path / _DATA).stat().st_size

    def read_ahead(self) -> Iterator[int]:
        """Ask the kernel for the file, piece by piece, if it takes no more than half of the memory that is available;
        gives the size of each piece in bytes.
        """
        try:
            with (self._path / _DATA).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > _available_memory() // 2:
                    return
                for start in range(0, size, _PIECE):
                    length = min(_PIECE, size - start)
                    os.posix_fadvise(file.fileno(), start, length, os.POSIX_FADV_WILLNEED)
                    yield length
        except OSError:
            # Then it is read when it is needed.
            return

    @contextmanager
    def damage_marked(self) -> Iterator[None]:
        """Turns errors of LMDB into StoreError and StoreFull, and has files thrown away at the next opening when a
        process met damage in them.
        """
        try:
            with self._in_words("use the index"):
                yield
        except StoreError as error:
            if isinstance(error.__cause__, _DAMAGE):
                with suppress(OSError):
                    (self._path / "damaged").touch()
            raise

    @contextmanager
    def _in_words(self, doing: str) -> Iterator[None]:
        try:
            yield
        except lmdb.MapFullError as error:
            raise StoreFull(f"cannot {doing}: it has reached its size limit; raise [index] size_limit") from error
        except lmdb.MapResizedError as error:
            why = "another process has made it larger than this one expects; restart the one with the old size_limit"
            raise StoreError(f"cannot {doing}: {why}") from error
        except lmdb.Error as error:
            if self._is_full(error.code):
                raise StoreFull(f"cannot {doing}: no space left on its disk") from error
            raise StoreError(f"cannot {doing}: {error}") from error
        except OSError as error:
            raise StoreError(f"cannot {doing}: {error.strerror}") from error

    def _is_full(self, code: int) -> bool:
        if code == errno.EIO:
            return shutil.disk_usage(self._path).free < _FULL_DISK
        return code in (errno.ENOSPC, errno.EDQUOT)

    def close(self) -> None:
        self.env.close()
        os.close(self._folder)
