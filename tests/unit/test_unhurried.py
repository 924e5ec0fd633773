"""Work in the event loop that lets others have their turn."""

from __future__ import annotations

import asyncio
import time

from cachesrv.services.unhurried import unhurried


async def test_all_come_in_their_order() -> None:
    assert [item async for item in unhurried(range(1000))] == list(range(1000))
    assert [item async for item in unhurried(range(0))] == []


async def test_others_have_their_turn_meanwhile() -> None:
    done: list[int] = []
    seen: list[int] = []

    async def other() -> None:
        while len(done) < 5:
            seen.append(len(done))
            await asyncio.sleep(0)

    watching = asyncio.create_task(other())
    async for item in unhurried(range(5)):
        time.sleep(0.005)  # noqa: ASYNC251  work that takes longer than a turn
        done.append(item)
    await watching

    assert {1, 2, 3, 4} <= set(seen)
