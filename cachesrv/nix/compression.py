"""Reads the compressions that NARs and metadata come in, in bounded memory whatever the input claims.

Names are those of narinfo's `Compression` (Nix, `src/libutil/include/nix/util/compression-algo.hh`). Readers
are generators that pull their input, and each piece that they yield is at most MAX_PIECE bytes, however
much the data expands. Data that ends too early, has bytes behind its end or fails its checksum is BadInput,
and so is empty input except for `none`: a compressed nothing has a header.
"""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Protocol

import brotli  # type: ignore[import-untyped]  # the package has no stubs
import zstandard

from cachesrv.errors import BadInput, TooLarge

MAX_PIECE = 1024 * 1024
"""Bytes of a yielded piece at most, but for `none`, whose pieces are those of the input."""

SUFFIXES = {
    "none": "",
    "br": ".br",
    "bzip2": ".bz2",
    "compress": "",
    "grzip": "",
    "gzip": "",
    "lrzip": "",
    "lz4": ".lz4",
    "lzip": ".lzip",
    "lzma": "",
    "lzop": "",
    "xz": ".xz",
    "zstd": ".zst",
}
"""Every compression that a narinfo may name -> what Nix puts behind `nar/<hash>.nar`."""

_CONTENT_CODINGS = {
    "": "none",
    "identity": "none",
    "br": "br",
    "bzip2": "bzip2",
    "gzip": "gzip",
    "x-gzip": "gzip",
    "xz": "xz",
    "zstd": "zstd",
}

_SLICE = 64 * 1024  # zlib copies the input that it did not consume at every call: keep that small
_XZ_MEMORY = 256 * 1024 * 1024  # `xz -9` needs 65 MiB to read
_ZSTD_WINDOW = 1 << 27  # the most that zstd itself reads without being told to


def decompressed(name: str, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The contents of what `chunks` hold when they are compressed with `name`.

    Several members or frames after each other are read as their tools read them: as one (not for br, which
    has no such thing). Raises BadInput, at once for a name that cannot be read, else while reading.
    """
    reader = _READERS.get(name)
    if reader is None:
        raise BadInput(f"compression {name!r} cannot be read; known are {', '.join(_READERS)}")
    return reader(chunks)


def decompress(name: str, data: bytes, limit: int) -> bytes:
    """All contents of `data`, for small things; raises TooLarge once there are more than `limit` bytes."""
    pieces = []
    size = 0
    for piece in decompressed(name, (data,)):
        size += len(piece)
        if size > limit:
            raise TooLarge(f"more than {limit} bytes after decompression")
        pieces.append(piece)
    return b"".join(pieces)


def content_coding(name: str) -> str:
    """The compression that a value of HTTP's Content-Encoding names; raises BadInput for all others.

    `deflate` is among those: it means zlib's format to some and the bare stream to others.
    """
    compression = _CONTENT_CODINGS.get(name.strip().lower())
    if compression is None:
        raise BadInput(f"content coding {name!r} is not supported")
    return compression


class _Member(Protocol):
    """Reads one gzip member, xz or bzip2 stream; the interface of `bz2.BZ2Decompressor`."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes | memoryview, max_length: int) -> bytes: ...


class _GzipMember:
    def __init__(self) -> None:
        self._decompressor = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._decompressor.eof

    @property
    def unused_data(self) -> bytes:
        return self._decompressor.unused_data

    def decompress(self, data: bytes | memoryview, max_length: int) -> bytes:
        piece = self._decompressor.decompress(data or self._decompressor.unconsumed_tail, max_length)
        self.needs_input = not self._decompressor.unconsumed_tail
        return piece


class _BrotliStream:
    unused_data = b""  # the library refuses bytes behind the end itself

    def __init__(self) -> None:
        self._decompressor = brotli.Decompressor()
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return bool(self.needs_input and self._decompressor.is_finished())

    def decompress(self, data: bytes | memoryview, max_length: int) -> bytes:
        piece: bytes = self._decompressor.process(data, output_buffer_limit=max_length // 2)  # may double it
        self.needs_input = not piece and self._decompressor.can_accept_more_data()
        return piece


def _xz_stream() -> _Member:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, _XZ_MEMORY)


_ERRORS = (zlib.error, lzma.LZMAError, brotli.error, zstandard.ZstdError, OSError, EOFError)


def _members(name: str, start: Callable[[], _Member], chunks: Iterable[bytes]) -> Iterator[bytes]:
    member: _Member | None = None
    ended = False
    for chunk in chunks:
        for begin in range(0, len(chunk), _SLICE):
            data: bytes | memoryview = memoryview(chunk)[begin : begin + _SLICE]
            while data or (member is not None and not member.needs_input):
                if member is None:
                    if ended and name == "br":
                        raise BadInput("bytes behind the end of br data")
                    member = start()
                piece = _step(name, member, data)
                if piece:
                    yield piece
                data = b""
                if member.eof:
                    data, member, ended = member.unused_data, None, True
    if member is not None or not ended:
        raise _truncated(name)


def _step(name: str, member: _Member, data: bytes | memoryview) -> bytes:
    try:
        return member.decompress(data, MAX_PIECE)
    except _ERRORS as error:
        raise BadInput(f"not {name} data: {error}") from error


def _truncated(name: str) -> BadInput:
    return BadInput(f"{name} data end too early")


# zstd. Its Python library either bounds the output or tells where a frame ends, not both. So frames are
# followed here block by block (RFC 8878, section 3): a block gives at most 128 KiB, and the library, fed with
# one at a time, still checks and decodes them.

_ZSTD_MAGIC = 0xFD2FB528
_ZSTD_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
_ZSTD_RLE = 1  # the kind of block that is one byte, repeated


class _Input:
    """Bytes taken from chunks in the amounts that a format states."""

    def __init__(self, name: str, chunks: Iterable[bytes]) -> None:
        self._name = name
        self._chunks = iter(chunks)
        self._data = memoryview(b"")

    def at_end(self) -> bool:
        while not self._data:
            chunk = next(self._chunks, None)
            if chunk is None:
                return True
            self._data = memoryview(chunk)
        return False

    def take(self, size: int) -> bytes | memoryview:
        """The next `size` bytes; raises BadInput if there are fewer."""
        if len(self._data) >= size:
            taken, self._data = self._data[:size], self._data[size:]
            return taken
        joined = bytearray()
        while len(joined) < size:
            joined += self._some(size - len(joined))
        return bytes(joined)

    def skip(self, size: int) -> None:
        while size:
            size -= len(self._some(size))

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def _some(self, most: int) -> memoryview:
        if self.at_end():
            raise _truncated(self._name)
        some, self._data = self._data[:most], self._data[most:]
        return some


def _zstd(chunks: Iterable[bytes]) -> Iterator[bytes]:
    source = _Input("zstd", chunks)
    if source.at_end():
        raise _truncated("zstd")
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    while not source.at_end():
        magic = source.number(4)
        if magic == _ZSTD_MAGIC:
            yield from _zstd_frame(source, decompressor.decompressobj())
        elif magic in _ZSTD_SKIPPABLE:
            source.skip(source.number(4))
        else:
            raise BadInput(f"not zstd data: a frame begins with {magic:#010x}")


def _zstd_frame(source: _Input, frame: "zstandard.ZstdDecompressionObj") -> Iterator[bytes]:
    try:
        descriptor = source.take(1)
        frame.decompress(_ZSTD_MAGIC.to_bytes(4, "little") + descriptor)
        frame.decompress(source.take(_zstd_header_size(descriptor[0])))
        last = False
        while not frame.eof:
            part, last = (source.take(4), True) if last else _zstd_block(source)  # 4: the checksum
            piece = frame.decompress(part)
            if piece:
                yield piece
    except zstandard.ZstdError as error:
        raise BadInput(f"not zstd data: {error}") from error


def _zstd_header_size(descriptor: int) -> int:
    """Bytes of a frame's header behind the descriptor: window, dictionary, content size."""
    single_segment = descriptor >> 5 & 1
    content_size = (single_segment, 2, 4, 8)[descriptor >> 6]
    dictionary = (0, 1, 2, 4)[descriptor & 3]
    return (1 - single_segment) + dictionary + content_size


def _zstd_block(source: _Input) -> tuple[bytes, bool]:
    """The next block, and whether it is the last of its frame."""
    header = source.take(3)
    fields = int.from_bytes(header, "little")
    kind, size = fields >> 1 & 3, fields >> 3
    content = source.take(1 if kind == _ZSTD_RLE else size)
    return b"".join((header, content)), bool(fields & 1)


def _none(chunks: Iterable[bytes]) -> Iterator[bytes]:
    yield from chunks


_READERS: dict[str, Callable[[Iterable[bytes]], Iterator[bytes]]] = {
    "none": _none,
    "zstd": _zstd,
    "xz": partial(_members, "xz", _xz_stream),
    "gzip": partial(_members, "gzip", _GzipMember),
    "bzip2": partial(_members, "bzip2", bz2.BZ2Decompressor),
    "br": partial(_members, "br", _BrotliStream),
}
