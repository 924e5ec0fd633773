"""The aiohttp application: every route in one table. The front (hot path) stands before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from cachesrv.web import admin, cache, errors, push, uploads
from cachesrv.web.site import ROUTE, SITE, Site

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiohttp.typedefs import Handler, Middleware

SERVER = "cachesrv"


def create_app(site: Site, outermost: Sequence[Middleware] = ()) -> web.Application:
    """The application for a site; `outermost` are middlewares that see every request first and every answer last."""
    app = web.Application(middlewares=[*outermost, _counting, errors.middleware])
    app[SITE] = site
    app.on_response_prepare.append(_name_server)
    app.router.add_get("/", admin.page)
    app.router.add_get("/health/live", admin.live)
    app.router.add_get("/health/ready", admin.ready)
    app.router.add_get("/metrics", admin.metrics)
    _add(app, "GET", "/api/v1/caches/{cache}", push.get_cache)
    _add(app, "POST", "/api/v1/caches/{cache}/missing", push.missing)
    _add(app, "POST", "/api/v1/caches/{cache}/paths", push.publish)
    _add(app, "POST", "/api/v1/caches/{cache}/nars", push.take_pack)
    upload = "/api/v1/caches/{cache}/uploads/{upload}"
    _add(app, "POST", "/api/v1/caches/{cache}/uploads", uploads.begun)
    _add(app, "PUT", upload, uploads.begin)
    _add(app, "PUT", upload + "/parts/{number}", uploads.put_part)
    _add(app, "POST", upload + "/parts/{number}", uploads.sign)
    _add(app, "POST", upload + "/file", uploads.sign_file)
    _add(app, "POST", upload + "/complete", uploads.complete)
    _add(app, "DELETE", upload, uploads.abort)
    _add(app, "*", "/{name:.+}", cache.handle)
    return app


async def _name_server(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = SERVER


def _add(app: web.Application, method: str, path: str, handler: Handler) -> None:
    """A body is asked for (`100 Continue`) by the handler, once it is known that it will be read."""
    app.router.add_route(method, path, handler, expect_handler=_wait_with_continue)


async def _wait_with_continue(_request: web.Request) -> None:
    """Leave `Expect: 100-continue` to `cachesrv.web.bodies`."""


@web.middleware
async def _counting(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Count what was answered, by route and status."""
    try:
        response = await handler(request)
    except web.HTTPException as error:
        response = errors.line(request, error.status, error.reason.lower(), _allow(error))
    request.app[SITE].services.metrics.request(request.method, request.get(ROUTE, "unmatched"), response.status)
    return response


def _allow(error: web.HTTPException) -> dict[str, str]:
    return {name: value for name, value in error.headers.items() if name == "Allow"}
