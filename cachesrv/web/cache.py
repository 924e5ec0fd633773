"""The objects of a binary cache, as Nix clients read and write them: one handler an object and method."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from cachesrv.errors import BadInput, NotFound, StoreError, TooLarge
from cachesrv.index.base import lookup_key
from cachesrv.nix import narinfo
from cachesrv.nix.store_path import is_hash_part
from cachesrv.services import circle, metadata
from cachesrv.services.candidate import Candidate
from cachesrv.services.circle import CameRound
from cachesrv.services.delivery import Coming
from cachesrv.storage.base import PresignedUrl, validate_key
from cachesrv.web import admin, bodies, objects, ranges
from cachesrv.web.auth import token_of
from cachesrv.web.errors import MethodNotAllowed, UnknownCoding
from cachesrv.web.site import ROUTE, SITE, check_readable, check_writable, split

if TYPE_CHECKING:
    from cachesrv.services.caches import ServedCache
    from cachesrv.web.site import Rules, Services

CACHE_INFO_TYPE = "text/x-nix-cache-info"
NAR_TYPE = "application/x-nix-nar"

_ENCODED_LOG_LIMIT = 32 * 1024 * 1024
MISS_HEADERS = {"Cache-Control": "no-store"}
MISS_TEXT = "no such path\n"
_PORT = re.compile(r":[0-9]*\Z")
_NO_NAR = "there is no such NAR in this cache"
_NO_OBJECT = "there is no such object in this cache"
_EVICTED = 3
"""Times that a file is looked for which goes before it is opened: from the disk cache it may, and is elsewhere then."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request for the object called `name` in `cache`; `pusher` is the name of who writes."""

    request: web.Request
    services: Services
    rules: Rules
    cache: ServedCache
    name: str
    pusher: str


Handler = Callable[[Ask], Awaitable[web.StreamResponse]]


async def get_cache_info(ask: Ask) -> web.StreamResponse:
    """What the cache says of itself; never 404, for then clients try to write it."""
    return web.Response(body=ask.cache.info, headers={"Content-Type": CACHE_INFO_TYPE, "Cache-Control": "max-age=3600"})


async def get_narinfo(ask: Ask) -> web.StreamResponse:
    """The slow way to a narinfo: for what the front passes on, and for what the index does not know."""
    hash_part = _hash_part(ask.name, ".narinfo")
    try:
        found = await ask.services.lookup.find(ask.cache, hash_part)
    except CameRound as error:
        return web.Response(status=404, headers={**MISS_HEADERS, circle.ENDED_AT: error.name}, text=MISS_TEXT)
    if found is None:
        return web.Response(status=404, headers=MISS_HEADERS, text=MISS_TEXT)
    ask.services.usage.add(lookup_key(ask.cache.name, hash_part))
    headers = dict(line.split(": ", 1) for line in found.head.decode("ascii").splitlines() if line)
    if ranges.matches(ask.request.headers.get("If-None-Match"), headers["ETag"]):
        return web.Response(status=304, headers={"ETag": headers["ETag"], "Cache-Control": headers["Cache-Control"]})
    return web.Response(body=found.body, headers=headers)


async def put_narinfo(ask: Ask) -> web.StreamResponse:
    """Publish a path whose NAR is here."""
    hash_part = _hash_part(ask.name, ".narinfo")
    data = await bodies.whole(ask.request, narinfo.DEFAULT_LIMIT, ask.rules.stall_timeout)
    info = narinfo.parse(data)
    if info.store_path.hash_part != hash_part:
        raise BadInput(f"the narinfo is of {info.store_path}, its name says {hash_part}")
    await ask.services.publish.one(ask.cache, Candidate.from_narinfo(info), ask.pusher)
    return web.Response(status=204)


async def get_nar(ask: Ask) -> web.StreamResponse:
    """A NAR, whole or in part."""
    name = ask.name.removeprefix("nar/")
    key = validate_key(ask.cache.key(ask.name))
    hash_part = ask.request.query.get("path")
    if ask.request.method == "HEAD":
        # Never by a redirect: a presigned URL is good for GET alone.
        size = await ask.services.delivery.size(ask.cache, name, hash_part)
        if size is None:
            raise NotFound(_NO_NAR)
        ask.services.usage.add_nar(key)
        return await _send_nar(ask, objects.SizeOnly(size))
    for _ in range(_EVICTED):
        delivery = await ask.services.delivery.open(ask.cache, name, hash_part, not_at=_keeper_of_secrets(ask.request))
        if delivery is None:
            break
        ask.services.usage.add_nar(key)
        if isinstance(delivery, PresignedUrl):
            return web.Response(status=307, headers={"Location": delivery.url, "Cache-Control": "no-store"})
        if isinstance(delivery, Coming):
            async with objects.ChunksBody(delivery.size, delivery.read) as chunks:
                return await _send_nar(ask, chunks)
        if file := objects.opened(delivery):
            with file:
                return await _send_nar(ask, file)
    raise NotFound(_NO_NAR)


def _keeper_of_secrets(request: web.Request) -> str:
    """The host that this client has a password for, if it sent one: it would send it to any port of that host, and no
    bucket takes a request with two signatures (netrc knows no ports).
    """
    if "Authorization" not in request.headers:
        return ""
    return _PORT.sub("", request.host).strip("[]").lower()


async def _send_nar(ask: Ask, body: objects.Body) -> web.StreamResponse:
    response = await objects.send(
        ask.request,
        body,
        content_type=NAR_TYPE,
        cache_control=objects.IMMUTABLE,
        etag=f'"{ask.name.removeprefix("nar/")}"',
    )
    if ask.request.method == "GET" and response.status in {200, 206}:
        ask.services.metrics.add("sent_bytes", response.content_length or 0)
    return response


async def put_nar(ask: Ask) -> web.StreamResponse:
    """Take a NAR in, checked while it streams."""
    if bodies.coding(ask.request) != "none":
        raise UnknownCoding("a NAR is sent as it is, without Content-Encoding: its own compression is in its name")
    chunks = bodies.chunks(ask.request, ask.rules.stall_timeout)
    await ask.services.ingest.receive(ask.cache, ask.name.removeprefix("nar/"), chunks, ask.request.content_length)
    return web.Response(status=204)


async def get_metadata(ask: Ask) -> web.StreamResponse:
    """A listing, log, realisation or entry of the debug index."""
    kind = metadata.kind_of(ask.name)
    assert kind is not None
    key = validate_key(ask.cache.key(ask.name))
    info = await ask.services.metadata.find(key)
    if info is None:
        raise NotFound(_NO_OBJECT)
    send = partial(objects.send, ask.request, content_type=kind.content_type, cache_control=objects.REVALIDATE)
    if info.coded:
        return await send(objects.BytesBody(await _decoded(ask, key)))
    async with objects.ChunksBody(info.size, partial(ask.services.storage.read, key)) as body:
        return await send(body)


async def _decoded(ask: Ask, key: str) -> bytes:
    """What others have stored encoded: not all clients understand it so."""
    try:
        data = await ask.services.storage.get(key, limit=_ENCODED_LOG_LIMIT)
    except TooLarge as error:
        raise StoreError(f"{key} is stored encoded, and is too large to be decoded: {error}") from error
    if data is None:
        raise NotFound(_NO_OBJECT)
    return data


async def put_metadata(ask: Ask) -> web.StreamResponse:
    """Keep such an object."""
    kind = metadata.kind_of(ask.name)
    assert kind is not None
    validate_key(ask.cache.key(ask.name))
    if kind is metadata.LOG:
        chunks = bodies.decoded(ask.request, _ENCODED_LOG_LIMIT, ask.rules.stall_timeout)
        await ask.services.metadata.put_log(ask.cache, ask.name, chunks)
    else:
        data = await bodies.whole(ask.request, kind.limit, ask.rules.stall_timeout)
        await ask.services.metadata.put(ask.cache, kind, ask.name, data)
    return web.Response(status=204)


@dataclass(frozen=True, slots=True)
class Route:
    """Objects whose names match `pattern`; `label` is what metrics call them."""

    label: str
    pattern: re.Pattern[str]
    get: Handler
    put: Handler | None = None


ROUTES = (
    Route("nix-cache-info", re.compile(r"nix-cache-info"), get_cache_info),
    Route("narinfo", re.compile(r"[^/]+\.narinfo"), get_narinfo, put_narinfo),
    Route("nar", re.compile(r"nar/[^/]+"), get_nar, put_nar),
    *(Route(kind.route, kind.pattern, get_metadata, put_metadata) for kind in metadata.KINDS),
)


async def handle(request: web.Request) -> web.StreamResponse:
    """Everything that a binary cache is asked."""
    site = request.app[SITE]
    rules = site.rules
    circle.begin(request.headers.get(circle.ASKED_BY, ""))
    if request.method in {"GET", "HEAD"} and (whole := rules.caches.get(request.path.strip("/"))):
        await check_readable(rules, whole, token_of(request))
        return admin.introduce(request, [whole])
    cache, name = split(rules, request.path)
    route = next((route for route in ROUTES if route.pattern.fullmatch(name)), None)
    if route is None:
        raise NotFound("a binary cache has nothing of this name")
    request[ROUTE] = route.label
    token = token_of(request) if request.method == "PUT" or not cache.public else None
    if request.method in {"GET", "HEAD"}:
        await check_readable(rules, cache, token)
        return await route.get(Ask(request, site.services, rules, cache, name, ""))
    if request.method == "PUT" and route.put:
        principal = await check_writable(rules, cache, token)
        return await route.put(Ask(request, site.services, rules, cache, name, principal.name))
    allowed = ["GET", "HEAD", *(["PUT"] if route.put else [])]
    raise MethodNotAllowed(f"{request.method} is not for this; it can be asked by {', '.join(allowed)}", allowed)


def _hash_part(name: str, suffix: str) -> str:
    hash_part = name.removesuffix(suffix)
    if not is_hash_part(hash_part):
        raise BadInput(f"{hash_part[:100]!r} is not the hash part of a store path: 32 characters of nix-base-32")
    return hash_part
