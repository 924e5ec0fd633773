"""Whether what lies in storage has the content address that a path claims."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachesrv.errors import Mismatch
from cachesrv.nix.compression import decompressed
from cachesrv.nix.content_address import ContentCheck, Method
from cachesrv.nix.nar import NarReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cachesrv.nix.content_address import ContentAddress
    from cachesrv.services.candidate import Candidate


def needs_reading(address: ContentAddress, path: Candidate) -> bool:
    """Whether the contents have to be read for it: a NAR hash that is the content address has said it already."""
    own = path.store_path in path.references
    return not (address.method is Method.RECURSIVE and address.hash == path.nar_hash and not own)


def check_contents(address: ContentAddress, path: Candidate, compression: str, chunks: Iterator[bytes]) -> None:
    """Read a whole compressed NAR; raises Mismatch unless it has this content address, BadInput where that cannot be
    told. Blocks.
    """
    check = ContentCheck(address, path.store_path)
    pieces = decompressed(compression, chunks)
    if address.covers == "nar":
        for piece in pieces:
            check.update(piece)
    else:
        _feed_file(check, pieces)
    check.finish()


def _feed_file(check: ContentCheck, pieces: Iterator[bytes]) -> None:
    """The bytes of the one file in the NAR."""
    plain = False

    def on_file(path: tuple[bytes, ...], _size: int, executable: bool) -> Callable[[memoryview], None] | None:
        nonlocal plain
        plain = not path and not executable
        return check.update if plain else None

    reader = NarReader(listing=False, on_file=on_file)
    for piece in pieces:
        reader.feed(piece)
    reader.finish()
    if not plain:
        raise Mismatch("the content address is one of a plain file, and the NAR holds something else")
