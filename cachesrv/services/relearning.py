"""What others delete from storage that they write to as well: the index would answer for it for ever, nobody tells us.

So answers for such caches are forgotten once a day, and looked up where they lie when somebody asks again. That goes by
the first digit of the hash parts, a part each time, so that not all of it has to be looked up at once.
"""

from __future__ import annotations

import asyncio
import time
from itertools import islice, takewhile
from typing import TYPE_CHECKING

import structlog

from cachesrv.errors import StoreError
from cachesrv.nix.base32 import ALPHABET

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cachesrv.index.base import Index
    from cachesrv.services.caches import ServedCache

_log = structlog.get_logger()

DAY = 86_400.0
_TOGETHER = 500


async def keep_forgetting(
    index: Index, caches: Callable[[], Mapping[str, ServedCache]], *, within: float = DAY
) -> None:
    """Forget all of it within so many seconds, again and again, for ever."""
    pause = within / len(ALPHABET)
    while True:
        # By the clock: whoever restarts often gets round all the same.
        turn = time.time() // pause + 1
        await asyncio.sleep(max(0.0, turn * pause - time.time()))
        digit = ALPHABET[int(turn) % len(ALPHABET)]
        try:
            for cache in caches().values():
                if cache.bucket_is_authority:
                    await asyncio.to_thread(_forget, index, cache.name, digit)
        except StoreError as error:
            _log.warning("the index cannot forget what may have been deleted", error=str(error))


def _forget(index: Index, cache: str, digit: str) -> None:
    answers = takewhile(lambda known: known[0].startswith(digit), index.scan(cache, digit))
    while some := [(cache, hash_part) for hash_part, _ in islice(answers, _TOGETHER)]:
        index.delete(some)
