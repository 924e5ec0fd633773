"""What a push does when there is something to do: the plan, and where that broke a closure, one that leaves nothing to
upstreams.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cachesrv.nix.nar_writer import NarDump
from cachesrv.push.delivery import Delivery
from cachesrv.push.events import Failed
from cachesrv.push.failure import MISSING_REFERENCES
from cachesrv.push.keeping import keeping
from cachesrv.push.nar_source import LocalNar, StreamedNar
from cachesrv.push.packing import Packing
from cachesrv.push.pipeline import Pipeline
from cachesrv.push.plan import Decision, plan_refused
from cachesrv.push.transfers import journalled
from cachesrv.push.upload import Upload

if TYPE_CHECKING:
    from collections.abc import Callable

    from cachesrv.api import CacheAnswer
    from cachesrv.nix.path_info import PathInfo
    from cachesrv.nix.store_path import StorePath
    from cachesrv.push.events import Emit
    from cachesrv.push.local_store import LocalStore
    from cachesrv.push.nar_source import NarSource
    from cachesrv.push.plan import Answers, Plan
    from cachesrv.push.run import Options
    from cachesrv.push.server import Server
    from cachesrv.push.settings import Settings

_READ_AT_ONCE = 8
"""NARs for each of which there is memory to be read into; more of them only wait for a thread."""


class CarryingOut:
    """From a store to the cache of the settings; `tell` is told of a second plan."""

    def __init__(
        self, store: LocalStore, settings: Settings, options: Options, tell: Callable[[Plan], None], emit: Emit
    ) -> None:
        self._store = store
        self._settings = settings
        self._options = options
        self._tell = tell
        self._emit = emit

    async def run(self, plan: Plan, answers: Answers, server: Server, cache: CacheAnswer) -> frozenset[StorePath]:
        """What was published. Raises what concerns all paths."""
        options, store, url = self._options, self._store, str(self._settings.address)
        there = (info.nar_hash.nix32 for info in plan.those(Decision.PUBLISH, Decision.PRESENT))
        async with (
            keeping(options.record, options.keep_nars, url, store.store_dir, self._emit) as kept,
            journalled(options.journal, url, there, self._emit) as transfers,
        ):
            kept.expect(list(plan.those(Decision.UPLOAD, Decision.PUBLISH, Decision.UPSTREAM)))
            level = self._settings.level if options.level is None else options.level
            with Pipeline(level=level, memory=options.memory, jobs=min(options.jobs, _READ_AT_ONCE)) as pipeline:

                def open_nar(info: PathInfo) -> NarSource:
                    file = store.real_path(info.store_path)
                    if file is None:
                        return StreamedNar(store.nar(info), kept.taps(info))
                    return LocalNar(NarDump(file), kept.taps(info))

                delivery = Delivery(server, pipeline, open_nar, cache, transfers, emit=self._emit)
                packing = Packing(server, pipeline, open_nar, cache.packs, emit=self._emit) if cache.packs else None
                result = await Upload(plan, server, delivery, packing, jobs=options.jobs, emit=kept.emit).run()
                published = frozenset(result.published)
                answers = answers.after(stored=result.stored, published=published)
                second = plan_refused(plan, result.refused, answers)
                if second is not None:
                    self._tell(second)
                    result = await Upload(second, server, delivery, packing, jobs=options.jobs, emit=kept.emit).run()
                    published |= result.published
        for path, error in result.refused.items():
            self._emit(Failed(path.base_name, error, MISSING_REFERENCES))
        return published
