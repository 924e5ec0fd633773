"""Deletions that others began and died over, brought to their end: until then nobody can push what was to go."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from cachesrv.errors import CachesrvError
from cachesrv.services.maintenance import Busy, maintenance

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cachesrv.catalog.base import Catalog
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.removing import Removing

_log = structlog.get_logger()

PAUSE = 60.0
"""Seconds between two looks."""
_AFTER_FAILURE = 10
"""Pauses before the next try."""


async def keep_finishing(
    removing: Removing, catalog: Catalog, caches: Callable[[], Mapping[str, ServedCache]], *, pause: float = PAUSE
) -> None:
    """Look from time to time, for ever. Who is still at it is left alone."""
    pauses = 1
    while True:
        await asyncio.sleep(pauses * pause)
        pauses = 1
        try:
            if await catalog.doomed():
                async with maintenance(catalog):
                    number = await removing.finish(caches())
                if number:  # who was at it may have come to the end meanwhile
                    _log.info("a deletion that was cut short was finished", objects=number)
        except Busy:
            continue
        except CachesrvError as error:
            _log.warning("a deletion that was cut short cannot be finished", error=str(error))
            pauses = _AFTER_FAILURE
