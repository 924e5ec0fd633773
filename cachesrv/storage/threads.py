"""Blocking work on files in a few threads, that never outlives the call that asked for it."""

from __future__ import annotations

import asyncio
import errno
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from cachesrv.errors import StoreError, StoreFull, StoreRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

P = ParamSpec("P")
T = TypeVar("T")

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Whatever the object is: nothing need be wrong with it.
_NOT_LET = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@contextmanager
def in_words(doing: str) -> Iterator[None]:
    """Turns OSError into StoreError, StoreFull or StoreRefused: `cannot <doing>: <what the system says>`."""
    try:
        yield
    except OSError as error:
        kind = StoreFull if error.errno in _NO_ROOM else StoreRefused if error.errno in _NOT_LET else StoreError
        raise kind(f"cannot {doing}: {error.strerror}") from error


class Threads:
    """At most `number` threads, started as they are needed."""

    def __init__(self, number: int, *, name: str) -> None:
        self._pool = ThreadPoolExecutor(number, thread_name_prefix=name)
        self.closed = False

    async def run(self, doing: str, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """What `work` returns or raises, but for OSError, which becomes StoreError or StoreFull with the words `doing`.
        When the caller is cancelled, work that has not begun is dropped, and work that has is waited for: it may be
        using a buffer or a descriptor of the caller's. Raises StoreError after `close`.
        """
        if self.closed:
            raise StoreError(f"cannot {doing}: the store is closed")
        begun = self._pool.submit(work, *args, **kwargs)
        done = asyncio.wrap_future(begun)
        try:
            with in_words(doing):
                return await asyncio.shield(done)
        except asyncio.CancelledError:
            if not begun.cancel():
                await finished(done)
            raise

    async def close(self) -> None:
        """Take no more, and wait for all that was asked for."""
        self.closed = True
        await asyncio.to_thread(self._pool.shutdown)


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns or raises; it is done also when the caller is cancelled, and cancelled again."""
    done = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        await finished(done)
        raise


async def finished(future: asyncio.Future[T]) -> None:
    """Wait until it is done, also when the caller is cancelled; what came of it is dropped."""
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            # The caller is being cancelled already; the thread cannot be.
            continue
    if not future.cancelled():
        future.exception()
