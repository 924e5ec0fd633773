from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from stamina.instrumentation import set_on_retry_hooks
from structlog.testing import capture_logs

from cachesrv.errors import NotFound, StoreError, StoreUnavailable
from cachesrv.storage.decorators import Direct, Guarded, Limited, Measured, Retrying, SlowDown, TryAgain, log_retries

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cachesrv.storage.decorators import Requests


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def failing(*outcomes: Exception | str) -> Callable[[], Awaitable[str]]:
    """A request with these outcomes, one after the other."""
    waiting = iter(outcomes)

    async def request() -> str:
        outcome = next(waiting)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return request


async def outcome(requests: Requests, *outcomes: Exception | str) -> str:
    try:
        return await requests.run("x", failing(*outcomes))
    except StoreError as error:
        return str(error)


async def test_what_may_pass_is_tried_again() -> None:
    retrying = Retrying(Direct(), attempts=3, first=0.001)
    assert await outcome(retrying, TryAgain("1"), SlowDown("2"), "done") == "done"
    assert await outcome(retrying, TryAgain("1"), SlowDown("2"), TryAgain("3"), "late") == "3"


async def test_what_is_tried_again_is_told() -> None:
    log_retries()
    try:
        with capture_logs() as told:
            await outcome(Retrying(Direct(), first=0.001), TryAgain("the bucket did not answer"), "done")
    finally:
        set_on_retry_hooks(None)
    (event,) = told
    assert event.pop("in_seconds") < 1
    assert event == {
        "event": "a request is tried again",
        "error": "the bucket did not answer",
        "log_level": "info",
    }


@pytest.mark.parametrize("error", [StoreError("e"), StoreUnavailable("e"), NotFound("e"), ValueError("e")])
async def test_what_does_not_pass_is_not(error: Exception) -> None:
    with pytest.raises(type(error)):
        await Retrying(Direct(), first=0.001).run("x", failing(error, "done"))


async def test_the_delay_that_the_service_wants_is_kept() -> None:
    retrying = Retrying(Direct(), attempts=3, first=0.001, longest=0.3)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    assert await outcome(retrying, SlowDown("1", after=0.2), "done") == "done"
    assert loop.time() - begun >= 0.2
    assert await outcome(retrying, SlowDown("too long", after=0.4), "done") == "too long"


async def test_trying_again_has_an_end_in_time() -> None:
    retrying = Retrying(Direct(), attempts=1000, timeout=0.1, first=0.02, longest=0.02)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    assert await outcome(retrying, *[TryAgain("again")] * 1000) == "again"
    assert loop.time() - begun < 10


class Service:
    """Bears so many requests at a time."""

    def __init__(self, bears: int = 1000) -> None:
        self.bears = bears
        self.now = 0
        self.most = 0
        self.refused = 0

    async def __call__(self) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(0)
            if self.now > self.bears:
                self.refused += 1
                raise SlowDown("too many")
            await asyncio.sleep(0.0001)
        finally:
            self.now -= 1


async def test_the_limit_holds_and_nobody_is_forgotten() -> None:
    service = Service()
    limited = Limited(Direct(), most=7)
    await asyncio.gather(*(limited.run("x", service) for _ in range(200)))
    assert service.most == 7


async def test_the_limit_goes_down_fast_and_up_slowly() -> None:
    limited = Limited(Direct(), most=64)
    for expected in (32, 16, 8, 4, 2, 1, 1):
        with pytest.raises(SlowDown):
            await limited.run("x", failing(SlowDown("no")))
        assert limited.limit == expected
    successes = 0
    while limited.limit < 64:
        await limited.run("x", failing("done"))
        successes += 1
    assert 64 * 64 / 2 - 200 < successes < 64 * 64 / 2 + 200
    await limited.run("x", failing("done"))
    assert limited.limit == 64


async def test_complaints_of_one_moment_count_once() -> None:
    limited = Limited(Direct(), most=16)
    service = Service(bears=0)
    await asyncio.gather(*(limited.run("x", service) for _ in range(16)), return_exceptions=True)
    assert service.refused == 16
    assert limited.limit == 8


async def test_it_finds_what_the_service_bears() -> None:
    service = Service(bears=10)
    limited = Limited(Direct(), most=64)
    retrying = Retrying(limited, attempts=20, first=0.0001, longest=0.001)
    await asyncio.gather(*(retrying.run("x", service) for _ in range(600)))
    refused_while_learning = service.refused
    await asyncio.gather(*(retrying.run("x", service) for _ in range(600)))
    assert limited.limit <= 12
    assert service.refused - refused_while_learning < 250


async def test_other_errors_leave_the_limit() -> None:
    limited = Limited(Direct(), most=16)
    for error in (TryAgain("e"), NotFound("e"), StoreError("e")):
        with pytest.raises(type(error)):
            await limited.run("x", failing(error))
    assert limited.limit == 16


async def test_cancelled_waiters_make_way() -> None:
    limited = Limited(Direct(), most=1)
    gate = asyncio.Event()
    done: list[int] = []

    async def wait() -> None:
        await gate.wait()

    async def note() -> None:
        done.append(len(done))

    first = asyncio.create_task(limited.run("x", wait))
    waiting = [asyncio.create_task(limited.run("x", note)) for _ in range(4)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    waiting[2].cancel()
    gate.set()
    await first
    # One more is cancelled in the moment in which its turn comes.
    waiting[1].cancel()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [isinstance(result, asyncio.CancelledError) for result in results][::2] == [True, True]
    assert results[3] is None
    await limited.run("x", note)


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def test_who_is_gone_is_left_alone_and_looked_for(clock: Clock) -> None:
    guarded = Guarded(Direct(), patience=10, pause=2, clock=clock)
    assert await outcome(guarded, TryAgain("a")) == "a"
    clock.now += 9.9
    assert await outcome(guarded, TryAgain("b")) == "b"
    assert await outcome(guarded, "there") == "there"
    for said in ("c", "d"):
        clock.now += 9.9
        assert await outcome(guarded, TryAgain(said)) == said
    clock.now += 0.1
    assert await outcome(guarded, TryAgain("e")) == "e"
    gone = await outcome(guarded, "not asked")
    assert gone.startswith("e (so it is since 10 seconds")
    with pytest.raises(StoreUnavailable) as caught:
        await guarded.run("x", failing("not asked"))
    assert not isinstance(caught.value, TryAgain)
    clock.now += 2
    assert await outcome(guarded, TryAgain("f")) == "f"
    assert (await outcome(guarded, "not asked")).startswith("f")
    clock.now += 2
    assert await outcome(guarded, "there") == "there"
    assert await outcome(guarded, "there") == "there"


async def test_one_at_a_time_looks_for_who_is_gone(clock: Clock) -> None:
    guarded = Guarded(Direct(), patience=0, pause=2, clock=clock)
    await outcome(guarded, TryAgain("gone"))
    clock.now += 2
    gate = asyncio.Event()

    async def wait() -> str:
        await gate.wait()
        return "there"

    look = asyncio.create_task(guarded.run("x", wait))
    await asyncio.sleep(0)
    assert (await outcome(guarded, "not asked")).startswith("gone")
    gate.set()
    assert await look == "there"
    assert await outcome(guarded, "there") == "there"


@pytest.mark.parametrize("answer", [SlowDown("s"), StoreError("denied"), NotFound("n")])
async def test_who_answers_is_not_gone(clock: Clock, answer: Exception) -> None:
    guarded = Guarded(Direct(), patience=10, clock=clock)
    for _ in range(5):
        await outcome(guarded, TryAgain("a"))
        clock.now += 9
        with pytest.raises(type(answer)):
            await guarded.run("x", failing(answer))
        clock.now += 9
    assert await outcome(guarded, "there") == "there"


async def test_every_request_is_told(clock: Clock) -> None:
    told: list[tuple[str, float, str]] = []
    measured = Measured(
        Direct(), lambda operation, seconds, error: told.append((operation, seconds, repr(error))), clock=clock
    )

    async def request() -> str:
        clock.now += 3
        return "done"

    assert await measured.run("a", request) == "done"
    with pytest.raises(NotFound):
        await measured.run("b", failing(NotFound("n")))
    assert told == [("a", 3, "None"), ("b", 0, "NotFound('n')")]
