"""Streams that a thread consumes: in bounded memory, with an end in every case."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest

from cachesrv.errors import BadInput
from cachesrv.services import in_thread
from cachesrv.services.in_thread import consumed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as threads:
        yield threads


async def numbers(count: int) -> AsyncIterator[bytes]:
    for number in range(count):
        yield number.to_bytes(4, "big")


async def endless() -> AsyncIterator[bytes]:
    yield b"chunk"
    await asyncio.Event().wait()


@pytest.mark.parametrize("count", [0, 1, in_thread._IN_FLIGHT, 10 * in_thread._IN_FLIGHT + 1])
async def test_all_of_it_in_order(threads: ThreadPoolExecutor, count: int) -> None:
    received = await consumed(threads, list, numbers(count))
    assert [int.from_bytes(chunk, "big") for chunk in received] == list(range(count))


async def test_the_stream_waits_for_the_thread(threads: ThreadPoolExecutor) -> None:
    """Only a few chunks are on their way, however slow the thread is."""
    fed = 0
    full = asyncio.Event()
    go_on = threading.Event()

    async def counting() -> AsyncIterator[bytes]:
        nonlocal fed
        async for chunk in numbers(1000):
            fed += 1
            if fed == in_thread._IN_FLIGHT:
                full.set()
            yield chunk

    def slow(chunks: Iterator[bytes]) -> int:
        next(chunks)
        assert go_on.wait(10)
        return 1 + sum(1 for _ in chunks)

    task = asyncio.create_task(consumed(threads, slow, counting()))
    await full.wait()
    for _ in range(100):
        await asyncio.sleep(0)
    assert fed <= in_thread._IN_FLIGHT + 2
    go_on.set()
    assert await task == 1000


async def test_what_the_thread_raises_ends_the_stream(threads: ThreadPoolExecutor) -> None:
    """At once, though the stream would go on for ever."""

    async def endless() -> AsyncIterator[bytes]:
        while True:
            await asyncio.sleep(0)
            yield b"chunk"

    def refuse(chunks: Iterator[bytes]) -> None:
        for _ in range(20):
            next(chunks)
        raise BadInput("enough")

    async with asyncio.timeout(10):
        with pytest.raises(BadInput, match="enough"):
            await consumed(threads, refuse, endless())


async def test_bytes_after_the_end(threads: ThreadPoolExecutor) -> None:
    with pytest.raises(BadInput, match="after the end"):
        await consumed(threads, next, numbers(1000))


async def test_what_the_stream_raises_is_raised(threads: ThreadPoolExecutor) -> None:
    """And the thread is let go: it sees the end of the chunks."""
    ended = threading.Event()

    async def broken() -> AsyncIterator[bytes]:
        yield b"chunk"
        raise BadInput("the body broke off")

    def work(chunks: Iterator[bytes]) -> None:
        for _ in chunks:
            pass
        ended.set()
        raise ValueError("what the thread makes of it does not matter")

    with pytest.raises(BadInput, match="broke off"):
        await consumed(threads, work, broken())
    assert ended.is_set()


async def test_a_caller_that_is_cancelled_leaves_no_thread_at_work(threads: ThreadPoolExecutor) -> None:
    ended = threading.Event()

    def work(chunks: Iterator[bytes]) -> None:
        for _ in chunks:
            pass
        ended.set()

    task = asyncio.create_task(consumed(threads, work, endless()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
    assert await consumed(threads, list, numbers(1)) == [bytes(4)]


async def test_who_is_cancelled_once_more_is_silent_about_the_thread(threads: ThreadPoolExecutor) -> None:
    """What it made of half a stream is nobody's concern, and in no log."""
    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    ending, go_on = threading.Event(), threading.Event()

    def work(chunks: Iterator[bytes]) -> None:
        for _ in chunks:
            pass
        ending.set()
        go_on.wait()
        raise BadInput("the data end too early")

    task = asyncio.create_task(consumed(threads, work, endless()))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.to_thread(ending.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    del task
    go_on.set()
    assert await consumed(threads, list, numbers(1)) == [bytes(4)]
    gc.collect()
    assert told == []
