"""The services over real stores in a folder, and stores that fail when they are told to."""

from __future__ import annotations

import inspect
import shutil
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cachesrv.catalog.sql import SqlCatalog
from cachesrv.errors import StoreError
from cachesrv.index.base import Present
from cachesrv.index.memory import MemoryIndex
from cachesrv.nix import narinfo
from cachesrv.nix.signing import SecretKey
from cachesrv.services.caches import ReferencePolicy, ServedCache
from cachesrv.services.candidate import Candidate
from cachesrv.services.ingest import Ingest
from cachesrv.services.packs import Packs
from cachesrv.services.publish import Publish
from cachesrv.storage.filesystem import FilesystemStore
from cachesrv.telemetry import Metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from cachesrv.catalog.base import Catalog
    from cachesrv.index.base import Index
    from cachesrv.services.publish import Outcome
    from cachesrv.services.upstream import Upstreams
    from cachesrv.storage.base import ObjectStore
    from tests.samples import Sample

KEY = SecretKey.generate("main-1")


def served_cache(**changes: Any) -> ServedCache:
    """A public cache as it is without a configuration, but for some fields."""
    cache = ServedCache(
        name="main",
        prefix="main",
        store_dir="/nix/store",
        root=True,
        public=True,
        priority=40,
        want_mass_query=True,
        signing_keys=(KEY,),
        trusted_keys={},
        references=ReferencePolicy.STRICT,
        pull_through=False,
        bucket_is_authority=False,
    )
    return replace(cache, **changes)


async def chunks(data: bytes, size: int = 65536) -> AsyncIterator[bytes]:
    """A body as it comes."""
    for start in range(0, len(data), size):
        yield data[start : start + size]


def by_api(sample: Sample) -> Candidate:
    """As `cachesrv push` says it: the NAR is to be found by its hash."""
    return replace(Candidate.from_narinfo(sample.info), file=None)


def by_narinfo(sample: Sample) -> Candidate:
    """As a narinfo says it: the NAR is to be found by its name."""
    return Candidate.from_narinfo(sample.info)


@dataclass
class Site:
    """Services, and what they work on."""

    folder: Path
    storage: ObjectStore
    catalog: Catalog
    index: Index
    metrics: Metrics
    ingest: Ingest
    publish: Publish
    packs: Packs
    cache: ServedCache

    async def send(self, *samples: Sample) -> None:
        """Store their NARs."""
        for sample in samples:
            await self.ingest.receive(self.cache, sample.nar_name, chunks(sample.file), len(sample.file))

    async def add(self, *samples: Sample, as_: Callable[[Sample], Candidate] = by_api) -> Sequence[Outcome]:
        """Publish them in one batch."""
        return await self.publish.many(self.cache, [as_(sample) for sample in samples], "somebody")

    async def names(self) -> set[str]:
        """All objects of the cache."""
        return {info.key.removeprefix("main/") async for info in self.storage.list("main/")}

    async def published(self) -> set[str]:
        """Hash parts that the catalog knows."""
        return {record.hash_part async for record in self.catalog.scan("main")}

    def visible(self) -> set[str]:
        """Hash parts that the index answers for."""
        return {hash_part for hash_part, _ in self.index.scan("main")}


async def check_what_is_visible(site: Site) -> None:
    """Each place shows no more than the one that comes before it, and nothing without its NAR and its references."""
    names, published = await site.names(), await site.published()
    in_storage = {name.removesuffix(".narinfo") for name in names if name.endswith(".narinfo")}
    assert site.visible() <= published <= in_storage
    for hash_part in in_storage:
        text = await site.storage.get(f"main/{hash_part}.narinfo", limit=10_000)
        assert text is not None
        info = narinfo.parse(text)
        assert info.url in names
        assert "nix-cache-info" in names
        assert {path.hash_part for path in info.references} <= in_storage, info.store_path
    for hash_part in published:
        record = await site.catalog.path("main", hash_part)
        assert record is not None
        assert record.narinfo == await site.storage.get(f"main/{hash_part}.narinfo", limit=10_000)
        assert {reference[:32] for reference in record.references} <= published
        answer = site.index.get("main", hash_part)
        assert answer is None or (isinstance(answer, Present) and answer.body == record.narinfo)


@asynccontextmanager
async def open_site(
    folder: Path,
    *,
    index: Index | None = None,
    cache: ServedCache | None = None,
    storage: ObjectStore | None = None,
    upstreams: Upstreams | None = None,
    wrap: Callable[[Any], Any] = lambda store: store,
    copy_of: Path | None = None,
) -> AsyncIterator[Site]:
    """Services over stores below `folder`, which begins as a copy of that of a closed site, if one is given; `wrap`
    makes other stores of them.
    """
    if copy_of:
        shutil.copytree(copy_of, folder)
    storage = storage or FilesystemStore(folder / "objects")
    catalog = await SqlCatalog.open(f"sqlite:///{folder / 'catalog.sqlite'}")
    index = index or MemoryIndex()
    metrics = Metrics()
    ingest = Ingest(wrap(storage), wrap(catalog), metrics)
    publish = Publish(wrap(storage), wrap(catalog), wrap(index), ingest, metrics, upstreams=upstreams)
    packs = Packs(wrap(storage), wrap(catalog), ingest, publish, metrics)
    try:
        yield Site(folder, storage, catalog, index, metrics, ingest, publish, packs, cache or served_cache())
    finally:
        await publish.close()
        await ingest.close()
        await catalog.close()
        await storage.close()


class Steps:
    """Counts the writes of all stores that it wraps, and fails all of them from one on: as if the process had died.

    With `late`, the one at which it fails still takes effect, and only its answer is lost.
    """

    WRITES = frozenset(
        {
            "put",
            "put_many",
            "put_in_order",
            "put_absent",
            "writer",
            "delete",
            "sweep",
            "publish",
            "put_nar",
            "put_nars",
            "remove",
        }
        | {"remove_unneeded", "release_strays", "doom_damaged", "doom_unpublished", "settle"}
    )

    def __init__(self, fail_at: int | None = None, *, late: bool = False) -> None:
        self.taken: list[str] = []
        self._fail_at = fail_at
        self._late = late

    def wrap(self, store: Any) -> Any:
        return _Stumbling(store, self)

    def take(self, name: str) -> bool:
        """Note a write; whether it is to fail once it has taken effect. Raises StoreError when it fails before."""
        self.taken.append(name)
        number = len(self.taken) - 1
        if self._fail_at is None or number < self._fail_at:
            return False
        if number == self._fail_at and self._late:
            return True
        raise StoreError(f"as told: {name}")


class _Stumbling:
    def __init__(self, store: Any, steps: Steps) -> None:
        self._store = store
        self._steps = steps

    def __getattr__(self, name: str) -> Any:
        work = getattr(self._store, name)
        if name not in Steps.WRITES:
            return work
        if not inspect.iscoroutinefunction(work):
            return lambda *args, **kwargs: self._done(name, self._steps.take(name), work(*args, **kwargs))

        async def stumbling(*args: Any, **kwargs: Any) -> Any:
            late = self._steps.take(name)
            return self._done(name, late, await work(*args, **kwargs))

        return stumbling

    @staticmethod
    def _done(name: str, late: bool, result: Any) -> Any:
        if late:
            raise StoreError(f"as told, after it was done: {name}")
        return result
