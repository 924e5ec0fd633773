"""What a survey of storage finds, kept on disk until catalog and index are rebuilt from it.

Tables, by hash part but for the second:

    listed      size and time of each narinfo that lies in storage
    nars        size of each object below nar/, by its name there
    findings    what a narinfo was found to be, when it had that size and time
    standing    whether a path can be served (OK), or not (BAD)

The first two and the last are made anew by each survey; what was found stays good, so that one that was interrupted
does not read again what it has read.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from cachesrv.services.flaws import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cachesrv.index.scratch import Changes, Scratch

TABLES = ("listed", "nars", "findings", "standing")
OK = b"+"
BAD = b"-"

_LISTED = struct.Struct(">Qd")
_SIZE = struct.Struct(">Q")


class Listed(NamedTuple):
    """A narinfo as it was listed: its name without `.narinfo` (not checked), bytes, seconds since the epoch."""

    hash_part: str
    size: int
    modified: float


class FoundPath(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A path that its narinfo describes well; see `cachesrv.catalog.base.PathRecord`. `nar`: its name below nar/;
    `modified`: when its narinfo was written, in seconds since the epoch.
    """

    name: str
    narinfo: bytes
    nar: str
    nar_hash: str
    nar_size: int
    file_size: int
    references: tuple[str, ...]
    deriver: str | None
    ca: str | None
    modified: int


class Finding(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """`size` and `modified` of the narinfo as it was read. Without a `path` it cannot be served: `flaw` is the label of
    a `cachesrv.services.flaws.Kind`, and `why` says more.
    """

    size: int
    modified: float
    path: FoundPath | None = None
    flaw: str = ""
    why: str = ""

    @property
    def lost(self) -> bool:
        """Whether something of the path is not there."""
        return bool(self.flaw) and Kind.of(self.flaw).is_loss


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Finding).decode


class Findings:
    """Blocks. Raises StoreError."""

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch

    def begin(self) -> None:
        """A survey begins: what lies there is listed anew."""
        for table in ("listed", "nars", "standing"):
            self._scratch.clear(table)

    def note(self, narinfos: Iterable[Listed], nars: Iterable[tuple[str, int]]) -> None:
        """That lies there."""
        with self._scratch.changing() as changes:
            changes.put_many("listed", [(n.hash_part.encode(), _LISTED.pack(n.size, n.modified)) for n in narinfos])
            changes.put_many("nars", [(name.encode(), _SIZE.pack(size)) for name, size in nars])

    def next(self, after: str, limit: int) -> Sequence[tuple[Listed, Finding | None]]:
        """The narinfos that are listed beyond `after`, at most `limit`, each with what was found when it was as it is
        now, if anything.
        """
        with self._scratch.changing() as changes:
            items = changes.scan("listed", after.encode(), limit)
            listed = [Listed(key.decode(), *_LISTED.unpack(value)) for key, value in items]
            return [(narinfo, _still_good(narinfo, get(changes, narinfo.hash_part))) for narinfo in listed]

    def nar_sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Of those that are listed."""
        with self._scratch.changing() as changes:
            found = ((name, changes.get("nars", name.encode())) for name in names)
            return {name: _SIZE.unpack(size)[0] for name, size in found if size}

    def put(self, findings: Iterable[tuple[str, Finding]]) -> None:
        """Note what was found, by hash part."""
        with self._scratch.changing() as changes:
            changes.put_many("findings", [(hash_part.encode(), _encode(finding)) for hash_part, finding in findings])

    def put_standing(self, standing: Iterable[tuple[str, bytes]]) -> None:
        """Note OK or BAD, by hash part."""
        with self._scratch.changing() as changes:
            changes.put_many("standing", [(hash_part.encode(), value) for hash_part, value in standing])

    def of(self, hash_parts: Iterable[str]) -> dict[str, tuple[Finding | None, bool]]:
        """What was found of those that are listed now, if anything, and whether they can be served."""
        with self._scratch.changing() as changes:
            return {
                hash_part: (get(changes, hash_part), changes.get("standing", hash_part.encode()) == OK)
                for hash_part in hash_parts
                if changes.get("listed", hash_part.encode())
            }


def get(changes: Changes, hash_part: str) -> Finding | None:
    """What was found of a path, at whatever time."""
    value = changes.get("findings", hash_part.encode())
    return _decode(value) if value else None


def _still_good(listed: Listed, finding: Finding | None) -> Finding | None:
    if finding and finding.path and (finding.size, finding.modified) == (listed.size, listed.modified):
        return finding
    return None
