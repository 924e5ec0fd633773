"""The level of compression follows who waits for whom; it settles, and what is sent is whole at any level."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachesrv.nix.nar_writer import dump
from cachesrv.nix.seekable import compress_zstd
from cachesrv.push import events, level
from cachesrv.push.address import Address
from cachesrv.push.frame import FRAME_SIZE
from cachesrv.push.level import DEFAULT_LEVEL, HIGHEST, LOWEST, AdaptiveLevel, FixedLevel, Observed, levels
from cachesrv.push.load import Leaving, Load
from cachesrv.push.pipeline import Pipeline
from cachesrv.push.run import Options, push
from cachesrv.push.settings import Settings
from cachesrv.push.token import TokenVariable
from tests.push_doubles import FakeCache, TemporaryStore, store_path

if TYPE_CHECKING:
    from pathlib import Path

    from aiohttp import web

FOR_LINK = Observed(1.0, idle=0.9)
FOR_COMPRESSION = Observed(1.0, starved=0.9)
FOR_NOBODY = Observed(1.0, idle=0.4, starved=0.2)


@dataclass
class Watch:
    """A chooser of levels, and what a push has seen."""

    chooser: AdaptiveLevel
    observed: Observed = field(default_factory=Observed)

    def see(self, seen: Observed, seconds: float = 1.0) -> int:
        """The level after so many seconds more of it."""
        before = self.observed
        self.observed = Observed(
            before.work + seconds * seen.work,
            before.idle + seconds * seen.idle,
            before.starved + seconds * seen.starved,
        )
        return self.chooser.choose(self.observed)


@pytest.fixture
def watch() -> Watch:
    return Watch(AdaptiveLevel())


def test_it_begins_as_without_it(watch: Watch) -> None:
    assert watch.chooser.choose(Observed()) == DEFAULT_LEVEL


def test_it_rises_step_by_step_while_nars_wait_for_the_link(watch: Watch) -> None:
    assert [watch.see(FOR_LINK) for _ in range(8)] == [4, 5, 6, 7, 8, 9, 9, 9]


def test_it_falls_while_the_link_waits(watch: Watch) -> None:
    assert [watch.see(FOR_COMPRESSION) for _ in range(4)] == [2, 1, 1, 1]


def test_it_stays_where_nobody_waits_long(watch: Watch) -> None:
    assert [watch.see(FOR_NOBODY) for _ in range(50)] == [DEFAULT_LEVEL] * 50


def test_little_says_nothing(watch: Watch) -> None:
    assert [watch.see(FOR_LINK, 0.25) for _ in range(4)] == [3, 3, 3, 4]
    assert [watch.see(FOR_LINK, 0.0) for _ in range(9)] == [4] * 9


def test_a_step_back_needs_more_each_time(watch: Watch) -> None:
    seen = [watch.see(FOR_LINK)]
    for seconds in (2, 4, 8, 16, 32, 32):
        turned = FOR_COMPRESSION if seen[-1] == 4 else FOR_LINK
        seen += [watch.see(turned, seconds - 0.5), watch.see(turned, 0.5)]
    assert seen == [4, 4, 3, 3, 4, 4, 3, 3, 4, 4, 3, 3, 4]


def test_a_link_that_changes_is_followed_to_the_end(watch: Watch) -> None:
    for _ in range(20):
        watch.see(FOR_LINK)
    for _ in range(20):
        watch.see(FOR_COMPRESSION)
    assert watch.see(FOR_COMPRESSION) == LOWEST


@given(
    link=st.floats(0.1, 1000),
    growth=st.lists(st.floats(1.0, 3.0), min_size=HIGHEST, max_size=HIGHEST),
    fast=st.floats(1, 2000),
)
def test_it_settles_on_every_link(link: float, growth: list[float], fast: float) -> None:
    """Bytes per second of the link; how much slower each level is than the one before. Files become no smaller."""
    watch, speeds = Watch(AdaptiveLevel()), [fast]
    for slower in growth:
        speeds.append(speeds[-1] / slower)
    taken = [DEFAULT_LEVEL]
    for _ in range(500):
        speed = speeds[taken[-1] - 1]
        busy = min(link / speed, 1.0)
        starved = max(0.0, 1.0 - speed / link)
        taken.append(watch.see(Observed(1.0, idle=1.0 - busy, starved=starved)))

    changes = sum(1 for one, other in pairwise(taken[100:]) if one != other)
    assert changes <= 400 / 16
    assert set(taken) <= set(range(LOWEST, HIGHEST + 1))


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0, 1), st.floats(0, 1))))
def test_it_stays_within_bounds_and_takes_one_step_at_a_time(seen: list[tuple[float, float, float]]) -> None:
    watch, before = Watch(AdaptiveLevel()), DEFAULT_LEVEL
    for seconds, idle, starved in seen:
        now = watch.see(Observed(1.0, idle, (1.0 - idle) * starved), seconds)
        assert LOWEST <= now <= HIGHEST
        assert abs(now - before) <= 1
        before = now


def test_a_stated_level_stays() -> None:
    fixed = levels(12)
    assert isinstance(fixed, FixedLevel)
    assert [fixed.choose(Observed(100.0, idle=100.0)), *fixed.possible] == [12, 12]
    assert isinstance(levels("auto"), AdaptiveLevel)


class Clock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def load(clock: Clock) -> Load:
    return Load(4, clock)


def test_what_nobody_does_is_not_seen(load: Load, clock: Clock) -> None:
    clock.seconds += 10
    assert load.observed == Observed()


def test_threads_without_work_are_idle_in_part(load: Load, clock: Clock) -> None:
    with load.leaving():
        clock.seconds += 1
        with load.compressing():
            clock.seconds += 4
    clock.seconds += 10
    assert load.observed == Observed(work=5, idle=1 + 3)


def test_busy_threads_with_nothing_on_its_way(load: Load, clock: Clock) -> None:
    for _ in range(6):
        load.begin()
    clock.seconds += 2
    for _ in range(5):
        load.end()
    clock.seconds += 4
    load.end()
    clock.seconds += 4
    assert load.observed == Observed(work=6, starved=2 + 1)


def test_both_at_work_is_nobody_waiting(load: Load, clock: Clock) -> None:
    for _ in range(4):
        load.begin()
    with load.leaving(), load.leaving():
        clock.seconds += 3
    assert load.observed == Observed(work=3)


def test_what_leaves_now_and_then_is_one_thing(load: Load, clock: Clock) -> None:
    leaving = Leaving(load)
    leaving.start()
    leaving.start()
    clock.seconds += 1
    leaving.stop()
    leaving.stop()
    clock.seconds += 1
    leaving.start()
    leaving.close()
    leaving.start()
    clock.seconds += 1
    assert load.observed == Observed(work=1, idle=1)


def test_memory_is_reckoned_for_the_highest_level() -> None:
    memory = 64 * 2**20
    with Pipeline(level="auto", memory=memory) as adaptive, Pipeline(level=HIGHEST, memory=memory) as highest:
        assert adaptive.shares == highest.shares


async def test_a_slow_server_raises_the_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of NARs, one after the other; each is the file that its level makes."""
    monkeypatch.setattr(level, "PATIENCE", 0.05)
    store = TemporaryStore(tmp_path)
    names = [f"path-{number}" for number in range(6)]
    for number, name in enumerate(names):
        store.add(name, random.Random(number).randbytes(100) * 500)
    told: list[events.Event] = []
    async with FakeCache() as cache:

        async def slow(request: web.Request) -> web.StreamResponse:
            await asyncio.sleep(0.2)
            return await cache._put(request)

        cache.fail("nar", *[slow] * len(names))
        settings = Settings(Address.parse(cache.url), TokenVariable.of("CACHESRV_TOKEN", "secret"), level="auto")
        paths = [store_path(name).full("/nix/store") for name in names]
        summary = await push(paths, store, settings, Options(jobs=1), told.append)

    assert (summary.uploaded, summary.failed) == (len(names), 0)
    stored = {event.path: event.level for event in told if isinstance(event, events.Stored)}
    assert next(iter(stored.values())) == DEFAULT_LEVEL
    assert max(stored.values()) > DEFAULT_LEVEL
    for name in names:
        path = store_path(name)
        file = b"".join(compress_zstd(dump(store.file(name)), stored[path.base_name], FRAME_SIZE))
        assert cache.nars[store.infos[path].nar_hash.nix32] == file


async def test_options_go_before_settings(tmp_path: Path) -> None:
    store = TemporaryStore(tmp_path)
    store.add("path")
    for stated, expected in ((5, 5), (None, 7)):
        told: list[events.Event] = []
        async with FakeCache() as cache:
            settings = Settings(Address.parse(cache.url), TokenVariable.of("CACHESRV_TOKEN", "secret"), level=7)
            await push([store_path("path").full("/nix/store")], store, settings, Options(level=stated), told.append)
        assert [event.level for event in told if isinstance(event, events.Stored)] == [expected]
