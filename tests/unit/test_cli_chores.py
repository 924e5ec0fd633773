"""Commands that the server has started, and ends."""

from __future__ import annotations

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE
from typing import TYPE_CHECKING

from cachesrv.cli import chores

if TYPE_CHECKING:
    import pytest


async def test_what_does_not_end_when_it_is_told_to_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chores, "_STOPPING", 0.01)
    code = "import signal; signal.signal(2, signal.SIG_IGN); print('ready', flush=True); signal.pause()"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=PIPE)
    assert process.stdout
    assert await process.stdout.readline() == b"ready\n"
    await chores._end(process)
    assert process.returncode == -signal.SIGKILL


async def test_what_ends_just_before_it_is_killed_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asyncio has no process any more to kill when the time is over in the same round of its loop."""
    monkeypatch.setattr(chores, "_STOPPING", 0.01)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "import signal; signal.pause()")
    truly, ended = process.wait, asyncio.Event()

    async def wait() -> int:
        if not ended.is_set():
            try:
                await ended.wait()
            finally:
                process.kill()
                await truly()
                ended.set()
        return await truly()

    monkeypatch.setattr(process, "send_signal", lambda _: None)
    monkeypatch.setattr(process, "wait", wait)
    await chores._end(process)
    assert process.returncode == -signal.SIGKILL
