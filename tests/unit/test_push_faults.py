"""Whatever goes wrong at the server, each path is told of once, and the next push completes what this one could not."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import TYPE_CHECKING

import msgspec
import pytest

from cachesrv import pack
from cachesrv.errors import CachesrvError
from cachesrv.push import events
from cachesrv.push.address import Address
from cachesrv.push.connection import Timeouts
from cachesrv.push.retry import Backoff
from cachesrv.push.run import Options, push
from cachesrv.push.settings import Settings
from cachesrv.push.token import TokenVariable
from tests.push_doubles import FakeCache, TemporaryStore, answer, drop, store_path

if TYPE_CHECKING:
    from pathlib import Path

    from aiohttp import web

    from tests.push_doubles import Handler

ROUTES = ("paths", "pack", "nar", "begun", "begin", "part", "sign", "bucket", "complete", "abort", "missing")
PATIENCE = 60.0
"""Seconds after which a push is taken to hang."""


def fill(store: TemporaryStore, chance: random.Random) -> list[str]:
    """Paths of all kinds, some of which have the same NAR, or come from a daemon."""
    names: list[str] = []
    for number in range(25):
        contents = chance.choice(
            [b"one of %d" % (number % 3), chance.randbytes(chance.choice([10, 30_000, 3_000_000]))]
        )
        name = f"path-{number}"
        store.add(name, contents, chance.sample(names, min(len(names), chance.randrange(4))))
        if chance.random() < 0.2:
            store.unreadable.add(store_path(name))
        names.append(name)
    return names


def some_cache(chance: random.Random) -> FakeCache:
    """One of those that there may be."""
    small = msgspec.structs.replace(pack.LIMITS, nars=3, size=60_000, head_size=3000)
    if chance.random() < 0.3:
        return FakeCache(part_size=8 * 2**20, direct=True, packs=chance.choice([None, small]))
    return FakeCache(
        part_size=chance.choice([0, 100_000, 2**20]),
        packs=chance.choice([None, pack.LIMITS, small]),
        bears=chance.choice([0, 1, 2]),
    )


def faults(cache: FakeCache, chance: random.Random) -> list[Handler]:
    """Answers, broken connections, and a server that loses some of what it had."""

    async def lose(request: web.Request) -> web.StreamResponse:
        for nar_hash in chance.sample([*cache.nars], min(len(cache.nars), 2)):
            del cache.nars[nar_hash]
        for parts in cache.uploads.values():
            for number in chance.sample([*parts], min(len(parts), 2)):
                del parts[number]
        return await answer(503)(request)

    async def restart(request: web.Request) -> web.StreamResponse:
        cache.uploads.clear()
        return await drop(request)

    return [*(answer(status) for status in (400, 403, 404, 409, 413, 500, 503)), drop, lose, restart]


def check(told: list[events.Event], cache: FakeCache, paths: int | None) -> None:
    """`paths`: how many there are, if all had their turn."""
    outcomes = Counter(event.path for event in told if isinstance(event, events.Published | events.Failed))
    assert set(outcomes.values()) <= {1}
    assert {event.path for event in told if isinstance(event, events.Published)} <= cache.published.keys()
    (plan,) = (event for event in told if isinstance(event, events.PlanMade)) if paths is not None else (None,)
    assert plan is None or plan.present + len(outcomes) == paths


@pytest.mark.parametrize("seed", range(13))
async def test_each_path_has_one_end(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    store = TemporaryStore(tmp_path)
    names = fill(store, chance)
    damaged = chance.sample(names, chance.choice([0, 2, 4]))
    for name in damaged:
        store.file(name).write_bytes(b"something else")
    cache = some_cache(chance)
    options = Options(
        jobs=chance.choice([1, 2, 8]),
        level=chance.choice([1, "auto"]),
        memory=chance.choice([None, 20 * 2**20]),
        journal=tmp_path / "journal",
        backoff=Backoff(attempts=chance.choice([2, 4]), first=0.005, longest=0.02),
        timeouts=Timeouts(connect=PATIENCE, answer=PATIENCE, stall=PATIENCE, store=PATIENCE),
    )
    paths = [store_path(name).full("/nix/store") for name in names]
    async with cache:
        settings = Settings(Address.parse(cache.url), TokenVariable.of("CACHESRV_TOKEN", "secret"))
        for faulty in (True, True, False):
            kinds = faults(cache, chance) if faulty else []
            cache.faults = {route: chance.sample(kinds, chance.choice([0, 0, 1, 4])) for route in ROUTES if faulty}
            cache.bears = cache.bears if faulty else 0
            told: list[events.Event] = []
            try:
                async with asyncio.timeout(PATIENCE):
                    await push(paths, store, settings, options, told.append)
            except CachesrvError:
                assert faulty
                check(told, cache, None)
            else:
                check(told, cache, len(names))
    assert damaged or len(cache.published) == len(names)
