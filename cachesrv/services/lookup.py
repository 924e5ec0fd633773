"""Which narinfo a cache has for a hash part: the index, and behind it a chain of sources.

What the sources say is written to the index: a path when one of them has it, an absence when all of them say that they
have not. An error is neither, and is never written; nor is it told to clients as an absence, which they remember too,
unless it is one that will not pass. An index that cannot be read costs time. Equal questions in flight are asked once.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeAlias

import structlog

from cachesrv.errors import PeerError, PeerUnavailable, StoreError
from cachesrv.index.base import Absent, IndexEntry, Present
from cachesrv.services.answer import present
from cachesrv.services.batch import Batcher
from cachesrv.services.circle import CameRound, asked_by
from cachesrv.services.patience import waiting
from cachesrv.services.upstream import is_elsewhere

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cachesrv.catalog.base import Catalog
    from cachesrv.index.base import Index
    from cachesrv.services.caches import ServedCache

_log = structlog.get_logger()

_SLACK = 2
"""Seconds by which clocks of one host differ: some are read once a second."""


_Question: TypeAlias = "tuple[str, str, tuple[str, ...]]"
"""The name of a cache, a hash part, and through whom it is asked."""


class Source(Protocol):
    """Somewhere that may know a path."""

    async def narinfo(self, cache: ServedCache, hash_part: str) -> bytes | None:
        """Its narinfo as it is to be served; None when the source is sure not to have it. Raises StoreError when it
        cannot tell; PeerUnavailable when it cannot tell now, and others may do instead; PeerError when what it has
        cannot be served, now and later.
        """

    def lacks(self, cache: ServedCache, hash_part: str) -> bool:
        """Whether it is sure not to have it, as far as can be told in microseconds; False where it has to be asked."""


class CatalogSource:
    """What was published, by this process or another one; but where others write to storage, who may delete it too."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def narinfo(self, cache: ServedCache, hash_part: str) -> bytes | None:
        """See Source."""
        if cache.bucket_is_authority:
            return None
        record = await self._catalog.path(cache.name, hash_part)
        return record.narinfo if record else None

    def lacks(self, cache: ServedCache, hash_part: str) -> bool:
        """See Source."""
        return cache.bucket_is_authority or self._catalog.lacks(cache.name, hash_part)


@dataclass(frozen=True, slots=True)
class _Learnt:
    """What the sources said; `epoch` is that of the index from before they were asked."""

    cache: str
    hash_part: str
    text: bytes | None
    epoch: int


class Lookup:
    """Answers questions that the index alone cannot, and teaches it."""

    def __init__(self, index: Index, sources: Sequence[Source], *, negative_ttl: int, timeout: float) -> None:
        """`negative_ttl`: seconds for which an absence is believed; `timeout`: for one question to all sources."""
        self._index = index
        self._sources = sources
        self._negative_ttl = negative_ttl
        self._timeout = timeout
        self._asked: dict[_Question, asyncio.Task[bytes | None]] = {}
        self._learnt: Batcher[_Learnt] = Batcher(self._learn)
        self._learning: set[asyncio.Task[None]] = set()

    async def find(self, cache: ServedCache, hash_part: str) -> Present | None:
        """The answer for a path, or None when it is not there. Raises StoreError or PeerUnavailable when that cannot be
        told now, CameRound when it is being asked on behalf of who is waiting for it.
        """
        known = self._known(cache, hash_part)
        # Who asks on behalf of others may be the one who has it, and have nothing but our word for that.
        if known is not None and not (asked_by() and isinstance(known, Present) and is_elsewhere(known.body)):
            return known if isinstance(known, Present) else None
        text = await self._ask_once(cache, hash_part)
        return present(text) if text is not None else None

    def _known(self, cache: ServedCache, hash_part: str) -> Present | Absent | None:
        try:
            known = self._index.get(cache.name, hash_part)
        except StoreError as error:
            # It knows nothing that others do not, and is begun anew at the next start.
            _log.error("the index cannot be read: restart cachesrv", error=str(error))
            return None
        return None if isinstance(known, Absent) and not self.believes(known.until, time.time()) else known

    def believes(self, until: int, now: float) -> bool:
        """Whether an absence in the index, that ends then, is believed now. One that would last longer than any was
        noted by a clock that has been set back since, and would end when that time comes.
        """
        return now < until <= now + self._negative_ttl + _SLACK

    def lacks(self, cache: ServedCache, hash_part: str) -> bool:
        """Whether it is certain, and can be told at once, that a path is not there of which the index knows nothing.
        That is not written to the index, which is no quicker to ask by much, and would have to be told otherwise later.
        """
        # The catalog is first of them, and the only one that takes a look to tell.
        return all(source.lacks(cache, hash_part) for source in reversed(self._sources))

    async def forget(self, cache: ServedCache, hash_part: str, nar: str) -> None:
        """If the index says that the NAR of a path is `nar/<nar>`, take that for nothing: it is looked up anew next
        time. Raises StoreError.
        """
        # Anybody may name a path and a NAR that have nothing to do with each other; a look costs less than a write.
        known = self._known(cache, hash_part)
        url = rb"\nURL: nar/%s[?\n]" % re.escape(nar.encode())
        if isinstance(known, Present) and re.search(url, known.body):
            await asyncio.to_thread(self._index.delete, [(cache.name, hash_part)])

    async def close(self) -> None:
        """Finish what is being asked and learnt."""
        await asyncio.gather(*self._asked.values(), return_exceptions=True)
        await asyncio.gather(*self._learning)
        await self._learnt.close()

    async def _ask_once(self, cache: ServedCache, hash_part: str) -> bytes | None:
        # What came round must not wait for itself.
        key = (cache.name, hash_part, asked_by())
        task = self._asked.get(key)
        if task is None:
            task = asyncio.create_task(self._ask(cache, hash_part))
            self._asked[key] = task
            task.add_done_callback(partial(self._answered, key))
        # The others wait for it too, if this one goes.
        return await asyncio.shield(task)

    def _answered(self, key: _Question, task: asyncio.Task[bytes | None]) -> None:
        del self._asked[key]
        if not task.cancelled():
            task.exception()  # all who waited may have gone; then nobody else would look

    async def _ask(self, cache: ServedCache, hash_part: str) -> bytes | None:
        doubts: list[PeerError] = []
        epoch = self._epoch()
        async with waiting(self._timeout, f"whether {hash_part} is there"):
            text = await self._ask_sources(cache, hash_part, doubts)
        for doubt in doubts:
            if not isinstance(doubt, CameRound):
                _log.warning("a source could not answer", cache=cache.name, hash_part=hash_part, error=str(doubt))
        if text is not None or not doubts:
            if epoch is not None:
                self._teach(_Learnt(cache.name, hash_part, text, epoch))
        elif unavailable := next((doubt for doubt in doubts if isinstance(doubt, PeerUnavailable)), None):
            raise unavailable
        elif came_round := next((doubt for doubt in doubts if isinstance(doubt, CameRound)), None):
            raise came_round
        return text

    def _epoch(self) -> int | None:
        """That of the index; None when it cannot be read, and has nothing to be taught."""
        try:
            return self._index.epoch()
        except StoreError:
            return None

    async def _ask_sources(self, cache: ServedCache, hash_part: str, doubts: list[PeerError]) -> bytes | None:
        """The first answer; who could not tell is added to `doubts`."""
        for source in self._sources:
            try:
                text = await source.narinfo(cache, hash_part)
            except PeerError as error:
                doubts.append(error)
            else:
                if text is not None:
                    return text
        return None

    def _teach(self, learnt: _Learnt) -> None:
        """Write to the index, without making the one who asked wait for it."""
        task = asyncio.create_task(self._submit(learnt))
        self._learning.add(task)
        task.add_done_callback(self._learning.discard)

    async def _submit(self, learnt: _Learnt) -> None:
        try:
            await self._learnt.submit(learnt)
        except StoreError as error:
            _log.warning("the index does not take what was looked up", error=str(error))

    async def _learn(self, batch: list[_Learnt]) -> None:
        """A path that was published meanwhile stays as it was published; what was removed meanwhile is not stored."""
        epoch = self._index.epoch()
        answers = [learnt for learnt in batch if learnt.epoch == epoch]
        absent = [(learnt.cache, learnt.hash_part) for learnt in answers if learnt.text is None]
        entries = [IndexEntry(one.cache, one.hash_part, present(one.text)) for one in answers if one.text is not None]
        if entries:
            await asyncio.to_thread(self._index.put, entries, replace=False, epoch=epoch)
        if absent:
            until = int(time.time()) + self._negative_ttl
            await asyncio.to_thread(self._index.put_absent, absent, until, epoch=epoch)
