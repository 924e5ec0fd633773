"""Questions for which a client waits: they end in time."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from cachesrv.errors import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@asynccontextmanager
async def waiting(seconds: float, question: str) -> AsyncIterator[None]:
    """What is inside asks `question`, such as "whether x is there". Raises StoreUnavailable when it takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise StoreUnavailable(f"nobody could say within {seconds:g} s {question}") from None
