"""What a status other than success means to the uploader: one of our errors, with a line that says what to do."""

from __future__ import annotations

import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from cachesrv.api import ErrorAnswer, cache_url
from cachesrv.errors import BadInput, CachesrvError, Conflict, NotAllowed, NotAuthenticated, Refused, ServerError
from cachesrv.nix import json_document
from cachesrv.push.body_limit import BodyTooLarge, LengthWanted
from cachesrv.push.one_line import one_line
from cachesrv.push.retry import Away, Broken, Overloaded, TryAgain
from cachesrv.push.token import is_nowhere

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cachesrv.push.address import Address
    from cachesrv.push.token import TokenSource

TOO_MUCH = frozenset({408, 429, 502, 503, 504})
"""Statuses that may come of too many requests at once."""

_TOO_LATE = frozenset({408, 504, 524})
"""Statuses that may come of a request that took too long; the last one is Cloudflare's."""

_AWAY = frozenset({502, 503})
"""Statuses that a proxy has for all requests while there is no server behind it, as it has 504."""

_MAY_PASS = TOO_MUCH | {425}
_WILL_NOT_PASS = frozenset({501, 505})
_OF_BODIES: dict[int, tuple[type[CachesrvError], str]] = {
    411: (LengthWanted, "{} or a proxy before it takes no NAR whose length is not known"),
    413: (BodyTooLarge, "too large for {} or a proxy before it"),
    507: (ServerError, "{} takes no more (507 Insufficient Storage)"),
}


class NotThere(ServerError):
    """The server knows nothing of what it was asked for."""


def refusal(
    status: int,
    said: str,
    address: Address,
    tokens: TokenSource,
    *,
    location: str = "",
    retry_after: float = 0.0,
) -> CachesrvError:
    """The error for an answer; `said` is the server's own line, `tokens` where the token that was sent comes from,
    `retry_after` is in seconds.
    """
    because = f": {said}" if said else ""
    if 300 <= status < 400:
        return ServerError(_redirected(address, location))
    if status == 401:
        return NotAuthenticated(_who(address, tokens) + because)
    if status == 403:
        token = "no token" if is_nowhere(tokens) else f"the token from {tokens}"
        return NotAllowed(f"{address} does not allow this with {token}: it takes one that permits push{because}")
    if status == 404:
        return NotThere(
            f"there is no cache {address.cache} at {address.base}, or what is there is no cachesrv{because}"
        )
    if status == 409:
        return Conflict(said or "the cache has it otherwise")
    if status in _OF_BODIES:
        kind, words = _OF_BODIES[status]
        return kind(words.format(address) + because)
    if status in _MAY_PASS or (status >= 500 and status not in _WILL_NOT_PASS):
        return _passing(status)(f"{address} answered with status {status}{because}", retry_after)
    if status >= 500 or status < 200:
        return ServerError(f"{address} answered with status {status}{because}")
    return Refused(said or f"the server refused it with status {status}")


def _passing(status: int) -> type[TryAgain]:
    if status in _TOO_LATE:
        return Broken
    if status in _AWAY:
        return Away
    return Overloaded if status in TOO_MUCH else TryAgain


def said_in(body: bytes, content_type: str) -> str:
    """The server's own line in the body of an error; empty for the pages of proxies."""
    if "html" in content_type:
        return ""
    try:
        return one_line(json_document.decode(body, ErrorAnswer, what="an error").error)
    except BadInput:
        return one_line(body.decode(errors="replace"))


def seconds_until(headers: Mapping[str, str]) -> float:
    """What `retry-after` among the headers asks for, in seconds or as a time, which counts from that in `date`: the
    server's clock may not be ours. 0 when it cannot be read.
    """
    retry_after = headers.get("retry-after", "")
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:9])
    then, now = _seconds(retry_after), _seconds(headers.get("date", ""))
    return 0.0 if then is None else max(0.0, then - (time.time() if now is None else now))


def _seconds(text: str) -> float | None:
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None


def _redirected(address: Address, location: str) -> str:
    """The cache's URL where an answer sends us elsewhere, as far as that can be told from where it does."""
    base, found, _ = location.partition(cache_url("", address.cache))
    if found and base.startswith(("http://", "https://")):
        return f"{address} is at {one_line(base)}/{address.cache} now: use that URL"
    return f"{address} redirects{' to ' + one_line(location) if location else ''}: use that URL"


def _who(address: Address, tokens: TokenSource) -> str:
    if is_nowhere(tokens):
        return f"{address} wants a token: give one by --token-file, $CACHESRV_TOKEN, the client configuration or netrc"
    return f"{address} does not accept the token from {tokens}"
