from __future__ import annotations

import asyncio
import errno
import threading
import time

import pytest

from cachesrv.errors import StoreError, StoreFull
from cachesrv.storage.threads import Threads


async def test_errors_of_the_system_are_told_in_words() -> None:
    threads = Threads(1, name="test")

    def fail(number: int) -> None:
        raise OSError(number, "what the system says", "/secret/path")

    with pytest.raises(StoreError, match=r"\Acannot read a: what the system says\Z") as caught:
        await threads.run("read a", fail, errno.EIO)
    assert not isinstance(caught.value, StoreFull)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        with pytest.raises(StoreFull, match=r"\Acannot write a: what the system says\Z"):
            await threads.run("write a", fail, number)
    await threads.close()


async def test_a_cancelled_caller_goes_on_only_when_its_work_has_ended() -> None:
    threads = Threads(1, name="test")
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait()
        ended.set()
        raise OSError(errno.EIO, "unheard")

    task = asyncio.create_task(threads.run("work", work))
    await asyncio.to_thread(begun.wait)
    for _ in range(3):
        task.cancel()
        await asyncio.sleep(0.001)
        assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
    await threads.close()


async def test_work_that_has_not_begun_is_dropped_when_its_caller_is_cancelled() -> None:
    threads = Threads(1, name="test")
    go_on = threading.Event()
    done: list[str] = []
    first = asyncio.create_task(threads.run("wait", go_on.wait))
    second = asyncio.create_task(threads.run("work", done.append, "second"))
    await asyncio.sleep(0.01)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    go_on.set()
    assert await first
    await threads.close()
    assert done == []


async def test_close_waits_for_what_was_asked_for_and_takes_no_more() -> None:
    threads = Threads(1, name="test")
    done: list[int] = []

    def work(number: int) -> None:
        time.sleep(0.01)
        done.append(number)

    tasks = [asyncio.create_task(threads.run("work", work, n)) for n in range(3)]
    await asyncio.sleep(0)
    await threads.close()
    assert done == [0, 1, 2]
    await asyncio.gather(*tasks)
    with pytest.raises(StoreError, match="closed"):
        await threads.run("work", work, 3)
