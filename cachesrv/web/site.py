"""What the handlers work with: the services, and what the configuration says at this moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiohttp import web

from cachesrv.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cachesrv.catalog.base import Catalog
    from cachesrv.index.base import Index
    from cachesrv.services.access import Access, Principal
    from cachesrv.services.caches import ServedCache
    from cachesrv.services.completeness import Completeness
    from cachesrv.services.delivery import Delivery
    from cachesrv.services.ingest import Ingest
    from cachesrv.services.leases import Leases
    from cachesrv.services.lookup import Lookup
    from cachesrv.services.metadata import Metadata
    from cachesrv.services.packs import Packs
    from cachesrv.services.publish import Publish
    from cachesrv.services.taking import Taking
    from cachesrv.services.uploads import Uploads
    from cachesrv.services.upstream import Upstreams
    from cachesrv.services.usage import Usage
    from cachesrv.storage.base import ObjectStore
    from cachesrv.telemetry import Metrics


@dataclass(frozen=True)
class Services:
    """Made once, when the process starts."""

    storage: ObjectStore
    catalog: Catalog
    index: Index
    lookup: Lookup
    ingest: Ingest
    delivery: Delivery
    uploads: Uploads
    publish: Publish
    packs: Packs
    metadata: Metadata
    usage: Usage
    leases: Leases
    upstreams: Upstreams
    completeness: Completeness
    taking: Taking
    metrics: Metrics


@dataclass(frozen=True)
class Rules:
    """Made anew when the configuration is read again. `caches` by name; times in seconds."""

    caches: Mapping[str, ServedCache]
    root: ServedCache | None
    access: Access
    max_nar_size: int
    stall_timeout: float
    base_url: str


class Site:
    """Both together; requests in flight finish by the rules that they began with."""

    def __init__(self, services: Services, rules: Rules) -> None:
        self.services = services
        self.rules = rules
        self.ready = True
        """False while the server is shutting down, so that a load balancer sends no more."""


SITE = web.AppKey("site", Site)
ROUTE = web.RequestKey("route", str)
"""Where a request notes which route of `cachesrv.telemetry.ROUTES` it took."""


def split(rules: Rules, path: str) -> tuple[ServedCache, str]:
    """The cache that a path lies in, and the rest of the path: `/main/nar/x` is `nar/x` in `main`, `/nar/x` is the same
    in the root cache. Raises NotFound.
    """
    first, _, rest = path[1:].partition("/")
    if rest and (cache := rules.caches.get(first)):
        return cache, rest
    if rules.root:
        return rules.root, path[1:]
    raise NotFound(f"there is no cache called {first[:100]!r} here")


def named(rules: Rules, name: str) -> ServedCache:
    """A cache by its name. Raises NotFound."""
    if cache := rules.caches.get(name):
        return cache
    raise NotFound(f"there is no cache called {name[:100]!r} here")


async def check_readable(rules: Rules, cache: ServedCache, token: str | None) -> None:
    """Anybody may read a public cache. Raises NotAuthenticated, NotAllowed."""
    if not cache.public:
        await rules.access.require(token, "pull", cache.name)


async def check_writable(rules: Rules, cache: ServedCache, token: str | None) -> Principal:
    """Who writes. Raises NotAuthenticated, NotAllowed."""
    return await rules.access.require(token, "push", cache.name)
