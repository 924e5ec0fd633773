"""Chores that are due, and those that are not."""

from __future__ import annotations

import asyncio
import time

from cachesrv.errors import StoreError
from cachesrv.services.schedule import Chore, scheduled


class Notes:
    """A catalog's notes. `asked` is released each time that they are looked at."""

    def __init__(self, **notes: str) -> None:
        self.notes = notes
        self.asked = asyncio.Semaphore(0)
        self.error: Exception | None = None

    async def noted(self, name: str) -> str | None:
        self.asked.release()
        if self.error:
            raise self.error
        return self.notes.get(name)


async def looked(notes: Notes, times: int) -> None:
    async with asyncio.timeout(10):
        while not notes.asked.locked():
            await notes.asked.acquire()
        for _ in range(times):
            await notes.asked.acquire()


async def test_what_was_never_done_is_due_and_then_not_for_a_while() -> None:
    notes, done = Notes(), []

    async def do() -> None:
        done.append(1)
        notes.notes["swept"] = str(int(time.time()))

    async with scheduled(notes, [Chore("swept", 3600, do)], first=0, look_again=0):  # type: ignore[arg-type]  # notes are all that it needs
        await looked(notes, 5)
        assert len(done) == 1
        # somebody else did it long ago
        notes.notes["swept"] = str(int(time.time()) - 3600)
        await looked(notes, 5)
        assert len(done) == 2


async def test_what_was_done_by_a_clock_that_was_wrong_does_not_wait_for_that_time() -> None:
    notes, done = Notes(swept=str(int(time.time()) + 10 * 365 * 86_400)), []

    async def do() -> None:
        done.append(1)
        notes.notes["swept"] = str(int(time.time()))

    async with scheduled(notes, [Chore("swept", 3600, do)], first=0, look_again=0):  # type: ignore[arg-type]  # see above
        await looked(notes, 5)
    assert len(done) == 1


async def test_neither_a_chore_nor_the_catalog_that_fails_ends_it() -> None:
    notes, done = Notes(), []

    async def do() -> None:
        done.append(1)
        raise ValueError("broken")

    async with scheduled(notes, [Chore("swept", 3600, do)], first=0, look_again=0):  # type: ignore[arg-type]  # see above
        await looked(notes, 2)
        assert len(done) > 1
        notes.error = StoreError("away")
        await looked(notes, 2)
        before = len(done)
        await looked(notes, 2)
        assert len(done) == before
        notes.error = None
        await looked(notes, 2)
        assert len(done) > before


async def test_leaving_cancels_what_is_being_done() -> None:
    began, ended = asyncio.Event(), []

    async def do() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(1)

    async with scheduled(Notes(), [Chore("swept", 3600, do)], first=0):  # type: ignore[arg-type]  # see above
        await asyncio.wait_for(began.wait(), 10)
    assert ended


async def test_a_long_one_does_not_hold_up_the_others() -> None:
    other = asyncio.Event()

    async def long() -> None:
        await asyncio.Event().wait()

    async def short() -> None:
        other.set()

    chores = [Chore("long", 3600, long), Chore("short", 3600, short)]
    async with scheduled(Notes(), chores, first=0):  # type: ignore[arg-type]  # see above
        await asyncio.wait_for(other.wait(), 10)
