"""The use case: push paths of a local store to a cache.

    settings = find_settings(Given(to="https://cache.example.org/main"), os.environ)
    async with opened_store(None, os.environ) as store:
        summary = await push(["./result"], store, settings, Options(jobs=4), emit=print)

`emit` gets typed events (see `events`) while it goes on. Paths that cannot be pushed are told of and counted, and do
not hold up the others; what concerns all of them is raised.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cachesrv.api import MAX_BATCH
from cachesrv.errors import BadInput, ConfigError
from cachesrv.push.connection import Timeouts
from cachesrv.push.events import Failed, PlanMade, Planned, ignore
from cachesrv.push.failure import CONFLICT
from cachesrv.push.level import AUTO, STRONGEST
from cachesrv.push.one_line import one_line
from cachesrv.push.plan import Answers, Decision, make_plan, wanted
from cachesrv.push.realisations import RealisationUpload, missing_realisations
from cachesrv.push.retry import OUTAGE, Backoff
from cachesrv.push.selection import select
from cachesrv.push.server import connect
from cachesrv.push.tally import Tally
from cachesrv.push.upstreams import Upstream, Upstreams

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from cachesrv.api import CacheAnswer
    from cachesrv.nix.path_info import PathInfo
    from cachesrv.nix.store_path import StorePath
    from cachesrv.push.events import Emit, Summary
    from cachesrv.push.level import Level
    from cachesrv.push.local_store import LocalStore
    from cachesrv.push.plan import Plan
    from cachesrv.push.server import Server
    from cachesrv.push.settings import Settings

MAX_PARTS = 16
"""Connections beside one for each NAR: for parts of large NARs, and for questions."""


@dataclass(frozen=True, slots=True)
class Options:
    """jobs: NARs on their way at once; level: of zstd, or `auto` (see `level`), by default what the settings say;
    closure: push what the paths need as well; dry_run: only say what would be done; memory: bytes for NARs on their
    way, whatever their number and size, by default as `memory.Shares` says; upstreams: caches beside those that the
    server declares whose paths are not pushed; declared_upstreams: whether those count; record: the file in which to
    note what was pushed (see `record`); journal: the one for what has arrived of large NARs (see `journal`); keep_nars:
    a directory for NARs as Nix reads them (see `kept_nars`).
    """

    jobs: int = 8
    level: Level | None = None
    closure: bool = True
    dry_run: bool = False
    memory: int | None = None
    upstreams: tuple[Upstream, ...] = ()
    declared_upstreams: bool = True
    record: Path | None = None
    journal: Path | None = None
    keep_nars: Path | None = None
    backoff: Backoff = field(default_factory=lambda: Backoff(outage=OUTAGE))
    timeouts: Timeouts = field(default_factory=Timeouts)

    def __post_init__(self) -> None:
        """Raises BadInput for what would never end, or send what no client can read."""
        if self.jobs < 1:
            raise BadInput(f"jobs has to be 1 at least, not {self.jobs}")
        if self.level not in (None, AUTO, *range(1, STRONGEST + 1)):
            raise BadInput(f"level has to be a number from 1 to {STRONGEST}, or {AUTO!r}, not {self.level!r}")


async def push(
    paths: Iterable[str | os.PathLike[str]],
    store: LocalStore,
    settings: Settings,
    options: Options | None = None,
    emit: Emit = ignore,
) -> Summary:
    """Push `paths`: names of files in the store, or of symlinks into it. The summary is the last event as well, also
    when this raises: ServerError, NotAllowed, ConfigError, or what the store raises about itself; BadInput for one
    path in the place of several.
    """
    tally = Tally(emit)
    try:
        if isinstance(paths, str | os.PathLike):
            raise BadInput(f"paths has to be a list: [{paths!r}]")
        await _Push(store, settings, options or Options(), tally).run(os.fspath(path) for path in paths)
    finally:
        summary = tally.summary()
        emit(summary)
    return summary


class _Push:
    def __init__(self, store: LocalStore, settings: Settings, options: Options, emit: Emit) -> None:
        self._store = store
        self._settings = settings
        self._options = options
        self._emit = emit

    async def run(self, names: Iterable[str]) -> None:
        infos = await select(self._store, names, closure=self._options.closure, emit=self._emit)
        if not infos:
            return
        async with connect(
            self._settings.address,
            self._settings.token,
            connections=self._options.jobs + MAX_PARTS,
            backoff=self._options.backoff,
            timeouts=self._options.timeouts,
            emit=self._emit,
        ) as server:
            cache = await server.describe()
            self._check(cache)
            answers = await _ask(server, infos)
            plan = make_plan(infos, answers, await self._left_out(infos, answers, cache))
            realisations = await missing_realisations(self._store, self._kept_in_cache(plan), server, self._emit)
            self._tell(plan, len(realisations))
            for step in plan.steps:
                if step.decision is Decision.CONFLICT:
                    self._emit(Failed(step.path.base_name, step.reason, CONFLICT))
            if not self._options.dry_run:
                published = await self._carry_out(plan, answers, server, cache)
                there = published.union(info.store_path for info in plan.those(Decision.PRESENT))
                sending = RealisationUpload(realisations, server, jobs=self._options.jobs, emit=self._emit)
                await sending.run(there)

    async def _carry_out(
        self, plan: Plan, answers: Answers, server: Server, cache: CacheAnswer
    ) -> frozenset[StorePath]:
        """What was published."""
        if not any(True for _ in plan.those(Decision.UPLOAD, Decision.PUBLISH)):
            return frozenset()
        from cachesrv.push.carrying_out import CarryingOut  # noqa: PLC0415  brings all that sends with it

        carrying = CarryingOut(self._store, self._settings, self._options, self._tell, self._emit)
        return await carrying.run(plan, answers, server, cache)

    def _kept_in_cache(self, plan: Plan) -> list[PathInfo]:
        return list(plan.those(Decision.UPLOAD, Decision.PUBLISH, Decision.PRESENT))

    async def _left_out(self, infos: Sequence[PathInfo], answers: Answers, cache: CacheAnswer) -> dict[StorePath, str]:
        """What upstreams have: those of the cache, and those that the options add."""
        options = self._options
        declared = cache.upstreams if options.declared_upstreams else ()
        upstreams = [*map(Upstream.from_answer, declared), *options.upstreams]
        async with Upstreams(upstreams, self._store.store_dir, self._settings.token_for, self._emit) as asked:
            return await asked.left_out(infos, answers.missing)

    def _check(self, cache: CacheAnswer) -> None:
        if cache.store_dir != self._store.store_dir:
            raise ConfigError(
                f"{self._settings.address} is for paths in {one_line(cache.store_dir)}, "
                f"this store has them in {self._store.store_dir}"
            )

    def _tell(self, plan: Plan, realisations: int = 0) -> None:
        for step in plan.steps:
            self._emit(
                Planned(
                    path=step.path.base_name,
                    decision=step.decision.value,
                    reason=step.reason,
                    nar_size=step.info.nar_size,
                )
            )
        self._emit(
            PlanMade(
                paths=len(plan.steps),
                **{decision.value: plan.count(decision) for decision in Decision},
                nars=len(plan.nars),
                nar_bytes=plan.nar_bytes,
                realisations=realisations,
            )
        )


async def _ask(server: Server, infos: Sequence[PathInfo]) -> Answers:
    """What the server says of all the paths, in as few questions as it takes."""
    batches = [infos[start : start + MAX_BATCH] for start in range(0, len(infos), MAX_BATCH)]
    asked = [await server.missing([wanted(info) for info in batch]) for batch in batches]
    return Answers.merge(answer for answers in asked for answer in answers)
