"""A directory of NARs that were pushed, as Nix reads them instead of the cache: `--store 'URL?local-nar-cache=DIR'`.

    <hash part>.nar, <hash part>.ls        up to Nix 2.33: by the store path
    <NAR hash>.nar, <NAR hash>.ls          from Nix 2.34 on: by what is in it, in nix-base-32

Both names are of one file. The NAR is not compressed; the listing is the root node alone, without the frame that it
has in a cache. What is there is left as it is, and nothing is ever removed, as Nix does it.

Source: Nix, `src/libstore/remote-fs-accessor.cc` of 2.8, `src/libutil/nar-cache.cc` of 2.34.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

from cachesrv.nix.listing import render_node
from cachesrv.push.inspection import Inspection

if TYPE_CHECKING:
    from collections.abc import Iterable
    from tempfile import _TemporaryFileWrapper

    from cachesrv.nix.hashes import Hash
    from cachesrv.nix.path_info import PathInfo
    from cachesrv.push.inspection import Seen, Tap

_UNFINISHED = ".nar-"
_ABANDONED_SECONDS = 24 * 3600
"""After which a file is nobody's, where files cannot be locked."""
_BEGUN_SECONDS = 60
"""In which whoever has made a file locks it, and needs the listing that lies beside it."""


class KeptNars:
    """The directory, made when it is first wanted. `trouble` is the first thing that went wrong; nothing is kept after
    that. Used by several threads.
    """

    def __init__(self, directory: Path) -> None:
        self.trouble: str | None = None
        self._directory = directory
        self._names: dict[Hash, set[str]] = {}
        self._starting = threading.Lock()
        self._started = False

    def expect(self, infos: Iterable[PathInfo]) -> None:
        """Paths that may be published; several may have one NAR."""
        for info in infos:
            self._names.setdefault(info.nar_hash, set()).add(info.store_path.hash_part)

    def tap(self, info: PathInfo) -> Tap:
        """Keeps the NAR of a path."""
        return _Copy(self, info)

    def create(self) -> _TemporaryFileWrapper[bytes]:
        """A file for a NAR that begins. Raises OSError."""
        with self._starting:
            if not self._started:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._remove_abandoned()
                self._started = True
        file = NamedTemporaryFile(dir=self._directory, prefix=_UNFINISHED, delete=False)  # noqa: SIM115  closed with the copy
        with suppress(OSError):  # not every file system has locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file

    def keep(self, file: Path, seen: Seen | None, info: PathInfo) -> None:
        """Give a NAR that is complete its names, the listing first: Nix looks for it only when the NAR is there. Raises
        OSError.
        """
        names = [info.nar_hash.bare_nix32, info.store_path.hash_part, *self._names.get(info.nar_hash, ())]
        if seen is not None and seen.listing is not None:
            listing = Path(f"{file}.ls")
            try:
                listing.write_bytes(render_node(seen.listing))
                self._link(listing, names, "ls")
            finally:
                listing.unlink(missing_ok=True)
        self._link(file, names, "nar")

    def stop(self, error: OSError) -> None:
        """Keep nothing more."""
        if self.trouble is None:
            self.trouble = f"NARs are not kept in {self._directory}: {error.strerror or error}"

    def _remove_abandoned(self) -> None:
        """What pushes left that were killed: their locks went with them."""
        for file in self._directory.glob(f"{_UNFINISHED}*"):
            with suppress(FileNotFoundError, PermissionError):  # it may be that of another user
                age = time.time() - file.stat().st_mtime
                if age > _BEGUN_SECONDS and (age > _ABANDONED_SECONDS or not _is_locked(file)):
                    file.unlink()

    def _link(self, file: Path, names: Iterable[str], suffix: str) -> None:
        # for all to read that may enter the directory, as what Nix puts there
        file.chmod(0o644)
        for name in names:
            with suppress(FileExistsError):
                os.link(file, self._directory / f"{name}.{suffix}")


def _is_locked(file: Path) -> bool:
    """Whether somebody writes it; so it counts too where that cannot be told. Raises FileNotFoundError."""
    try:
        with file.open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        raise
    except OSError:
        return True
    return False


class _Copy:
    """A `Tap` that writes what it sees."""

    def __init__(self, kept: KeptNars, info: PathInfo) -> None:
        self._kept = kept
        self._info = info
        self._seen: Seen | None = None
        self._inspection = Inspection(self._see)
        self._file: _TemporaryFileWrapper[bytes] | None = None

    def feed(self, data: memoryview) -> None:
        if self._kept.trouble is not None:
            return
        try:
            if self._file is None:
                self._file = self._kept.create()
            self._file.write(data)
        except OSError as error:
            self._fail(error)
        self._inspection.feed(data)

    def accept(self) -> None:
        self._inspection.accept()
        if self._file is None:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())  # else a power cut could leave half of it, which Nix would not notice
            self._kept.keep(Path(self._file.name), self._seen, self._info)
        except OSError as error:
            self._fail(error)
        self.drop()

    def drop(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            with suppress(OSError):
                Path(self._file.name).unlink()
            self._file = None

    def _see(self, seen: Seen) -> None:
        self._seen = seen

    def _fail(self, error: OSError) -> None:
        self._kept.stop(error)
        self.drop()
