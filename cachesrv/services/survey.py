"""What lies in storage: all of it listed, and every narinfo read that has not been read before."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from cachesrv.errors import BadInput, CachesrvError
from cachesrv.nix import narinfo
from cachesrv.services.findings import Finding, Listed
from cachesrv.services.flaws import Kind
from cachesrv.services.judging import flawed, judge, with_nar
from cachesrv.services.reading import read_all
from cachesrv.services.several import several
from cachesrv.services.taking import found

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from cachesrv.services.caches import ServedCache
    from cachesrv.services.findings import Findings
    from cachesrv.storage.base import ObjectStore

_LISTED_TOGETHER = 10_000
_READ_TOGETHER = 500
_ASKED_TOGETHER = 32
_NARINFO = ".narinfo"
_NAR = "nar/"


class Improve(Protocol):
    """Makes better what was found, such as by a signature."""

    async def __call__(self, found: Sequence[tuple[str, Finding]]) -> Sequence[tuple[str, Finding]]:
        """The same paths, in order, by hash part, as they are now in storage. Raises StoreError."""


async def as_found(found: Sequence[tuple[str, Finding]]) -> Sequence[tuple[str, Finding]]:
    """An Improve that leaves everything as it is."""
    return found


class Survey:
    """Finds out what paths a cache's storage holds. Counts those that were `known` by an earlier survey."""

    def __init__(self, storage: ObjectStore, findings: Findings, cache: ServedCache, improve: Improve) -> None:
        self._storage = storage
        self._findings = findings
        self._cache = cache
        self._improve = improve
        self.known = 0

    async def look(self, tell: Callable[[int], None]) -> None:
        """List what lies there; `tell` is told the number of narinfos so far. Raises StoreError."""
        await asyncio.to_thread(self._findings.begin)
        narinfos: list[Listed] = []
        nars: list[tuple[str, int]] = []
        prefix = self._cache.key("")
        number = 0
        async for info in self._storage.list(prefix):
            name = info.key[len(prefix) :]
            if name.startswith(_NAR) and "/" not in name[len(_NAR) :]:
                nars.append((name[len(_NAR) :], info.size))
            elif name.endswith(_NARINFO) and "/" not in name:
                narinfos.append(Listed(name.removesuffix(_NARINFO), info.size, info.modified))
                number += 1
            if len(nars) + len(narinfos) >= _LISTED_TOGETHER:
                await asyncio.to_thread(self._findings.note, narinfos, nars)
                tell(number)
                narinfos, nars = [], []
        await asyncio.to_thread(self._findings.note, narinfos, nars)
        tell(number)

    async def read(self) -> AsyncIterator[Sequence[tuple[str, Finding]]]:
        """What is found of the listed narinfos, bit by bit, in order. Raises StoreError."""
        after = ""
        while batch := await asyncio.to_thread(self._findings.next, after, _READ_TOGETHER):
            after = batch[-1][0].hash_part
            new = [listed for listed, known in batch if known is None]
            texts = await self._texts(new)
            self.known += len(batch) - len(new)
            judged = await asyncio.to_thread(self._judged, batch, texts)
            findings = await self._improve(await self._with_nars(judged))
            await asyncio.to_thread(self._findings.put, findings)
            yield findings

    async def again(self, hash_part: str) -> Finding | None:
        """What is found of one path now; None when there is no narinfo. Raises StoreError."""
        return await found(self._storage, self._cache, hash_part)

    async def _texts(self, listed: Sequence[Listed]) -> dict[str, bytes | CachesrvError | None]:
        """Narinfos by hash part; for those that cannot be read, why; None for those that are gone."""
        keys = {self._cache.narinfo_key(one.hash_part): one.hash_part for one in listed}
        texts = await read_all(self._storage, keys, limit=narinfo.DEFAULT_LIMIT)
        return {hash_part: texts.get(key) for key, hash_part in keys.items()}

    def _judged(
        self, batch: Sequence[tuple[Listed, Finding | None]], texts: Mapping[str, bytes | CachesrvError | None]
    ) -> list[tuple[str, Finding]]:
        return [(listed.hash_part, known or self._judge(listed, texts[listed.hash_part])) for listed, known in batch]

    def _judge(self, listed: Listed, text: bytes | CachesrvError | None) -> Finding:
        if text is None:
            return flawed(listed, Kind.MISSING_NARINFO, "it was there a moment ago and is gone")
        if isinstance(text, CachesrvError):
            return flawed(listed, Kind.UNREADABLE_NARINFO, str(text))
        return judge(self._cache, listed, text)

    async def _with_nars(self, found: Sequence[tuple[str, Finding]]) -> list[tuple[str, Finding]]:
        """The same, with the sizes of their NARs."""
        names = {finding.path.nar for _, finding in found if finding.path}
        sizes: dict[str, int | None] = dict(await asyncio.to_thread(self._findings.nar_sizes, names))
        # They may have come after the list was made.
        late = [*(names - sizes.keys())]
        sizes.update(zip(late, await several(self._nar_size, late, at_a_time=_ASKED_TOGETHER), strict=True))
        return [
            (hash_part, with_nar(finding, sizes[finding.path.nar]) if finding.path else finding)
            for hash_part, finding in found
        ]

    async def _nar_size(self, name: str) -> int | None:
        try:
            info = await self._storage.head(self._cache.key(_NAR + name))
        except BadInput:
            return None
        return info.size if info else None
