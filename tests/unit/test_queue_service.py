"""The service: what wakes it, what it waits for, and when it ends."""

from __future__ import annotations

import asyncio
import json
import os
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest

from cachesrv.errors import ConfigError, NotAllowed, PeerError, StoreFull
from cachesrv.push import changes
from cachesrv.push.queue import process, runner, work
from cachesrv.push.queue.entries import TROUBLE, Counts, Entry
from cachesrv.push.queue.intake import Incoming, number_written
from cachesrv.push.queue.lock import QueueLock
from cachesrv.push.queue.process import retry
from cachesrv.push.queue.runner import Service, drain
from cachesrv.push.queue.status import read_status, status_lines
from cachesrv.push.retry import Backoff, TryAgain
from tests.push_doubles import FakeCache, answer
from tests.queue_doubles import FakeQueue, full
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

EMPTY = Counts()


@pytest.fixture
def queue(tmp_path: Path, cache: FakeCache) -> Iterator[FakeQueue]:
    with FakeQueue(tmp_path, cache) as queue:
        yield queue


@asynccontextmanager
async def serving(queue: FakeQueue, **options: Any) -> AsyncIterator[asyncio.Task[None]]:
    """A service that hears hooks."""
    ready = asyncio.Event()
    service = Service(queue.work, idle=options.pop("idle", None))
    task = asyncio.create_task(service.run(ready=ready.set, **options))
    await asyncio.wait_for(ready.wait(), 20)
    yield task
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_what_waited_and_what_comes_is_pushed(queue: FakeQueue, cache: FakeCache) -> None:
    queue.built("before")
    async with serving(queue):
        await until(lambda: len(cache.published) == 1)
        queue.built("after")
        await until(lambda: len(cache.published) == 2)


async def test_hooks_are_heard_in_a_directory_that_was_made_anew(
    queue: FakeQueue, cache: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changes, "POLL", 0.05)
    async with serving(queue):
        await asyncio.to_thread(os.rename, f"{queue.directory}/incoming", f"{queue.directory}/away")
        queue.built("one")
        await until(lambda: len(cache.published) == 1)
        queue.built("two")
        await until(lambda: len(cache.published) == 2)


async def test_what_another_one_left_in_flight_is_pushed(queue: FakeQueue, cache: FakeCache) -> None:
    queue.built("one")
    await queue.work.take_in()
    queue.entries.claim([Entry(full("one"))])
    async with serving(queue):
        await until(lambda: len(cache.published) == 1)


async def test_it_tells_how_it_stands(queue: FakeQueue, cache: FakeCache) -> None:
    shown: list[Counts] = []
    queue.built("one")
    async with serving(queue, show=shown.append):
        await until(lambda: bool(shown))

    assert shown[-1] == EMPTY


async def test_failed_ones_are_tried_again_by_themselves(
    queue: FakeQueue, cache: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "AGAIN", Backoff(first=0.01))
    cache.fail("nar", answer(422, "no"), answer(422, "no"))
    queue.built("one")
    async with serving(queue):
        await until(lambda: len(cache.published) == 1)

    assert queue.told.kept_for == {full("one"): ["no", "no"]}


async def test_trouble_passes_and_hooks_do_not_hurry_it(
    queue: FakeQueue, cache: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "TROUBLED", Backoff(first=3600, longest=3600))
    queue.way.closed.append(ConfigError("no token yet"))
    queue.built("one")
    async with serving(queue):
        await until(lambda: bool(queue.told.troubles))
        queue.built("two")
        await until(lambda: len(queue.waiting()) == 2)
        assert queue.way.pushes == []
        status = read_status(queue.directory)
        assert retry(queue.directory, ()) == 0
        await until(lambda: len(cache.published) == 2)
        await until(lambda: queue.entries.counts() == EMPTY)

    assert status.trouble is not None
    assert status.trouble.reason == "no token yet"
    assert 1700 < status.trouble.next_try - time.time() <= 3600
    assert any(line.startswith("trouble ") and "no token yet" in line for line in status_lines(status))
    assert queue.entries.fact(TROUBLE) is None
    assert queue.told.troubles == ["no token yet"]
    assert "cachesrv_queue_troubles_total 1.0" in queue.figures.read_text()


async def test_a_server_may_ask_to_be_left_alone(
    queue: FakeQueue, cache: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "TROUBLED", Backoff(first=0.01, longest=3600))
    queue.way.closed.append(TryAgain("later", retry_after=1000))
    queue.built("one")
    async with serving(queue):
        await until(lambda: queue.entries.fact(TROUBLE) is not None)

    assert 900 < json.loads(queue.entries.fact(TROUBLE) or "")["next_try"] - time.time() <= 1000


async def test_a_full_disk_is_waited_for(queue: FakeQueue, cache: FakeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "TROUBLED", Backoff(first=0.01, longest=0.01))
    full_disk = [StoreFull("there is no room for the queue")] * 3
    truly = queue.entries.note

    def note(*arguments: Any) -> None:
        if full_disk and arguments[1] is not None:
            raise full_disk.pop()
        truly(*arguments)

    def add(*arguments: Any) -> None:
        if len(full_disk) > 1:
            raise full_disk[0]
        truly_add(*arguments)

    truly_add = queue.entries.add
    monkeypatch.setattr(queue.entries, "note", note)
    monkeypatch.setattr(queue.entries, "add", add)
    queue.built("one")
    async with serving(queue):
        await until(lambda: len(cache.published) == 1)

    assert queue.told.troubles == ["there is no room for the queue"] * 2


async def test_when_idle_it_ends_but_not_before_all_is_done(
    queue: FakeQueue, cache: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "AGAIN", Backoff(first=0.3, longest=0.3))
    cache.fail("nar", answer(422, "no"))
    queue.built("one")
    async with serving(queue, idle=0.01) as task:
        await asyncio.wait_for(task, 20)

    assert len(cache.published) == 1
    assert queue.entries.counts() == EMPTY


async def test_a_fifo_wakes_it_and_is_read(queue: FakeQueue, cache: FakeCache, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "wake")
    fifo = os.open(tmp_path / "wake", os.O_RDWR)
    queue.work.sources = []  # deaf to all else
    async with serving(queue, fifos=[fifo], idle=3600):
        queue.built("one")
        queue.entries.add([Entry(full("one"), queued=1)])
        os.write(fifo, b"\n\n\n")
        await until(lambda: len(cache.published) == 1)

    os.set_blocking(fifo, False)
    with pytest.raises(BlockingIOError):
        os.read(fifo, 1)
    os.close(fifo)


async def test_a_drain_tries_everything_once(queue: FakeQueue, cache: FakeCache) -> None:
    queue.built("one", "bad", "failed-before", "bad-again")
    await queue.work.take_in()
    for name in ("failed-before", "bad-again"):
        queue.entries.failed({Entry(full(name)): ("before", time.time() + 3600)})
    queue.way.errors[full("bad")] = queue.way.errors[full("bad-again")] = NotImplementedError("no")
    queue.built("late")

    left = await drain(queue.work)

    assert sorted(entry.path for entry in left) == sorted([full("bad"), full("bad-again")])
    assert {entry.attempts for entry in left} == {1, 2}
    assert len(cache.published) == 3


async def test_a_drain_ends_with_what_concerns_all(queue: FakeQueue, cache: FakeCache) -> None:
    queue.built("one")
    cache.fail("cache", answer(403, "not you"))

    with pytest.raises(NotAllowed, match="not you"):
        await drain(queue.work)
    assert queue.waiting() == [full("one")]
    assert queue.entries.counts().pushing == 0


async def test_one_who_drains_beside_a_service_waits_for_it(queue: FakeQueue, cache: FakeCache) -> None:
    cache.fail("nar", answer(422, "no"))
    queue.built("one")
    async with serving(queue):
        await until(lambda: bool(queue.failed()))
        go_on = asyncio.Event()
        cache.fail("nar", lambda request: _after(go_on, request))
        left = asyncio.create_task(process._wait_for_other(queue.directory, _another_lock(queue), queue.work))
        await until(lambda: cache.count("nar") == 2)
        assert not left.done()
        go_on.set()

        assert [entry.reason for entry in await asyncio.wait_for(left, 20)] == ["still not"]


async def test_one_who_drains_beside_a_service_in_trouble_hears_of_it(queue: FakeQueue, cache: FakeCache) -> None:
    queue.way.closed.extend([ConfigError("no token")] * 3)
    queue.built("one")
    async with serving(queue):
        await until(lambda: queue.entries.fact(TROUBLE) is not None)
        with pytest.raises(PeerError, match="nothing can be pushed: no token"):
            await asyncio.wait_for(process._wait_for_other(queue.directory, _another_lock(queue), queue.work), 20)


@pytest.mark.parametrize("look", ["written", "counts"])
async def test_one_who_drains_misses_nothing_that_is_being_taken_in(
    queue: FakeQueue, monkeypatch: pytest.MonkeyPatch, look: str
) -> None:
    """The service takes it in between two looks at where it may be."""
    looked_at = process if look == "written" else queue.entries
    truly = getattr(looked_at, look)

    def first_look(*arguments: Any) -> Any:
        found = truly(*arguments)
        Incoming(queue.directory)._take_in(queue.entries)
        return found

    queue.built("one")
    monkeypatch.setattr(looked_at, look, first_look)
    assert not process._is_done(queue.directory, queue.entries, time.time())


async def test_one_who_drains_does_not_wait_for_what_nobody_can_read(queue: FakeQueue) -> None:
    await asyncio.to_thread(os.mkdir, f"{queue.directory}/incoming/directory")

    assert process._is_done(queue.directory, queue.entries, time.time())


async def test_one_who_drains_takes_over_from_a_service_that_ends(
    queue: FakeQueue, cache: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_LOOK", 0.05)
    queue.built("one")
    other = _another_lock(queue)
    left = asyncio.create_task(process._wait_for_other(queue.directory, other, queue.work))
    await until(lambda: number_written(queue.directory) == 2)  # it has called the other one
    queue.lock.close()

    assert await asyncio.wait_for(left, 20) == []
    assert len(cache.published) == 1
    other.close()


def _another_lock(queue: FakeQueue) -> QueueLock:
    lock = QueueLock(queue.directory)
    assert not lock.take()
    return lock


async def _after(event: asyncio.Event, request: Any) -> Any:
    await event.wait()
    return await answer(422, "still not")(request)
