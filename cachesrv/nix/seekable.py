"""NARs as independent zstd frames followed by a seek table: the zstd seekable format, version 0.1.0.

Any zstd reader takes such a file for one stream, Nix included. Because the frames do not depend on each
other they can be compressed in parallel and fetched one by one: `compress_zstd` does it all in order, and
who has threads uses the parts: `cut`, `compress_frame` for each piece, `seek_table` at the end.

The table is a skippable frame: magic number, size of the rest; for each frame its compressed and its
decompressed size and, if the descriptor says so, a checksum; then the number of frames, the descriptor
and a second magic number, which ends the file. All numbers are little-endian.
Source: zstd, `contrib/seekable_format/zstd_seekable_compression_format.md`.
"""

import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import zstandard

from cachesrv.errors import BadInput, TooLarge

FRAME_SIZE = 4 * 1024 * 1024
"""Bytes of contents in a frame: large enough to compress well, small enough to fetch for one file."""

MAX_FRAMES = 1 << 20
"""Frames in a table at most: 4 TiB of contents in frames of FRAME_SIZE, and a table of 8 MiB."""

FOOTER_SIZE = 9
"""Bytes at the end of a file that tell whether it has a seek table, and how large that is."""

_HEADER = struct.Struct("<II")
_FOOTER = struct.Struct("<IBI")
_FRAME_MAGIC = 0x184D2A5E
_FOOTER_MAGIC = 0x8F92EAB1
_SINGLE = 2 * _HEADER.size + FOOTER_SIZE  # bytes of a seek table of one frame
_HAS_CHECKSUMS = 0x80
_RESERVED = 0x7C

Data = bytes | bytearray | memoryview


class FrameSize(NamedTuple):
    """Bytes of a frame in the file, and of its contents."""

    compressed: int
    decompressed: int


class Span(NamedTuple):
    """Bytes `start` to `end` (exclusive) of a file, which are whole frames.

    Of their contents the first `skip` bytes come before those that were asked for.
    """

    start: int
    end: int
    skip: int


def cut(chunks: Iterable[Data], frame_size: int = FRAME_SIZE) -> Iterator[bytearray]:
    """The same bytes in pieces of `frame_size`, the last one shorter; one empty piece if there are none.

    Chunks are copied before the next one is asked for; pieces are the caller's to keep.
    """
    piece = bytearray()
    empty = True
    for chunk in chunks:
        data = memoryview(chunk)
        while data:
            taken = data[: frame_size - len(piece)]
            data = data[len(taken) :]
            piece += taken
            if len(piece) == frame_size:
                yield piece
                piece = bytearray()
                empty = False
    if piece or empty:
        yield piece


def compress_frame(data: Data, level: int = 3) -> bytes:
    """One frame that holds `data`, with its size and a checksum; safe to call in several threads at once.

    Equal data, levels and versions of zstd give equal bytes.
    """
    return Frames(level).compress(data)


def largest_file(size: int) -> int:
    """Bytes that so many can become: of what does not compress, zstd makes a little more."""
    return size + size // 64 + 1024


class Frames:
    """Makes frames as `compress_frame` does, one after the other, and much faster where they are small. For one thread
    at a time.
    """

    def __init__(self, level: int = 3) -> None:
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)

    def compress(self, data: Data) -> bytes:
        """A frame."""
        return self._compressor.compress(data)

    def file(self, data: Data) -> bytes:
        """A frame and its seek table, which is what `compress_zstd` makes of what is not larger than a frame."""
        frame = self.compress(data)
        return frame + seek_table([FrameSize(len(frame), len(data))])


def seek_table(frames: Sequence[FrameSize]) -> bytes:
    """The table to put behind `frames`, which are all that the file holds, in order."""
    if len(frames) > MAX_FRAMES:
        raise TooLarge(f"{len(frames)} frames are too many for a seek table")
    entries = b"".join(_HEADER.pack(*frame) for frame in frames)
    footer = _FOOTER.pack(len(frames), 0, _FOOTER_MAGIC)
    return _HEADER.pack(_FRAME_MAGIC, len(entries) + len(footer)) + entries + footer


def compress_zstd(chunks: Iterable[Data], level: int = 3, frame_size: int = FRAME_SIZE) -> Iterator[bytes]:
    """The file that holds what `chunks` do: its frames, then the seek table."""
    sizes = []
    for piece in cut(chunks, frame_size):
        frame = compress_frame(piece, level)
        sizes.append(FrameSize(len(frame), len(piece)))
        yield frame
    yield seek_table(sizes)


def read_single_frame(file: Data, size: int) -> bytes | None:
    """The contents of a file that is one frame with `size` bytes of contents and its seek table, as `compress_zstd`
    writes what is smaller than a frame; None when it is another one. Much faster than a reader that takes any form.
    Raises BadInput when the frame does not hold what it says.
    """
    frame, table = file[:-_SINGLE], file[-_SINGLE:]
    try:
        if bytes(table) != seek_table([FrameSize(len(frame), size)]) or zstandard.frame_content_size(frame) != size:
            return None
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BadInput(f"not zstd data: {error}") from error


def seek_table_size(tail: bytes) -> int:
    """Bytes that the seek table takes at the end of a file, from its last FOOTER_SIZE bytes or more.

    Raises BadInput if the file has none, TooLarge if it names more than MAX_FRAMES.
    """
    count, entry_size = _footer(tail)
    return _HEADER.size + count * entry_size + FOOTER_SIZE


class FrameIndex:
    """Tells which frames of a file hold a range of its contents."""

    def __init__(self, frames: Iterable[FrameSize]) -> None:
        compressed, decompressed = array("Q", (0,)), array("Q", (0,))
        for frame in frames:
            compressed.append(compressed[-1] + frame.compressed)
            decompressed.append(decompressed[-1] + frame.decompressed)
        self._borders = compressed  # where frames begin in the file, and the last one ends
        self._contents = decompressed  # the same in the contents

    @property
    def content_size(self) -> int:
        """Bytes of the contents of all frames."""
        return self._contents[-1]

    @property
    def frames_size(self) -> int:
        """Bytes of all frames in the file, which is where the seek table begins."""
        return self._borders[-1]

    @classmethod
    def parse(cls, tail: bytes) -> "FrameIndex":
        """The index from a file's last bytes, at least `seek_table_size` of them.

        What the table says of the frames cannot be seen from it: compare `frames_size` with the file, and
        expect that frames hold other contents than stated. Raises BadInput if there is no valid table.
        """
        size = seek_table_size(tail)
        if size > len(tail):
            raise BadInput(f"seek table of {size} bytes, of which {len(tail)} are there")
        table = memoryview(tail)[len(tail) - size :]
        if _HEADER.unpack_from(table) != (_FRAME_MAGIC, size - _HEADER.size):
            raise BadInput("seek table is not a skippable frame of its size")
        _, entry_size = _footer(tail)
        entries = table[_HEADER.size : -FOOTER_SIZE]
        layout = struct.Struct("<II4x" if entry_size > _HEADER.size else "<II")
        return cls(map(FrameSize._make, layout.iter_unpack(entries)))

    def frames_for(self, start: int, end: int) -> Span:
        """The frames that hold bytes `start` to `end` (exclusive) of the contents; none for an empty range.

        Raises BadInput for a range that is not inside the contents.
        """
        if not 0 <= start <= end <= self.content_size:
            raise BadInput(f"range {start}-{end} is not inside {self.content_size} bytes")
        if start == end:
            return Span(0, 0, 0)
        first = bisect_right(self._contents, start) - 1
        last = bisect_left(self._contents, end)
        return Span(self._borders[first], self._borders[last], start - self._contents[first])


def _footer(tail: bytes) -> tuple[int, int]:
    """Number of frames and bytes of an entry."""
    if len(tail) < FOOTER_SIZE:
        raise BadInput("too short for a seek table")
    count, descriptor, magic = _FOOTER.unpack_from(tail, len(tail) - FOOTER_SIZE)
    if magic != _FOOTER_MAGIC:
        raise BadInput("no seek table at the end")
    if descriptor & _RESERVED:
        raise BadInput(f"seek table of an unknown kind ({descriptor:#04x})")
    if count > MAX_FRAMES:
        raise TooLarge(f"seek table of {count} frames, more than {MAX_FRAMES}")
    return count, 12 if descriptor & _HAS_CHECKSUMS else 8
