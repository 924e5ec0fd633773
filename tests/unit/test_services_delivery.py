"""NARs from where they are: files of this host, a bucket by redirect or through us, upstream caches."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web

from cachesrv.errors import (
    CachesrvError,
    NotFound,
    PeerError,
    PeerUnavailable,
    StoreError,
    StoreFull,
)
from cachesrv.index.base import Absent, IndexEntry, Present
from cachesrv.services import fetch as fetching
from cachesrv.services.answer import present
from cachesrv.services.breaker import Breaker
from cachesrv.services.delivery import Coming, Delivery, FarAway
from cachesrv.services.fetch import Fetches
from cachesrv.services.http_reader import HttpReader
from cachesrv.services.lookup import Lookup
from cachesrv.services.pull_through import PullThrough
from cachesrv.services.upstream import Upstream, Upstreams
from cachesrv.storage.base import ByteRange, FilePart, LocalFile, PresignedUrl
from cachesrv.storage.disk_cache import DiskCache
from cachesrv.storage.kept import KeepingStore
from cachesrv.storage.memory import MemoryStore
from cachesrv.storage.no_cache import NoCache
from tests.fake_upstream import KEY, FakeUpstream, cut, drop, sent, status, unsized, waiting
from tests.samples import Sample
from tests.service_site import open_site, served_cache
from tests.waiting import PLENTY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from cachesrv.services.delivery import NarDelivery
    from cachesrv.storage.base import ObjectCache
    from tests.service_site import Site

LIMIT = 2**23
SMALL = Sample("small", b"some bytes")
LARGE = Sample("large", bytes(range(256)) * 8000)
HUGE = Sample("huge", bytes(LIMIT))
PULLING = served_cache(pull_through=True)


class Bucket(MemoryStore):
    """A store that is far away: what is asked of it is counted, and it can be made to fail, once, as it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.redirects = False
        self.altered = False
        self.cut_after: int | None = None

    async def head(self, key: str) -> Any:
        self.asked.append("head")
        return await super().head(key)

    async def delivery(self, key: str) -> Any:
        if self.redirects:
            return PresignedUrl(f"https://bucket.test/{key}?signed")
        return await super().delivery(key)

    async def read(self, key: str, byte_range: ByteRange | None = None) -> AsyncIterator[bytes]:
        self.asked.append("read")
        sent_already = 0
        async for chunk in super().read(key, byte_range):
            for start in range(0, len(chunk), 100_000):
                piece = chunk[start : start + 100_000]
                if self.cut_after is not None and sent_already >= self.cut_after:
                    raise StoreError("the bucket hung up")
                yield bytes(len(piece)) if self.altered else piece
                sent_already += len(piece)


@dataclass
class Far:
    """A site whose storage is a bucket, or whose paths may be upstream."""

    site: Site
    bucket: Bucket
    disk_cache: ObjectCache
    delivery: Delivery
    upstream: FakeUpstream

    async def store(self, *samples: Sample) -> None:
        """Known to the catalog, and not in the disk cache."""
        await self.site.send(*samples)
        for sample in samples:
            await self.disk_cache.discard(f"main/nar/{sample.nar_name}")
        self.bucket.asked.clear()

    async def open(self, sample: Sample, hash_part: str | None = None) -> NarDelivery | None:
        return await self.delivery.open(PULLING, sample.nar_name, hash_part)

    async def pull(self, sample: Sample) -> bytes:
        return await taken(await self.open(sample, sample.path.hash_part))

    async def size(self, sample: Sample, hash_part: str | None = None) -> int | None:
        return await self.delivery.size(PULLING, sample.nar_name, hash_part)

    async def kept(self, sample: Sample) -> bool:
        return await self.disk_cache.get(f"main/nar/{sample.nar_name}") is not None

    async def settled(self) -> None:
        """When no fetch is under way."""
        tasks = self.delivery._far_away.fetches._tasks
        if tasks:
            await asyncio.wait(tasks)


@asynccontextmanager
async def far_site(
    folder: Path, *, disk_cache: bool = True, redirect: bool = False, local: bool = False
) -> AsyncIterator[Far]:
    bucket = Bucket()
    bucket.redirects = redirect
    cache = DiskCache(folder / "nar-cache", limit=LIMIT)
    await cache.open()
    kept: ObjectCache = cache if disk_cache else NoCache()
    storage = None if local else KeepingStore(bucket, kept, lambda key: "/nar/" in key)
    async with FakeUpstream() as upstream, aiohttp.ClientSession() as session:
        reader = HttpReader(session, upstream.url, timeout=PLENTY)
        up = Upstream("up", reader, {KEY.name: KEY.public}, Breaker())
        upstreams = Upstreams(lambda _: [up], patience=PLENTY)
        async with open_site(folder, storage=storage, cache=PULLING, upstreams=upstreams) as site:
            lookup = Lookup(site.index, [upstreams], negative_ttl=60, timeout=PLENTY)
            fetches = Fetches(kept)
            origin = PullThrough(upstreams, site.ingest, site.publish, keep=not local, forget=lookup.forget)
            far_away = FarAway(kept, fetches, origin, storage_is_local=local, redirect=redirect, patience=PLENTY)
            yield Far(site, bucket, kept, Delivery(site.storage, site.catalog, site.ingest, far_away), upstream)
            await fetches.close()
    await cache.close()


@pytest.fixture
async def far(tmp_path: Path) -> AsyncIterator[Far]:
    """Through us."""
    async with far_site(tmp_path) as far:
        yield far


@pytest.fixture
async def local(tmp_path: Path) -> AsyncIterator[Far]:
    """Files of this host, and an upstream."""
    async with far_site(tmp_path, local=True) as far:
        yield far


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_PAUSE", 0.001)


async def taken(delivery: NarDelivery | None, start: int = 0, end: int | None = None) -> bytes:
    """The bytes that a client gets."""
    if isinstance(delivery, LocalFile):
        with open(delivery.path, "rb") as file:  # noqa: ASYNC230, PTH123  a small file
            return file.read()[start:end]
    assert isinstance(delivery, Coming)
    part = ByteRange(start, delivery.size if end is None else end)
    return b"".join([in_memory(chunk) async for chunk in delivery.read(part)])


def in_memory(chunk: bytes | FilePart) -> bytes:
    return chunk.read() if isinstance(chunk, FilePart) else chunk


async def as_far_as_it_came(delivery: NarDelivery | None) -> tuple[int, CachesrvError | None]:
    assert isinstance(delivery, Coming)
    size = 0
    try:
        async for chunk in delivery.read(ByteRange(0, delivery.size)):
            size += len(in_memory(chunk))
    except CachesrvError as error:
        return size, error
    return size, None


# From a bucket


async def test_what_comes_from_afar_is_kept(far: Far) -> None:
    await far.store(LARGE)
    assert await taken(await far.open(LARGE)) == LARGE.file
    await far.settled()
    # Whether it was deleted meanwhile is asked last.
    assert far.bucket.asked == ["read", "head"]
    again = await far.open(LARGE)
    assert isinstance(again, LocalFile)
    assert await taken(again) == LARGE.file
    assert far.bucket.asked == ["read", "head"]


async def test_what_was_pushed_is_here(far: Far) -> None:
    await far.site.send(LARGE)
    assert isinstance(await far.open(LARGE), LocalFile)
    assert "read" not in far.bucket.asked


async def test_many_who_ask_are_one_to_the_bucket(far: Far) -> None:
    await far.store(LARGE)
    parts = [(0, None), (0, 10), (0, 1_000_000)] * 5

    async def one(start: int, end: int | None) -> bytes:
        return await taken(await far.open(LARGE), start, end)

    for (start, end), data in zip(parts, await asyncio.gather(*(one(*part) for part in parts)), strict=True):
        assert data == LARGE.file[start:end]
    assert far.bucket.asked.count("read") == 1


async def test_who_wants_but_the_end_does_not_wait_for_the_rest(far: Far) -> None:
    await far.store(LARGE)
    assert await taken(await far.open(LARGE), 2_000_000) == LARGE.file[2_000_000:]
    await far.settled()
    assert not await far.kept(LARGE)


async def test_what_is_not_there_is_nowhere(far: Far) -> None:
    assert await far.open(LARGE) is None
    assert await far.size(LARGE) is None
    assert await far.open(LARGE, "not-a-hash-part") is None


async def test_the_size_is_known_without_a_question(far: Far) -> None:
    await far.store(LARGE)
    assert await far.size(LARGE) == len(LARGE.file)
    assert far.bucket.asked == []


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("disk_cache", [True, False])
async def test_what_is_altered_or_cut_never_arrives_whole(tmp_path: Path, known: bool, disk_cache: bool) -> None:
    async with far_site(tmp_path, disk_cache=disk_cache) as far:
        await far.store(LARGE)
        if not known:
            await far.site.catalog.remove_nars([f"main/nar/{LARGE.nar_name}"])
        far.bucket.altered = True
        size, error = await as_far_as_it_came(await far.open(LARGE))
        assert isinstance(error, PeerError)
        assert size < len(LARGE.file)
        far.bucket.altered, far.bucket.cut_after = False, 1_000_000
        size, error = await as_far_as_it_came(await far.open(LARGE))
        assert isinstance(error, StoreError)
        assert size < len(LARGE.file)
        await far.settled()
        assert not await far.kept(LARGE)
        far.bucket.cut_after = None
        assert await taken(await far.open(LARGE)) == LARGE.file


async def test_what_others_put_there_is_judged_by_its_name(far: Far) -> None:
    by_nar_hash = f"{LARGE.nar_hash.bare_nix32}.nar"
    for name in (LARGE.nar_name, by_nar_hash):
        await far.bucket.put(f"main/nar/{name}", LARGE.file)
        assert await taken(await far.delivery.open(PULLING, name, None)) == LARGE.file
        await far.settled()
        assert isinstance(await far.delivery.open(PULLING, name, None), LocalFile)


async def test_a_name_that_says_nothing_is_passed_on_and_not_kept(far: Far) -> None:
    await far.bucket.put("main/nar/odd.nar", LARGE.file)
    for _ in range(2):
        opened = await far.delivery.open(PULLING, "odd.nar", None)
        assert await taken(opened) == LARGE.file
        await far.settled()
    assert far.bucket.asked.count("read") == 2


@pytest.mark.parametrize("disk_cache", [True, False])
async def test_what_has_no_room_is_passed_on(tmp_path: Path, disk_cache: bool) -> None:
    async with far_site(tmp_path, disk_cache=disk_cache) as far:
        await far.store(HUGE)
        assert await taken(await far.open(HUGE)) == HUGE.file
        assert far.bucket.asked == ["read"]
        far.bucket.altered = True
        wrong = Sample("wrong", b"x" * LIMIT)
        await far.store(wrong)
        size, error = await as_far_as_it_came(await far.open(wrong))
        assert isinstance(error, PeerError)
        assert size < len(wrong.file)


async def test_an_object_that_the_catalog_knows_and_the_bucket_lost(far: Far) -> None:
    await far.store(LARGE)
    await far.bucket.delete([f"main/nar/{LARGE.nar_name}"])
    with pytest.raises(NotFound):
        await taken(await far.open(LARGE))


async def test_who_may_go_there_is_sent_there(tmp_path: Path) -> None:
    async with far_site(tmp_path, redirect=True) as far:
        await far.store(LARGE)
        assert await far.open(LARGE) == PresignedUrl(f"https://bucket.test/main/nar/{LARGE.nar_name}?signed")
        assert await far.size(LARGE) == len(LARGE.file)
        assert far.bucket.asked == []
        # what is here is quicker
        await far.site.send(SMALL)
        assert isinstance(await far.open(SMALL), LocalFile)
        # nobody is sent for what is not there
        assert await far.open(HUGE) is None
        await far.bucket.put("main/nar/foreign.nar", b"x")
        assert isinstance(await far.delivery.open(PULLING, "foreign.nar", None), PresignedUrl)


# From upstream


async def test_what_is_upstream_is_fetched_stored_and_published(local: Far) -> None:
    local.upstream.add(LARGE)
    assert await local.open(LARGE) is None
    assert await local.pull(LARGE) == LARGE.file
    await local.settled()
    assert isinstance(await local.open(LARGE), LocalFile)
    assert await local.site.published() == local.site.visible() == {LARGE.path.hash_part}
    assert local.upstream.asked(f"nar/{LARGE.nar_name}") == 1


async def test_many_who_ask_are_one_to_the_upstream(local: Far) -> None:
    gate = asyncio.Event()
    local.upstream.add(LARGE)
    local.upstream.fail(f"nar/{LARGE.nar_name}", waiting(gate, sent(LARGE.file)))
    asking = [asyncio.create_task(local.pull(LARGE)) for _ in range(10)]
    await asyncio.sleep(0.1)
    gate.set()
    assert await asyncio.gather(*asking) == [LARGE.file] * 10
    assert local.upstream.asked(f"nar/{LARGE.nar_name}") == 1


async def test_a_size_can_be_asked_without_a_fetch(local: Far) -> None:
    local.upstream.add(LARGE)
    assert await local.size(LARGE, LARGE.path.hash_part) == len(LARGE.file)
    assert await local.size(LARGE) is None
    assert local.upstream.asked(f"nar/{LARGE.nar_name}") == 0


async def test_a_size_that_nobody_says_is_found_out(local: Far) -> None:
    sample = Sample("unsized", bytes(range(256)) * 5000, compression="zstd")
    local.upstream.add(sample, file_size=None, file_hash=None)
    name = f"{sample.nar_hash.bare_nix32}.nar.zst"
    at = f"nar/{sample.nar_name}"
    local.upstream.fail(at, *[unsized(sample.file)] * 3)
    opened = await local.delivery.open(PULLING, name, sample.path.hash_part)
    assert await taken(opened) == sample.file
    assert await local.delivery.size(PULLING, name, sample.path.hash_part) == len(sample.file)
    assert local.upstream.asked(at) == 1


@pytest.mark.parametrize("kind", ["cut", "dropped"])
async def test_a_transfer_that_breaks_is_resumed(local: Far, kind: str) -> None:
    local.upstream.add(LARGE)
    fault = cut(LARGE.file, 1_000_000) if kind == "cut" else drop
    local.upstream.fail(f"nar/{LARGE.nar_name}", fault)
    assert await local.pull(LARGE) == LARGE.file
    assert kind == "dropped" or 0 < local.upstream.asked_from[-1] <= 1_000_000


@pytest.mark.parametrize(
    "content", [bytes(len(LARGE.file)), LARGE.file[:-1] + b"x", LARGE.file + b"x", LARGE.file[:-1]]
)
async def test_what_is_wrong_never_arrives_whole_and_is_not_kept(local: Far, content: bytes) -> None:
    local.upstream.add(LARGE)
    local.upstream.objects[f"nar/{LARGE.nar_name}"] = content
    size, error = await as_far_as_it_came(await local.open(LARGE, LARGE.path.hash_part))
    assert isinstance(error, PeerError)
    assert size < len(LARGE.file)
    await local.settled()
    assert await local.open(LARGE) is None
    assert await local.site.published() == set()
    # and the next one is fetched anew
    local.upstream.objects[f"nar/{LARGE.nar_name}"] = LARGE.file
    assert await local.pull(LARGE) == LARGE.file


async def test_a_nar_of_another_path_is_not_published_as_this_one(local: Far) -> None:
    """A NAR that fits its name, and not the narinfo that leads to it."""
    other = Sample("other", b"y" * 500_000)
    local.upstream.add(LARGE, url=f"nar/{other.nar_name}", file_hash=other.info.file_hash, file_size=len(other.file))
    local.upstream.objects[f"nar/{other.nar_name}"] = other.file
    opened = await local.delivery.open(PULLING, other.nar_name, LARGE.path.hash_part)
    size, error = await as_far_as_it_came(opened)
    assert isinstance(error, PeerError)
    assert size < len(other.file)
    assert await local.site.published() == set()


async def test_no_more_is_decompressed_than_the_upstream_signed(local: Far) -> None:
    """What says where the NAR lies, how it is packed and how large its file is, is not signed."""
    bomb = Sample("bomb", bytes(2**26), compression="zstd")
    info = bomb.info
    local.upstream.add(LARGE, url=info.url, compression="zstd", file_hash=info.file_hash, file_size=info.file_size)
    local.upstream.objects[info.url] = bomb.file
    _, error = await as_far_as_it_came(await local.delivery.open(PULLING, bomb.nar_name, LARGE.path.hash_part))
    assert f"more than the {len(LARGE.nar)} bytes" in str(error)
    assert await local.site.storage.head(f"main/{info.url}") is None


async def test_a_body_that_does_not_end_is_not_taken_for_ever(local: Far) -> None:
    """Where nobody says how long it is, and none of it is of the NAR: frames to be skipped (RFC 8878, 3.1.2)."""
    frame = (0x184D2A50).to_bytes(4, "little") + (2**16).to_bytes(4, "little") + bytes(2**16)
    frames = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal frames
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        while frames < 2**14:
            await response.write(frame)
            frames += 1
        return response

    name = f"{LARGE.nar_hash.bare_nix32}.nar.zst"
    local.upstream.add(LARGE, url=f"nar/{name}", compression="zstd", file_hash=None, file_size=None)
    local.upstream.fail(f"nar/{name}", status(405), *[endless] * 9)
    with pytest.raises(PeerError, match="taken of this NAR at most"):
        await local.delivery.open(PULLING, name, LARGE.path.hash_part)
    assert frames < 2**10


async def test_where_nothing_can_be_stored_that_is_told_before_the_first_byte(local: Far) -> None:
    local.upstream.add(HUGE)
    with pytest.raises(StoreFull, match="larger than the disk cache"):
        await local.open(HUGE, HUGE.path.hash_part)


@pytest.mark.parametrize(("number", "kind"), [(503, PeerUnavailable), (404, PeerError), (403, PeerError)])
async def test_an_upstream_without_the_nar_is_told_before_the_first_byte(
    local: Far, number: int, kind: type[CachesrvError]
) -> None:
    local.upstream.add(LARGE)
    local.upstream.fail(f"nar/{LARGE.nar_name}", *[status(number)] * 20)
    size, error = await as_far_as_it_came(await local.open(LARGE, LARGE.path.hash_part))
    assert (size, type(error)) == (0, kind)


async def test_an_upstream_that_is_down_is_not_an_absence(local: Far) -> None:
    local.upstream.fail(f"{LARGE.path.hash_part}.narinfo", *[status(500)] * 9)
    for ask in (local.open, local.size):
        with pytest.raises(PeerUnavailable):
            await ask(LARGE, LARGE.path.hash_part)


async def test_what_has_left_the_upstream_is_forgotten(local: Far) -> None:
    """Its narinfo was looked up when it was there: clients would come for ever for a NAR that is nowhere."""
    local.site.index.put([IndexEntry("main", LARGE.path.hash_part, present(LARGE.narinfo()))])
    assert await local.open(LARGE, LARGE.path.hash_part) is None
    known = local.site.index.get("main", LARGE.path.hash_part)
    assert known is None or isinstance(known, Absent)


async def test_who_asks_for_nonsense_has_nothing_forgotten(local: Far) -> None:
    other = Sample("other").path.hash_part
    local.site.index.put([IndexEntry("main", LARGE.path.hash_part, present(LARGE.narinfo()))])
    local.site.index.put_absent([("main", other)], 2**40)
    epoch = local.site.index.epoch()
    for hash_part in (LARGE.path.hash_part, other):
        assert await local.delivery.open(PULLING, HUGE.nar_name, hash_part) is None
    assert local.site.index.epoch() == epoch
    assert isinstance(local.site.index.get("main", LARGE.path.hash_part), Present)
    assert isinstance(local.site.index.get("main", other), Absent)


async def test_what_a_cache_offered_while_it_pulled_through_is_forgotten(local: Far) -> None:
    local.upstream.add(LARGE)
    local.site.index.put([IndexEntry("main", LARGE.path.hash_part, present(LARGE.narinfo()))])
    assert await local.delivery.open(served_cache(), LARGE.nar_name, LARGE.path.hash_part) is None
    assert local.site.index.get("main", LARGE.path.hash_part) is None


async def test_caches_that_do_not_pull_through_do_not(local: Far) -> None:
    local.upstream.add(LARGE)
    assert await local.delivery.open(served_cache(), LARGE.nar_name, LARGE.path.hash_part) is None
    assert local.upstream.requests.total() == 0


async def test_a_path_from_upstream_may_need_what_is_upstream(local: Far) -> None:
    """Also where pushed paths may not, and where pushed ones have to be signed by others."""
    needs = Sample("needs", b"x", references=(LARGE.path,))
    lost = Sample("lost", b"y", references=(HUGE.path,))
    local.upstream.add(LARGE)
    for sample in (needs, lost):
        local.upstream.add(sample)
        opened = await local.delivery.open(
            replace(PULLING, trusted_keys={"boss-1": KEY.public}), sample.nar_name, sample.path.hash_part
        )
        assert await taken(opened) == sample.file
    await local.settled()
    # NARs are given out all the same, since clients want them.
    assert await local.site.published() == {needs.path.hash_part}


async def test_into_a_bucket_too(far: Far) -> None:
    far.upstream.add(LARGE)
    assert await far.pull(LARGE) == LARGE.file
    await far.settled()
    assert await far.kept(LARGE)
    assert await far.bucket.get(f"main/nar/{LARGE.nar_name}", limit=2**30) == LARGE.file
    assert await far.site.published() == {LARGE.path.hash_part}


async def test_small_ones_at_once(local: Far) -> None:
    local.upstream.add(SMALL)
    assert await local.pull(SMALL) == SMALL.file
    await local.settled()
    for _ in range(2):
        content = local.delivery.at_once(f"main/nar/{SMALL.nar_name}", limit=2**20)
        assert content is None or bytes(content) == SMALL.file


async def test_what_is_deleted_while_it_is_fetched_is_not_kept(far: Far) -> None:
    await far.store(LARGE)
    delivery = await far.open(LARGE)
    assert isinstance(delivery, Coming)
    chunks = delivery.read(ByteRange(0, delivery.size))
    got = in_memory(await anext(chunks))
    await far.site.storage.delete([f"main/nar/{LARGE.nar_name}"])
    got += b"".join([in_memory(chunk) async for chunk in chunks])
    assert got == LARGE.file
    await far.settled()
    assert not await far.kept(LARGE)


@pytest.mark.parametrize("number", [403, 405, 501])
async def test_an_upstream_that_knows_nothing_but_get_will_do(local: Far, number: int) -> None:
    sample = Sample("compressed", bytes(range(256)) * 5000, compression="zstd")
    local.upstream.add(sample, file_size=None)
    at = f"nar/{sample.nar_name}"
    local.upstream.fail(at, status(number))
    assert await local.pull(sample) == sample.file
    assert (local.upstream.asked(at, "HEAD"), local.upstream.asked(at)) == (1, 1)
