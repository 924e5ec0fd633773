"""Realisations, which lead from an output of a content-addressed derivation to the path that it came out as.

They are sent after the paths that they lead to, each after those that it depends on, so that whoever finds one finds
all of it. A path that was in the cache before may have come out of one more derivation: they are asked for by
themselves.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cachesrv.api import MAX_BATCH
from cachesrv.errors import CachesrvError, NotAllowed
from cachesrv.nix.realisation import object_name, render
from cachesrv.push.events import Failed, Noted, Realised
from cachesrv.push.failure import MISSING_REFERENCES, Failure
from cachesrv.push.foremost import foremost
from cachesrv.push.upload import concerns_all

if TYPE_CHECKING:
    from collections.abc import Collection, Container, Mapping, Sequence

    from cachesrv.nix.path_info import PathInfo
    from cachesrv.nix.realisation import Realisation, RealisedOutput
    from cachesrv.nix.store_path import StorePath
    from cachesrv.push.events import Emit
    from cachesrv.push.local_store import LocalStore
    from cachesrv.push.server import Server

Realisations = dict["RealisedOutput", "Realisation"]


async def missing_realisations(
    store: LocalStore, infos: Collection[PathInfo], server: Server, emit: Emit
) -> Realisations:
    """What the store knows of how these paths came out, and the cache does not. Where no path is content-addressed
    nobody needs that: other derivations say themselves where their outputs are.
    """
    paths = [info.store_path for info in infos if not info.store_path.is_derivation]
    built = [info.store_path for info in infos if info.ca and info.deriver and not info.store_path.is_derivation]
    if not any(info.ca for info in infos if not info.store_path.is_derivation):
        return {}
    try:
        known = await store.realisations(paths)
    except NotAllowed as error:
        if built:
            emit(Noted(f"what {_some(built)} came out of is not pushed, should that be content-addressed: {error}"))
        return {}
    names = {object_name(output): output for output in known}
    asked = list(names)
    missing: set[str] = set()
    for start in range(0, len(asked), MAX_BATCH):
        missing.update(await server.missing_realisations(asked[start : start + MAX_BATCH]))
    return {names[name]: known[names[name]] for name in asked if name in missing}


class RealisationUpload:
    """Sends realisations to a server, `jobs` at once."""

    def __init__(
        self, realisations: Mapping[RealisedOutput, Realisation], server: Server, *, jobs: int, emit: Emit
    ) -> None:
        self._realisations = realisations
        self._server = server
        self._turns = asyncio.Semaphore(jobs)
        self._emit = emit

    async def run(self, there: Container[StorePath]) -> None:
        """Send those that lead to paths that are `there`. Raises what concerns all."""
        open_ = {output: one for output, one in self._realisations.items() if one.out_path in there}
        failed: set[RealisedOutput] = set()
        while open_:
            ready = [output for output in open_ if not _needed(output, open_[output]) & open_.keys()]
            # a cycle, which no store should hold, is sent as it is: the server judges
            batch = {output: open_.pop(output) for output in ready or list(open_)}
            try:
                async with asyncio.TaskGroup() as tasks:
                    sent = {output: tasks.create_task(self._send(output, one, failed)) for output, one in batch.items()}
            except BaseExceptionGroup as group:
                raise foremost(group) from None
            failed.update(output for output, sending in sent.items() if not sending.result())

    async def _send(self, output: RealisedOutput, realisation: Realisation, failed: set[RealisedOutput]) -> bool:
        name = object_name(output)
        if lacking := _needed(output, realisation) & failed:
            error = f"it needs {object_name(min(lacking, key=str))}, which is not in the cache"
            self._emit(Failed(name, error, MISSING_REFERENCES))
            return False
        async with self._turns:
            try:
                await self._server.put_metadata(name, render(output, realisation))
            except CachesrvError as error:
                if concerns_all(error):
                    raise
                self._emit(Failed(name, *Failure.of(error)))
                return False
        self._emit(Realised(name, realisation.out_path.base_name))
        return True


def _some(paths: Sequence[StorePath]) -> str:
    return f"{paths[0]} and {len(paths) - 1} others" if len(paths) > 1 else str(paths[0])


def _needed(output: RealisedOutput, realisation: Realisation) -> set[RealisedOutput]:
    return {needed for needed, _ in realisation.dependencies if needed != output}
