"""Locks by name."""

from __future__ import annotations

import asyncio
import gc

from cachesrv.services.locks import NamedLocks


async def test_one_at_a_time_for_each_name() -> None:
    locks = NamedLocks()
    inside: set[str] = set()
    most = 0

    async def work(name: str) -> None:
        nonlocal most
        async with locks.hold([name]):
            assert name not in inside
            inside.add(name)
            most = max(most, len(inside))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            inside.remove(name)

    await asyncio.gather(*(work(name) for name in "abab" * 5))
    assert most == 2, "different names do not wait for each other"


async def test_names_in_any_order_and_twice() -> None:
    """Two that want the same ones in another order do not wait for each other for ever."""
    locks = NamedLocks()
    done = 0

    async def work(*names: str) -> None:
        nonlocal done
        async with locks.hold(names):
            await asyncio.sleep(0)
            done += 1

    async with asyncio.timeout(10):
        await asyncio.gather(*(work("a", "b", "a") if number % 2 else work("b", "c", "a") for number in range(20)))
    assert done == 20


async def test_who_gives_up_holds_nothing() -> None:
    locks = NamedLocks()

    async def wait() -> None:
        async with locks.hold(["a", "b"]):
            raise AssertionError("b is held")

    async with locks.hold(["b"]):
        waiting = asyncio.create_task(wait())
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        async with asyncio.timeout(10), locks.hold(["a"]):
            pass


async def test_nothing_is_kept_of_names_that_nobody_holds() -> None:
    locks = NamedLocks()
    for number in range(100):
        async with locks.hold([str(number)]):
            pass
    gc.collect()
    assert len(locks._locks) == 0
