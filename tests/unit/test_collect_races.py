"""A collection in the middle of a push or a lookup, and the other way round, at each write that either makes.

What is visible is whole at every moment, and what was acknowledged is there afterwards.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from cachesrv.catalog.retention import MAINTENANCE, Removal
from cachesrv.errors import BeingRemoved, MissingNar, MissingReferences, StoreError
from cachesrv.services.removing import Removing, objects_of
from tests.collecting import (
    DAY,
    HOLDER,
    START,
    Clock,
    Gate,
    Process,
    Stores,
    cache,
    check_consistency,
    die,
    names_in,
    policy,
)
from tests.samples import Sample

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Action = Callable[[Stores], Awaitable[set[str]]]
    Prepare = Callable[[Stores, Clock], Awaitable[None]]

pytestmark = pytest.mark.long

MAIN = cache()
CACHES = {"main": MAIN}
MONTH = {"main": policy(max_age=30 * DAY)}
LIBRARY = Sample("library", b"library")
TOOL = Sample("tool", b"tool", (LIBRARY.path,))
PROGRAM = Sample("program", b"program", (LIBRARY.path,))
TWIN = Sample("twin", b"library")
MOST_WRITES = 40


async def acting(stores: Stores, act: Callable[[Process], Awaitable[object]]) -> bool:
    """Whether it was done; refused is not done."""
    process = Process(stores, tries=1)
    try:
        await act(process)
    except (MissingReferences, MissingNar, StoreError):
        return False
    finally:
        await process.end()
    return True


async def collect(stores: Stores) -> set[str]:
    await acting(stores, lambda process: process.collect(CACHES, MONTH, nar_grace=0))
    return set()


def pushing(sample: Sample) -> Action:
    async def push(stores: Stores) -> set[str]:
        return {sample.name} if await acting(stores, lambda process: process.push(MAIN, sample)) else set()

    return push


def publishing(sample: Sample) -> Action:
    """Without the NAR, which is there."""

    async def publish(stores: Stores) -> set[str]:
        return {sample.name} if await acting(stores, lambda process: process.publish(MAIN, sample)) else set()

    return publish


async def send_library(stores: Stores) -> set[str]:
    """A NAR that was acknowledged can be relied on."""
    if await acting(stores, lambda process: process.send(MAIN, LIBRARY)):
        record = await stores.catalog.nar(f"main/nar/{LIBRARY.nar_name}")
        assert record is not None
        assert await stores.storage.head(record.key) is not None
    return set()


async def look_up(stores: Stores) -> set[str]:
    for sample in (LIBRARY, TOOL):
        await acting(stores, lambda process, sample=sample: process.find(MAIN, sample))  # type: ignore[misc]
    return set()


async def rely_on_library(stores: Stores) -> set[str]:
    await acting(stores, lambda process: process.grant(MAIN, LIBRARY))
    return {"library"} & await names_in(stores, MAIN)


async def use_library(stores: Stores) -> set[str]:
    await stores.catalog.touch("main", {LIBRARY.path.hash_part: START + 200 * DAY})
    return {"library"} & await names_in(stores, MAIN)


async def pin_tool(stores: Stores) -> set[str]:
    there = await names_in(stores, MAIN)
    if "tool" not in there:
        return set()
    await stores.catalog.pin("main", "p", TOOL.path.base_name, keep=1, expires_at=None, at=START, by="ann")
    return {"tool", "library"}


async def old(stores: Stores, clock: Clock) -> None:
    """A closure that may go, and the NAR of what could need it."""
    await acting(stores, lambda process: process.push(MAIN, LIBRARY, TOOL))
    clock.pass_(100 * DAY)
    await acting(stores, lambda process: process.send(MAIN, PROGRAM))


async def gone(stores: Stores, clock: Clock) -> None:
    """… that has gone already, all but the NARs."""
    await acting(stores, lambda process: process.push(MAIN, LIBRARY, TOOL))
    clock.pass_(100 * DAY)
    await acting(stores, lambda process: process.collect(CACHES, MONTH))
    assert await names_in(stores, MAIN) == set()
    clock.pass_(DAY)


async def half_gone(stores: Stores, clock: Clock) -> None:
    """… that a collection was just about to take away when it died."""
    await old(stores, clock)
    await acting(stores.through(Gate(1, die, late=True)), lambda process: process.collect(CACHES, MONTH))
    assert await stores.catalog.doomed() != []
    clock.pass_(1)


async def forgotten(stores: Stores, clock: Clock) -> None:
    """NARs that lie in storage without the catalog knowing."""
    await old(stores, clock)
    await stores.catalog.remove_nars([f"main/nar/{sample.nar_name}" for sample in (LIBRARY, TOOL)])


async def unindexed(stores: Stores, clock: Clock) -> None:
    """A closure that may go and was not asked for since the index was lost."""
    await old(stores, clock)
    stores.index.clear("main")


async def nothing(_stores: Stores, _clock: Clock) -> None:
    """An empty cache."""


ACTIONS: dict[str, Action] = {
    "push library": pushing(LIBRARY),
    "push tool": pushing(TOOL),
    "push twin": pushing(TWIN),
    "publish twin": publishing(TWIN),
    "publish program": publishing(PROGRAM),
    "send library": send_library,
    "look up": look_up,
    "rely on library": rely_on_library,
    "use library": use_library,
    "pin tool": pin_tool,
}


@pytest.mark.parametrize("prepare", [old, gone, half_gone, forgotten])
@pytest.mark.parametrize("name", ACTIONS)
async def test_something_in_the_middle_of_a_collection(
    stores: Stores, clock: Clock, prepare: Prepare, name: str
) -> None:
    """Before each of its writes: then it has read what the other is about to change."""
    for at in range(MOST_WRITES):
        await begin(stores, clock, prepare)
        acknowledged: set[str] = set()

        async def middle(acknowledged: set[str] = acknowledged) -> None:
            acknowledged |= await ACTIONS[name](stores)
            await check_consistency(stores, CACHES)

        gate = Gate(at, middle)
        await collect(stores.through(gate))
        await check(stores, acknowledged)
        if at >= len(gate.writes):
            break


@pytest.mark.parametrize("prepare", [old, gone, half_gone, forgotten])
@pytest.mark.parametrize("name", ACTIONS)
async def test_a_collection_in_the_middle_of_something(
    stores: Stores, clock: Clock, prepare: Prepare, name: str
) -> None:
    """As above."""
    for at in range(MOST_WRITES):
        await begin(stores, clock, prepare)

        async def middle() -> None:
            await collect(stores)
            await check_consistency(stores, CACHES)

        gate = Gate(at, middle)
        acknowledged = await ACTIONS[name](stores.through(gate))
        await check(stores, acknowledged)
        if at >= len(gate.writes):
            break


class Watched(Gate):
    """Something is done before and after each write."""

    async def pass_(self, name: str, *, after: bool) -> None:
        self.writes.append(name)
        await self._then()


@pytest.mark.parametrize("prepare", [old, unindexed])
async def test_who_looks_up_all_along_never_sees_a_path_without_what_it_needs(
    stores: Stores, clock: Clock, prepare: Prepare
) -> None:
    """What was looked up before it went does not hide that it has gone."""
    await prepare(stores, clock)
    seen: list[tuple[bool, bool]] = []
    process = Process(stores)

    async def look() -> None:
        tool = await process.find(MAIN, TOOL) is not None
        # As long as it is published nobody asks for it, so that the index does not know it.
        library = "library" in await names_in(stores, MAIN) or await process.find(MAIN, LIBRARY) is not None
        seen.append((tool, library))
        await asyncio.gather(*process._lookup._learning)

    watched = Watched(0, look)
    await collect(stores.through(watched))
    await process.end()
    assert (True, False) not in seen, watched.writes
    assert seen[0] == (True, True)
    assert seen[-1] == (False, False)


async def test_a_collection_in_the_middle_of_a_lookup(stores: Stores, clock: Clock) -> None:
    """What was read before it went does not come into the index afterwards."""
    for at in range(3):
        await begin(stores, clock, unindexed)

        async def middle() -> None:
            await collect(stores)

        await look_up(stores.through(Gate(at, middle)))
        await check_consistency(stores, CACHES)
        assert stores.index.count()[0] == (0 if at < 2 else 2)


@pytest.mark.parametrize("prepare", [old, gone])
@pytest.mark.parametrize("name", ["push library", "send library"])
async def test_a_collection_that_dies_in_the_middle_of_something(
    stores: Stores, clock: Clock, prepare: Prepare, name: str
) -> None:
    """What it had begun to delete is not used until the next one has finished it."""
    for at in range(MOST_WRITES):
        for died_at in range(MOST_WRITES):
            await begin(stores, clock, prepare)
            dying = Gate(died_at, die)

            async def middle(dying: Gate = dying) -> None:
                await collect(stores.through(dying))

            gate = Gate(at, middle)
            acknowledged = await ACTIONS[name](stores.through(gate))
            await check(stores, acknowledged)
            await collect(stores)
            await check(stores, acknowledged)
            if died_at >= len(dying.writes):
                break
        if at >= len(gate.writes):
            break


async def test_what_is_deleted_while_it_is_published_is_not_visible_afterwards(stores: Stores, clock: Clock) -> None:
    async def delete() -> None:
        await stores.catalog.lock(MAINTENANCE, HOLDER, now=0, until=1)
        removal = Removal(
            "main", partial(objects_of, MAIN), HOLDER, lambda _: "deleted", "ann", START, despite_leases=True
        )
        numbers = await stores.catalog.numbers("main", [LIBRARY.path.hash_part])
        removing = Removing(stores.storage, stores.catalog, stores.index)
        await removing.paths(removal, {number: hash_part for hash_part, number in numbers.items()})

    for at in range(MOST_WRITES):
        await begin(stores, clock, nothing)
        gate = Gate(at, delete)
        await pushing(LIBRARY)(stores.through(gate))
        await check(stores, set())
        if at >= len(gate.writes):
            break


async def begin(stores: Stores, clock: Clock, prepare: Prepare) -> None:
    """With nothing, and then what the test wants."""
    await stores.catalog.unpin("main", "p")
    clock.pass_(1000 * DAY)
    for _ in range(2):
        await collect(stores)
        clock.pass_(1)
    assert await names_in(stores, MAIN) == set()
    clock.now = float(START)
    await prepare(stores, clock)


async def check(stores: Stores, acknowledged: set[str]) -> None:
    await check_consistency(stores, CACHES)
    assert acknowledged <= await names_in(stores, MAIN)
    await look_up(stores)
    await check_consistency(stores, CACHES)


async def test_who_is_told_to_try_again_succeeds_in_the_end(stores: Stores, clock: Clock) -> None:
    await half_gone(stores, clock)
    process = Process(stores, tries=1)
    with pytest.raises(BeingRemoved):
        await process.push(MAIN, LIBRARY)
    await collect(stores)
    await process.push(MAIN, LIBRARY, TOOL)
    await check_consistency(stores, CACHES)
    await process.end()


async def test_another_nar_may_take_the_place_of_one_that_went(stores: Stores, clock: Clock) -> None:
    await gone(stores, clock)
    other = replace(LIBRARY, content=b"built differently")
    assert await pushing(other)(stores) == {"library"}
    await check_consistency(stores, CACHES)
