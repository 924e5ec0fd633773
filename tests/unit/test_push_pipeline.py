"""From the files of a store path to the compressed NAR, in one pass and in bounded memory."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import zstandard

from cachesrv.budget import Budget
from cachesrv.errors import BadInput, Mismatch, StoreError, TooLarge
from cachesrv.nix.hashes import Hash
from cachesrv.nix.nar_writer import NarDump, dump
from cachesrv.nix.seekable import FrameIndex
from cachesrv.push.buffers import Buffers
from cachesrv.push.frame import FRAME_SIZE
from cachesrv.push.memory import Shares
from cachesrv.push.nar_source import LocalNar, StreamedNar
from cachesrv.push.pipeline import Pipeline
from tests.push_doubles import path_info

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator

    from cachesrv.nix.path_info import PathInfo

MIB = 1024 * 1024


def mixed(size: int) -> bytes:
    """Bytes that compress, but not to nothing."""
    chance = random.Random(size)
    block = chance.randbytes(1000)
    return b"".join(block[: chance.randint(1, 1000)] + chance.randbytes(100) for _ in range(size // 550))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose NAR has several frames."""
    directory = tmp_path_factory.mktemp("large")
    (directory / "file").write_bytes(mixed(3 * FRAME_SIZE))
    for number in range(100):
        (directory / f"small-{number}").write_bytes(mixed(20_000 + number))
    return directory


def info_of(file: Path) -> PathInfo:
    nar = b"".join(dump(file))
    return replace(path_info("path"), nar_hash=Hash.of("sha256", nar), nar_size=len(nar))


class InChunks:
    """What a `LocalNar` reads from, a chunk at a time; `before_each` is called before all but the first."""

    def __init__(self, chunks: Iterator[bytes], before_each: Callable[[], object]) -> None:
        self._chunks = chunks
        self._before_each = before_each
        self._rest = next(chunks)

    def read_into(self, buffer: memoryview) -> int:
        filled = 0
        while filled < len(buffer):
            if not self._rest:
                self._before_each()
                self._rest = next(self._chunks, b"")
                if not self._rest:
                    break
            size = min(len(self._rest), len(buffer) - filled)
            buffer[filled : filled + size] = self._rest[:size]
            filled, self._rest = filled + size, self._rest[size:]
        return filled

    def close(self) -> None:
        self._chunks = iter(())


async def compressed(pipeline: Pipeline, path: Path, info: PathInfo, limit: int = 0) -> bytes:
    async with pipeline.nar(LocalNar(NarDump(path)), info, limit=limit) as nar:
        file = b"".join([chunk async for chunk in nar])
        assert nar.failure is None
        assert (nar.nar_size, nar.nar_sent, nar.file_size) == (info.nar_size, info.nar_size, len(file))
    assert pipeline.budget.free == pipeline.budget.total
    return file


async def test_what_comes_out_is_the_nar(large: Path) -> None:
    with Pipeline() as pipeline:
        file = await compressed(pipeline, large, info_of(large))

    nar = b"".join(dump(large))
    assert zstandard.ZstdDecompressor().decompressobj(read_across_frames=True).decompress(file) == nar
    index = FrameIndex.parse(file)
    assert index.content_size == len(nar)
    span = index.frames_for(FRAME_SIZE + 5, FRAME_SIZE + 10)
    middle = zstandard.ZstdDecompressor().decompress(file[span.start : span.end])
    assert middle[span.skip :][:5] == nar[FRAME_SIZE + 5 : FRAME_SIZE + 10]


@pytest.mark.parametrize("contents", [b"", b"x", bytes(FRAME_SIZE - 112), bytes(FRAME_SIZE - 111)])
async def test_nars_of_every_size_are_whole(tmp_path: Path, contents: bytes) -> None:
    file = tmp_path / "file"
    file.write_bytes(contents)
    info = info_of(file)

    with Pipeline() as pipeline:
        data = await compressed(pipeline, file, info)

    assert zstandard.ZstdDecompressor().decompressobj(read_across_frames=True).decompress(data) == b"".join(dump(file))
    assert FrameIndex.parse(data).content_size == info.nar_size


async def test_the_file_does_not_depend_on_threads_or_chunks(large: Path) -> None:
    info, nar = info_of(large), b"".join(dump(large))
    files = set()
    for cores in (1, 2, 5):
        with Pipeline(cores=cores, memory=40 * MIB) as pipeline:
            files.add(await compressed(pipeline, large, info))
    for chunk_size in (777_777, 3 * MIB):
        with Pipeline() as pipeline:
            async with pipeline.nar(StreamedNar(_stream(nar, chunk_size)), info) as streamed:
                files.add(b"".join([chunk async for chunk in streamed]))

    assert len(files) == 1


async def test_levels_make_a_difference(large: Path) -> None:
    sizes = []
    for level in (1, 12):
        with Pipeline(level=level) as pipeline:
            sizes.append(len(await compressed(pipeline, large, info_of(large))))

    assert sizes[0] > sizes[1]


def _other_hash(info: PathInfo) -> PathInfo:
    return replace(info, nar_hash=Hash.of("sha256", b"other"))


def _shorter(info: PathInfo) -> PathInfo:
    return replace(info, nar_size=info.nar_size - 8)


def _longer(info: PathInfo) -> PathInfo:
    return replace(info, nar_size=info.nar_size + 8)


@pytest.mark.parametrize("lie", [_other_hash, _shorter, _longer])
async def test_a_nar_that_is_not_as_stated_never_ends_well(large: Path, lie: Callable[[PathInfo], PathInfo]) -> None:
    stated = lie(info_of(large))
    with Pipeline() as pipeline:
        async with pipeline.nar(LocalNar(NarDump(large)), stated) as nar:
            with pytest.raises(Mismatch, match=r"path.*NAR has") as caught:
                await _drain(nar)
            assert nar.failure is caught.value


async def test_an_unknown_size_is_no_lie(large: Path) -> None:
    info = info_of(large)
    with Pipeline() as pipeline:
        async with pipeline.nar(LocalNar(NarDump(large)), replace(info, nar_size=0)) as nar:
            await _drain(nar)
            assert nar.nar_size == info.nar_size


async def test_a_file_that_gets_too_large_is_not_finished(large: Path) -> None:
    with Pipeline() as pipeline:
        async with pipeline.nar(LocalNar(NarDump(large)), info_of(large), limit=100_000) as nar:
            with pytest.raises(TooLarge, match="100000 bytes"):
                await _drain(nar)


async def test_failures_of_the_source_come_through(tmp_path: Path) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    (directory / "a").write_bytes(bytes(3 * FRAME_SIZE))
    os.mkfifo(directory / "z")
    with Pipeline() as pipeline:
        async with pipeline.nar(LocalNar(NarDump(directory)), path_info("path", size=0)) as nar:
            with pytest.raises(BadInput, match="neither file, directory nor"):
                await _drain(nar)
        async with pipeline.nar(StreamedNar(_broken_stream()), path_info("path", size=0)) as nar:
            with pytest.raises(StoreError, match="broke"):
                await _drain(nar)
        assert pipeline.budget.free == pipeline.budget.total


async def test_whoever_leaves_early_leaves_nothing_behind(large: Path) -> None:
    info, open_files = info_of(large), _open_files()
    with Pipeline() as pipeline:
        for _ in range(5):
            async with pipeline.nar(LocalNar(NarDump(large)), info) as nar:
                await anext(aiter(nar))
        assert pipeline.budget.free == pipeline.budget.total
        assert _open_files() == open_files
        assert await compressed(pipeline, large, info)
    assert len(asyncio.all_tasks()) == 1


async def test_a_source_that_cannot_be_closed_keeps_no_memory(large: Path) -> None:
    """The push goes on with other NARs, which would wait for it for ever."""

    class Stuck(LocalNar):
        async def close(self) -> None:
            await super().close()
            raise StoreError("the disk has gone")

    with Pipeline() as pipeline:
        with pytest.raises(StoreError, match="gone"):
            async with pipeline.nar(Stuck(NarDump(large)), info_of(large)) as nar:
                await anext(aiter(nar))
        assert pipeline.budget.free == pipeline.budget.total


async def test_a_consumer_that_goes_while_it_waits_does_no_harm(large: Path) -> None:
    info = info_of(large)
    stop = threading.Event()
    slow = InChunks(dump(large), lambda: stop.wait(10))

    with Pipeline() as pipeline:
        async with pipeline.nar(LocalNar(slow), info) as nar:
            consumer = asyncio.create_task(_drain(nar))
            await asyncio.sleep(0.05)
            consumer.cancel()
            stop.set()
        assert pipeline.budget.free == pipeline.budget.total


async def test_memory_is_bounded_however_slow_the_receiver(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(random.Random(5).randbytes(12 * FRAME_SIZE))
    info, memory = info_of(file), 30 * MIB
    with Pipeline(cores=2, memory=memory, jobs=2) as pipeline:
        shares = pipeline.shares
        assert shares.buffers * FRAME_SIZE + shares.budget < memory
        async with (
            pipeline.nar(LocalNar(NarDump(file)), info) as one,
            pipeline.nar(LocalNar(NarDump(file)), info) as two,
        ):
            first = aiter(one)
            await anext(first)
            await asyncio.sleep(0.3)
            assert one.nar_size + two.nar_size <= shares.buffers * FRAME_SIZE + shares.budget
            await asyncio.gather(_drain(two), _drain(first))
        assert pipeline.budget.free == pipeline.budget.total


async def test_many_nars_share_little_memory(large: Path) -> None:
    info = info_of(large)
    with Pipeline(cores=4, memory=1) as pipeline:
        assert pipeline.shares.threads == 1
        files = await asyncio.gather(*(_file(pipeline, large, info) for _ in range(6)))

    assert len(set(files)) == 1


async def _file(pipeline: Pipeline, path: Path, info: PathInfo) -> bytes:
    async with pipeline.nar(LocalNar(NarDump(path)), info) as nar:
        return hashlib.sha256(b"".join([chunk async for chunk in nar])).digest()


async def test_a_budget_is_given_out_in_order_of_asking() -> None:
    budget, got = Budget(10), []

    async def want(name: str, size: int) -> None:
        await budget.take(size)
        got.append(name)

    await budget.take(8)
    waiting = [asyncio.create_task(want(*one)) for one in (("large", 9), ("small", 1), ("gone", 1), ("last", 1))]
    await asyncio.sleep(0)
    assert got == []  # what would fit does not overtake

    waiting[2].cancel()
    budget.give(8)
    await asyncio.sleep(0)
    assert got == ["large", "small"]
    budget.give(9)
    await asyncio.gather(*waiting, return_exceptions=True)
    assert got == ["large", "small", "last"]
    assert budget.free == 8


async def test_one_who_gives_up_makes_way() -> None:
    budget = Budget(10)
    await budget.take(5)
    first = asyncio.create_task(budget.take(9))
    second = asyncio.create_task(budget.take(5))
    await asyncio.sleep(0)

    first.cancel()
    await second

    assert budget.free == 0


async def test_what_was_granted_to_one_who_is_gone_is_not_lost() -> None:
    budget = Budget(10)
    await budget.take(10)
    waiting = asyncio.create_task(budget.take(10))
    await asyncio.sleep(0)

    budget.give(10)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)

    assert budget.free == 10


async def test_more_than_the_whole_budget_is_never_waited_for() -> None:
    with pytest.raises(ValueError, match="11 bytes can never be had"):
        await Budget(10).take(11)


async def test_buffers_are_used_again() -> None:
    buffers = Buffers(1, 100)
    first = await buffers.take()
    waiting = asyncio.create_task(buffers.take())
    await asyncio.sleep(0)
    assert not waiting.done()

    buffers.give(first)

    assert await waiting is first


@pytest.mark.parametrize("cores", [1, 2, 12, 64])
def test_by_default_every_core_has_work(cores: int) -> None:
    shares = Shares.of(None, frame_size=FRAME_SIZE, level=3, cores=cores, jobs=8)

    assert shares.threads == cores
    assert shares.buffers >= 2 * cores
    assert shares.budget >= cores * shares.bound


def test_stated_memory_is_kept_to_on_any_machine() -> None:
    for level in (1, 3, 19):
        shares = Shares.of(128 * MIB, frame_size=FRAME_SIZE, level=level, cores=64, jobs=8)

        assert 0 < shares.threads < 64
        assert shares.buffers * FRAME_SIZE + shares.budget + shares.threads * shares.bound <= 128 * MIB


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def _drain(chunks: AsyncIterable[bytes]) -> None:
    async for _ in chunks:
        await asyncio.sleep(0)


async def _stream(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]
        yield b""


async def _broken_stream() -> AsyncIterator[bytes]:
    yield bytes(2 * FRAME_SIZE)
    raise StoreError("it broke")
