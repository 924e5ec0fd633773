"""Which requests are so plain that they can be answered without a full HTTP parser. Pure.

The header fields of one client are the same for all its requests, to the byte: each block of them is judged once, by
strict rules, and the verdict is remembered. A block that is not plainly understood leaves the request to aiohttp.
Source: RFC 9112, 2 to 6.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cachesrv.errors import NotAuthenticated
from cachesrv.web.auth import token_in

MAX_BLOCK = 4096
"""Bytes of header fields; longer blocks are left to aiohttp."""

_REMEMBERED = 1024
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([!-~](?:[ -~]*[!-~])?)?[ \t]*")
_HOST = re.compile(rb"[0-9A-Za-z.:_\[\]-]+")
_WITHOUT_EFFECT = frozenset(
    {
        *(b"accept", b"accept-encoding", b"accept-language", b"cache-control", b"pragma", b"user-agent"),
        *(b"forwarded", b"via", b"x-client-ip", b"x-cluster-client-ip", b"x-forwarded-for", b"x-forwarded-host"),
        *(b"x-forwarded-port", b"x-forwarded-prefix", b"x-forwarded-proto", b"x-forwarded-scheme"),
        *(b"x-forwarded-server", b"x-forwarded-ssl", b"x-original-forwarded-for", b"x-real-ip", b"x-scheme"),
        *(b"traceparent", b"tracestate", b"x-amzn-trace-id", b"x-cloud-trace-context", b"x-request-id"),
        *(b"x-envoy-attempt-count", b"x-envoy-expected-rq-timeout-ms", b"x-envoy-external-address"),
        *(b"cdn-loop", b"cf-connecting-ip", b"cf-ipcountry", b"cf-ray", b"cf-visitor", b"true-client-ip"),
        *(b"fastly-client-ip", b"fastly-ff", b"x-varnish"),
    }
)
"""Fields that change nothing in the answer: those of clients and of the proxies before us."""

_CONDITIONS = frozenset({b"range", b"if-range", b"if-none-match", b"if-modified-since"})
"""Fields that change the answer, but not where the request ends."""


_WITHOUT_BODY = (b"GET ", b"HEAD ")
_BODY = re.compile(rb"content-length|transfer-encoding|upgrade", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Block:
    """The header fields of a request that has no body and leaves the connection open. `token` is what it carries for
    authorisation; `conditional` says that the answer depends on more than what is asked for.
    """

    token: str | None
    conditional: bool


def judge(fields: bytes) -> Block | None:
    """All that follows the request line, empty line included; None when it is anything out of the ordinary, such as a
    body, an upgrade, a second request, or a field that nobody has heard of.
    """
    if len(fields) > MAX_BLOCK or not fields.endswith(b"\r\n\r\n"):
        return None
    seen: dict[bytes, bytes] = {}
    for line in fields[:-4].split(b"\r\n"):
        match = _FIELD.fullmatch(line)
        if not match or (name := match[1].lower()) in seen:
            return None
        seen[name] = match[2] or b""
    if not _HOST.fullmatch(seen.pop(b"host", b"")) or seen.pop(b"connection", b"keep-alive").lower() != b"keep-alive":
        return None
    authorization = seen.pop(b"authorization", None)
    effective = seen.keys() - _WITHOUT_EFFECT
    if effective - _CONDITIONS:
        return None
    try:
        token = token_in(authorization.decode("ascii")) if authorization is not None else None
    except NotAuthenticated:
        return None
    return Block(token, conditional=bool(effective))


def is_whole(data: bytes) -> bool:
    """Whether this is one request that has no body and has come to its end, as far as can be told without a parser."""
    if not (data.startswith(_WITHOUT_BODY) and data.endswith(b"\r\n\r\n") and data.count(b"\r\n\r\n") == 1):
        return False
    return not _BODY.search(data)


class Blocks:
    """Verdicts that were reached before, bounded in number."""

    def __init__(self) -> None:
        self._verdicts: dict[bytes, Block | None] = {}

    def get(self, fields: bytes) -> Block | None:
        """As `judge`."""
        try:
            return self._verdicts[fields]
        except KeyError:
            verdict = judge(fields)
        if len(fields) <= MAX_BLOCK:
            if len(self._verdicts) >= _REMEMBERED:
                self._verdicts.clear()
            self._verdicts[fields] = verdict
        return verdict
