"""What operators and their tools ask: health, metrics, and what this server is."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from aiohttp import web

from cachesrv.errors import StoreError
from cachesrv.services.collect import COLLECTED
from cachesrv.services.verify import FLAWS_FOUND, VERIFIED
from cachesrv.web.site import ROUTE, SITE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cachesrv.services.caches import ServedCache
    from cachesrv.telemetry import Gauge
    from cachesrv.web.site import Site


async def live(request: web.Request) -> web.Response:
    """The process answers."""
    request[ROUTE] = "health"
    return web.Response(text="live\n", headers={"Cache-Control": "no-store"})


async def ready(request: web.Request) -> web.Response:
    """The stores answer, and the server is not about to stop."""
    request[ROUTE] = "health"
    site = request.app[SITE]
    if not site.ready:
        return web.Response(status=503, text="stopping\n", headers={"Cache-Control": "no-store"})
    await site.services.catalog.noted(COLLECTED)
    return web.Response(text="ready\n", headers={"Cache-Control": "no-store"})


async def metrics(request: web.Request) -> web.Response:
    """Prometheus' text format."""
    request[ROUTE] = "metrics"
    site = request.app[SITE]
    gauges: list[Gauge] = []
    with suppress(StoreError):
        answers, absences = await asyncio.to_thread(site.services.index.count)
        gauges.append(("index_paths", "Paths in the index.", answers))
        gauges.append(("index_absences", "Absences in the index.", absences))
    with suppress(StoreError):
        collected = float(await site.services.catalog.noted(COLLECTED) or 0)
        gauges.append(("collected_at_seconds", "When garbage was collected last, whoever did it; 0: never.", collected))
        verified = float(await site.services.catalog.noted(VERIFIED) or 0)
        gauges.append(("verified_at_seconds", "When all caches were verified last by a server; 0: never.", verified))
        flaws = float(await site.services.catalog.noted(FLAWS_FOUND) or 0)
        gauges.append(("flaws", "Flaws that this verification found.", flaws))
    text = await asyncio.to_thread(site.services.metrics.render, gauges)
    return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


async def page(request: web.Request) -> web.Response:
    """What this is and how to use it."""
    caches = [cache for cache in request.app[SITE].rules.caches.values() if cache.public]
    return introduce(request, caches)


def introduce(request: web.Request, caches: Iterable[ServedCache]) -> web.Response:
    """What clients of these caches need."""
    request[ROUTE] = "page"
    parts = ["cachesrv: a Nix binary cache.\n", *(_introduction(request.app[SITE], cache) for cache in caches)]
    return web.Response(text="\n".join(parts), headers={"Cache-Control": "no-store"})


def _introduction(site: Site, cache: ServedCache) -> str:
    keys = " ".join(key.public.render() for key in cache.signing_keys)
    return (
        f"{cache.name}, in nix.conf:\n\n"
        f"    extra-substituters = {site.rules.base_url}/{cache.name}\n"
        f"    extra-trusted-public-keys = {keys}\n"
    )
