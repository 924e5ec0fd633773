"""Chores that one of all processes does from time to time, and that nobody does twice."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from cachesrv.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection

    from cachesrv.catalog.base import Catalog

_log = structlog.get_logger()

FIRST = 60.0
"""Seconds after the start before anything is due: there is enough to do then."""
LOOK_AGAIN = 300.0


@dataclass(frozen=True, slots=True)
class Chore:
    """Something that is due `interval` seconds after it came to its end last: whoever does it says in the catalog when
    that was, by the note `note`.
    """

    note: str
    interval: int
    do: Callable[[], Awaitable[None]]


def is_due(done: int, interval: int) -> bool:
    """Whether something is due again that was done at that time. What was done that long after now was done by a clock
    that has been set back since: it would be due when that time comes, perhaps never.
    """
    return abs(time.time() - done) >= interval


@asynccontextmanager
async def scheduled(
    catalog: Catalog, chores: Collection[Chore], *, first: float = FIRST, look_again: float = LOOK_AGAIN
) -> AsyncIterator[None]:
    """Meanwhile do what is due. Leaving cancels what is being done."""
    tasks = [asyncio.create_task(_keep_doing(catalog, chore, first, look_again)) for chore in chores]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _keep_doing(catalog: Catalog, chore: Chore, first: float, look_again: float) -> None:
    await asyncio.sleep(min(first, chore.interval))
    while True:
        if await _is_due(catalog, chore):
            try:
                await chore.do()
            except Exception:  # noqa: BLE001  whatever became of it, it is due again
                _log.exception("a chore failed", defect=True, chore=chore.note)
        await asyncio.sleep(min(look_again, chore.interval))


async def _is_due(catalog: Catalog, chore: Chore) -> bool:
    """Others may have done it, here or on other hosts."""
    try:
        done = int(await catalog.noted(chore.note) or 0)
    except StoreError as error:
        _log.error("it cannot be told what is due", chore=chore.note, error=str(error))
        return False
    return is_due(done, chore.interval)
