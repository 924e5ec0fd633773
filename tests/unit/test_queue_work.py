"""What a queue does with what it holds: one push after another, and nothing holds up anything else."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cachesrv.errors import BadInput, ConfigError, DaemonError, ServerError, StoreError
from cachesrv.push.queue import work as module
from cachesrv.push.queue.entries import Counts, Entry
from cachesrv.push.queue.figures import write_figures
from cachesrv.push.queue.spool import put
from cachesrv.push.queue.work import AGAIN, CannotPush
from tests.push_doubles import FakeCache, answer
from tests.queue_doubles import FakeQueue, full
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from aiohttp import web


@pytest.fixture
def queue(tmp_path: Path, cache: FakeCache) -> Iterator[FakeQueue]:
    with FakeQueue(tmp_path, cache) as queue:
        yield queue


async def everything(queue: FakeQueue, until: float | None = None) -> int:
    """All steps until there is nothing to do; how many."""
    steps = 0
    while await queue.work.step(time.time() if until is None else until):
        steps += 1
    return steps


async def test_all_that_waits_goes_in_one_push(queue: FakeQueue, cache: FakeCache) -> None:
    queue.built("one", "two", "three")

    assert await everything(queue) == 1
    assert queue.way.pushes == [["one", "two", "three"]]
    assert len(cache.published) == 3
    assert cache.count("missing") == 1
    assert queue.waiting() == []
    assert queue.told.summaries[0].uploaded == 3


async def test_a_path_that_is_queued_again_is_pushed_once(queue: FakeQueue, cache: FakeCache) -> None:
    queue.built("one")
    for _ in range(5):
        put(queue.directory, [full("one").encode()])

    assert await everything(queue) == 1
    assert cache.count("nar") == 1


async def test_what_is_there_already_is_done(queue: FakeQueue, cache: FakeCache) -> None:
    queue.built("one")
    await everything(queue)
    put(queue.directory, [full("one").encode()])

    assert await everything(queue) == 1
    assert cache.count("nar") == 1
    assert queue.entries.counts().oldest is None


async def test_what_is_refused_is_kept_with_its_reason_and_holds_nobody_up(queue: FakeQueue, cache: FakeCache) -> None:
    queue.built("bad")
    cache.fail("nar", answer(422, "not that one"))
    await everything(queue)
    queue.built("good")
    await everything(queue)

    assert list(cache.published) == [full("good").rpartition("/")[2]]
    assert queue.failed() == {full("bad"): "not that one"}
    assert queue.told.kept_for == {full("bad"): ["not that one"]}
    [entry] = queue.entries.those_failed()
    assert entry.next_try > time.time()


async def test_what_failed_is_tried_again_when_it_is_time(queue: FakeQueue, cache: FakeCache) -> None:
    queue.built("bad")
    cache.fail("nar", answer(422, "no"), answer(422, "no"))
    await everything(queue)
    [first] = queue.entries.those_failed()
    await everything(queue, first.next_try)
    [second] = queue.entries.those_failed()

    assert second.attempts == 2
    assert second.next_try - time.time() > AGAIN.first
    assert await everything(queue, second.next_try - 1) == 0
    assert await everything(queue, second.next_try) == 1
    assert queue.failed() == {}
    assert cache.published


async def test_new_and_failed_ones_take_turns(queue: FakeQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue.work, "_most", 1)
    monkeypatch.setattr(module, "MOST", 1)
    names = ["a", "b", "c", "d"]
    queue.built(*names)
    await queue.work.take_in()
    queue.entries.failed({Entry(full(name)): ("before", 0) for name in names[:2]})

    assert await everything(queue) == 4
    assert [name for [name] in queue.way.pushes] == ["c", "a", "d", "b"]


async def test_what_breaks_a_push_is_found_and_holds_nobody_up(queue: FakeQueue, cache: FakeCache) -> None:
    names = [f"path-{number}" for number in range(9)]
    queue.built(*names)
    queue.way.errors[full("path-4")] = DaemonError("the database is damaged there")
    await everything(queue)

    assert queue.failed() == {full("path-4"): "the database is damaged there"}
    assert len(cache.published) == 8
    assert len(queue.way.pushes) <= 12


async def test_a_defect_that_one_path_shows_is_like_that_too(queue: FakeQueue, cache: FakeCache) -> None:
    queue.built("one", "two")
    queue.way.errors[full("two")] = ZeroDivisionError("x")
    await everything(queue)

    assert queue.failed() == {full("two"): "defect, please report it: ZeroDivisionError: x"}
    assert len(cache.published) == 1


async def test_a_limit_of_this_machine_is_the_fault_of_no_path(queue: FakeQueue) -> None:
    queue.built("one", "two")
    queue.way.errors[full("two")] = RuntimeError("can't start new thread")
    with pytest.raises(CannotPush) as stopped:
        await everything(queue)
    assert str(stopped.value.args[0]).startswith("no thread could be started")
    assert queue.failed() == {}


@pytest.mark.parametrize("error", [ConfigError("which cache?"), DaemonError("nobody listens"), StoreError("gone")])
async def test_what_must_be_opened_first_concerns_all(queue: FakeQueue, cache: FakeCache, error: Exception) -> None:
    queue.built("one", "two")
    queue.way.closed.append(error)
    with pytest.raises(CannotPush, match=str(error)):
        await everything(queue)

    assert queue.failed() == {}
    assert len(queue.waiting()) == 2
    assert queue.entries.counts().pushing == 0
    assert await everything(queue) == 1


async def test_a_server_that_is_gone_concerns_all(queue: FakeQueue, cache: FakeCache) -> None:
    queue.built("one", "two")
    cache.fail("cache", answer(404, "no such cache"))
    with pytest.raises(CannotPush) as caught:
        await everything(queue)

    assert isinstance(caught.value.error, ServerError)
    assert queue.failed() == {}
    assert await everything(queue) == 1
    assert queue.way.pushes == [["one", "two"], ["one", "two"]]


async def test_what_the_store_has_no_more_is_dropped(queue: FakeQueue, cache: FakeCache) -> None:
    queue.built("one")
    put(queue.directory, [full("gone").encode()])

    assert await everything(queue) == 1
    assert queue.told.gone == [full("gone")]
    assert queue.waiting() == []
    assert len(cache.published) == 1


async def test_what_is_built_again_while_it_is_found_gone_is_pushed(queue: FakeQueue, cache: FakeCache) -> None:
    queue.built("one")
    put(queue.directory, [full("gone").encode()])

    async def build_again(request: web.Request) -> web.StreamResponse:
        queue.built("gone")
        await queue.work.take_in()
        return await answer(503, "later")(request)

    cache.fail("missing", build_again)
    assert await everything(queue) == 2
    assert queue.told.gone == []
    assert len(cache.published) == 2


async def test_what_is_of_another_store_is_kept(queue: FakeQueue) -> None:
    other = f"/elsewhere/{full('one').rpartition('/')[2]}"
    put(queue.directory, [other.encode(), b"/nix/store/garbage"])
    await everything(queue)

    assert queue.told.gone == []
    assert {path: reason and reason[-32:] for path, reason in queue.failed().items()} == {
        other: "not in the store directory /nix/store"[-32:],
        "/nix/store/garbage": "not <hash part>-<name> of a store path"[-32:],
    }


async def test_derivations_stand_for_what_came_out_of_them(queue: FakeQueue, cache: FakeCache) -> None:
    queue.store.add("one")
    queue.store.add("two")
    queue.way.known_outputs[full("one.drv")] = [full("one"), full("two")]
    put(queue.directory, [], full("one.drv").encode())
    put(queue.directory, [], full("gone.drv").encode())
    await everything(queue)

    assert len(cache.published) == 2
    assert queue.told.gone == [full("gone.drv")]
    assert queue.entries.counts().oldest is None


async def test_derivations_that_cannot_be_looked_up_are_kept(queue: FakeQueue, monkeypatch: pytest.MonkeyPatch) -> None:
    async def outputs(*_: object) -> None:
        raise BadInput("a row that no Nix writes")

    monkeypatch.setattr(type(queue.way), "outputs", outputs)
    queue.built("other")
    put(queue.directory, [], full("one.drv").encode())
    await everything(queue)

    assert queue.failed() == {full("one.drv"): "a row that no Nix writes"}
    assert queue.waiting() == []


async def test_a_push_that_is_cut_off_loses_nothing(queue: FakeQueue, cache: FakeCache) -> None:
    queue.built("one", "two")
    begun = asyncio.Event()

    async def hang(request: web.Request) -> web.StreamResponse:
        begun.set()
        await asyncio.sleep(60)
        raise ConnectionResetError

    cache.fail("nar", hang, hang)
    task = asyncio.create_task(everything(queue))
    await asyncio.wait_for(begun.wait(), 20)
    assert queue.entries.counts().pushing == 2
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task

    assert queue.entries.counts().pushing == 0
    assert len(queue.waiting()) == 2
    cache.faults.clear()
    assert await everything(queue) == 1


async def test_a_push_is_told_also_by_one_who_is_stopped_then(
    queue: FakeQueue, cache: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the moment in which the queue forgets what was pushed."""
    queue.built("one")
    loop, truly = asyncio.get_running_loop(), queue.entries.done

    def done(entries: Iterable[Entry]) -> None:
        truly(entries)
        loop.call_soon_threadsafe(task.cancel)

    monkeypatch.setattr(queue.entries, "done", done)
    task = asyncio.create_task(everything(queue))
    with pytest.raises(asyncio.CancelledError):
        await task

    assert [summary.paths for summary in queue.told.summaries] == [1]
    assert queue.work.figures.pushed == 1


async def test_meanwhile_the_queue_is_up_to_date(
    queue: FakeQueue, cache: FakeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has been published has left it, what hooks write has joined it, while a push goes on."""
    monkeypatch.setattr(module, "_REFRESH", 0.01)
    queue.built("one")
    queue.store.add("two", b"two" * 1000)
    put(queue.directory, [full("two").encode()])
    go_on = asyncio.Event()

    async def wait(request: web.Request) -> web.StreamResponse:
        await go_on.wait()
        return await answer(422, "too late")(request)

    cache.fail("nar", wait)
    task = asyncio.create_task(everything(queue))
    await asyncio.wait_for(cache.publication.wait(), 20)
    put(queue.directory, [full("three").encode()])
    await until(lambda: (queue.entries.counts().pushing, queue.entries.counts().waiting) == (1, 1))
    await until(lambda: 'state="waiting"} 1.0' in queue.figures.read_text())
    figures = queue.figures.read_text()
    go_on.set()
    await task

    assert 'cachesrv_queue_paths{state="in_flight"} 1.0' in figures
    assert queue.told.gone == [full("three")]


async def test_prometheus_is_told(queue: FakeQueue, cache: FakeCache) -> None:
    queue.built("one", "bad")
    cache.fail("nar", answer(422, "no"))
    put(queue.directory, [full("gone").encode()])
    await everything(queue)
    await queue.work.show()

    lines = dict(line.rsplit(" ", 1) for line in queue.figures.read_text().splitlines() if not line.startswith("#"))
    for name, value in {
        'paths{state="waiting"}': 0,
        'paths{state="failed"}': 1,
        "pushed_paths_total": 1,
        "dropped_paths_total": 1,
        "failures_total": 1,
        "trouble": 0,
    }.items():
        assert float(lines[f"cachesrv_queue_{name}"]) == value, name
    assert float(lines["cachesrv_queue_oldest_timestamp_seconds"]) > 0
    assert float(lines["cachesrv_queue_sent_bytes_total"]) > 0
    assert queue.figures.stat().st_mode & 0o777 == 0o644
    assert [path.name for path in queue.figures.parent.glob(".figures*")] == []


@pytest.mark.parametrize("file", ["/dev/null/x", f"/{'x' * 300}", ".", "/"])
async def test_figures_that_cannot_be_written_hold_nobody_up(queue: FakeQueue, cache: FakeCache, file: str) -> None:
    queue.built("one")
    unable = module.Work(queue.entries, queue.work.sources, queue.way, queue.told, figures=Path(file))

    assert await unable.step(time.time())
    assert await unable.show() == Counts()
    with pytest.raises(StoreError, match="cannot be written: "):
        write_figures(Path(file), b"")
