"""What went wrong, as an HTTP answer: one table from our errors to statuses, one line of text to the client.

What is not in the tree of `cachesrv.errors` is a defect of ours: it goes to the log with its stack, and the client
learns nothing of it but that it happened.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import structlog
from aiohttp import web

from cachesrv import errors
from cachesrv.services import amounts
from cachesrv.web.ranges import Unsatisfiable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiohttp.typedefs import Handler

_log = structlog.get_logger()

BEGUN = web.RequestKey("answer begun", bool)
"""Set in a request whose answer has begun and is sent bit by bit."""

RETRY_AFTER = 5
"""Seconds after which a client may ask again what could not be answered."""


class BodyTooSlow(errors.CachesrvError):
    """A request body that does not come forward."""


class UnknownCoding(errors.BadInput):
    """A Content-Encoding that cannot be decoded here."""


class MethodNotAllowed(errors.CachesrvError):
    """The resource is there, but not for this method; `allowed` are those that it is for."""

    def __init__(self, message: str, allowed: Sequence[str]) -> None:
        super().__init__(message)
        self.allowed = allowed


STATUSES: dict[type[errors.CachesrvError], int] = {
    BodyTooSlow: 408,
    UnknownCoding: 415,
    MethodNotAllowed: 405,
    Unsatisfiable: 416,
    errors.TooLarge: 413,
    errors.Mismatch: 422,
    errors.BadInput: 400,
    errors.NotFound: 404,
    errors.Conflict: 409,
    errors.Refused: 422,
    errors.NotAuthenticated: 401,
    errors.NotAllowed: 403,
    errors.StoreFull: 507,
    errors.StoreUnavailable: 503,
    errors.StoreError: 500,
    errors.PeerUnavailable: 503,
    errors.PeerError: 502,
    errors.ConfigError: 500,
}
"""The first ancestor of an error that stands here decides."""

_OURS = (errors.StoreError, errors.PeerError, errors.ConfigError)
"""Errors whose text is for the operator, not for the client."""


def status_of(error: errors.CachesrvError) -> int:
    """The HTTP status for an error."""
    return next(STATUSES[kind] for kind in type(error).__mro__ if kind in STATUSES)


def text_for_client(error: errors.CachesrvError) -> str:
    """One line that says what to do, and nothing of how things are inside."""
    if isinstance(error, errors.StoreFull):
        left = f"room for this, {amounts.size(error.missing)} are missing" if error.missing else "room left"
        return f"the cache has no {left}: its operator has to collect garbage or make room"
    if isinstance(error, _OURS):
        return "the cache cannot answer this at present; its log says why"
    return " ".join(str(error).split())


def answer(request: web.BaseRequest, error: errors.CachesrvError) -> web.Response:
    """The answer that tells a client of an error; what only the operator can mend goes to the log."""
    status = status_of(error)
    if isinstance(error, _OURS):
        _log.error("request failed", method=request.method, path=request.path, status=status, error=str(error))
    else:
        _log.debug("request refused", method=request.method, path=request.path, status=status, error=str(error))
    headers = {"Cache-Control": "no-store"}
    if status == web.HTTPUnauthorized.status_code:
        headers["WWW-Authenticate"] = 'Basic realm="cachesrv"'
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = ", ".join(error.allowed)
    if isinstance(error, Unsatisfiable):
        headers["Content-Range"] = f"bytes */{error.size}"
    if status == web.HTTPServiceUnavailable.status_code:
        headers["Retry-After"] = str(RETRY_AFTER)
    return line(request, status, text_for_client(error), headers)


def line(request: web.BaseRequest, status: int, text: str, headers: dict[str, str]) -> web.Response:
    """One line of text, or JSON for programs that use the API."""
    if request.path.startswith("/api/"):
        body = json.dumps({"error": text}) + "\n"
        return web.Response(status=status, text=body, content_type="application/json", headers=headers)
    return web.Response(status=status, text=f"{text}\n", headers=headers)


@web.middleware
async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn whatever a handler raises into an answer; where one has begun already, the connection ends."""
    try:
        return await handler(request)
    except errors.CachesrvError as error:
        _end_if_begun(request)
        return answer(request, error)
    except (asyncio.CancelledError, ConnectionError, web.HTTPException):
        raise
    except Exception:  # noqa: BLE001  a defect, whatever it is, must not end the connection without an answer
        _log.exception("defect", method=request.method, path=request.path)
        _end_if_begun(request)
        return line(request, 500, "an internal error; the cache's log says more", {"Cache-Control": "no-store"})


def _end_if_begun(request: web.Request) -> None:
    """An answer that breaks off must not look whole."""
    if request.get(BEGUN) and request.transport is not None:
        request.transport.abort()
        raise ConnectionResetError("an answer broke off")
