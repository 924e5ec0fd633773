"""How many requests a service bears: what is concluded from how they end, and who is let in when."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachesrv.turns import Bearing, Turns


def settle(bearing: Bearing, bears: int, rounds: int) -> tuple[list[int], int]:
    """Limits after each of so many rounds in which all who may come at once, and how many were turned away."""
    limits, refused = [], 0
    for _ in range(rounds):
        begun = []
        while bearing.lets_in(streams=False):
            begun.append(bearing.begin(streams=False))
        for place, one in enumerate(begun):
            bearing.end(streams=False)
            if place < bears:
                bearing.went_well()
            else:
                refused += 1
                bearing.was_too_much(one)
        limits.append(bearing.limit)
    return limits, refused


@pytest.mark.parametrize("bears", [1, 2, 3, 7, 20, 63])
def test_it_settles_near_what_is_borne(bears: int) -> None:
    bearing = Bearing(64)
    settle(bearing, bears, 10)
    limits, refused = settle(bearing, bears, 200)

    assert max(limits) <= bears + 1
    assert min(limits) >= max(1, bears // 2)
    assert refused <= 2 * 200


def test_what_is_borne_is_not_lessened() -> None:
    bearing = Bearing(64)
    limits, refused = settle(bearing, 64, 20)
    assert set(limits) == {64}
    assert refused == 0


def test_who_bears_more_again_gets_more() -> None:
    bearing = Bearing(16)
    settle(bearing, 1, 20)
    limits, _ = settle(bearing, 16, 20)
    assert limits[-1] == 16
    assert all(after - before <= 1 for before, after in pairwise(limits))


def test_complaints_of_those_who_were_under_way_together_count_once() -> None:
    bearing = Bearing(16)
    begun = [bearing.begin(streams=False) for _ in range(16)]
    for one in begun:
        bearing.was_too_much(one)
    assert bearing.limit == 8
    bearing.was_too_much(bearing.begin(streams=False))
    assert bearing.limit == 4


@given(st.integers(1, 5), st.lists(st.tuples(st.booleans(), st.sampled_from(["begin", "well", "much"])), max_size=60))
def test_there_is_always_a_way_on(most: int, steps: list[tuple[bool, str]]) -> None:
    """One request that streams none can be under way, whatever else is; and never more than the limit but that one."""
    bearing = Bearing(most)
    under_way: list[tuple[bool, int]] = []
    for streams, step in steps:
        if step == "begin" and bearing.lets_in(streams=streams):
            room = bearing.limit - len(under_way)
            assert room > 0 or (not streams and all(other for other, _ in under_way))
            under_way.append((streams, bearing.begin(streams=streams)))
        elif step != "begin" and under_way:
            streamed, begun = under_way.pop()
            bearing.end(streams=streamed)
            if step == "well":
                bearing.went_well()
            else:
                bearing.was_too_much(begun)
        assert 1 <= bearing.limit <= most
        assert bearing.lets_in(streams=False) or not all(streamed for streamed, _ in under_way)


def test_who_wants_to_be_left_alone_says_how_long() -> None:
    bearing = Bearing(4)
    assert bearing.rest(100) == 0
    bearing.leave_alone(160)
    bearing.leave_alone(130)
    assert bearing.rest(100) == 60
    assert bearing.rest(170) == 0


async def test_while_the_service_rests_nobody_is_let_in_but_those_inside_may_end() -> None:
    turns = Turns(3)
    loop = asyncio.get_running_loop()
    entered: list[float] = []

    async def come() -> None:
        async with turns.turn():
            entered.append(loop.time())

    async with turns.turn(), turns.turn() as turn:
        until = loop.time() + 0.2
        turn.leave_alone(0.2)
        waiting = [asyncio.create_task(come()) for _ in range(5)]
        waiting[0].cancel()
        await asyncio.sleep(0)
    await asyncio.gather(*waiting, return_exceptions=True)

    assert len(entered) == 4
    assert min(entered) >= until - 0.001


async def test_streams_wait_for_each_other_and_others_pass_them() -> None:
    turns = Turns(2)
    order: list[str] = []

    async def come(name: str, *, streams: bool) -> None:
        async with turns.turn(streams=streams):
            order.append(name)

    async with turns.turn(streams=True), turns.turn(streams=True):
        waiting = [asyncio.create_task(come("stream", streams=True)), asyncio.create_task(come("other", streams=False))]
        await waiting[1]
        assert order == ["other"]
    await waiting[0]
    assert order == ["other", "stream"]


async def test_who_is_cancelled_in_the_moment_of_being_let_in_makes_way() -> None:
    turns = Turns(1)

    async def come() -> None:
        async with turns.turn():
            pass

    async with turns.turn():
        first, second = asyncio.create_task(come()), asyncio.create_task(come())
        await asyncio.sleep(0)
    first.cancel()
    await second
    assert first.cancelled() or first.done()
    await come()
