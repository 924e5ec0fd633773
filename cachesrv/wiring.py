"""Configuration to stores to services: the only place that picks an implementation."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import structlog

from cachesrv.catalog.sql import SqlCatalog
from cachesrv.errors import BadInput, ConfigError, StoreDamaged, StoreError
from cachesrv.index.lmdb import LmdbIndex
from cachesrv.index.unusable import UnusableIndex
from cachesrv.nix.signing import PublicKey, trusted_keys
from cachesrv.services.access import Access, Principal, token_hash
from cachesrv.services.breaker import Breaker
from cachesrv.services.bucket import BucketSource
from cachesrv.services.caches import DeclaredUpstream, ReferencePolicy, ServedCache
from cachesrv.services.circle import Circle
from cachesrv.services.collect import Collect, Terms
from cachesrv.services.completeness import Completeness
from cachesrv.services.copies import FromReader, FromUpstreams, OtherCaches, SameNar
from cachesrv.services.data_directory import DataDirectory, parse_secret_key, read_secret
from cachesrv.services.deleting import Delete
from cachesrv.services.delivery import Delivery, FarAway
from cachesrv.services.direct import Direct as DirectUploads
from cachesrv.services.disk_room import RESERVE, DiskRoom, Place
from cachesrv.services.fetch import Fetches
from cachesrv.services.http_reader import HttpReader
from cachesrv.services.ingest import Ingest
from cachesrv.services.leases import Leases
from cachesrv.services.lookup import CatalogSource, Lookup, Source
from cachesrv.services.marking import Policy
from cachesrv.services.metadata import Metadata
from cachesrv.services.packs import Packs
from cachesrv.services.part_store import PartStore
from cachesrv.services.path_check import Stores
from cachesrv.services.place import place
from cachesrv.services.publish import Publish
from cachesrv.services.pull_through import PullThrough
from cachesrv.services.repair import Means, Repair
from cachesrv.services.spool import Spool
from cachesrv.services.store_reader import StoreReader
from cachesrv.services.taking import Taking
from cachesrv.services.uploads import Limits, Uploads
from cachesrv.services.upstream import Upstream, Upstreams
from cachesrv.services.usage import RESOLUTION, Usage
from cachesrv.services.verify import Allowances, Verify
from cachesrv.storage.decorators import Direct, Guarded, Limited, Measured, Retrying, log_retries
from cachesrv.storage.disk_cache import DiskCache
from cachesrv.storage.filesystem import FilesystemStore
from cachesrv.storage.kept import KeepingStore, KeptCopies
from cachesrv.storage.no_cache import NoCache
from cachesrv.storage.s3_url import BucketUrl
from cachesrv.web.site import Rules, Services

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence

    from cachesrv.catalog.base import Catalog
    from cachesrv.config import Cache, Config
    from cachesrv.index.base import Index
    from cachesrv.nix.signing import SecretKey
    from cachesrv.services.copies import Copies
    from cachesrv.services.nar_check import NarCheck
    from cachesrv.services.upstream import Reader
    from cachesrv.storage.base import ObjectCache, ObjectStore
    from cachesrv.storage.decorators import Requests
    from cachesrv.storage.s3 import S3Store
    from cachesrv.telemetry import Metrics

_log = structlog.get_logger()

_FETCHES = 128
"""NARs that are fetched from afar at the same time."""
_PATIENCE_WITH_COPIES = 10
"""Seconds for which a cache is waited for that is asked for copies."""


def private_umask() -> None:
    """What this process makes is for its owner, and for its group to read; secrets are made for the owner alone."""
    os.umask(0o027)


def open_storage(config: Config, metrics: Metrics | None = None) -> ObjectStore:
    """The object store; requests to a bucket are counted in `metrics`."""
    if config.storage.kind == "s3":
        return _open_bucket(config, metrics)
    return FilesystemStore(Path(config.storage.path or DataDirectory(config.data_dir).objects))


async def problems_of_bucket(config: Config) -> Sequence[str]:
    """What a server would stumble over in its bucket, one line each. Raises StoreError."""
    bucket = _open_bucket(config)
    try:
        return await bucket.probe()
    finally:
        await bucket.close()


def _open_bucket(config: Config, metrics: Metrics | None = None) -> S3Store:
    from cachesrv.storage.s3 import S3Store

    storage = config.storage
    requests: Requests = Direct()
    if metrics is not None:
        requests = Measured(requests, partial(_count_request, metrics))
    return S3Store(
        storage.bucket or "",
        requests=_persistent(requests),
        prefix=storage.prefix or "",
        region=storage.region,
        endpoint=storage.endpoint,
        addressing_style=storage.addressing_style,
        redirect=config.delivery.mode == "redirect",
        presign_seconds=config.delivery.presign_seconds,
    )


def _persistent(requests: Requests, timeout: float = 45) -> Requests:
    """As many as the bucket bears, and tried again where that may help."""
    log_retries()
    return Retrying(Guarded(Limited(requests)), timeout=timeout)


def _count_request(metrics: Metrics, _operation: str, _seconds: float, error: BaseException | None) -> None:
    from cachesrv.storage.s3_errors import Exists

    metrics.add("bucket_requests")
    # That an object is there already is what a conditional write finds out.
    if isinstance(error, StoreError) and not isinstance(error, Exists):
        metrics.add("bucket_failures")


def open_index(config: Config) -> Index:
    """The index; open it in the process that uses it."""
    path = config.index.path or str(DataDirectory(config.data_dir).index)
    try:
        return LmdbIndex(path, negative_limit=config.lookup.negative_limit, size_limit=config.index.size_limit)
    except StoreDamaged as error:
        _log.error("there is no index until all that have it open have ended: restart cachesrv", error=str(error))
        return UnusableIndex(str(error))


async def open_catalog(config: Config) -> Catalog:
    """The catalog, migrated to the present version."""
    url = config.catalog.url or f"sqlite:///{DataDirectory(config.data_dir).catalog}"
    return await SqlCatalog.open(url, pool_size=config.catalog.pool_size)


def open_disk_room(config: Config) -> DiskRoom:
    """What is left on the disks of objects, catalog and index. Nothing is opened, and nothing made."""
    data = DataDirectory(config.data_dir)
    places = [Place(data.root, data.reserve)]
    if _storage_is_local(config):
        objects = Path(config.storage.path or data.objects)
        places.append(Place(objects, objects / RESERVE, has_objects=True))
    others = [Path(config.index.path)] if config.index.path else []
    if config.catalog.url:
        others.append(Path(config.catalog.url.removeprefix("sqlite:///")).parent)
    places += [Place(folder, folder / RESERVE) for folder in others]
    return DiskRoom(places, size=config.storage.reserve)


@asynccontextmanager
async def open_services(config: Config, metrics: Metrics) -> AsyncIterator[Services]:
    """All services of one process; leaving finishes what is under way."""
    async with AsyncExitStack() as stack:
        disk_cache = await _open_disk_cache(config, stack)
        bare = open_storage(config, metrics)
        storage = bare if _storage_is_local(config) else KeepingStore(bare, disk_cache, _is_nar)
        stack.push_async_callback(storage.close)
        catalog = await open_catalog(config)
        stack.push_async_callback(catalog.close)
        index = open_index(config)
        stack.callback(index.close)
        circle = partial(Circle.of, f"{place()} {config.data_dir}")
        upstreams = Upstreams(_open_upstreams(config, stack, circle), patience=config.lookup.timeout, circle=circle)
        completeness = Completeness(storage, catalog)
        bucket = BucketSource(storage, Breaker(), completeness)
        sources: list[Source] = [CatalogSource(catalog), bucket, upstreams]
        lookup = Lookup(index, sources, negative_ttl=config.lookup.negative_ttl, timeout=config.lookup.timeout)
        stack.push_async_callback(lookup.close)
        room = open_disk_room(config)
        ingest = Ingest(
            storage,
            catalog,
            metrics,
            max_nar_size=config.server.max_nar_size,
            lease=config.collect.lease,
            room=room,
        )
        stack.push_async_callback(ingest.close)
        uploads = _make_uploads(config, bare, storage, ingest, disk_cache=disk_cache, room=room)
        stack.push_async_callback(uploads.close)
        taking = Taking(storage, catalog, index, completeness)
        publish = Publish(storage, catalog, index, ingest, metrics, upstreams=upstreams, room=room, taking=taking)
        stack.push_async_callback(publish.close)
        packs = Packs(storage, catalog, ingest, publish, metrics, max_nar_size=config.server.max_nar_size, room=room)
        # What comes from upstream has threads of its own, and does not hold up pushes; the disk cache has it as it is.
        taking_in = Ingest(
            bare, catalog, metrics, max_nar_size=config.server.max_nar_size, parallel=_FETCHES, room=room
        )
        stack.push_async_callback(taking_in.close)
        fetches = Fetches(disk_cache, parallel=_FETCHES)
        stack.push_async_callback(fetches.close)
        keep = not _storage_is_local(config)
        origin = PullThrough(upstreams, taking_in, publish, keep=keep, forget=lookup.forget)
        far_away = FarAway(
            disk_cache,
            fetches,
            origin,
            storage_is_local=_storage_is_local(config),
            redirect=config.delivery.mode == "redirect",
            patience=config.lookup.timeout,
        )
        # What is in use has to look so all the time to who spares what was used within the time of a lease.
        usage = Usage(catalog, resolution=min(RESOLUTION, config.collect.lease / 4))
        stack.push_async_callback(usage.flush)
        metadata = Metadata(storage, catalog, patience=config.lookup.timeout, room=room)
        delivery = Delivery(storage, catalog, ingest, far_away)
        leases = Leases(catalog, config.collect.lease)
        yield Services(
            storage,
            catalog,
            index,
            lookup,
            ingest,
            delivery,
            uploads,
            publish,
            packs,
            metadata,
            usage,
            leases,
            upstreams,
            completeness,
            taking,
            metrics,
        )


def _make_uploads(
    config: Config, bare: ObjectStore, storage: ObjectStore, ingest: Ingest, *, disk_cache: ObjectCache, room: DiskRoom
) -> Uploads:
    given = config.uploads
    limits = Limits(given.part_size, given.limit_size, given.limit_count, given.keep)
    parts = PartStore(storage)
    if config.storage.kind != "s3":
        return Uploads(parts, ingest, limits, disk_room=room)
    from cachesrv.storage.s3 import S3Store

    assert isinstance(bare, S3Store)
    # Also where it is not offered (any more): what was begun is completed, or swept away.
    offered = given.direct and config.delivery.mode == "redirect"
    direct = DirectUploads(parts, storage, bare.direct, ingest, KeptCopies(disk_cache), offered=offered)
    return Uploads(parts, ingest, limits, direct, disk_room=room)


def policies(config: Config) -> dict[str, Policy]:
    """What the caches keep, of those that do not keep everything."""
    return {
        cache.name: Policy(cache.retention_age or None, cache.retention_size or None, spared=config.collect.lease)
        for cache in config.cache
        if cache.retention_age or cache.retention_size
    }


def build_delete(config: Config, services: Services, cache: str) -> Delete:
    """Deletion from this cache. Raises ConfigError."""
    caches = served_caches(config)
    return Delete(services.storage, services.catalog, services.index, cache=caches[cache], caches=caches)


def build_collect(
    config: Config, services: Services, only: Collection[str] = (), *, nar_grace: int | None = None
) -> Collect:
    """Garbage collection as it is configured; `only` in these caches, if any are named. Raises ConfigError."""
    caches = served_caches(config)
    if unknown := set(only) - caches.keys():
        raise ConfigError(f"no cache is called {', '.join(sorted(unknown))}; there are {', '.join(caches)}")
    grace = config.collect.nar_grace if nar_grace is None else nar_grace
    return Collect(
        services.storage,
        services.catalog,
        services.index,
        caches=caches,
        policies=policies(config),
        terms=Terms(nar_grace=grace, history=config.collect.history),
        only=only,
    )


def build_verify(
    config: Config, services: Services, contents: NarCheck | None = None, allowances: Allowances | None = None
) -> Verify:
    """Verification of the stores of these services; with `contents`, of all NARs too. Raises ConfigError."""
    stores = Stores(services.storage, services.catalog, services.index, services.upstreams.resolve)
    caches = served_caches(config)
    keys = {cache.name: _known_keys(config, cache, caches[cache.name]) for cache in config.cache}
    return Verify(stores, caches, keys, contents=contents, allowances=allowances or Allowances())


@asynccontextmanager
async def open_repair(
    config: Config,
    services: Services,
    holder: str,
    *,
    copies: Sequence[Copies] = (),
    contents: NarCheck | None = None,
    forced: bool = False,
) -> AsyncIterator[Repair]:
    """Repair of the stores of these services, from all that they know and from more `copies`. Raises ConfigError."""
    stores = Stores(services.storage, services.catalog, services.index, services.upstreams.resolve)
    caches = served_caches(config)
    data = DataDirectory(config.data_dir)
    with ThreadPoolExecutor(thread_name_prefix="repair") as threads:
        means = Means(
            ingest=services.ingest,
            publish=services.publish,
            spool=Spool(data.root, threads),
            places=(
                SameNar(services.storage, services.catalog, caches),
                OtherCaches(services.storage, services.catalog, caches),
                *copies,
                FromUpstreams(services.upstreams),
            ),
            keys={cache.name: _known_keys(config, cache, caches[cache.name]) for cache in config.cache},
            contents=contents,
            removed=data.removed,
            abandoned=Allowances().abandoned,
            forced=forced,
        )
        yield Repair(stores, caches, means, holder=holder)


async def open_copies(url: str, stack: AsyncExitStack) -> Copies:
    """Any binary cache: `http(s)://`, `s3://`, `file://` or a folder. Raises ConfigError."""
    if "://" in url and not url.startswith("file://"):
        return FromReader(url, _open_reader(DeclaredUpstream(url, url, (), _PATIENCE_WITH_COPIES), stack))
    folder = Path(url.removeprefix("file://"))
    if not (folder / "nix-cache-info").exists():
        raise ConfigError(f"{folder} is not a folder that is a binary cache: it has no nix-cache-info")
    store = FilesystemStore(folder)
    stack.push_async_callback(store.close)
    return FromReader(url, StoreReader(store))


def _known_keys(config: Config, cache: Cache, served: ServedCache) -> Mapping[str, PublicKey]:
    """Public keys of which it is certain whose they are: by them, signatures can be told right from wrong."""
    texts = [
        *((f"cache {cache.name}", text) for text in cache.trusted_keys),
        *(
            (f"upstream {upstream.name}", text)
            for upstream in config.upstream
            if upstream.name in cache.upstreams
            for text in upstream.public_keys
        ),
    ]
    others = (_public_key(whose, text) for whose, text in texts)
    return trusted_keys([*(key.public for key in served.signing_keys), *others])


def _storage_is_local(config: Config) -> bool:
    return config.storage.kind == "filesystem"


def _is_nar(key: str) -> bool:
    return f"/{key}".rpartition("/")[0].endswith("/nar")


async def _open_disk_cache(config: Config, stack: AsyncExitStack) -> ObjectCache:
    """The disk cache; also where nothing is to be kept in it yet, for caches that come to pull through by a reload."""
    if not config.delivery.disk_cache_size:
        return NoCache()
    path = config.delivery.disk_cache_path or DataDirectory(config.data_dir).nar_cache
    # A reserve, and what pushes leave beside it.
    disk_cache = DiskCache(path, limit=config.delivery.disk_cache_size, spare=2 * config.storage.reserve)
    stack.push_async_callback(disk_cache.close)
    await disk_cache.open()
    return disk_cache


class _OpenUpstreams:
    """Those that were declared at any time, each opened once for each cache, and open until `stack` is left. `circle`
    gives the one of a cache by its name.
    """

    def __init__(self, stack: AsyncExitStack, circle: Callable[[str], Circle]) -> None:
        self._stack = stack
        self._circle = circle
        self._open: dict[tuple[str, DeclaredUpstream], Upstream] = {}

    def __call__(self, cache: ServedCache) -> tuple[Upstream, ...]:
        """Those of a cache."""
        return tuple(
            self._open.get((cache.name, declared)) or self.open(cache.name, declared) for declared in cache.upstreams
        )

    def open(self, cache: str, declared: DeclaredUpstream) -> Upstream:
        """One of them; only in an event loop."""
        keys = trusted_keys(map(PublicKey.parse, declared.public_keys))
        reader = _open_reader(declared, self._stack, self._circle(cache))
        upstream = self._open[cache, declared] = Upstream(declared.name, reader, keys, Breaker())
        return upstream


def _open_upstreams(config: Config, stack: AsyncExitStack, circle: Callable[[str], Circle]) -> _OpenUpstreams:
    # Those that a reload brings are closed when these are: after all that asks them.
    own = AsyncExitStack()
    stack.push_async_exit(own)
    upstreams = _OpenUpstreams(own, circle)
    declared = _declared_upstreams(config)
    for cache in config.cache:
        for name in cache.upstreams:
            upstreams.open(cache.name, declared[name])
    return upstreams


def _declared_upstreams(config: Config) -> dict[str, DeclaredUpstream]:
    """By name. Raises ConfigError for one that cannot be asked."""
    for upstream in config.upstream:
        for text in upstream.public_keys:
            _public_key(f"upstream {upstream.name}", text)
        if upstream.url.startswith("s3:"):
            _bucket_of_others(upstream.name, upstream.url)
    return {
        upstream.name: DeclaredUpstream(upstream.name, upstream.url, upstream.public_keys, upstream.timeout)
        for upstream in config.upstream
    }


def _open_reader(upstream: DeclaredUpstream, stack: AsyncExitStack, circle: Circle | None = None) -> Reader:
    if upstream.url.startswith("s3:"):
        store = _open_bucket_of_others(upstream)
        stack.push_async_callback(store.close)
        return StoreReader(store)
    # How many connections there are is bounded by how much is asked and fetched at the same time.
    connector = aiohttp.TCPConnector(limit=0)
    session = aiohttp.ClientSession(connector=connector, headers={"User-Agent": "cachesrv"})
    stack.push_async_callback(session.close)
    return HttpReader(session, upstream.url, timeout=upstream.timeout, circle=circle)


def _open_bucket_of_others(upstream: DeclaredUpstream) -> S3Store:
    from cachesrv.storage.s3 import S3Store

    url = _bucket_of_others(upstream.name, upstream.url)
    requests = _persistent(Direct(), timeout=upstream.timeout)
    return S3Store(url.bucket, requests=requests, prefix=url.prefix, region=url.region, endpoint=url.endpoint)


def _bucket_of_others(name: str, text: str) -> BucketUrl:
    try:
        return BucketUrl.parse(text)
    except BadInput as error:
        raise ConfigError(f"upstream {name}: {error}") from error


def served_caches(config: Config) -> dict[str, ServedCache]:
    """The caches by name, with their keys; a cache without a key gets one made. Raises ConfigError."""
    upstreams = _declared_upstreams(config)
    return {cache.name: _served_cache(config, cache, upstreams) for cache in config.cache}


@dataclass(frozen=True, slots=True)
class Declared:
    """A configuration, and what it leads to: caches with their keys, by name, and the holders of tokens by sha256."""

    config: Config
    caches: Mapping[str, ServedCache]
    principals: Sequence[tuple[str, Principal]]


def declared(config: Config) -> Declared:
    """Reads all files of keys and tokens, and makes those that are ours to make. Raises ConfigError."""
    return Declared(config, served_caches(config), tuple(_principals(config)))


def build_rules(given: Declared, catalog: Catalog, base_url: str) -> Rules:
    """The same in the form that requests are judged by."""
    server = given.config.server
    return Rules(
        caches=given.caches,
        root=next((cache for cache in given.caches.values() if cache.root), None),
        access=Access(given.principals, catalog),
        max_nar_size=server.max_nar_size,
        stall_timeout=server.stall_timeout,
        base_url=(server.base_url or base_url).rstrip("/"),
    )


def _served_cache(config: Config, cache: Cache, upstreams: Mapping[str, DeclaredUpstream]) -> ServedCache:
    return ServedCache(
        name=cache.name,
        prefix=cache.place,
        store_dir=config.server.store_dir,
        root=cache.root,
        public=cache.public,
        priority=cache.priority,
        want_mass_query=cache.want_mass_query,
        signing_keys=tuple(_signing_keys(config, cache)),
        trusted_keys=trusted_keys(_public_key(f"cache {cache.name}", text) for text in cache.trusted_keys),
        references=ReferencePolicy(cache.references),
        pull_through=cache.pull_through,
        bucket_is_authority=cache.authority == "bucket",
        upstreams=tuple(upstreams[name] for name in cache.upstreams),
    )


def _signing_keys(config: Config, cache: Cache) -> Iterator[SecretKey]:
    if cache.signing_key_files is None:
        yield DataDirectory(config.data_dir).signing_key(cache.name)
        return
    for name in cache.signing_key_files:
        yield parse_secret_key(read_secret(Path(name)), Path(name))


def _public_key(whose: str, text: str) -> PublicKey:
    try:
        return PublicKey.parse(text)
    except BadInput as error:
        raise ConfigError(f"{whose}: {text!r}: {error}") from error


def _principals(config: Config) -> Iterator[tuple[str, Principal]]:
    own = DataDirectory(config.data_dir).token()
    yield token_hash(own), Principal("push-token", ("*",), frozenset({"pull", "push"}))
    for token in config.token:
        yield token.sha256, Principal(token.name, tuple(token.caches), frozenset(token.permissions))
