"""Stores in memory and in a folder, services on them, and a clock that is moved by hand: to keep and to collect."""

from __future__ import annotations

import asyncio
import inspect
import tempfile
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from cachesrv.catalog.retention import MAINTENANCE
from cachesrv.catalog.sql import SqlCatalog
from cachesrv.errors import StoreError
from cachesrv.index.base import Present
from cachesrv.index.memory import MemoryIndex
from cachesrv.nix import narinfo
from cachesrv.nix.hashes import Hash
from cachesrv.nix.signing import SecretKey
from cachesrv.services.caches import ReferencePolicy, ServedCache
from cachesrv.services.candidate import Candidate
from cachesrv.services.collect import Collect, Terms
from cachesrv.services.ingest import Ingest
from cachesrv.services.leases import Leases
from cachesrv.services.lookup import CatalogSource, Lookup
from cachesrv.services.marking import Policy
from cachesrv.services.publish import Publish
from cachesrv.storage.memory import MemoryStore
from cachesrv.telemetry import Metrics

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping

    from cachesrv.catalog.base import Catalog
    from cachesrv.catalog.retention import PathSummary, UnusedNar
    from cachesrv.index.base import Index
    from cachesrv.services.removal_report import Report
    from cachesrv.storage.base import ObjectStore
    from tests.samples import Sample

START = 1_700_000_000
HOUR = 3600
DAY = 24 * HOUR
LEASE = HOUR
GRACE = 10 * DAY
HOLDER = "the collector of a test"
_METRICS = Metrics()
KEY = SecretKey.generate("main-1")


def cache(name: str = "main", prefix: str | None = None, **changes: Any) -> ServedCache:
    """A public cache as it is without a configuration, but for some fields."""
    fields = {
        "name": name,
        "prefix": prefix or name,
        "store_dir": "/nix/store",
        "root": False,
        "public": True,
        "priority": 40,
        "want_mass_query": True,
        "signing_keys": (KEY,),
        "trusted_keys": {},
        "references": ReferencePolicy.STRICT,
        "pull_through": False,
        "bucket_is_authority": False,
    }
    return ServedCache(**{**fields, **changes})


class Clock:
    """Seconds since the epoch, for the whole process while it is in force; time never stands still."""

    def __init__(self) -> None:
        self.now = float(START)

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        self.now += seconds

    def in_force(self) -> Any:
        return patch("time.time", self)


@dataclass
class Heard:
    """All that a collection told; a `Listener`."""

    paths: list[tuple[str, str, str]] = field(default_factory=list)
    nars: list[str] = field(default_factory=list)

    def path(self, cache: str, path: PathSummary, reason: str) -> None:
        self.paths.append((cache, path.name, reason))

    def nar(self, nar: UnusedNar) -> None:
        self.nars.append(nar.key)

    @property
    def names(self) -> list[str]:
        return [name for _, name, _ in self.paths]


class Stores:
    """What outlives a process. `gate` is passed before each write of those that are given out."""

    def __init__(self, storage: ObjectStore, catalog: Catalog, index: Index) -> None:
        self.storage = storage
        self.catalog = catalog
        self.index = index

    def through(self, gate: Gate) -> Stores:
        return Stores(*(_Gated(store, gate) for store in (self.storage, self.catalog, self.index)))


class Gate:
    """Passed before each write of a store, and after it. At the write `at` something happens: before it, or after it
    with `late`. `then` may raise: as if the process had died, all later writes fail as well.
    """

    WRITES = frozenset(
        {
            *("put", "put_many", "put_in_order", "put_absent", "delete", "hold", "doom", "settle"),
            *("publish", "put_nar", "put_nars", "remove", "remove_unneeded", "lease", "lease_nars"),
        }
    )

    def __init__(self, at: int, then: Callable[[], Awaitable[None]], *, late: bool = False) -> None:
        self.writes: list[str] = []
        self._at = at
        self._then = then
        self._late = late
        self._dead: StoreError | None = None
        self._loop = asyncio.get_running_loop()

    def pass_in_thread(self, name: str, *, after: bool) -> None:
        asyncio.run_coroutine_threadsafe(self.pass_(name, after=after), self._loop).result()

    async def pass_(self, name: str, *, after: bool) -> None:
        if self._dead:
            raise self._dead
        if not after:
            self.writes.append(name)
        if len(self.writes) - 1 == self._at and after == self._late:
            try:
                await self._then()
            except StoreError as error:
                self._dead = error
                raise


async def die() -> None:
    raise StoreError("the process has died")


class _Gated:
    def __init__(self, store: Any, gate: Gate) -> None:
        self._store = store
        self._gate = gate

    def __getattr__(self, name: str) -> Any:
        work = getattr(self._store, name)
        if name not in Gate.WRITES:
            return work
        if not inspect.iscoroutinefunction(work):

            def gated(*args: Any, **kwargs: Any) -> Any:
                self._gate.pass_in_thread(name, after=False)
                result = work(*args, **kwargs)
                self._gate.pass_in_thread(name, after=True)
                return result

            return gated

        async def gated_coroutine(*args: Any, **kwargs: Any) -> Any:
            await self._gate.pass_(name, after=False)
            result = await work(*args, **kwargs)
            await self._gate.pass_(name, after=True)
            return result

        return gated_coroutine


class Process:
    """The services of one process on some stores."""

    def __init__(self, stores: Stores, *, tries: int = 5) -> None:
        self._stores = stores
        storage, catalog, index = stores.storage, stores.catalog, stores.index
        self._ingest = Ingest(storage, catalog, _METRICS, parallel=2, lease=LEASE)
        self._publish = Publish(storage, catalog, index, self._ingest, _METRICS, tries=tries)
        self._lookup = Lookup(index, [CatalogSource(catalog)], negative_ttl=60, timeout=5)
        self._leases = Leases(catalog, LEASE)

    async def send(self, to: ServedCache, sample: Sample) -> None:
        await self._ingest.receive(to, sample.nar_name, _chunks(sample.file), len(sample.file))

    async def publish(self, to: ServedCache, sample: Sample, pusher: str = "somebody") -> None:
        await self._publish.one(to, Candidate.from_narinfo(sample.info), pusher)

    async def push(self, to: ServedCache, *samples: Sample) -> None:
        """As an uploader does that knows nothing."""
        for sample in samples:
            await self.send(to, sample)
            await self.publish(to, sample)

    async def grant(self, of: ServedCache, *samples: Sample) -> None:
        """As an uploader does that asks what is here."""
        await self._leases.grant(of, {s.path.hash_part for s in samples}, {s.nar_hash.nix32 for s in samples})

    async def find(self, of: ServedCache, sample: Sample) -> Present | None:
        return await self._lookup.find(of, sample.path.hash_part)

    async def collect(
        self, caches: Mapping[str, ServedCache], policies: Mapping[str, Policy], *, dry_run: bool = False, **terms: int
    ) -> tuple[Report, Heard]:
        stores = self._stores
        given = Terms(**{"nar_grace": GRACE, "history": 400 * DAY, **terms})
        collect = Collect(stores.storage, stores.catalog, stores.index, caches=caches, policies=policies, terms=given)
        heard = Heard()
        if dry_run:
            return await collect.rehearse(heard), heard
        await stores.catalog.lock(MAINTENANCE, HOLDER, now=0, until=1)
        return await collect.run(HOLDER, heard, by="test", pace=0), heard

    async def end(self) -> None:
        await self._lookup.close()
        await self._publish.close()
        await self._ingest.close()


async def _chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


@asynccontextmanager
async def open_stores(open_storage: Callable[[], ObjectStore] = MemoryStore) -> AsyncIterator[Stores]:
    """All of it in memory, unless objects are to be elsewhere: what has to be on disk has tests of its own."""
    with tempfile.TemporaryDirectory(prefix="cachesrv-test-", dir="/dev/shm") as folder:
        storage, index = open_storage(), MemoryIndex(clock=lambda: time.time())  # noqa: PLW0108  it is patched later
        catalog = await SqlCatalog.open(f"sqlite:///{folder}/catalog.sqlite")
        try:
            yield Stores(storage, catalog, index)
        finally:
            await catalog.close()
            await storage.close()


def policy(max_age: int | None = None, max_size: int | None = None) -> Policy:
    return Policy(max_age, max_size, spared=LEASE)


async def check_consistency(stores: Stores, caches: Mapping[str, ServedCache]) -> None:
    """Whatever can be seen is whole: each place shows no more than the one before it, and nothing without its NAR and
    its references.
    """
    for of in caches.values():
        published = {record.hash_part: record async for record in stores.catalog.scan(of.name)}
        for hash_part, record in published.items():
            file = await stores.storage.get(record.nar_key, limit=2**20)
            assert file is not None, f"{record.name} has no NAR"
            info = narinfo.parse(record.narinfo)
            assert (info.file_size, info.file_hash) == (len(file), Hash.of("sha256", file))
            assert {reference[:32] for reference in record.references} <= published.keys(), record.name
            assert record.narinfo == await stores.storage.get(of.narinfo_key(hash_part), limit=10_000), record.name
        for hash_part, answer in stores.index.scan(of.name):
            if isinstance(answer, Present):
                assert hash_part in published, f"the index answers for {hash_part}"
                assert answer.body == published[hash_part].narinfo
            else:
                assert hash_part not in published, f"the index denies {hash_part}"


async def names_in(stores: Stores, of: ServedCache) -> set[str]:
    """Of the published paths."""
    return {record.name async for record in stores.catalog.scan(of.name)}


async def nars_in(stores: Stores, prefix: str = "main") -> set[str]:
    """Keys of the NARs in storage."""
    return {info.key async for info in stores.storage.list(f"{prefix}/nar/")}


def closure(references: Mapping[str, frozenset[str]], roots: set[str]) -> Iterator[str]:
    """All that `roots` lead to, themselves included, as far as it is among the keys."""
    ahead, found = list(roots), set[str]()
    while ahead:
        name = ahead.pop()
        if name in references and name not in found:
            found.add(name)
            yield name
            ahead += references[name]
