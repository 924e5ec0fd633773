"""The record of what was pushed from here: paths, what lies in them, and the files that build systems read next.

One SQLite file of the user's own, `$XDG_STATE_HOME/cachesrv/pushed-1.sqlite` (by default below `~/.local/state`;
`$CACHESRV_PUSHED` names another one). The number is that of the schema: two versions of cachesrv use two files. It is
derived, like a cache: what is too old, or too much, is dropped, and a file that is broken is set aside. Several
processes may write at the same time.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from cachesrv.errors import BadInput, StoreError
from cachesrv.nix import listing
from cachesrv.nix.compression import decompress
from cachesrv.nix.seekable import compress_frame
from cachesrv.push.inspection import SeenFile
from cachesrv.push.state_database import Database, Schema

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Mapping, Sequence
    from typing import Self

    from cachesrv.nix.hashes import Hash
    from cachesrv.nix.listing import ListingNode
    from cachesrv.push.inspection import Seen

FILE_NAME = "pushed-1.sqlite"
LISTING_LEVEL = 3
LISTING_LIMIT = 32 * 1024 * 1024
"""Bytes of a listing after decompression: far more than one of `inspection.LISTING_ENTRIES` can have."""
UNUSED_SECONDS = 24 * 3600
"""For which a NAR is kept at least whose path was not published: the push may go on."""
_SLACK = 1.05
"""Beyond its limits by less, the record is left as it is: to bring it back takes a look at all that it holds."""
_ROW = 500
"""Bytes that a row takes beside its contents."""

_SCHEMA = Schema(
    "the record of what was pushed",
    """
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
""",
    last="reads",
)


@dataclass(frozen=True, slots=True)
class Limits:
    """seconds since the push, bytes of listings and contents together, and paths: what is beyond goes, oldest first."""

    age: int = 30 * 24 * 3600
    size: int = 256 * 1024 * 1024
    paths: int = 200_000


@dataclass(frozen=True, slots=True)
class PushedPath:
    """A path that is in a cache since this machine pushed it. path: in full; cache: its URL; nar_hash as
    `sha256:<nix32>`; nar_size in bytes; at: seconds since the epoch.
    """

    path: str
    cache: str
    nar_hash: str
    nar_size: int
    at: int


@dataclass(frozen=True, slots=True)
class SeenNar:
    """What was seen of the NAR with this hash; the listing is compressed, None where there is none."""

    nar_hash: str
    listing: bytes | None
    files: tuple[SeenFile, ...]

    @classmethod
    def of(cls, nar_hash: Hash, seen: Seen) -> Self:
        packed = compress_frame(listing.render(seen.listing), LISTING_LEVEL) if seen.listing is not None else None
        return cls(nar_hash.nix32, packed, seen.files)

    @property
    def size(self) -> int:
        """Bytes that it takes, more or less."""
        return _ROW + len(self.listing or b"") + sum(len(file.content or b"") + _ROW for file in self.files)


@dataclass(frozen=True, slots=True)
class Reads:
    """How often files were read from somewhere, and how many bytes of them."""

    count: int = 0
    bytes: int = 0


def record_file(environ: Mapping[str, str]) -> Path | None:
    """Where the record of this user is, see the module; None for users without a home."""
    if stated := environ.get("CACHESRV_PUSHED"):
        return Path(stated).absolute()
    if (state := environ.get("XDG_STATE_HOME", "")).startswith("/"):  # others are to be passed over
        return Path(state) / "cachesrv" / FILE_NAME
    try:
        home = Path(environ.get("HOME") or "~").expanduser()
    except RuntimeError:
        return None
    return home / ".local/state/cachesrv" / FILE_NAME


class Record:
    """An open record; blocking, for one thread at a time. Everything may raise StoreError, which names the file."""

    def __init__(self, db: Database, limits: Limits) -> None:
        self.file = db.file
        self._limits = limits
        self._db = db

    @classmethod
    def open(cls, file: Path, limits: Limits | None = None) -> Self:
        """The record, made if it is not there."""
        return cls(Database.open(file, _SCHEMA), limits or Limits())

    @classmethod
    def existing(cls, file: Path, limits: Limits | None = None) -> Self | None:
        """The record, None if nothing was pushed from here yet."""
        return cls.open(file, limits) if os.access(file, os.F_OK) else None

    def close(self) -> None:
        self._db.close()

    def write(self, nars: Sequence[SeenNar], paths: Sequence[PushedPath]) -> None:
        """Note what was seen and what was published, all of it or nothing."""
        now = int(time.time())
        self._db.write(lambda db: _insert(db, nars, paths, now))

    def prune(self) -> None:
        """Drop what is beyond the limits."""
        now = int(time.time())
        self._db.write(lambda db: _prune(db, self._limits, now))

    def find(self, path: str) -> list[PushedPath]:
        """The pushes of a store path (in full), the latest first."""
        rows = self._db.query(
            "SELECT path, cache, nar_hash, nar_size, at FROM paths WHERE path = ? ORDER BY at DESC, cache", path
        )
        return [PushedPath(*row) for row in rows]

    def paths(self) -> list[PushedPath]:
        """All pushes, the latest first."""
        rows = self._db.query("SELECT path, cache, nar_hash, nar_size, at FROM paths ORDER BY at DESC, path, cache")
        return [PushedPath(*row) for row in rows]

    def has_seen(self, nar_hash: str) -> bool:
        """Whether it is known what the NAR holds: what is not in `files` is not there."""
        return bool(self._db.query("SELECT 1 FROM nars WHERE nar_hash = ?", nar_hash))

    def listing(self, nar_hash: str) -> ListingNode | None:
        """What the NAR holds, None if that is not known."""
        for (compressed,) in self._db.query("SELECT listing FROM nars WHERE nar_hash = ?", nar_hash):
            if compressed is not None:
                try:
                    return listing.parse(decompress("zstd", compressed, LISTING_LIMIT))
                except BadInput as error:
                    raise StoreError(f"{self.file} holds a listing that is none: {error}") from error
        return None

    def files(self, nar_hash: str) -> list[SeenFile]:
        """The build-facing files in the NAR; without contents that are not what was seen: SQLite would not notice."""
        rows = self._db.query(
            "SELECT name, kind, size, executable, sha256, content, target FROM files WHERE nar_hash = ? ORDER BY name",
            nar_hash,
        )
        return [
            SeenFile(name, kind, size, bool(executable), digest, content if _is(content, digest) else None, target)
            for name, kind, size, executable, digest, content, target in rows
        ]

    def count_read(self, source: str, size: int) -> None:
        """A file of `size` bytes was read from `source`."""
        self._db.write(
            lambda db: db.execute(
                "INSERT INTO reads VALUES (?, 1, ?)"
                " ON CONFLICT DO UPDATE SET count = count + 1, bytes = bytes + excluded.bytes",
                (source, size),
            )
        )

    def reads(self) -> dict[str, Reads]:
        """All reads so far, by source."""
        return {source: Reads(count, size) for source, count, size in self._db.query("SELECT * FROM reads")}


def _is(content: object, digest: str) -> bool:
    return isinstance(content, bytes) and sha256(content).hexdigest() == digest


def _insert(db: sqlite3.Connection, nars: Sequence[SeenNar], paths: Sequence[PushedPath], now: int) -> None:
    for nar in nars:
        db.execute(
            "INSERT INTO nars VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET at = excluded.at",
            (nar.nar_hash, now, nar.size, nar.listing),
        )
        db.executemany(
            "INSERT OR IGNORE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (nar.nar_hash, one.name, one.kind, one.size, one.executable, one.sha256, one.content, one.target)
                for one in nar.files
            ],
        )
    db.executemany(
        "INSERT OR REPLACE INTO paths VALUES (?, ?, ?, ?, ?)",
        [(path.path, path.cache, path.nar_hash, path.nar_size, path.at) for path in paths],
    )


def _prune(db: sqlite3.Connection, limits: Limits, now: int) -> None:
    """Every push ends with this, so that the usual case, that there is nothing to do, is a look at a few indices."""
    oldest, paths = db.execute("SELECT coalesce(min(at), ?), count(*) FROM paths", (now,)).fetchone()
    (size,) = db.execute("SELECT total(bytes) FROM nars").fetchone()
    if now - oldest <= limits.age * _SLACK and paths <= limits.paths * _SLACK and size <= limits.size * _SLACK:
        return
    db.execute("DELETE FROM paths WHERE at < ?", (now - limits.age,))
    (paths,) = db.execute("SELECT count(*) FROM paths").fetchone()
    db.execute(
        "DELETE FROM paths WHERE (path, cache) IN (SELECT path, cache FROM paths ORDER BY at, path, cache LIMIT ?)",
        (max(0, paths - limits.paths),),
    )
    db.execute(
        "DELETE FROM nars WHERE at < ? AND NOT EXISTS (SELECT 1 FROM paths WHERE paths.nar_hash = nars.nar_hash)",
        (now - min(UNUSED_SECONDS, limits.age),),
    )
    (size,) = db.execute("SELECT total(bytes) FROM nars").fetchone()
    if size > limits.size:
        db.execute(
            "DELETE FROM nars WHERE nar_hash IN (SELECT nar_hash FROM"
            " (SELECT nar_hash, sum(bytes) OVER (ORDER BY at DESC, nar_hash) AS total FROM nars) WHERE total > ?)",
            (limits.size,),
        )
    db.execute("DELETE FROM files WHERE nar_hash NOT IN (SELECT nar_hash FROM nars)")
