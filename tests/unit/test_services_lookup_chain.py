"""Index, catalog, bucket and upstreams behind each other: who is asked, what is remembered, and for how long."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest

from cachesrv.errors import PeerError, PeerUnavailable, StoreError, StoreUnavailable
from cachesrv.index.base import Absent, Present
from cachesrv.index.lmdb import LmdbIndex
from cachesrv.index.unusable import UnusableIndex
from cachesrv.nix import narinfo
from cachesrv.services import breaker as breaking
from cachesrv.services.breaker import Breaker
from cachesrv.services.bucket import BucketSource
from cachesrv.services.completeness import Completeness
from cachesrv.services.http_reader import HttpReader
from cachesrv.services.lookup import CatalogSource, Lookup, Source
from cachesrv.services.upstream import Upstream, Upstreams
from cachesrv.storage.memory import MemoryStore
from tests.fake_upstream import KEY, FakeUpstream, drop, sent, silent, status, waiting
from tests.samples import Sample
from tests.service_site import open_site, served_cache
from tests.waiting import PLENTY, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from cachesrv.index.base import Index
    from tests.fake_upstream import Fault
    from tests.service_site import Site

CACHE = served_cache(bucket_is_authority=True, pull_through=True)
PUSHED, IN_BUCKET, UPSTREAM = (Sample(name, name.encode()) for name in ("pushed", "bucket", "upstream"))
ABSENT = "0" * 32


class Bucket(MemoryStore):
    """A store that counts questions about narinfos, and fails with `error` or hangs."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0
        self.error: Exception | None = None

    async def get(self, key: str, *, limit: int) -> bytes | None:
        self.asked += 1
        if self.error:
            raise self.error
        return await super().get(key, limit=limit)


@dataclass
class Chain:
    site: Site
    bucket: Bucket
    upstream: FakeUpstream
    lookup: Lookup
    now: float = 0.0
    """What the breakers take for the time, in seconds."""

    async def find(self, hash_part: str) -> bytes | None:
        found = await self.lookup.find(CACHE, hash_part)
        return found.body if found else None

    def known(self, hash_part: str) -> Present | Absent | None:
        return self.site.index.get("main", hash_part)

    @property
    def asked(self) -> tuple[int, int]:
        """Of the bucket, and of the upstream."""
        return self.bucket.asked, self.upstream.requests.total()

    async def learnt(self) -> None:
        """When all that was asked is in the index."""
        await self.lookup.close()


@asynccontextmanager
async def open_chain(folder: Path, index: Index) -> AsyncIterator[Chain]:
    bucket = Bucket()
    async with FakeUpstream() as upstream, aiohttp.ClientSession() as session:
        reader = HttpReader(session, upstream.url, timeout=PLENTY)
        up = Upstream("up", reader, {KEY.name: KEY.public}, Breaker(lambda: opened.now))
        upstreams = Upstreams(lambda _: [up], patience=PLENTY)
        async with open_site(folder, storage=bucket, index=index, cache=CACHE, upstreams=upstreams) as site:
            of_bucket = BucketSource(bucket, Breaker(lambda: opened.now))
            sources: list[Source] = [CatalogSource(site.catalog), of_bucket, upstreams]
            lookup = Lookup(index, sources, negative_ttl=1000, timeout=PLENTY)
            opened = Chain(site, bucket, upstream, lookup)
            yield opened
            await lookup.close()


@pytest.fixture
async def chain(tmp_path: Path) -> AsyncIterator[Chain]:
    index = LmdbIndex(str(tmp_path / "index"), size_limit=2**26)
    async with open_chain(tmp_path, index) as chain:
        await chain.site.send(PUSHED)
        assert await chain.site.add(PUSHED) == [None]
        names = {f"main/{IN_BUCKET.path.hash_part}.narinfo": IN_BUCKET.narinfo()}
        await chain.bucket.put_many({**names, f"main/nar/{IN_BUCKET.nar_name}": IN_BUCKET.file})
        chain.upstream.add(UPSTREAM)
        yield chain
    index.close()


async def test_each_source_in_its_turn_and_once(chain: Chain) -> None:
    for _ in range(2):
        for sample in (PUSHED, IN_BUCKET, UPSTREAM):
            text = await chain.find(sample.path.hash_part)
            assert text
            assert narinfo.parse(text).store_path == sample.path
        assert await chain.find(ABSENT) is None
        await chain.learnt()
        assert chain.asked == (3, 2)


async def test_what_another_node_published_is_found_in_the_catalog(chain: Chain) -> None:
    chain.site.index.delete([("main", PUSHED.path.hash_part)])
    assert await chain.lookup.find(served_cache(pull_through=True), PUSHED.path.hash_part)
    assert chain.asked == (0, 0)


async def test_what_others_have_deleted_is_not_found_in_the_catalog(chain: Chain) -> None:
    await chain.bucket.delete([f"main/{PUSHED.path.hash_part}.narinfo"])
    assert await chain.find(PUSHED.path.hash_part)
    chain.site.index.delete([("main", PUSHED.path.hash_part)])
    assert await chain.find(PUSHED.path.hash_part) is None


async def test_nothing_is_certain_that_others_may_have(chain: Chain) -> None:
    alone = served_cache()
    assert chain.lookup.lacks(alone, ABSENT)
    assert not chain.lookup.lacks(alone, PUSHED.path.hash_part)
    assert not chain.lookup.lacks(replace(alone, bucket_is_authority=True), ABSENT)
    assert not chain.lookup.lacks(replace(alone, pull_through=True), ABSENT)
    incomplete = Completeness(chain.bucket, chain.site.catalog)
    assert not BucketSource(chain.bucket, Breaker(), incomplete).lacks(alone, ABSENT)
    assert chain.asked == (0, 0)


async def test_absences_survive_a_restart(chain: Chain, tmp_path: Path) -> None:
    parts = [f"{number:032}" for number in range(200)]
    assert await asyncio.gather(*map(chain.find, parts)) == [None] * 200
    await chain.learnt()
    assert chain.asked == (200, 200)
    assert isinstance(chain.site.index, LmdbIndex)
    chain.site.index.close()
    index = LmdbIndex(str(tmp_path / "index"), size_limit=2**26)
    (tmp_path / "again").mkdir()
    async with open_chain(tmp_path / "again", index) as again:
        assert await asyncio.gather(*map(again.find, parts)) == [None] * 200
        assert again.asked == (0, 0)
    # closed once more by the fixture
    chain.site.index.close = index.close  # type: ignore[method-assign]  # the first one is closed


async def test_a_publish_ends_an_absence(chain: Chain) -> None:
    late = Sample("late")
    assert await chain.find(late.path.hash_part) is None
    await chain.learnt()
    assert isinstance(chain.known(late.path.hash_part), Absent)
    await chain.site.send(late)
    assert await chain.site.add(late) == [None]
    assert await chain.find(late.path.hash_part)


FAULTS = [status(500), status(503), status(403), status(401), drop, silent, sent(b"nonsense"), sent(bytes(2**20 + 1))]


@pytest.mark.parametrize("fault", FAULTS)
async def test_what_goes_wrong_upstream_is_never_an_absence(chain: Chain, fault: Fault) -> None:
    chain.upstream.fail(f"{ABSENT}.narinfo", *[fault] * 9)
    passing = fault in (FAULTS[0], FAULTS[1], drop, silent)
    if passing:
        with pytest.raises((PeerUnavailable, StoreUnavailable)):
            await chain.find(ABSENT)
    else:
        assert await chain.find(ABSENT) is None
    await chain.learnt()
    assert chain.known(ABSENT) is None


@pytest.mark.parametrize("error", [StoreUnavailable("no route"), StoreError("denied"), PeerError("broken narinfo")])
async def test_what_goes_wrong_in_the_bucket_is_never_an_absence(chain: Chain, error: Exception) -> None:
    chain.bucket.error = error
    if isinstance(error, StoreError):
        with pytest.raises(StoreError):
            await chain.find(ABSENT)
    else:
        assert await chain.find(ABSENT) is None
    await chain.learnt()
    assert chain.known(ABSENT) is None
    chain.bucket.error = None
    assert await chain.find(ABSENT) is None
    await chain.learnt()
    assert isinstance(chain.known(ABSENT), Absent)


async def test_what_one_source_cannot_tell_another_may(chain: Chain) -> None:
    """A narinfo in the bucket that is broken does not hide the one that is upstream."""
    chain.bucket.error = PeerError("broken narinfo")
    assert await chain.find(UPSTREAM.path.hash_part)


async def test_our_own_paths_do_not_wait_for_anybody(chain: Chain) -> None:
    gate = asyncio.Event()
    chain.upstream.fail(f"{ABSENT}.narinfo", *[waiting(gate, status(500))] * 100)
    asking = [asyncio.create_task(chain.find(ABSENT)) for _ in range(10)]
    await until(lambda: chain.upstream.asked(f"{ABSENT}.narinfo") > 0)
    assert await chain.find(PUSHED.path.hash_part)
    assert await chain.find(IN_BUCKET.path.hash_part)
    assert not any(task.done() for task in asking)
    gate.set()
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    assert all(isinstance(outcome, PeerUnavailable | StoreUnavailable) for outcome in outcomes)
    # they were one question
    assert chain.upstream.asked(f"{ABSENT}.narinfo") == 1


async def test_the_bucket_is_down_and_comes_back(chain: Chain) -> None:
    there, absent = IN_BUCKET.path.hash_part, "1" * 32
    assert await chain.find(there)
    assert await chain.find(absent) is None
    await chain.learnt()
    chain.bucket.error = StoreUnavailable("no route")
    for number in range(10):
        with pytest.raises(StoreUnavailable):
            await chain.find(f"{number:032}")
        assert await chain.find(there)
        assert await chain.find(absent) is None
    assert chain.bucket.asked < 10
    chain.bucket.error = None
    chain.now += breaking.PAUSE_SECONDS
    assert await chain.find(f"{0:032}") is None


async def test_who_gives_up_does_not_take_the_answer_from_others(chain: Chain) -> None:
    gate = asyncio.Event()
    name = f"{UPSTREAM.path.hash_part}.narinfo"
    chain.upstream.fail(name, waiting(gate, sent(chain.upstream.objects[name])))
    first, second = (asyncio.create_task(chain.find(UPSTREAM.path.hash_part)) for _ in range(2))
    await until(lambda: chain.upstream.asked(name) > 0)
    first.cancel()
    await asyncio.wait([first])
    gate.set()
    assert await second
    assert chain.upstream.asked(name) == 1


async def test_when_all_give_up_the_answer_is_learnt_all_the_same(chain: Chain) -> None:
    gate = asyncio.Event()
    name = f"{UPSTREAM.path.hash_part}.narinfo"
    chain.upstream.fail(name, waiting(gate, sent(chain.upstream.objects[name])))
    only = asyncio.create_task(chain.find(UPSTREAM.path.hash_part))
    await until(lambda: chain.upstream.asked(name) > 0)
    only.cancel()
    await asyncio.wait([only])
    gate.set()
    await chain.learnt()
    assert isinstance(chain.known(UPSTREAM.path.hash_part), Present)


async def test_an_error_that_nobody_waits_for_is_nobodys_concern(chain: Chain, recwarn: Any) -> None:
    gate = asyncio.Event()
    name = f"{ABSENT}.narinfo"
    chain.upstream.fail(name, waiting(gate, status(500)))
    unseen: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
    only = asyncio.create_task(chain.find(ABSENT))
    await until(lambda: chain.upstream.asked(name) > 0)
    only.cancel()
    await asyncio.wait([only])
    gate.set()
    await chain.learnt()
    assert unseen == []


async def test_what_was_looked_up_can_be_forgotten(chain: Chain) -> None:
    assert await chain.find(UPSTREAM.path.hash_part)
    await chain.learnt()
    await chain.lookup.forget(CACHE, UPSTREAM.path.hash_part, UPSTREAM.nar_name)
    del chain.upstream.objects[f"{UPSTREAM.path.hash_part}.narinfo"]
    assert await chain.find(UPSTREAM.path.hash_part) is None


async def test_there_is_nothing_to_forget_in_an_index_that_cannot_be_read(chain: Chain) -> None:
    sources = [CatalogSource(chain.site.catalog)]
    lookup = Lookup(UnusableIndex("it is damaged"), sources, negative_ttl=1, timeout=PLENTY)
    await lookup.forget(CACHE, UPSTREAM.path.hash_part, UPSTREAM.nar_name)
    assert await lookup.find(served_cache(), PUSHED.path.hash_part)
