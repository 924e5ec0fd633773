"""Batches: nobody waits for others to come, and a bad item fails nobody but itself."""

from __future__ import annotations

import asyncio

import pytest

from cachesrv.errors import BadInput
from cachesrv.services.batch import Batcher


class Sink:
    """Takes lists one at a time, each when it is let; refuses those that hold `bad`."""

    def __init__(self, *bad: int) -> None:
        self.flushed: list[list[int]] = []
        self.gate = asyncio.Event()
        self.at_work = 0
        self._bad = set(bad)

    async def flush(self, items: list[int]) -> None:
        self.at_work += 1
        assert self.at_work == 1, "two flushes at once"
        try:
            await self.gate.wait()
            if bad := self._bad.intersection(items):
                raise BadInput(f"bad: {sorted(bad)}")
            self.flushed.append(items)
        finally:
            self.at_work -= 1


async def started(*tasks: asyncio.Task[None]) -> None:
    """Every task has run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)


async def test_the_first_leaves_at_once_and_the_others_together() -> None:
    sink = Sink()
    batcher: Batcher[int] = Batcher(sink.flush)
    first = asyncio.create_task(batcher.submit(0))
    await started(first)
    assert sink.at_work == 1
    others = [asyncio.create_task(batcher.submit(number)) for number in range(1, 6)]
    await started(first, *others)
    sink.gate.set()
    await asyncio.gather(first, *others)
    assert sink.flushed == [[0], [1, 2, 3, 4, 5]]


async def test_lists_are_limited() -> None:
    sink = Sink()
    batcher: Batcher[int] = Batcher(sink.flush, limit=2)
    tasks = [asyncio.create_task(batcher.submit(number)) for number in range(5)]
    await started(*tasks)
    sink.gate.set()
    await asyncio.gather(*tasks)
    assert sink.flushed == [[0, 1], [2, 3], [4]]


async def test_a_bad_item_fails_alone() -> None:
    sink = Sink(2)
    batcher: Batcher[int] = Batcher(sink.flush)
    sink.gate.set()
    outcomes = await asyncio.gather(*(batcher.submit(number) for number in range(4)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), type(None), BadInput, type(None)]
    assert sorted(item for items in sink.flushed for item in items) == [0, 1, 3]
    await batcher.submit(4)  # and those that come later are taken


async def test_who_goes_away_leaves_the_item() -> None:
    sink = Sink()
    batcher: Batcher[int] = Batcher(sink.flush)
    tasks = [asyncio.create_task(batcher.submit(number)) for number in range(2)]
    await started(*tasks)
    tasks[0].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    sink.gate.set()
    await tasks[1]
    assert sorted(item for items in sink.flushed for item in items) == [0, 1]


async def test_closing_waits_for_what_was_submitted() -> None:
    sink = Sink()
    batcher: Batcher[int] = Batcher(sink.flush)
    tasks = [asyncio.create_task(batcher.submit(number)) for number in range(3)]
    await started(*tasks)
    closing = asyncio.create_task(batcher.close())
    await started(closing)
    sink.gate.set()
    await closing
    assert sorted(item for items in sink.flushed for item in items) == [0, 1, 2]
    await asyncio.gather(*tasks)
