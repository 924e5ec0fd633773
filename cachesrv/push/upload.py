"""Carries a plan out: NARs in parallel, each from the start when its connection breaks, and paths published in
batches as soon as they and all they refer to are there. What is published stays, however the push ends.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cachesrv.api import MAX_BATCH, PathToPublish
from cachesrv.errors import CachesrvError, ConfigError, NotAllowed, ServerError
from cachesrv.nix.signing import readable_signatures
from cachesrv.push.body_limit import BodyTooLarge
from cachesrv.push.events import Failed, Published
from cachesrv.push.failure import MISSING_NAR, MISSING_REFERENCES, Failure
from cachesrv.push.foremost import foremost
from cachesrv.push.one_line import one_line
from cachesrv.push.packing import PACKS_AT_ONCE
from cachesrv.push.plan import Decision
from cachesrv.push.publish_order import PublishOrder
from cachesrv.push.retry import TryAgain

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence

    from cachesrv.api import PackHead, PathOutcome
    from cachesrv.nix.hashes import Hash
    from cachesrv.nix.path_info import PathInfo
    from cachesrv.nix.store_path import StorePath
    from cachesrv.push.delivery import Delivery
    from cachesrv.push.events import Emit
    from cachesrv.push.packing import Pack, Packing
    from cachesrv.push.plan import Nar, Plan
    from cachesrv.push.server import Server

MAX_REFERENCES = 200_000
"""In one request to publish: with names of the greatest length it stays below MAX_REQUEST_SIZE."""

GATHER = 0.2
"""Seconds from the first path that is ready to the request that publishes it: others join it meanwhile."""

PACKED_PATHS = 1000
PACKED_REFERENCES = 10_000
"""In one pack, at most; with these its head is rarely too large."""


@dataclass(slots=True)
class Result:
    """What became of the paths. `refused` by the server for want of references, or because of such a one: nobody has
    been told of these. `stored`: paths whose NAR the server has by now.
    """

    published: set[StorePath] = field(default_factory=set)
    refused: dict[StorePath, str] = field(default_factory=dict)
    stored: set[StorePath] = field(default_factory=set)


@dataclass(slots=True)
class _Again:
    """Paths to publish once more, and NARs to send for it, each once only: a server that was killed or has collected
    garbage may have lost some.
    """

    paths: dict[StorePath, PathInfo] = field(default_factory=dict)
    nars: set[Hash] = field(default_factory=set)


class Upload:
    """One plan on its way to one server, with `jobs` NARs at once."""

    def __init__(
        self, plan: Plan, server: Server, delivery: Delivery, packing: Packing | None, *, jobs: int, emit: Emit
    ) -> None:
        infos = list(plan.those(Decision.UPLOAD, Decision.PUBLISH))
        self._nars = plan.nars
        self._server = server
        self._delivery = delivery
        self._packing = packing
        self._jobs = jobs
        self._emit = emit
        self._order = PublishOrder(infos)
        self._result = Result()
        self._sent_again: set[Hash] = set()
        self._changed = asyncio.Event()
        self._all_sent = asyncio.Event()
        self._pack_under_way = asyncio.Lock()
        to_send = {info.store_path for nar in plan.nars for info in nar.infos}
        self._nar_is_there(info for info in infos if info.store_path not in to_send)

    async def run(self) -> Result:
        """Raises what concerns all paths: no connection, no permission, a server that makes no sense."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._publish())
                senders = [tasks.create_task(work) for work in self._sending()]
                for sender in senders:
                    await sender
                self._all_sent.set()
                self._changed.set()
        except BaseExceptionGroup as group:
            raise foremost(group) from None
        return self._result

    def _sending(self) -> Iterator[Coroutine[None, None, None]]:
        """Small NARs are sent in packs, where the server takes them."""
        packing = self._packing
        if packing is not None:
            groups = packing.groups(self._nars)
            for _ in range(min(PACKS_AT_ONCE, self._jobs)):
                yield self._send_packs(packing, groups)
        others = [nar for nar in self._nars if packing is None or not packing.takes(nar)]
        nars = iter(others)
        for _ in range(min(self._jobs, len(others))):
            yield self._send(nars)

    async def _send(self, nars: Iterable[Nar]) -> None:
        for nar in nars:
            for info in nar.infos:
                # a path that turns out to be damaged may have an intact twin
                if self._order.is_open(info.store_path) and await self._bring(info):
                    self._nar_is_there(nar.infos)
                    break

    async def _send_packs(self, packing: Packing, groups: Iterator[list[Nar]]) -> None:
        for group in groups:
            if self._packing is None:
                await self._send_together(group)
                continue
            again = _Again()
            async with packing.packed([nar for nar in map(self._open_part, group) if nar.infos]) as pack:
                self._settle((), pack.failed)
                # One after the other: so nearly every path can go with its NAR, all that it refers to being published.
                async with self._pack_under_way:
                    left = await self._send_pack(packing, pack, again) if pack.ready else []
            # Not before: they may wait for memory that the pack had.
            await self._send_again(again)
            await self._send_together([*left, *pack.others])

    async def _send_together(self, nars: Sequence[Nar]) -> None:
        waiting = iter(nars)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(min(max(1, self._jobs // PACKS_AT_ONCE), len(nars))):
                tasks.create_task(self._send(waiting))

    def _open_part(self, nar: Nar) -> Nar:
        """Without the paths that have failed meanwhile."""
        return replace(nar, infos=tuple(info for info in nar.infos if self._order.is_open(info.store_path)))

    async def _send_pack(self, packing: Packing, pack: Pack, again: _Again) -> list[Nar]:
        """NARs that have to be sent one by one; what else is to be done is added to `again`."""
        batch, request = self._with_paths(packing, pack)
        try:
            answer = await packing.send(pack, *request)
        except CachesrvError as error:
            if concerns_all(error):
                raise
            self._put_back(batch)
            return await self._send_otherwise(packing, pack, error, again)
        refused = [one.nar for one, outcome in zip(pack.ready, answer.nars, strict=True) if outcome.error is not None]
        hashes = {nar.hash for nar in refused}
        self._nar_is_there(info for one in pack.ready if one.nar.hash not in hashes for info in one.nar.infos)
        again.paths.update((info.store_path, info) for info in batch if info.nar_hash in hashes)
        self._hear(batch, answer.paths, again)
        return refused

    def _with_paths(self, packing: Packing, pack: Pack) -> tuple[list[PathInfo], tuple[PackHead, bytes]]:
        """What is sent, and the paths to publish in it: none where there is no room for them."""
        batch = self._order.take(PACKED_PATHS, PACKED_REFERENCES, pack.paths)
        request = packing.request(pack, [_to_publish(info) for info in batch])
        if request is not None:
            return batch, request
        self._put_back(batch)
        request = packing.request(pack, [])
        assert request is not None
        return [], request

    async def _send_otherwise(self, packing: Packing, pack: Pack, error: CachesrvError, again: _Again) -> list[Nar]:
        """What becomes of a pack that was not taken: smaller ones, NARs that have to be sent one by one, or nothing."""
        if isinstance(error, TryAgain):
            self._settle((), {path: Failure.of(error) for path in pack.paths})
            return []
        if isinstance(error, BodyTooLarge) and len(pack.ready) > 1:
            return [nar for half in pack.halves() for nar in await self._send_pack(packing, half, again)]
        if not isinstance(error, BodyTooLarge):
            self._packing = None  # whatever the reason: it will be the same for the next one
        return [ready.nar for ready in pack.ready]

    def _put_back(self, batch: Iterable[PathInfo]) -> None:
        for info in batch:
            self._order.put_back(info.store_path)

    async def _bring(self, info: PathInfo) -> bool:
        """Whether the NAR is there; the path has failed if not."""
        try:
            await self._delivery.bring(info)
        except CachesrvError as error:
            if concerns_all(error):
                raise
            self._settle((), {info.store_path: Failure.of(error)})
            return False
        return True

    def _nar_is_there(self, infos: Iterable[PathInfo]) -> None:
        for info in infos:
            if self._order.is_open(info.store_path):
                self._order.nar_is_there(info.store_path)
                self._result.stored.add(info.store_path)
        self._changed.set()

    async def _publish(self) -> None:
        while not self._order.is_done:
            await self._changed.wait()
            self._changed.clear()
            if self._order.is_ready:
                with suppress(TimeoutError):  # wait_for would swallow a cancellation at the wrong moment
                    async with asyncio.timeout(GATHER):
                        await self._all_sent.wait()
            while batch := self._order.take(MAX_BATCH, MAX_REFERENCES):
                outcomes = await self._server.publish([_to_publish(info) for info in batch])
                again = _Again()
                self._hear(batch, outcomes, again)
                await self._send_again(again)

    def _hear(self, batch: Sequence[PathInfo], outcomes: Sequence[PathOutcome], again: _Again) -> None:
        """Add to `again` what has to be published once more; of what is there already, nothing is to be heard."""
        published: list[StorePath] = []
        failed: dict[StorePath, Failure] = {}
        for info, outcome in zip(batch, outcomes, strict=True):
            path = info.store_path
            if path in again.paths:
                continue
            if outcome.error is None:
                published.append(path)
                self._emit(Published(outcome.path))
            elif outcome.kind == MISSING_NAR and info.nar_hash not in self._sent_again:
                again.paths[path] = info
                again.nars.add(info.nar_hash)
            elif outcome.kind == MISSING_REFERENCES and not again.paths.keys().isdisjoint(info.references):
                again.paths[path] = info
            elif outcome.kind == MISSING_REFERENCES:
                self._result.refused[path] = one_line(outcome.error)
            else:
                failed[path] = Failure(one_line(outcome.error), one_line(outcome.kind or "failed"))
        self._result.published.update(published)
        self._settle(published, failed)

    async def _send_again(self, again: _Again) -> None:
        for path, info in again.paths.items():
            lost = info.nar_hash in again.nars and info.nar_hash not in self._sent_again
            if lost and self._order.is_open(path) and await self._bring(info):
                self._sent_again.add(info.nar_hash)
            self._order.put_back(path)

    def _settle(self, published: Sequence[StorePath], failed: Mapping[StorePath, Failure]) -> None:
        """Pass on what has failed, and what has failed with it; a NAR may fail whose path had failed before."""
        told = [path for path in failed if self._order.is_open(path)]
        for path in told:
            self._emit(Failed(path.base_name, *failed[path]))
        refused = [path for path in self._result.refused if self._order.is_open(path)]
        for path, cause in self._order.settle(published, [*told, *refused]).items():
            error = f"it refers to {cause}, which is not in the cache"
            if cause in self._result.refused:
                self._result.refused[path] = error
            else:
                self._emit(Failed(path.base_name, error, MISSING_REFERENCES))
        self._changed.set()


def concerns_all(error: CachesrvError) -> bool:
    """Whether no other path can fare better."""
    if isinstance(error, TryAgain):
        return error.hopeless
    return isinstance(error, ServerError | NotAllowed | ConfigError)


def _to_publish(info: PathInfo) -> PathToPublish:
    return PathToPublish(
        path=info.store_path.base_name,
        nar_hash=info.nar_hash.nix32,
        nar_size=info.nar_size,
        references=[path.base_name for path in info.references],
        deriver=info.deriver.base_name if info.deriver else None,
        signatures=[signature.render() for signature in readable_signatures(info.signatures)],
        ca=info.ca,
    )
