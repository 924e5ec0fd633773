"""The journal of what is on its way in parts: an interrupted push goes on and makes nothing again that has arrived.

One SQLite file of the user's own, `transfers-1.sqlite` beside the record of what was pushed; the number is that of the
schema. For each transfer it has the parts that were acknowledged, and the frames that begin in them: so the NAR is read
and hashed again, but only the frames that somebody still lacks are compressed. It claims nothing: what the server does
not have any more counts for nothing, and the server checks the whole NAR in the end. A row that was altered is passed
over, what is old or too much goes, and several processes may write at the same time.
"""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from cachesrv.push.arrived import ArrivedPart, Transfer
from cachesrv.push.record import record_file
from cachesrv.push.state_database import Database, Schema

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from typing import Self

FILE_NAME = "transfers-1.sqlite"

_ROW = 200
"""Bytes that a part takes beside the sizes of its frames."""

_SCHEMA = Schema(
    "the journal of what is on its way",
    """
CREATE TABLE IF NOT EXISTS transfers (
    cache TEXT NOT NULL, nar_hash TEXT NOT NULL, upload TEXT NOT NULL, level INTEGER NOT NULL, at INTEGER NOT NULL,
    PRIMARY KEY (cache, nar_hash, upload)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS transfers_by_age ON transfers (at);
CREATE TABLE IF NOT EXISTS parts (
    cache TEXT NOT NULL, nar_hash TEXT NOT NULL, upload TEXT NOT NULL, number INTEGER NOT NULL, size INTEGER NOT NULL,
    digest BLOB NOT NULL, tag TEXT NOT NULL, first INTEGER NOT NULL, start INTEGER NOT NULL, frames BLOB NOT NULL,
    sum BLOB NOT NULL, PRIMARY KEY (cache, nar_hash, upload, number)
);
""",
    last="parts",
)


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds since anything was added, transfers, bytes of all: what is beyond goes, the oldest transfers first."""

    age: int = 7 * 24 * 3600
    transfers: int = 1000
    size: int = 64 * 1024 * 1024


def journal_file(environ: Mapping[str, str]) -> Path | None:
    """Where the journal of this user is; None for users without a home."""
    record = record_file(environ)
    return record.with_name(FILE_NAME) if record else None


class Journal:
    """An open journal; blocking, for one thread at a time. Everything may raise StoreError, which names the file."""

    def __init__(self, db: Database, limits: Limits) -> None:
        self._db = db
        self._limits = limits

    @classmethod
    def open(cls, file: Path, limits: Limits | None = None) -> Self:
        """The journal, made if it is not there."""
        return cls(Database.open(file, _SCHEMA), limits or Limits())

    def close(self) -> None:
        self._db.close()

    def transfers(self, cache: str, nar_hash: str) -> list[Transfer]:
        """Those of a NAR, the latest first."""
        rows = self._db.query(
            "SELECT cache, nar_hash, upload, level FROM transfers WHERE cache = ? AND nar_hash = ? ORDER BY at DESC",
            cache,
            nar_hash,
        )
        return [Transfer(*row) for row in rows]

    def begun(self, cache: str) -> set[str]:
        """The NARs of which there are transfers, by their hashes."""
        return {row[0] for row in self._db.query("SELECT nar_hash FROM transfers WHERE cache = ?", cache)}

    def parts(self, transfer: Transfer) -> list[ArrivedPart]:
        """What has arrived of it, by number."""
        rows = self._db.query(
            "SELECT number, size, digest, tag, first, start, frames, sum FROM parts"
            " WHERE cache = ? AND nar_hash = ? AND upload = ? ORDER BY number",
            *_key(transfer),
        )
        return [part for row in rows if (part := _read(transfer, row)) is not None]

    def begin(self, transfer: Transfer) -> None:
        """Note that parts will be sent."""
        now = int(time.time())
        self._db.write(lambda db: _touch(db, transfer, now))

    def add(self, transfer: Transfer, part: ArrivedPart) -> None:
        """Note that a part has arrived."""
        now = int(time.time())

        def work(db: sqlite3.Connection) -> None:
            _touch(db, transfer, now)
            db.execute(
                "INSERT OR REPLACE INTO parts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*_key(transfer), *_fields(part), _sum(transfer, part)),
            )

        self._db.write(work)

    def forget(self, transfers: Iterable[Transfer]) -> None:
        """They have come to their end."""

        def work(db: sqlite3.Connection) -> None:
            for transfer in transfers:
                for table in ("transfers", "parts"):
                    db.execute(
                        f"DELETE FROM {table} WHERE cache = ? AND nar_hash = ? AND upload = ?",  # noqa: S608  of ours
                        _key(transfer),
                    )

        self._db.write(work)

    def prune(self) -> None:
        """Drop what is beyond the limits."""
        now = int(time.time())
        self._db.write(lambda db: _prune(db, self._limits, now))


def _touch(db: sqlite3.Connection, transfer: Transfer, now: int) -> None:
    db.execute("INSERT OR REPLACE INTO transfers VALUES (?, ?, ?, ?, ?)", (*_row(transfer), now))


def _key(transfer: Transfer) -> tuple[str, str, str]:
    return (transfer.cache, transfer.nar_hash, transfer.upload)


def _row(transfer: Transfer) -> tuple[str, str, str, int]:
    return (*_key(transfer), transfer.level)


def _fields(part: ArrivedPart) -> tuple[int, int, bytes, str, int, int, bytes]:
    return (part.number, part.size, part.digest, part.tag, part.first, part.start, array("Q", part.frames).tobytes())


def _read(transfer: Transfer, row: tuple[Any, ...]) -> ArrivedPart | None:
    """None for a row that is not as it was written."""
    number, size, digest, tag, first, start, frames, stated = row
    if not isinstance(frames, bytes) or len(frames) % 8:
        return None
    part = ArrivedPart(number, size, digest, tag, first, start, array("Q", frames))
    return part if _sum(transfer, part) == stated else None


def _sum(transfer: Transfer, part: ArrivedPart) -> bytes:
    """SQLite would not notice that bytes of a row have changed."""
    return sha256(repr((_row(transfer), _fields(part))).encode()).digest()


def _prune(db: sqlite3.Connection, limits: Limits, now: int) -> None:
    db.execute("DELETE FROM transfers WHERE at < ?", (now - limits.age,))
    db.execute(
        "DELETE FROM transfers WHERE (cache, nar_hash, upload) IN"
        " (SELECT cache, nar_hash, upload FROM transfers ORDER BY at DESC, upload LIMIT -1 OFFSET ?)",
        (limits.transfers,),
    )
    db.execute(
        "DELETE FROM transfers WHERE (cache, nar_hash, upload) IN (SELECT cache, nar_hash, upload FROM"
        " (SELECT cache, nar_hash, upload, sum(bytes) OVER (ORDER BY at DESC, upload) AS total FROM"
        " (SELECT cache, nar_hash, upload, at, (SELECT total(? + length(frames)) FROM parts"
        " WHERE (parts.cache, parts.nar_hash, parts.upload)"
        " = (transfers.cache, transfers.nar_hash, transfers.upload)) AS bytes FROM transfers)) WHERE total > ?)",
        (_ROW, limits.size),
    )
    db.execute(
        "DELETE FROM parts WHERE (cache, nar_hash, upload) NOT IN (SELECT cache, nar_hash, upload FROM transfers)"
    )
