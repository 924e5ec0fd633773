"""The zstd seekable format: read by zstd, by Nix from a binary cache, and from the middle."""

import hashlib
import os
import random
import struct
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from cachesrv.errors import BadInput, TooLarge
from cachesrv.nix.compression import decompress, decompressed
from cachesrv.nix.nar_writer import dump
from cachesrv.nix.seekable import (
    FOOTER_SIZE,
    MAX_FRAMES,
    FrameIndex,
    FrameSize,
    compress_frame,
    compress_zstd,
    cut,
    read_single_frame,
    seek_table,
    seek_table_size,
)


def archive(data: bytes, frame_size: int, level: int = 3) -> bytes:
    return b"".join(compress_zstd([data], level, frame_size))


def sample(size: int, seed: int = 1) -> bytes:
    chance = random.Random(seed)
    words = [chance.randbytes(chance.randrange(1, 9)) for _ in range(50)]
    return b"".join(chance.choices(words, k=size))[:size]


def test_the_table_to_the_byte() -> None:
    table = seek_table([FrameSize(100, 4096), FrameSize(17, 0)])
    assert table.hex() == (
        "5e2a4d18" + "19000000" + "64000000" + "00100000" + "11000000" + "00000000" + "02000000" + "00" + "b1ea928f"
    )
    assert seek_table_size(table) == len(table)
    assert seek_table_size(b"frames" + table) == seek_table_size(table[-FOOTER_SIZE:]) == len(table)


@given(st.lists(st.binary(max_size=50)), st.integers(1, 64))
@settings(max_examples=60, deadline=None)
def test_cut(chunks: list[bytes], frame_size: int) -> None:
    pieces = list(cut(chunks, frame_size))
    data = b"".join(chunks)
    assert b"".join(pieces) == data
    assert all(len(piece) == frame_size for piece in pieces[:-1])
    assert len(pieces) == max(1, -(-len(data) // frame_size))


def test_cut_takes_chunks_whose_memory_is_used_again() -> None:
    def chunks() -> Iterator[memoryview]:
        buffer = bytearray(3)
        for number in range(5):
            buffer[:] = bytes([number]) * 3
            yield memoryview(buffer)

    assert list(cut(chunks(), 5)) == [b"\0\0\0\1\1", b"\1\2\2\2\3", b"\3\3\4\4\4"]


@given(st.binary(max_size=500), st.sampled_from((1, 7, 100, 1000)), st.sampled_from((1, 3, 9)))
@settings(max_examples=30, deadline=None)
def test_round_trip(data: bytes, frame_size: int, level: int) -> None:
    whole = archive(data, frame_size, level)
    assert decompress("zstd", whole, len(data)) == data
    assert whole == archive(data, frame_size, level)


def test_frames_do_not_depend_on_chunks_or_threads() -> None:
    data = sample(300_000)
    chunks = [data[start : start + 7777] for start in range(0, len(data), 7777)]
    assert b"".join(compress_zstd(chunks, 3, 50_000)) == archive(data, 50_000)
    with ThreadPoolExecutor(4) as threads:
        frames = list(threads.map(compress_frame, cut(chunks, 50_000)))
    assert b"".join(frames) == archive(data, 50_000)[: sum(map(len, frames))]


def test_a_frame_has_its_size_and_a_checksum() -> None:
    for size in (0, 1, 1000, 5_000_000):
        frame = compress_frame(bytes(size))
        assert zstandard.frame_content_size(frame) == size
        assert zstandard.get_frame_parameters(frame).has_checksum


@pytest.mark.parametrize("size", [0, 1, 1000, 100_000, 250_001])
def test_zstd_reads_it(tmp_path: Path, size: int) -> None:
    data = sample(size)
    path = tmp_path / "f.zst"
    path.write_bytes(archive(data, 50_000))
    assert subprocess.run(["zstd", "-dcq", path], capture_output=True, check=True).stdout == data
    subprocess.run(["zstd", "-tq", path], check=True)


def test_nix_substitutes_it(tmp_path: Path) -> None:
    """Nix 2.8.0 and later read frames that follow each other, and pass over the table."""
    tree = tmp_path / "tree"
    (tree / "lib").mkdir(parents=True)
    (tree / "lib" / "large").write_bytes(sample(200_000))
    (tree / "run").write_bytes(b"#!/bin/sh\n")
    (tree / "run").chmod(0o755)
    (tree / "link").symlink_to("lib/large")
    nar = b"".join(dump(tree))
    compressed = archive(nar, 16 * 1024)
    assert compressed.count(bytes.fromhex("28b52ffd")) > 10

    path = "/nix/store/" + "0" * 32 + "-seekable"
    cache = tmp_path / "cache"
    (cache / "nar").mkdir(parents=True)
    (cache / "nix-cache-info").write_text("StoreDir: /nix/store\n")
    (cache / "nar" / "x.nar.zst").write_bytes(compressed)
    (cache / f"{'0' * 32}.narinfo").write_text(
        f"StorePath: {path}\nURL: nar/x.nar.zst\nCompression: zstd\n"
        f"FileHash: sha256:{hashlib.sha256(compressed).hexdigest()}\nFileSize: {len(compressed)}\n"
        f"NarHash: sha256:{hashlib.sha256(nar).hexdigest()}\nNarSize: {len(nar)}\nReferences: \n"
    )
    (tmp_path / "nix.conf").write_text(
        "experimental-features = nix-command\nbuild-users-group =\nsandbox = false\nsubstituters =\n"
    )
    environment = os.environ | {
        "HOME": str(tmp_path),
        "NIX_CONF_DIR": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cached"),
    }
    command = ["nix", "copy", "--no-check-sigs", "--from", f"file://{cache}", "--store", f"{tmp_path}/root", path]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert b"".join(dump(f"{tmp_path}/root{path}")) == nar


def test_a_part_is_read_from_the_middle() -> None:
    data = sample(120_000)
    whole = archive(data, 10_000)
    index = FrameIndex.parse(whole[-seek_table_size(whole[-FOOTER_SIZE:]) :])
    assert index.content_size == len(data)
    assert index.frames_size == len(whole) - seek_table_size(whole)
    chance = random.Random(3)
    borders = [0, 1, 9_999, 10_000, 10_001, 50_000, 119_999, 120_000]
    ranges = [(start, end) for start in borders for end in borders if start <= end]
    ranges += [(start, min(start + chance.randrange(30_000), len(data))) for start in range(0, 120_000, 5003)]
    for start, end in ranges:
        span = index.frames_for(start, end)
        part = whole[span.start : span.end]
        contents = b"".join(decompressed("zstd", [part])) if part else b""
        assert contents[span.skip : span.skip + end - start] == data[start:end]
        if start < end:
            assert len(contents) < end - start + 20_000
        else:
            assert part == b""


@given(st.lists(st.builds(FrameSize, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), max_size=8), st.data())
@settings(max_examples=80, deadline=None)
def test_spans_cover_and_are_no_larger_than_needed(frames: list[FrameSize], data: st.DataObject) -> None:
    index = FrameIndex.parse(seek_table(frames))
    assert index.content_size == sum(frame.decompressed for frame in frames)
    start = data.draw(st.integers(0, index.content_size))
    end = data.draw(st.integers(start, index.content_size))
    span = index.frames_for(start, end)
    file_borders = [sum(frame.compressed for frame in frames[:number]) for number in range(len(frames) + 1)]
    borders = [sum(frame.decompressed for frame in frames[:number]) for number in range(len(frames) + 1)]
    spans = {
        (file_borders[first], file_borders[last], start - borders[first])
        for first in range(len(frames) + 1)
        for last in range(first, len(frames) + 1)
        if borders[first] <= start and end <= borders[last]
    }
    if start < end:
        assert span in spans
        assert span.end - span.start == min(last - first for first, last, _ in spans)
    else:
        assert span == (0, 0, 0)


@pytest.mark.parametrize(("start", "end"), [(-1, 5), (5, 4), (0, 11), (11, 11)])
def test_ranges_outside_are_refused(start: int, end: int) -> None:
    index = FrameIndex.parse(archive(bytes(10), 4))
    with pytest.raises(BadInput, match="not inside 10 bytes"):
        index.frames_for(start, end)


def table(entries: bytes, count: int, descriptor: int = 0, magic: int = 0x8F92EAB1) -> bytes:
    footer = struct.pack("<IBI", count, descriptor, magic)
    return struct.pack("<II", 0x184D2A5E, len(entries) + len(footer)) + entries + footer


def test_tables_with_checksums_are_read() -> None:
    entries = struct.pack("<6I", 10, 100, 0xDEADBEEF, 20, 200, 0xDEADBEEF)
    index = FrameIndex.parse(b"frames" + table(entries, 2, 0x83))
    assert (index.frames_size, index.content_size) == (30, 300)
    assert index.frames_for(100, 300) == (10, 30, 0)
    assert index.frames_for(150, 151) == (10, 30, 50)


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        b"\xb1\xea\x92\x8f",
        compress_frame(b"no table"),
        table(b"", 0, magic=0x8F92EAB2),
        table(b"", 0, descriptor=0x04),
        table(bytes(8), 2),
        table(bytes(16), 1),
        table(bytes(8), 1)[1:],
        b"x" * 8 + table(bytes(8), 1)[8:],
        table(b"", MAX_FRAMES),
        struct.pack("<II", 0x184D2A5E, 18) + table(bytes(8), 1)[8:],
    ],
)
def test_what_is_no_table(tail: bytes) -> None:
    with pytest.raises(BadInput):
        FrameIndex.parse(tail)


def test_more_frames_than_the_limit() -> None:
    for count in (MAX_FRAMES + 1, 2**32 - 1):
        with pytest.raises(TooLarge):
            seek_table_size(table(b"", count))
    with pytest.raises(TooLarge):
        seek_table([FrameSize(1, 1)] * (MAX_FRAMES + 1))


@given(st.binary(max_size=60), st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_any_bytes_give_a_value_or_bad_input(noise: bytes, position: int) -> None:
    good = table(struct.pack("<4I", 1, 2, 3, 4), 2)
    for tail in (noise, noise + good[9:], good[:position] + noise + good[position + len(noise) :]):
        try:
            index = FrameIndex.parse(tail)
        except BadInput:
            continue
        assert index.frames_for(0, index.content_size).end <= index.frames_size


def test_damage_is_noticed() -> None:
    whole = archive(sample(3000), 1000)
    frames = FrameIndex.parse(whole).frames_size
    for first, last in pairwise(range(0, frames, 50)):
        with pytest.raises(BadInput):
            decompress("zstd", whole[:first] + whole[last:], 1 << 20)


@given(st.binary(max_size=2000), st.integers(1, 3))
def test_a_single_frame_is_read_at_once(data: bytes, level: int) -> None:
    file = archive(data, 4096, level)

    assert read_single_frame(file, len(data)) == data
    for other in (memoryview(file)[1:], file[:-1], file + b"\0", compress_frame(data), b"", archive(data, 10) + file):
        assert read_single_frame(other, len(data)) is None
    assert read_single_frame(file, len(data) + 1) is None


@given(st.binary(min_size=1, max_size=200), st.data())
def test_damage_to_a_single_frame_is_noticed(data: bytes, chance: st.DataObject) -> None:
    file = bytearray(archive(data, 4096))
    file[chance.draw(st.integers(0, len(file) - 1))] ^= 1 << chance.draw(st.integers(0, 7))
    with suppress(BadInput):
        assert read_single_frame(file, len(data)) in (None, data)


def test_a_frame_that_claims_too_much_takes_no_memory() -> None:
    bomb = compress_frame(bytes(2**24))

    assert read_single_frame(bomb + seek_table([FrameSize(len(bomb), 100)]), 100) is None
