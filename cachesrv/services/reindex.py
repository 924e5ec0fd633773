"""Rebuilding catalog and index from what lies in storage: a standard binary cache, whoever wrote it.

Storage is surveyed (`cachesrv.services.survey`), and what was found is kept on disk: so this takes no more memory for
millions of paths than for one, and goes on where it was interrupted. Then paths are published, each after all that it
refers to; in the end, what is published and lies in storage no more is withdrawn. Narinfos are taken as they lie there,
and NARs are not read, only looked for. Serving and pushing go on meanwhile: where a push has changed a narinfo since it
was read, it is read again after it was published, until it is the same.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cachesrv.errors import Conflict, StoreUnavailable
from cachesrv.index.base import IndexEntry, Present
from cachesrv.services.answer import present
from cachesrv.services.caches import ReferencePolicy
from cachesrv.services.findings import Findings
from cachesrv.services.flaws import Flaw, Kind
from cachesrv.services.judging import flaw_of, record_of
from cachesrv.services.reference_order import ReferenceOrder
from cachesrv.services.survey import Survey, as_found
from cachesrv.services.withdrawal import Withdrawal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cachesrv.catalog.base import Catalog, PathRecord
    from cachesrv.index.base import Index
    from cachesrv.index.scratch import Scratch
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.findings import Finding
    from cachesrv.services.survey import Improve
    from cachesrv.storage.base import ObjectStore

_BATCH = 4000
_KEPT_FLAWS = 1000
_TRIES = 20


@dataclass(slots=True)
class Report:
    """How far it is: narinfos listed; read, `known` of them by an earlier run; paths that are served; published paths
    that are served no more; the first thousand of `flaws`.
    """

    listed: int = 0
    read: int = 0
    known: int = 0
    taken: int = 0
    withdrawn: int = 0
    flaws: int = 0
    first: list[Flaw] = field(default_factory=list)


class Listener(Protocol):
    """Who is told how it goes."""

    def progress(self, report: Report) -> None:
        """Some more was done."""

    def flaw(self, flaw: Flaw) -> None:
        """Something is wrong."""


class Reindex:
    """Rebuilds what is known of caches. Only for who holds the lock of `cachesrv.services.maintenance`."""

    def __init__(self, storage: ObjectStore, catalog: Catalog, index: Index) -> None:
        self._storage = storage
        self._catalog = catalog
        self._index = index

    async def run(
        self, cache: ServedCache, scratch: Scratch, listener: Listener, improve: Improve = as_found
    ) -> Report:
        """Take in everything that can be served. `scratch` has the tables of `cachesrv.services.findings`. Raises
        StoreError; the next run with the same scratch goes on from there.
        """
        run = _Run(
            self._storage,
            self._catalog,
            self._index,
            cache=cache,
            scratch=scratch,
            listener=listener,
            improve=improve,
        )
        return await run.run()


class _Run:
    def __init__(
        self,
        storage: ObjectStore,
        catalog: Catalog,
        index: Index,
        *,
        cache: ServedCache,
        scratch: Scratch,
        listener: Listener,
        improve: Improve,
    ) -> None:
        self._catalog = catalog
        self._index = index
        self._cache = cache
        self._strict = cache.references is ReferencePolicy.STRICT
        self._scratch = scratch
        self._listener = listener
        self._report = Report()
        self._findings = Findings(scratch)
        self._improve = improve
        self._survey = Survey(storage, self._findings, cache, self._improved)
        self._withdrawal = Withdrawal(
            storage, catalog, index, cache=cache, findings=self._findings, take=self._take_again
        )

    async def run(self) -> Report:
        await self._look()
        await self._publish()
        await self._withdraw()
        return self._report

    async def _look(self) -> None:
        def listed(number: int) -> None:
            self._report.listed = number
            self._listener.progress(self._report)

        await self._survey.look(listed)
        async for found in self._survey.read():
            self._report.read += len(found)
            self._report.known = self._survey.known
            for hash_part, finding in found:
                if finding.flaw:
                    self._note(flaw_of(self._cache, hash_part, Kind.of(finding.flaw), finding.why))
            self._listener.progress(self._report)

    async def _improved(self, found: Sequence[tuple[str, Finding]]) -> Sequence[tuple[str, Finding]]:
        """As was asked for, but nobody signs what was cut off."""
        unsigned = [part for part, finding in found if finding.path and not _is_signed(finding.path.narinfo)]
        if self._improve is as_found or not unsigned:
            return await self._improve(found)
        published = await self._catalog.paths(self._cache.name, unsigned)
        whole = [
            (part, finding)
            for part, finding in found
            if not (finding.path and part in published)
            or not _is_cut_off(record_of(self._cache, part, finding.path), published[part])
        ]
        improved = dict(await self._improve(whole))
        return [(part, improved.get(part, finding)) for part, finding in found]

    def _note(self, flaw: Flaw) -> None:
        self._report.flaws += 1
        if len(self._report.first) < _KEPT_FLAWS:
            self._report.first.append(flaw)
        self._listener.flaw(flaw)

    async def _publish(self) -> None:
        order = ReferenceOrder(self._scratch, strict=self._strict)
        while not order.done:
            step = await asyncio.to_thread(order.step, _BATCH)
            for hash_part, why in step.broken:
                self._note(flaw_of(self._cache, hash_part, Kind.MISSING_REFERENCE, why))
            if step.unknown:
                # They may have been published after storage was listed.
                order.learn(step.unknown, await self._catalog.present(self._cache.name, step.unknown))
            await self._take([record_of(self._cache, hash_part, path) for hash_part, path in step.paths])
            self._listener.progress(self._report)

    async def _take(self, records: Sequence[PathRecord]) -> None:
        """Publish paths. Where catalog or index say otherwise, it may be they who are right."""
        if not records:
            return
        otherwise = await self._catalog.restore(records, used_at=int(time.time()))
        entries = [_entry(record) for record in records if record.hash_part not in otherwise]
        await asyncio.to_thread(self._index.put, entries, replace=False)
        self._report.taken += len(records)
        for record in records:
            published = otherwise.get(record.hash_part)
            if published and _is_cut_off(record, published):
                self._report.taken -= 1
                why = "its narinfo was cut off: `cachesrv verify --repair` writes it again, as it is published"
                self._note(flaw_of(self._cache, record.hash_part, Kind.DISAGREEMENT, why))
            elif published or self._answers_otherwise(record):
                await self._settle(record)

    def _answers_otherwise(self, record: PathRecord) -> bool:
        answer = self._index.get(record.cache, record.hash_part)
        return not isinstance(answer, Present) or answer.body != record.narinfo

    async def _settle(self, record: PathRecord) -> None:
        """Publish what lies in storage, in the place of what was known. A push writes to storage first: what it has
        written by the time that it is looked at again is published here, and what it writes later it publishes itself.
        """
        for _ in range(_TRIES):
            try:
                await self._catalog.publish([record])
            except Conflict as error:
                if await self._withdrawal.is_lost(record.hash_part):
                    continue
                self._report.taken -= 1
                self._note(flaw_of(self._cache, record.hash_part, Kind.DISAGREEMENT, str(error)))
                return
            await asyncio.to_thread(self._index.put, [_entry(record)])
            finding = await self._survey.again(record.hash_part)
            if finding is None or finding.path is None or finding.path.narinfo == record.narinfo:
                return
            record = record_of(self._cache, record.hash_part, finding.path)
        raise StoreUnavailable(f"{self._cache.narinfo_key(record.hash_part)} changes all the time")

    async def _take_again(self, hash_part: str) -> None:
        finding = await self._survey.again(hash_part)
        if finding and finding.path:
            await self._take([record_of(self._cache, hash_part, finding.path)])

    async def _withdraw(self) -> None:
        published, _ = await self._catalog.count(self._cache.name)
        if published and not self._report.listed:
            why = f"nothing lies here, but {published} paths are published: they stay"
            self._note(Flaw(Kind.EMPTY_STORAGE.label, self._cache.name, why, object=self._cache.key("")))
            return
        if published > self._report.taken:
            async for flaws in self._withdrawal.paths():
                known = await asyncio.to_thread(self._findings.of, [flaw.path for flaw in flaws])
                for flaw in flaws:
                    self._withdrawn(flaw, known.get(flaw.path))
                self._listener.progress(self._report)
        await self._withdrawal.answers()

    def _withdrawn(self, flaw: Flaw, known: tuple[Finding | None, bool] | None) -> None:
        taken = known is not None and known[0] is not None and known[0].path is not None and known[1]
        if known is None or taken:
            self._note(flaw)
        if self._withdrawal.withdraws(flaw):
            self._report.withdrawn += 1
            self._report.taken -= taken


def _is_cut_off(found: PathRecord, published: PathRecord) -> bool:
    """Whether a narinfo has lost its last lines, what it refers to and the signatures that would tell."""
    lost = _is_signed(published.narinfo) and not _is_signed(found.narinfo)
    return lost and set(found.references) < set(published.references)


def _is_signed(text: bytes) -> bool:
    return b"\nSig: " in text


def _entry(record: PathRecord) -> IndexEntry:
    return IndexEntry(record.cache, record.hash_part, present(record.narinfo))
