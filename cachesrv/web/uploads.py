"""NARs in parts: see `cachesrv.api` for what goes over the wire."""

from __future__ import annotations

import binascii
import re
from base64 import b64decode
from typing import TYPE_CHECKING

from aiohttp import web

from cachesrv import api
from cachesrv.errors import BadInput
from cachesrv.nix.hashes import Hash
from cachesrv.services.part_store import Begun, Part
from cachesrv.services.uploads import DirectParts, Known, Missing, Sent, Verifying
from cachesrv.web import bodies
from cachesrv.web.auth import token_of
from cachesrv.web.errors import UnknownCoding
from cachesrv.web.push import authorised, json_answer
from cachesrv.web.site import ROUTE, SITE, check_writable, named

if TYPE_CHECKING:
    from cachesrv.storage.base import SignedPut

_PATIENCE = 20.0
"""Seconds after which an answer is given although it is not known yet: proxies wait for 60."""

_DIGEST = re.compile(r"sha-256=:([0-9A-Za-z+/=]{44}):")
_MD5 = re.compile(r"[0-9a-f]{32}")
_NUMBER = re.compile(r"[0-9]{1,9}")


async def begun(request: web.Request) -> web.Response:
    """Which of some uploads there are."""
    cache, asked, _ = await authorised(request, api.BegunRequest)
    if len(asked.uploads) > api.MAX_NAMES:
        raise BadInput(f"{len(asked.uploads)} uploads in one request, which takes {api.MAX_NAMES}")
    there = await request.app[SITE].services.uploads.begun(cache, asked.uploads)
    return json_answer(api.BegunAnswer(there))


async def begin(request: web.Request) -> web.Response:
    """Begin an upload, or take it up again; what is there of it."""
    cache, asked, pusher = await authorised(request, api.UploadRequest)
    uploads = request.app[SITE].services.uploads
    nar_hash = Hash.parse(asked.nar_hash)
    begun = Begun(nar_hash.nix32, asked.nar_size, pusher)
    there = await uploads.begin(cache, request.match_info["upload"], nar_hash, begun, direct=asked.direct)
    if there is None:
        return json_answer(api.UploadAnswer(stored=True))
    if isinstance(there, DirectParts):
        arrived = [api.DirectPart(part.number, part.tag) for part in there.parts]
        return json_answer(api.UploadAnswer(stored=False, direct=api.DirectAnswer(there.least, there.most, arrived)))
    parts = [api.UploadedPart(part.number, part.size, part.sha256) for part in there]
    return json_answer(api.UploadAnswer(stored=False, parts=parts))


async def put_part(request: web.Request) -> web.Response:
    """Take in a part."""
    request[ROUTE] = "api"
    rules = request.app[SITE].rules
    cache = named(rules, request.match_info["cache"])
    await check_writable(rules, cache, token_of(request))
    if bodies.coding(request) != "none":
        raise UnknownCoding("a part is sent as it is, without Content-Encoding")
    if request.content_length is None:
        raise BadInput("how large is the part? send Content-Length")
    digest = _digest(request.headers.get("Content-Digest", ""))
    part = Part(_number(request), request.content_length, digest.hex())
    chunks = bodies.chunks(request, rules.stall_timeout)
    await request.app[SITE].services.uploads.receive(cache, request.match_info["upload"], part, chunks)
    return web.Response(status=204)


async def sign(request: web.Request) -> web.Response:
    """Where else a part can be sent."""
    cache, asked, _ = await authorised(request, api.SignRequest)
    _check_md5(asked.md5)
    uploads = request.app[SITE].services.uploads
    signed = await uploads.sign(cache, request.match_info["upload"], _number(request), bytes.fromhex(asked.md5))
    return json_answer(_signed(signed))


async def sign_file(request: web.Request) -> web.Response:
    """Where else a NAR can be sent in one piece."""
    cache, asked, _ = await authorised(request, api.FileRequest)
    _check_md5(asked.md5)
    uploads = request.app[SITE].services.uploads
    nar_hash, md5 = Hash.parse(asked.nar_hash), bytes.fromhex(asked.md5)
    there = await uploads.sign_whole(cache, request.match_info["upload"], nar_hash, asked.size, md5)
    if isinstance(there, Known):
        return json_answer(api.FileAnswer(stored=True))
    return json_answer(api.FileAnswer(stored=False, put=_signed(there) if there else None))


async def complete(request: web.Request) -> web.Response:
    """Make a NAR of the parts."""
    cache, asked, _ = await authorised(request, api.CompleteRequest)
    uploads = request.app[SITE].services.uploads
    nar_hash = Hash.parse(asked.nar_hash)
    for md5 in asked.md5:
        _check_md5(md5)
    upload = request.match_info["upload"]
    sent = Sent(asked.parts, asked.md5, asked.size)
    outcome = await uploads.complete(cache, upload, nar_hash, sent, patience=_PATIENCE)
    if isinstance(outcome, Missing):
        return json_answer(api.CompleteAnswer("incomplete", missing=outcome.numbers))
    if isinstance(outcome, Verifying):
        return json_answer(api.CompleteAnswer("verifying", verified=outcome.read))
    return json_answer(api.CompleteAnswer("stored"))


async def abort(request: web.Request) -> web.Response:
    """Forget the parts."""
    request[ROUTE] = "api"
    rules = request.app[SITE].rules
    cache = named(rules, request.match_info["cache"])
    await check_writable(rules, cache, token_of(request))
    await request.app[SITE].services.uploads.abort(cache, request.match_info["upload"])
    return web.Response(status=204)


def _signed(put: SignedPut) -> api.SignAnswer:
    return api.SignAnswer(put.url, dict(put.headers))


def _number(request: web.Request) -> int:
    number = request.match_info["number"]
    if not _NUMBER.fullmatch(number):
        raise BadInput(f"{number[:50]!r} is not the number of a part")
    return int(number)


def _check_md5(text: str) -> None:
    if not _MD5.fullmatch(text):
        raise BadInput("md5: expected 32 hexadecimal digits")


def _digest(header: str) -> bytes:
    """The sha256 in a Content-Digest (RFC 9530). Raises BadInput."""
    match = _DIGEST.search(header)
    try:
        digest = b64decode(match[1], validate=True) if match else b""
    except binascii.Error:
        digest = b""
    if len(digest) != 32:
        raise BadInput("a part has to come with its sha256, as Content-Digest: sha-256=:<base64>:")
    return digest
