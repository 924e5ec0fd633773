"""What a NAR's bytes really are: both hashes, both sizes, a canonical NAR inside, its listing.

All of it in one pass, and blocking: it runs in a thread, beside the event loop that the bytes come in on.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from cachesrv.errors import Mismatch, TooLarge
from cachesrv.nix import listing
from cachesrv.nix.compression import decompress, decompressed
from cachesrv.nix.hashes import Hash
from cachesrv.nix.nar import NarReader
from cachesrv.nix.seekable import compress_frame, read_single_frame

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

LISTING_LIMIT = 16 * 1024 * 1024
"""Bytes of a listing, before compression; NARs with a larger one are served without."""


@dataclass(frozen=True, slots=True)
class VerifiedNar:
    """Sizes in bytes; `listing` is the zstd-compressed `.ls` object, None where there can be none."""

    file_hash: Hash
    file_size: int
    nar_hash: Hash
    nar_size: int
    listing: bytes | None


def verify(compression: str, chunks: Iterable[bytes], *, nar_limit: int = 0) -> VerifiedNar:
    """Read a whole compressed NAR. Blocks; run it in a thread.

    Raises BadInput when it does not decompress or is not a canonical NAR, TooLarge when the NAR has more than
    `nar_limit` bytes (0: no limit).
    """
    file = _Hasher()
    nar = _Hasher()
    reader = NarReader()
    for piece in decompressed(compression, file.passing(chunks)):
        nar.update(piece)
        if nar_limit and nar.size > nar_limit:
            raise TooLarge(f"the NAR has more than the {nar_limit} bytes that are taken at most")
        reader.feed(piece)
    reader.finish()
    rendered = listing.render(reader.root) if reader.root is not None else b""
    return VerifiedNar(
        file_hash=file.hash,
        file_size=file.size,
        nar_hash=nar.hash,
        nar_size=nar.size,
        listing=compress_frame(rendered, 3) if 0 < len(rendered) <= LISTING_LIMIT else None,
    )


@dataclass(frozen=True, slots=True)
class SmallNar:
    """Both hashes; `listing` is the `.ls` object as it is, None where there can be none."""

    file_hash: Hash
    nar_hash: Hash
    listing: bytes | None


def verify_small(file: bytes, nar_size: int) -> SmallNar:
    """Judge the zstd-compressed file of a NAR of `nar_size` bytes, all of it in memory. Blocks for a moment.

    Raises BadInput when it does not decompress to so many bytes, or not to a canonical NAR.
    """
    contents = read_single_frame(file, nar_size)
    if contents is None:
        contents = decompress("zstd", file, nar_size)
    if len(contents) != nar_size:
        raise Mismatch(f"the NAR has {len(contents)} bytes, not {nar_size}")
    reader = NarReader()
    reader.feed(contents)
    reader.finish()
    return SmallNar(
        file_hash=Hash("sha256", sha256(file).digest()),
        nar_hash=Hash("sha256", sha256(contents).digest()),
        listing=listing.render(reader.root) if reader.root is not None else None,
    )


class _Hasher:
    def __init__(self) -> None:
        self._sha256 = sha256()
        self.size = 0

    def update(self, data: bytes | memoryview) -> None:
        self._sha256.update(data)
        self.size += len(data)

    def passing(self, chunks: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self.update(chunk)
            yield chunk

    @property
    def hash(self) -> Hash:
        return Hash("sha256", self._sha256.digest())
