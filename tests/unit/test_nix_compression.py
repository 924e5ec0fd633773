"""Every format against its own tool, whole and damaged, and bombs of gigabytes in little memory."""

import bz2
import gzip
import lzma
import random
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import brotli  # type: ignore[import-untyped]  # the package has no stubs
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from cachesrv.errors import BadInput, TooLarge
from cachesrv.nix import narinfo
from cachesrv.nix.compression import MAX_PIECE, SUFFIXES, content_coding, decompress, decompressed


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def brotli_compress(data: bytes) -> bytes:
    compressed: bytes = brotli.compress(data, quality=3)
    return compressed


def gzip_compress(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "none": bytes,
    "zstd": zstd,
    "xz": lzma.compress,
    "gzip": gzip_compress,
    "bzip2": bz2.compress,
    "br": brotli_compress,
}
PACKED = [name for name in COMPRESS if name != "none"]
MANY = [name for name in PACKED if name != "br"]  # formats in which one file may follow another

MAGIC = bytes.fromhex("28b52ffd")
SKIPPABLE = bytes.fromhex("5e2a4d18 05000000 ffffffffff")
TEXT = b"".join(b"line %d of a text that compresses\n" % (number * number) for number in range(30))

contents = st.one_of(
    st.binary(max_size=300),
    st.builds(lambda data, times: data * times, st.binary(min_size=1, max_size=20), st.integers(1, 20_000)),
)


def whole(name: str, data: bytes, step: int = 1 << 20) -> bytes:
    return b"".join(decompressed(name, (data[start : start + step] for start in range(0, len(data), step))))


@pytest.mark.parametrize("name", COMPRESS)
@given(data=contents, step=st.sampled_from((1, 2, 3, 7, 100, 1 << 20)))
@settings(max_examples=25, deadline=None)
def test_round_trip_in_any_pieces(name: str, data: bytes, step: int) -> None:
    assert whole(name, COMPRESS[name](data), step) == data


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("zstd", "zstd -1"),
        ("zstd", "zstd -19"),
        ("zstd", "zstd --fast=5 --no-check"),
        ("zstd", "zstd --ultra -22 --long=27"),
        ("xz", "xz -0"),
        ("xz", "xz -9 --check=none"),
        ("xz", "xz -6 --block-size=100000 --check=sha256"),
        ("gzip", "gzip -1"),
        ("gzip", "gzip -9n"),
        ("bzip2", "bzip2 -1"),
        ("bzip2", "bzip2 -9"),
        ("br", "brotli -q 1 -c"),
        ("br", "brotli -q 9 -w 24 -c"),
    ],
)
def test_what_the_tools_write(name: str, command: str) -> None:
    chance = random.Random(1)
    data = b"".join(chance.choice((TEXT, bytes(5000), chance.randbytes(3000))) for _ in range(200))
    compressed = subprocess.run(command.split(), input=data, capture_output=True, check=True).stdout
    for step in (1000, 65536):
        assert whole(name, compressed, step) == data


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("step", [1, 10, 1 << 20])
def test_files_after_each_other_are_one(name: str, step: int) -> None:
    compress = COMPRESS[name]
    data = compress(TEXT) + compress(b"") + compress(b"more")
    assert whole(name, data, step) == TEXT + b"more"


def test_zstd_skippable_frames_hold_nothing() -> None:
    frame = zstd(TEXT)
    for data in (SKIPPABLE + frame, frame + SKIPPABLE, frame + SKIPPABLE * 2 + frame):
        assert whole("zstd", data) == whole("zstd", data, 1) == TEXT * data.count(frame)
    assert whole("zstd", SKIPPABLE) == b""


def test_zstd_frames_of_every_shape() -> None:
    for size in (0, 1, 255, 256, 65_000, 66_000, 300_000):
        for checksum in (True, False):
            for stated in (True, False):
                compressor = zstandard.ZstdCompressor(write_checksum=checksum, write_content_size=stated)
                frame = compressor.compress(TEXT[:1] * size)
                stream = compressor.compressobj()
                unsized = stream.compress(TEXT[:1] * size) + stream.flush()
                for step in (1, 5, 1 << 20):
                    assert whole("zstd", frame + unsized, step) == TEXT[:1] * size * 2


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("step", [1, 1 << 20])
def test_every_cut_is_noticed(name: str, step: int) -> None:
    """All of them, but for the one between two files that follow each other."""
    compress = COMPRESS[name]
    first = compress(TEXT)
    data = first + compress(b"more") if name in MANY else first
    for size in range(len(data)):
        if size == len(first):
            continue
        with pytest.raises(BadInput):
            whole(name, data[:size], step)


def test_a_cut_in_a_skippable_frame_is_noticed() -> None:
    data = zstd(b"x") + SKIPPABLE
    for size in range(len(data) - len(SKIPPABLE) + 1, len(data)):
        with pytest.raises(BadInput, match="end too early"):
            whole("zstd", data[:size])


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("garbage", [b"\0", b"x", b"\0\0\0\0", b"garbage behind the end", bytes(100_000)])
def test_bytes_behind_the_end_are_refused(name: str, garbage: bytes) -> None:
    data = COMPRESS[name](TEXT)
    for chunks in ([data + garbage], [data, garbage], [data, b"", garbage[:1], garbage[1:]]):
        with pytest.raises(BadInput):
            list(decompressed(name, chunks))


def test_br_streams_after_each_other_are_refused() -> None:
    data = brotli_compress(TEXT)
    for chunks in ([data + data], [data, data]):
        with pytest.raises(BadInput):
            list(decompressed("br", chunks))


@pytest.mark.parametrize("name", ["zstd", "xz", "gzip", "bzip2"])
def test_a_changed_byte_never_changes_the_contents(name: str) -> None:
    """These formats have checksums; a change in what describes the data (a file's time, a window) is none."""
    data = COMPRESS[name](TEXT)
    refused = 0
    for position in range(len(data)):
        for change in (1, 0x80, 0xFF):
            mutant = bytearray(data)
            mutant[position] ^= change
            try:
                assert whole(name, bytes(mutant)) == TEXT
            except BadInput:
                refused += 1
    assert refused > len(data) * 2


@pytest.mark.parametrize("name", PACKED)
@given(noise=st.binary(max_size=40), position=st.integers(0, 300), step=st.sampled_from((1, 1 << 20)))
@settings(max_examples=40, deadline=None)
def test_any_bytes_give_a_value_or_bad_input(name: str, noise: bytes, position: int, step: int) -> None:
    data = COMPRESS[name](TEXT)
    for mutant in (noise, data[:position] + noise, data[:position] + noise + data[position + len(noise) :]):
        with suppress(BadInput):
            whole(name, mutant, step)


@pytest.mark.parametrize("name", PACKED)
def test_nothing_is_no_compressed_data(name: str) -> None:
    for chunks in ([], [b""], [b"", b""]):
        with pytest.raises(BadInput, match="end too early"):
            list(decompressed(name, chunks))


def test_nothing_is_uncompressed_data() -> None:
    assert list(decompressed("none", [])) == []
    assert decompress("none", b"", 0) == b""


@pytest.mark.parametrize("name", ["", "lzip", "lz4", "ZSTD", "deflate", "zst"])
def test_other_names_are_refused_at_once(name: str) -> None:
    with pytest.raises(BadInput, match="cannot be read; known are none, zstd"):
        decompressed(name, [])


def test_suffixes() -> None:
    assert set(SUFFIXES) == set(narinfo.COMPRESSIONS)
    assert {name: suffix for name, suffix in SUFFIXES.items() if suffix} == {
        "br": ".br",
        "bzip2": ".bz2",
        "lz4": ".lz4",
        "lzip": ".lzip",
        "xz": ".xz",
        "zstd": ".zst",
    }


@pytest.mark.parametrize("name", COMPRESS)
def test_limit_of_small_things(name: str) -> None:
    data = COMPRESS[name](TEXT)
    assert decompress(name, data, len(TEXT)) == TEXT
    with pytest.raises(TooLarge, match=f"more than {len(TEXT) - 1} bytes"):
        decompress(name, data, len(TEXT) - 1)


def test_content_codings() -> None:
    for coding, name in {
        "gzip": "gzip",
        "x-gzip": "gzip",
        " GZip ": "gzip",
        "br": "br",
        "zstd": "zstd",
        "xz": "xz",
        "bzip2": "bzip2",
        "identity": "none",
        "": "none",
    }.items():
        assert content_coding(coding) == name
    for coding in ("deflate", "compress", "gzip, br", "none", "aes128gcm"):
        with pytest.raises(BadInput, match="not supported"):
            content_coding(coding)


class SourceFailed(OSError):
    pass


@pytest.mark.parametrize("name", COMPRESS)
def test_an_error_of_the_source_is_passed_on(name: str) -> None:
    def source() -> Iterator[bytes]:
        yield COMPRESS[name](TEXT)[:20]
        raise SourceFailed

    with pytest.raises(SourceFailed):
        list(decompressed(name, source()))


@pytest.mark.parametrize("name", PACKED)
def test_input_is_read_only_as_output_is_wanted(name: str) -> None:
    read = 0

    def source() -> Iterator[bytes]:
        nonlocal read
        data = COMPRESS[name](random.Random(2).randbytes(2_500_000))
        for start in range(0, len(data), 50_000):
            read += 1
            yield data[start : start + 50_000]

    pieces = decompressed(name, source())
    next(pieces)
    assert read <= 40
    assert all(len(piece) <= MAX_PIECE for piece in pieces)


# zstd beyond what its library would refuse anyway


def zstd_frame(*blocks: tuple[int, int, bytes], window: int = 0x58) -> bytes:
    """A frame of (kind, stated size, content) with a window of 2 MiB, or of another one."""
    frame = MAGIC + bytes([0, window])
    for number, (kind, size, content) in enumerate(blocks):
        last = number == len(blocks) - 1
        frame += (size << 3 | kind << 1 | last).to_bytes(3, "little") + content
    return frame


RAW, RLE, COMPRESSED, RESERVED = range(4)


def test_zstd_blocks() -> None:
    assert whole("zstd", zstd_frame((RAW, 3, b"abc"), (RLE, 4, b"d"), (RAW, 0, b""))) == b"abcdddd"


def test_zstd_headers_of_every_shape() -> None:
    """Descriptor, then a window unless the frame is one segment, a dictionary's number, the content's size."""
    for size_flag in range(4):
        for single in (False, True):
            for dictionary_flag in range(4):
                descriptor = bytes([size_flag << 6 | single << 5 | dictionary_flag])
                window = b"" if single else b"\x58"
                dictionary = bytes((0, 1, 2, 4)[dictionary_flag])
                size = (3).to_bytes(8, "little")  # two bytes say what there is beyond 256
                length = (single, 2, 4, 8)[size_flag]
                content = b"x" * (259 if size_flag == 1 else 3)
                block = (RAW | len(content) << 3 | 1).to_bytes(3, "little") + content
                frame = MAGIC + descriptor + window + dictionary + size[:length] + block
                assert whole("zstd", frame, 1) == content
                assert whole("zstd", frame * 2) == content * 2


@pytest.mark.parametrize(
    "blocks",
    [
        [(RLE, 128 * 1024 + 1, b"x")],
        [(RLE, 2**21 - 1, b"x")],
        [(RAW, 128 * 1024 + 1, b"x" * (128 * 1024 + 1))],
        [(RESERVED, 1, b"x")],
        [(COMPRESSED, 5, b"abcde")],
    ],
)
def test_zstd_blocks_that_cannot_be(blocks: list[tuple[int, int, bytes]]) -> None:
    with pytest.raises(BadInput):
        whole("zstd", zstd_frame(*blocks))


def test_zstd_windows_have_a_limit() -> None:
    assert whole("zstd", zstd_frame((RAW, 1, b"x"), window=(27 - 10) << 3)) == b"x"
    with pytest.raises(BadInput, match="not zstd data"):
        whole("zstd", zstd_frame((RAW, 1, b"x"), window=(27 - 10) << 3 | 1))


def test_xz_dictionaries_have_a_limit() -> None:
    """The dictionary's size is a byte in the header of a block, which has a checksum of its own."""

    def with_dictionary(code: int) -> bytes:
        data = bytearray(lzma.compress(TEXT))
        assert data[14:16] == b"\x21\x01"
        data[16] = code
        data[20:24] = zlib.crc32(data[12:20]).to_bytes(4, "little")
        return bytes(data)

    assert whole("xz", with_dictionary(28)) == TEXT  # 64 MiB, `xz -9`
    with pytest.raises(BadInput, match="not xz data: Memory usage limit"):
        whole("xz", with_dictionary(36))  # 1 GiB


def zeros(name: str) -> bytes:
    """What expands to hundreds of MiB, for zstd to 4 GiB."""
    block = bytes(32 * 1024 * 1024)
    if name == "zstd":
        return zstd_frame(*[(RLE, 128 * 1024, b"\0")] * 8) * 4096
    if name == "br":
        compressor = brotli.Compressor(quality=1)
        return b"".join([compressor.process(block) for _ in range(8)] + [compressor.finish()])
    return COMPRESS[name](block) * 8


EXPAND = """
import sys
from cachesrv.nix.compression import decompressed

def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

data = sys.stdin.buffer.read()
before = peak()
size = largest = 0
for piece in decompressed(sys.argv[1], [data]):
    size += len(piece)
    largest = max(largest, len(piece))
print(size, largest, peak() - before)
"""


@pytest.mark.parametrize("name", PACKED)
def test_a_bomb_expands_in_little_memory(name: str) -> None:
    bomb = zeros(name)
    assert len(bomb) < 3_000_000
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", EXPAND, name]
    run = subprocess.run(command, input=bomb, capture_output=True, check=True, cwd=root)
    size, largest, growth = map(int, run.stdout.split())
    assert size == (4 << 30 if name == "zstd" else 256 << 20)
    assert largest <= MAX_PIECE
    assert growth < 20_000_000


@pytest.mark.parametrize("name", PACKED)
def test_a_bomb_that_says_it_is_metadata(name: str) -> None:
    with pytest.raises(TooLarge):
        decompress(name, zeros(name), 1000)
