"""Takes one file, or the listing, out of a NAR that streams by. All of it blocks: it runs in a thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, NoReturn

from cachesrv.errors import BadInput, Mismatch
from cachesrv.nix.compression import decompressed
from cachesrv.nix.hashes import Hash
from cachesrv.nix.nar import CONTENTS, NarReader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cachesrv.nix.listing import ListingNode
    from cachesrv.nix.narinfo import NarInfo

Write = Callable[[bytes | memoryview], object]
"""Takes bytes that are valid during the call."""

HEAD_SIZE = len(CONTENTS) + 8
"""Bytes in front of a file's contents in a NAR, which say that they are contents and how long."""


class Complete(Exception):
    """Ends the reading of a NAR."""


@dataclass(frozen=True, slots=True)
class ReadNar:
    """A NAR that was read to its end and is what its narinfo says; `root` is None where it has too many files. Names in
    it that are not UTF-8 are as Python has those of files.
    """

    root: ListingNode | None
    found: bool


def read(
    info: NarInfo, file: tuple[bytes, ...] | None, write: Write, chunks: Iterator[bytes], *, to_end: bool
) -> ReadNar:
    """Read a compressed NAR and write the contents of the file with these names.

    Raises Complete when the file has gone by, unless `to_end`; BadInput for what is no NAR, Mismatch when it is another
    than the narinfo says.
    """
    taken = _Taken(file, write, to_end=to_end)
    reader = NarReader(on_file=taken.on_file, any_names=True)
    digest = sha256()
    for piece in decompressed(info.compression, chunks):
        digest.update(piece)
        reader.feed(piece)
        if reader.size > info.nar_size:
            break
    nar_hash = Hash("sha256", digest.digest())
    if reader.size != info.nar_size or nar_hash != info.nar_hash:
        raise Mismatch(
            f"the NAR of {info.full_path} is not what its narinfo says:"
            f" {info.nar_hash} and {info.nar_size} bytes are stated, {nar_hash} and {reader.size} were read"
        )
    reader.finish()
    return ReadNar(reader.root, taken.found)


class DoesNotFit(BadInput):
    """Where a file was to lie in a NAR there is something else."""


def read_part(compression: str, skip: int, size: int, write: Write, chunks: Iterator[bytes]) -> NoReturn:
    """Write the `size` bytes of a file's contents, whose head begins `skip` bytes into what the chunks hold.

    Raises Complete at the end; DoesNotFit, before anything is written, when no contents of this size begin there;
    BadInput.
    """
    before = bytearray()
    left = size
    for piece in decompressed(compression, chunks):
        data = memoryview(piece)
        dropped = min(skip, len(data))
        skip, data = skip - dropped, data[dropped:]
        wanted = HEAD_SIZE - len(before)
        before += data[:wanted]
        data = data[wanted:]
        if len(before) == HEAD_SIZE and before != CONTENTS + size.to_bytes(8, "little"):
            raise DoesNotFit("the listing does not fit the NAR")
        if data:
            write(data[:left])
            left -= min(left, len(data))
        if not left and len(before) == HEAD_SIZE:
            raise Complete
    raise BadInput(f"the NAR ends {left} bytes early")


class _Taken:
    """Has the contents of one file written."""

    def __init__(self, file: tuple[bytes, ...] | None, write: Write, *, to_end: bool) -> None:
        self.found = False
        self._file = file
        self._write = write
        self._to_end = to_end
        self._left = 0

    def on_file(self, names: tuple[bytes, ...], size: int, _executable: bool) -> Callable[[memoryview], None] | None:
        if names != self._file:
            return None
        self.found = True
        self._left = size
        self._stop_at_end()
        return self._take

    def _take(self, piece: memoryview) -> None:
        self._write(piece)
        self._left -= len(piece)
        self._stop_at_end()

    def _stop_at_end(self) -> None:
        if not self._left and not self._to_end:
            raise Complete
