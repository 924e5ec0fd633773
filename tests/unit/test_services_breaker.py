from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from cachesrv.errors import PeerError, PeerUnavailable
from cachesrv.services.breaker import FAILURES, LONGEST_PAUSE_SECONDS, PAUSE_SECONDS, SLOW_SECONDS, Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breaker(clock: Clock) -> Breaker:
    return Breaker(clock)


def ask(breaker: Breaker, error: BaseException | None = None) -> None:
    try:
        with breaker.watching(PeerUnavailable):
            if error:
                raise error
    except (PeerError, asyncio.CancelledError):
        pass


def test_who_fails_several_times_in_a_row_is_left_alone_for_a_while(breaker: Breaker, clock: Clock) -> None:
    for _ in range(FAILURES):
        assert breaker.allows()
        ask(breaker, PeerUnavailable("down"))
    assert not breaker.allows()
    clock.now += PAUSE_SECONDS - 0.1
    assert not breaker.allows()
    clock.now += 0.1
    assert breaker.allows()


def test_after_the_pause_one_question_decides(breaker: Breaker, clock: Clock) -> None:
    for _ in range(FAILURES):
        ask(breaker, PeerUnavailable("down"))
    for _ in range(3):
        clock.now += PAUSE_SECONDS
        assert [breaker.allows() for _ in range(3)] == [True, False, False]
        ask(breaker, PeerUnavailable("down"))
        assert not breaker.allows()
    clock.now += PAUSE_SECONDS
    assert breaker.allows()
    ask(breaker)
    assert [breaker.allows() for _ in range(3)] == [True] * 3


def test_the_question_that_decides_may_get_lost(breaker: Breaker, clock: Clock) -> None:
    for _ in range(FAILURES):
        ask(breaker, PeerUnavailable("down"))
    clock.now += PAUSE_SECONDS
    assert breaker.allows()
    ask(breaker, asyncio.CancelledError())
    assert not breaker.allows()
    clock.now += PAUSE_SECONDS
    assert breaker.allows()


def test_failures_that_are_not_in_a_row_do_not_matter(breaker: Breaker) -> None:
    for _ in range(5):
        for _ in range(FAILURES - 1):
            ask(breaker, PeerUnavailable("down"))
        ask(breaker)
        assert breaker.allows()


def test_an_answer_of_no_use_is_an_answer(breaker: Breaker) -> None:
    for _ in range(2 * FAILURES):
        ask(breaker, PeerError("it answered 403"))
        assert breaker.allows()


@pytest.mark.parametrize(
    ("after", "pause"), [(1, PAUSE_SECONDS), (60, 60), (10 * LONGEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)]
)
def test_who_asks_to_be_left_alone_is(breaker: Breaker, clock: Clock, after: float, pause: float) -> None:
    ask(breaker, PeerUnavailable("busy", after=after))
    clock.now += pause - 0.1
    assert not breaker.allows()
    clock.now += 0.1
    assert breaker.allows()


def test_a_failure_that_asks_for_less_does_not_shorten_the_pause(breaker: Breaker, clock: Clock) -> None:
    ask(breaker, PeerUnavailable("busy", after=60))
    ask(breaker, PeerUnavailable("one that was under way"))
    clock.now += 59
    assert not breaker.allows()


@pytest.mark.parametrize(("seconds", "allows"), [(SLOW_SECONDS, False), (SLOW_SECONDS / 2, True)])
def test_to_be_given_up_on_is_a_failure_for_who_is_slow(
    breaker: Breaker, clock: Clock, seconds: float, allows: bool
) -> None:
    for _ in range(FAILURES):
        with suppress(asyncio.CancelledError), breaker.watching(PeerUnavailable):
            clock.now += seconds
            raise asyncio.CancelledError
    assert breaker.allows() is allows
