"""Waiting for changes in directories."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from cachesrv.push import changes as module
from cachesrv.push.changes import DELETED, MOVED_IN, Changes
from tests.waiting import PLENTY

if TYPE_CHECKING:
    from pathlib import Path

    from cachesrv.push.changes import Changes as ChangesType


async def until_changed(changes: ChangesType) -> None:
    async with asyncio.timeout(20):
        await changes.wait()


async def test_changes_of_the_kinds_asked_for_wake(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    (tmp_path / "file").touch()
    with Changes() as changes:
        changes.add(str(one), MOVED_IN)
        changes.add(str(two), DELETED)

        (tmp_path / "file").rename(one / "file")
        await until_changed(changes)
        (one / "file").rename(two / "file")
        await changes.wait(0.05)
        assert not changes.pending
        (two / "file").unlink()
        await until_changed(changes)


async def test_what_happened_before_the_wait_counts(tmp_path: Path) -> None:
    with Changes() as changes:
        changes.wake()
        assert changes.pending
        await until_changed(changes)
        assert not changes.pending


async def test_many_events_wake_once(tmp_path: Path) -> None:
    with Changes() as changes:
        changes.add(str(tmp_path), DELETED)
        for _ in range(2):
            files = [tmp_path / f"{'x' * 200}{number}" for number in range(1000)]
            for file in files:
                file.touch()
                file.unlink()
            await until_changed(changes)
            await changes.wait(0.01)
            assert not changes.pending


@pytest.mark.parametrize("later", range(4))
async def test_one_who_waits_can_be_cancelled_in_the_moment_of_a_change(later: int) -> None:
    async def wait_for_ever() -> None:
        with Changes() as changes:
            waiting.append(changes)
            while True:
                await changes.wait(1000)

    waiting: list[ChangesType] = []
    task = asyncio.create_task(wait_for_ever())
    await asyncio.sleep(0.01)
    waiting[0].wake()
    for _ in range(later):
        await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=PLENTY)
    assert done


async def test_a_wait_has_an_end(tmp_path: Path) -> None:
    with Changes() as changes:
        changes.add(str(tmp_path), MOVED_IN)
        await changes.wait(0.01)


@pytest.mark.parametrize("deaf", ["no instance", "no directory"])
async def test_where_there_is_no_inotify_it_is_looked_from_time_to_time(
    deaf: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL", 0.01)
    if deaf == "no instance":

        class Libc:
            inotify_init1 = staticmethod(lambda _: -1)
            inotify_add_watch = staticmethod(lambda *_: -1)

        monkeypatch.setattr(module, "_libc", Libc)
    with Changes() as changes:
        changes.add(str(tmp_path / "nowhere"), MOVED_IN)
        await until_changed(changes)
