"""Many things worked on in the event loop, without holding up who else needs it: lookups are answered there too."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

T = TypeVar("T")

_TURN = 0.002
"""Seconds of work, after which the others have their turn."""


async def unhurried(items: Iterable[T]) -> AsyncIterator[T]:
    """The items, with pauses between them."""
    end = time.monotonic() + _TURN
    for item in items:
        yield item
        if time.monotonic() > end:
            await asyncio.sleep(0)
            end = time.monotonic() + _TURN
