"""The same work on many things, several at a time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

Item = TypeVar("Item")
Result = TypeVar("Result")


async def several(work: Callable[[Item], Awaitable[Result]], items: Sequence[Item], *, at_a_time: int) -> list[Result]:
    """What `work` returns for each, in order. Raises what one of them raised; nothing is at work then."""
    results: dict[int, Result] = {}
    waiting = iter(enumerate(items))

    async def work_some() -> None:
        for number, item in waiting:
            results[number] = await work(item)

    tasks = [asyncio.create_task(work_some()) for _ in range(min(at_a_time, len(items)))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            if not task.cancelling():  # who is at its end already is to come to it
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [results[number] for number in range(len(items))]
