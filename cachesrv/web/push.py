"""The push API: see `cachesrv.api` for what goes over the wire."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import msgspec
from aiohttp import web

from cachesrv import api, pack
from cachesrv.errors import (
    BadInput,
    CachesrvError,
    Conflict,
    MissingNar,
    MissingReferences,
    StoreError,
    TooLarge,
    Unsigned,
)
from cachesrv.nix import json_document
from cachesrv.nix.hashes import Hash
from cachesrv.nix.store_path import StorePath
from cachesrv.services import visible
from cachesrv.services.candidate import Candidate
from cachesrv.services.packs import SentNar
from cachesrv.services.unhurried import unhurried
from cachesrv.web import bodies, errors
from cachesrv.web.auth import token_of
from cachesrv.web.site import ROUTE, SITE, check_readable, check_writable, named

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cachesrv.services.caches import ServedCache
    from cachesrv.services.publish import Outcome

Body = TypeVar("Body")

KINDS: dict[type[CachesrvError], str] = {
    Conflict: "conflict",
    MissingNar: "missing-nar",
    MissingReferences: "missing-references",
    Unsigned: "unsigned",
    BadInput: "bad-input",
    CachesrvError: "failed",
}
"""The first ancestor of an error that stands here decides."""


async def get_cache(request: web.Request) -> web.Response:
    """What a client has to know of the cache."""
    request[ROUTE] = "api"
    rules = request.app[SITE].rules
    cache = named(rules, request.match_info["cache"])
    await check_readable(rules, cache, token_of(request))
    uploads = request.app[SITE].services.uploads
    return json_answer(
        api.CacheAnswer(
            name=cache.name,
            store_dir=cache.store_dir,
            priority=cache.priority,
            public=cache.public,
            public_keys=[key.public.render() for key in cache.signing_keys],
            upstreams=[api.UpstreamAnswer(one.public_url, list(one.public_keys)) for one in cache.completed_by],
            max_nar_size=rules.max_nar_size,
            part_size=uploads.limits.part_size,
            direct=uploads.offers_direct,
            packs=request.app[SITE].services.packs.limits,
        )
    )


async def missing(request: web.Request) -> web.Response:
    """Which of many paths are not here; asked once by an uploader."""
    cache, asked, pusher = await authorised(request, api.MissingRequest)
    _check_batch([*asked.paths, *asked.realisations])
    services = request.app[SITE].services
    wanted = {StorePath.parse(path.path): Hash.parse(path.nar_hash).nix32 async for path in unhurried(asked.paths)}
    await services.leases.grant(cache, {path.hash_part for path in wanted}, set(wanted.values()))
    hash_parts = {path.hash_part for path in wanted}
    hash_parts -= await services.taking.deleted(cache, hash_parts)
    published = await visible.nar_hashes(services.catalog, services.index, cache, hash_parts)
    if taken := await services.taking.take(cache, hash_parts - published.keys()):
        published |= await visible.nar_hashes(services.catalog, services.index, cache, taken)
    absent = {path: nar_hash for path, nar_hash in wanted.items() if path.hash_part not in published}
    stored = await services.catalog.nars_by_hash(cache.prefix, set(absent.values()))
    conflicts = {
        path: published[path.hash_part]
        for path, nar_hash in wanted.items()
        if path not in absent and published[path.hash_part] != nar_hash
    }
    if conflicts:
        records = await services.catalog.paths(cache.name, {path.hash_part for path in conflicts})
        refused = [(records[one.hash_part], wanted[one]) for one in conflicts if one.hash_part in records]
        await services.publish.remember_conflicts(refused, pusher)
    return json_answer(
        api.MissingAnswer(
            missing=[path.base_name for path in absent],
            stored=[path.base_name for path, nar_hash in absent.items() if nar_hash in stored],
            conflicts=[api.PublishedOtherwise(path.base_name, nar_hash) for path, nar_hash in conflicts.items()],
            realisations=await services.metadata.missing_realisations(cache, asked.realisations),
        )
    )


async def publish(request: web.Request) -> web.Response:
    """Publish many paths whose NARs are here."""
    cache, asked, pusher = await authorised(request, api.PublishRequest)
    _check_batch(asked.paths)
    candidates, wrong = await _candidates(cache, asked.paths)
    published = await request.app[SITE].services.publish.many(cache, candidates, pusher)
    return json_answer(api.PublishAnswer(_outcomes(asked.paths, wrong, published)))


async def take_pack(request: web.Request) -> web.Response:
    """Store many small NARs, and publish paths."""
    cache, pusher = await _pusher(request)
    packs = request.app[SITE].services.packs
    async with packs.memory(bodies.decoded_size(request, packs.largest)):
        body = await bodies.whole(request, packs.largest, request.app[SITE].rules.stall_timeout)
        received = pack.decode(body, packs.limits)
        _check_batch(received.head.paths)
        candidates, wrong = await _candidates(cache, received.head.paths)
        nars = [
            SentNar(nar.nar_hash, nar.nar_size, bytes(file))
            for nar, file in zip(received.head.nars, received.files, strict=True)
        ]
        stored, published = await packs.receive(cache, nars, candidates, pusher)
    return json_answer(
        api.PackAnswer(
            [_nar_outcome(sent.nar_hash, error) for sent, error in zip(nars, stored, strict=True)],
            _outcomes(received.head.paths, wrong, published),
        )
    )


async def authorised(request: web.Request, kind: type[Body]) -> tuple[ServedCache, Body, str]:
    """The cache that the request is about, its body, and the name of who sends it and may write. Raises BadInput,
    NotAuthenticated, NotAllowed, NotFound.
    """
    cache, pusher = await _pusher(request)
    data = await bodies.whole(request, api.MAX_REQUEST_SIZE, request.app[SITE].rules.stall_timeout)
    return cache, json_document.decode(data, kind, what=f"the {kind.__name__} in the body"), pusher


async def _pusher(request: web.Request) -> tuple[ServedCache, str]:
    """The cache that the request is about, and the name of who sends it."""
    request[ROUTE] = "api"
    rules = request.app[SITE].rules
    cache = named(rules, request.match_info["cache"])
    principal = await check_writable(rules, cache, token_of(request))
    return cache, principal.name


def _check_batch(paths: Sequence[object]) -> None:
    if len(paths) > api.MAX_BATCH:
        raise TooLarge(f"{len(paths)} paths in one request, at most {api.MAX_BATCH} are taken")


async def _candidates(
    cache: ServedCache, paths: Sequence[api.PathToPublish]
) -> tuple[list[Candidate], dict[int, BadInput]]:
    """Those that make sense, and by their places what is wrong with the others."""
    candidates: list[Candidate] = []
    wrong: dict[int, BadInput] = {}
    async for place, path in unhurried(enumerate(paths)):
        try:
            candidates.append(Candidate.from_api(path, cache.store_dir))
        except BadInput as error:
            wrong[place] = error
    return candidates, wrong


def _outcomes(
    paths: Sequence[api.PathToPublish], wrong: Mapping[int, BadInput], published: Sequence[Outcome]
) -> list[api.PathOutcome]:
    """One a path. Raises StoreError when that is why one of them is not published."""
    if full := next((outcome for outcome in published if isinstance(outcome, StoreError)), None):
        raise full
    others = iter(published)
    results = [wrong[place] if place in wrong else next(others) for place in range(len(paths))]
    return [
        api.PathOutcome(path.path) if error is None else api.PathOutcome(path.path, *_why(error))
        for path, error in zip(paths, results, strict=True)
    ]


def _nar_outcome(nar_hash: str, error: Outcome) -> api.NarOutcome:
    return api.NarOutcome(nar_hash) if error is None else api.NarOutcome(nar_hash, *_why(error))


def _why(error: CachesrvError) -> tuple[str, str]:
    """For people and for programs."""
    kind = next(KINDS[ancestor] for ancestor in type(error).__mro__ if ancestor in KINDS)
    return errors.text_for_client(error), kind


def json_answer(answer: msgspec.Struct) -> web.Response:
    """An answer of the API."""
    return web.Response(
        body=msgspec.json.encode(answer), content_type="application/json", headers={"Cache-Control": "no-store"}
    )
