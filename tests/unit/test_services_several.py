"""Much work, some of it at a time; when it ends early, nothing is at work any more."""

from __future__ import annotations

import asyncio

import pytest

from cachesrv.errors import BadInput
from cachesrv.services.several import several


async def test_results_are_in_order_and_so_many_at_a_time() -> None:
    at_work: set[int] = set()
    most = 0

    async def work(item: int) -> int:
        nonlocal most
        at_work.add(item)
        most = max(most, len(at_work))
        for _ in range(item % 3):
            await asyncio.sleep(0)
        at_work.remove(item)
        return item * 2

    assert await several(work, range(20), at_a_time=4) == [item * 2 for item in range(20)]
    assert most == 4
    assert await several(work, [], at_a_time=4) == []


async def test_when_one_fails_the_others_end() -> None:
    ended: list[int] = []

    async def work(item: int) -> None:
        if item == 2:
            await asyncio.sleep(0)
            raise BadInput("no")
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(item)

    with pytest.raises(BadInput, match="no"):
        await several(work, range(9), at_a_time=3)
    assert sorted(ended) == [0, 1]


async def test_who_is_cancelled_waits_until_all_have_come_to_their_end() -> None:
    ended: list[int] = []

    async def work(item: int) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(5 * item):
                await asyncio.sleep(0)
            ended.append(item)

    task = asyncio.create_task(several(work, range(9), at_a_time=3))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sorted(ended) == [0, 1, 2]
