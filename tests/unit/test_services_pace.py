"""Work at no more than so many bytes a second."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from cachesrv.services.pace import Pace

if TYPE_CHECKING:
    import pytest


async def test_bytes_take_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    slow = Pace(1000)
    for _ in range(100):
        await slow.spend(100)
    assert 109.5 < now < 110.0
    now += 1000  # rest is not saved up
    before = now
    for _ in range(100):
        await slow.spend(100)
    assert 9.5 < now - before < 10.0
    before = now
    await Pace(0).spend(10**12)
    assert now == before
