"""NARs that clients write to a bucket themselves, on a real server: nothing counts that was not read back."""

from __future__ import annotations

import asyncio
from hashlib import md5, sha256
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import zstandard

from cachesrv.errors import BadInput, Mismatch, NotFound, StoreFull, StoreUnavailable, TooLarge
from cachesrv.nix.seekable import largest_file
from cachesrv.services import direct, upload_room
from cachesrv.services.direct import Direct
from cachesrv.services.ingest import Ingest
from cachesrv.services.part_store import Begun, Part, Place
from cachesrv.services.uploads import DirectParts, Missing, Sent, Uploads, Verifying
from cachesrv.storage.disk_cache import DiskCache
from cachesrv.storage.s3 import S3Store
from cachesrv.storage.s3_parts import MIN_PART_SIZE
from tests.direct_site import alter, bucket_site, keys, leftovers, process, put
from tests.samples import Sample
from tests.service_site import Site, chunks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Sequence

    from cachesrv.catalog.base import NarRecord
    from tests.radosgw import Gateway

UPLOAD = "0123456789abcdef"
LARGE = Sample("large", Random(3).randbytes(2 * MIN_PART_SIZE + 1000), compression="zstd")
IN_OTHER_BYTES = zstandard.ZstdCompressor(write_checksum=True).compress(LARGE.nar)
OTHER = Sample("other", Random(4).randbytes(MIN_PART_SIZE + 1000), compression="zstd")
PARTS = [LARGE.file[start : start + MIN_PART_SIZE] for start in range(0, len(LARGE.file), MIN_PART_SIZE)]
TAGS = [md5(part).hexdigest() for part in PARTS]
NAR_NAME = f"{LARGE.nar_hash.bare_nix32}.nar.zst"


@pytest.fixture
async def site(tmp_path: Path, gateway: Gateway, bucket: str) -> AsyncIterator[Site]:
    async with bucket_site(tmp_path, gateway, bucket) as site:
        yield site


async def begin(uploads: Uploads, site: Site) -> list[Part] | DirectParts | None:
    begun = Begun(LARGE.nar_hash.nix32, len(LARGE.nar), "somebody")
    return await uploads.begin(site.cache, UPLOAD, LARGE.nar_hash, begun, direct=True)


async def there(uploads: Uploads, site: Site) -> dict[int, str]:
    """The parts that are there; it is begun by that."""
    begun = await begin(uploads, site)
    assert isinstance(begun, DirectParts)
    assert begun.least == MIN_PART_SIZE
    return {part.number: part.tag for part in begun.parts}


async def send(uploads: Uploads, site: Site, numbers: Sequence[int], parts: Sequence[bytes] = PARTS) -> None:
    for number in numbers:
        signed = await uploads.sign(site.cache, UPLOAD, number, md5(parts[number - 1]).digest())
        assert await put(signed, parts[number - 1]) == 200


async def complete(
    uploads: Uploads, site: Site, tags: Sequence[str] = TAGS, patience: float = 60, md5: Sequence[str] | None = None
) -> NarRecord | Missing | Verifying:
    """The MD5 of parts are their tags, here as mostly."""
    md5 = tags if md5 is None else md5
    return await uploads.complete(site.cache, UPLOAD, LARGE.nar_hash, Sent(tags, md5), patience=patience)


async def test_what_clients_write_becomes_a_nar(site: Site) -> None:
    async with process(site) as uploads:
        assert await there(uploads, site) == {}
        await send(uploads, site, [3, 1])
        assert await there(uploads, site) == {1: TAGS[0], 3: TAGS[2]}
        assert await complete(uploads, site) == Missing([2])
        await send(uploads, site, [2])
        assert await keys(site) == {"staged"}
        record = await complete(uploads, site)

        assert record == await site.ingest.known(site.cache, NAR_NAME)
        assert await begin(uploads, site) is None
        assert await complete(uploads, site) == record
    assert await site.storage.get(f"main/nar/{NAR_NAME}", limit=10**8) == LARGE.file
    assert await keys(site) == {f"main/nar/{NAR_NAME}"}
    assert site.metrics.total("nars_stored") == 1
    assert await leftovers(site) == 0


async def test_another_process_goes_on(site: Site) -> None:
    async with process(site) as first:
        await there(first, site)
        await send(first, site, [1, 2])
    async with process(site) as second:
        # URLs are to be had without a new beginning.
        await send(second, site, [3])
        assert await there(second, site) == dict(enumerate(TAGS, 1))
        assert not isinstance(await complete(second, site), Missing | Verifying)


async def test_a_server_that_dies_while_it_reads_back_does_it_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, never = asyncio.Event(), asyncio.Event()
    fence = site.catalog.fence

    async def stop(*arguments: Any) -> int:
        reached.set()
        await never.wait()
        return await fence(*arguments)

    async with process(site) as first:
        await there(first, site)
        await send(first, site, [1, 2, 3])
        with monkeypatch.context() as patched:
            patched.setattr(site.catalog, "fence", stop)
            asking = asyncio.create_task(complete(first, site, patience=0.01))
            await asyncio.wait_for(reached.wait(), 60)
            assert isinstance(await asking, Verifying)
            assert await complete(first, site, patience=0.01) == Verifying(len(LARGE.file))

    async with process(site) as second:
        # The object is complete; a client that comes back finds all parts there.
        assert await there(second, site) == dict(enumerate(TAGS, 1))
        assert await complete(second, site, [*TAGS[:2], TAGS[0]]) == Missing([1, 2, 3])
        assert not isinstance(await complete(second, site), Missing | Verifying)
    assert await keys(site) == {f"main/nar/{NAR_NAME}"}


async def test_two_processes_complete_at_once(site: Site) -> None:
    async with process(site) as one, process(site) as two:
        await there(one, site)
        await send(one, site, [1, 2, 3])
        outcomes = await asyncio.gather(complete(one, site), complete(two, site))

        assert not any(isinstance(outcome, Verifying) for outcome in outcomes)
        assert not isinstance(await complete(two, site), Missing)
    assert await keys(site) == {f"main/nar/{NAR_NAME}"}
    assert await site.storage.get(f"main/nar/{NAR_NAME}", limit=10**8) == LARGE.file


@pytest.mark.parametrize("file", [OTHER.file, LARGE.file[:-1], b"no zstd at all"], ids=["other", "short", "nonsense"])
async def test_what_is_not_the_nar_is_not_published(site: Site, file: bytes) -> None:
    parts = [file[start : start + MIN_PART_SIZE] for start in range(0, len(file), MIN_PART_SIZE)]
    tags = [md5(part).hexdigest() for part in parts]
    async with process(site) as uploads:
        await there(uploads, site)
        await send(uploads, site, [*range(1, len(parts) + 1)], parts)
        with pytest.raises(BadInput):
            await complete(uploads, site, tags)
        assert await keys(site) == set()
        assert await site.ingest.known(site.cache, NAR_NAME) is None

        assert await there(uploads, site) == {}
        await send(uploads, site, [1, 2, 3])
        assert not isinstance(await complete(uploads, site), Missing | Verifying)


AT = [0, MIN_PART_SIZE, 2 * MIN_PART_SIZE - 1, len(LARGE.file) - 1]


@pytest.mark.parametrize("at", AT)
async def test_what_is_altered_on_its_way_back_is_read_again(
    site: Site, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    async with process(site) as uploads:
        await there(uploads, site)
        await send(uploads, site, [1, 2, 3])
        coming = alter(site, monkeypatch, at)
        assert not isinstance(await complete(uploads, site), Missing | Verifying)
        assert coming == []
    assert await site.storage.get(f"main/nar/{NAR_NAME}", limit=10**8) == LARGE.file


@pytest.mark.parametrize("at", AT)
async def test_a_part_that_is_altered_is_named(site: Site, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    async with process(site) as uploads:
        await there(uploads, site)
        await send(uploads, site, [1, 2, 3])
        alter(site, monkeypatch, at, at)
        number = at // MIN_PART_SIZE + 1
        with pytest.raises(Mismatch, match=rf"^part {number} was altered .* with the MD5 {TAGS[number - 1]}, and has"):
            await complete(uploads, site)
    assert await keys(site) == set()


@pytest.fixture
async def disk_cache(tmp_path: Path) -> AsyncIterator[DiskCache]:
    cache = DiskCache(tmp_path / "nar-cache", limit=2**28)
    await cache.open()
    yield cache
    await cache.close()


async def test_what_is_published_is_in_the_disk_cache(
    site: Site, disk_cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it lies in the bucket, also when it was read twice."""
    async with process(site, disk_cache=disk_cache) as uploads:
        await there(uploads, site)
        await send(uploads, site, [1, 2, 3])
        alter(site, monkeypatch, MIN_PART_SIZE)
        await complete(uploads, site)
    kept = await disk_cache.get(f"main/nar/{NAR_NAME}")
    assert kept is not None
    assert await asyncio.to_thread(Path(kept.path).read_bytes) == LARGE.file
    assert await disk_cache.used() == len(LARGE.file)


async def test_what_is_not_published_is_not_in_the_disk_cache(
    site: Site, disk_cache: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong, and what another one has published in other bytes."""
    async with process(site, disk_cache=disk_cache) as uploads:
        await there(uploads, site)
        await send(uploads, site, [1, 2, 3])
        with monkeypatch.context() as patched:
            alter(site, patched, MIN_PART_SIZE, MIN_PART_SIZE)
            with pytest.raises(Mismatch):
                await complete(uploads, site)
        assert await disk_cache.used() == 0

        await there(uploads, site)
        await send(uploads, site, [1, 2, 3])
        fence = site.catalog.fence

        async def meanwhile(keys: Collection[str]) -> int:
            monkeypatch.setattr(site.catalog, "fence", fence)
            await site.ingest.receive(site.cache, NAR_NAME, chunks(IN_OTHER_BYTES), None)
            return await fence(keys)

        monkeypatch.setattr(site.catalog, "fence", meanwhile)
        assert not isinstance(await complete(uploads, site), Missing | Verifying)
    assert await disk_cache.used() == 0


async def test_a_disk_cache_that_is_too_small_is_not_in_the_way(site: Site, tmp_path: Path) -> None:
    small = DiskCache(tmp_path / "nar-cache", limit=MIN_PART_SIZE)
    async with process(site, disk_cache=small) as uploads:
        await there(uploads, site)
        await send(uploads, site, [1, 2, 3])
        assert not isinstance(await complete(uploads, site), Missing | Verifying)
    assert await small.used() == 0
    await small.close()


async def test_who_does_not_tell_the_md5_of_parts_is_told_less(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async with process(site) as uploads:
        await there(uploads, site)
        await send(uploads, site, [1, 2, 3])
        with pytest.raises(BadInput, match="the MD5 of 2 parts of a NAR that has 3"):
            await complete(uploads, site, md5=TAGS[:2])
        coming = alter(site, monkeypatch, len(LARGE.file) // 2, None)
        with pytest.raises(BadInput, match=r"^(?!part)"):
            await complete(uploads, site, md5=())
        assert coming == [None]
    assert await keys(site) == set()


async def test_a_nar_that_came_otherwise_meanwhile_stays(site: Site) -> None:
    """With the same name, and other bytes: the first one is what narinfos may speak of by now."""
    async with process(site) as uploads:
        await there(uploads, site)
        await send(uploads, site, [1, 2, 3])
        first = await site.ingest.receive(site.cache, NAR_NAME, chunks(IN_OTHER_BYTES), None)

        assert await complete(uploads, site) == first
    assert await site.storage.get(f"main/nar/{NAR_NAME}", limit=10**8) == IN_OTHER_BYTES != LARGE.file
    assert await keys(site) == {f"main/nar/{NAR_NAME}"}
    assert await leftovers(site) == 0


async def test_an_old_url_is_worth_nothing_after_completion(site: Site) -> None:
    async with process(site) as uploads:
        await there(uploads, site)
        signed = await uploads.sign(site.cache, UPLOAD, 1, md5(PARTS[0]).digest())
        await send(uploads, site, [1, 2, 3])
        await complete(uploads, site)

        assert await put(signed, PARTS[0]) == 404
    assert await site.storage.get(f"main/nar/{NAR_NAME}", limit=10**8) == LARGE.file


async def test_what_is_aborted_or_silent_leaves_nothing(site: Site) -> None:
    async with process(site) as uploads:
        await there(uploads, site)
        await send(uploads, site, [1])
        await uploads.abort(site.cache, UPLOAD)
        assert await keys(site) == set()
        assert await leftovers(site) == 0
        with pytest.raises(NotFound):
            await uploads.sign(site.cache, UPLOAD, 1, md5(PARTS[0]).digest())

        await there(uploads, site)
        await send(uploads, site, [1])
        assert await uploads.sweep() == 0
    async with process(site, seconds=-60) as later:
        assert await later.sweep() == 1
    assert await keys(site) == set()
    assert await leftovers(site) == 0


async def test_what_a_killed_server_left_behind_is_found(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload that is noted nowhere, and an object that is complete, with nobody who comes to have it checked."""
    assert isinstance(site.storage, S3Store)
    place = Place.of("main", "a" * 16)
    await site.storage.direct.begin(place.staged_key("0123-5"))

    async def die(*_: object) -> None:
        raise StoreUnavailable("as told")

    async with process(site) as uploads:
        await there(uploads, site)
        await send(uploads, site, [1, 2, 3])
        with monkeypatch.context() as patched:
            patched.setattr(Direct, "make", die)
            with pytest.raises(StoreUnavailable, match="as told"):
                await complete(uploads, site)
        assert await keys(site) == {"staged"}
        assert [key async for key in site.storage.direct.unfinished()] == [place.staged_key("0123-5")]
        assert await uploads.sweep() == 0
    async with process(site, seconds=-60) as later:
        assert await later.sweep() == 2
    assert await keys(site) == set()
    assert await leftovers(site) == 0


async def test_where_it_is_not_offered_parts_come_through_the_server(site: Site) -> None:
    async with process(site, offered=False) as uploads:
        assert await begin(uploads, site) == []
        await uploads.abort(site.cache, UPLOAD)
    async with process(site) as before:
        await there(before, site)
        await send(before, site, [1, 2, 3])
    async with process(site, offered=False) as after:
        # What was begun before is not lost.
        assert not isinstance(await complete(after, site), Missing | Verifying)


async def test_a_client_that_cannot_reach_the_bucket_begins_anew(site: Site) -> None:
    async with process(site) as uploads:
        await there(uploads, site)
        begun = Begun(LARGE.nar_hash.nix32, len(LARGE.nar), "somebody")
        assert await uploads.begin(site.cache, UPLOAD, LARGE.nar_hash, begun) == []
        for number, part in enumerate(PARTS, 1):
            stated = Part(number, len(part), sha256(part).hexdigest())
            await uploads.receive(site.cache, UPLOAD, stated, chunks(part))
        digests = [sha256(part).hexdigest() for part in PARTS]
        assert not isinstance(await complete(uploads, site, digests), Missing | Verifying)
    assert await keys(site) == {f"main/nar/{NAR_NAME}"}
    assert await leftovers(site) == 0


async def test_nars_have_limits(site: Site) -> None:
    """Also when the client said of it that it is small."""
    ingest = Ingest(site.storage, site.catalog, site.metrics, max_nar_size=MIN_PART_SIZE)
    async with process(site, ingest=ingest) as uploads:
        begun = Begun(LARGE.nar_hash.nix32, 1, "somebody")
        await uploads.begin(site.cache, UPLOAD, LARGE.nar_hash, begun, direct=True)
        await send(uploads, site, [1, 2, 3])
        with pytest.raises(TooLarge):
            await complete(uploads, site)
    await ingest.close()
    assert await keys(site) == set()
    assert await leftovers(site) == 0


SIZE = largest_file(len(LARGE.nar))
SECOND = UPLOAD[::-1]


async def is_offered(uploads: Uploads, site: Site, upload: str, nar_size: int = len(LARGE.nar)) -> bool:
    begun = Begun(OTHER.nar_hash.nix32, nar_size, "somebody")
    return isinstance(await uploads.begin(site.cache, upload, OTHER.nar_hash, begun, direct=True), DirectParts)


async def test_what_may_come_counts_before_it_is_offered(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process and in others, until it is there, or gone."""
    monkeypatch.setattr(upload_room, "_COUNTED_FOR_IF_FULL", 0.0)
    part = Part(1, len(PARTS[0]), sha256(PARTS[0]).hexdigest())
    async with process(site, size=2 * SIZE - 1) as uploads, process(site, size=2 * SIZE - 1) as others:
        await there(uploads, site)
        assert not await is_offered(uploads, site, SECOND)
        assert not await is_offered(others, site, SECOND)
        # It may come through the server, where every part counts with what it has.
        await others.receive(site.cache, SECOND, part, chunks(PARTS[0]))
        await others.abort(site.cache, SECOND)

        # What is begun already does not count twice.
        await there(uploads, site)
        await there(others, site)
        await send(uploads, site, [1, 2, 3])
        await complete(uploads, site)
        assert await is_offered(uploads, site, SECOND)
        await uploads.abort(site.cache, SECOND)
        assert await is_offered(others, site, "a" * 16)


async def test_parts_that_come_through_the_server_count_beside_it(site: Site) -> None:
    part = Part(1, len(PARTS[0]), sha256(PARTS[0]).hexdigest())
    async with process(site, size=SIZE + len(PARTS[0]) - 1) as uploads:
        await there(uploads, site)
        begun = Begun(OTHER.nar_hash.nix32, len(OTHER.nar), "somebody")
        await uploads.begin(site.cache, SECOND, OTHER.nar_hash, begun)
        with pytest.raises(StoreFull, match=r"uploads\.limit_size"):
            await uploads.receive(site.cache, SECOND, part, chunks(PARTS[0]))


async def test_what_has_no_known_size_is_not_offered(site: Site) -> None:
    async with process(site) as uploads:
        assert not await is_offered(uploads, site, SECOND, nar_size=0)


@pytest.mark.parametrize("number", [0, -1, 10_001])
async def test_numbers_have_limits(site: Site, number: int) -> None:
    async with process(site) as uploads:
        await there(uploads, site)
        with pytest.raises(BadInput, match="counted from 1 to 10000"):
            await uploads.sign(site.cache, UPLOAD, number, md5(b"").digest())


async def test_another_process_has_begun_it_anew(site: Site) -> None:
    """After what was sent turned out to be something else, say: parts go where they are looked for."""
    async with process(site) as one, process(site) as two:
        await there(one, site)
        await send(one, site, [1])
        await two.abort(site.cache, UPLOAD)
        await there(two, site)

        await there(one, site)
        await send(one, site, [1, 2, 3])
        await complete(two, site)


async def test_what_another_process_has_begun_is_found_out_in_time(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_REMEMBERED_SECONDS", 0.0)
    async with process(site) as one, process(site) as two:
        await there(one, site)
        await two.abort(site.cache, UPLOAD)
        await there(two, site)
        await send(one, site, [1, 2, 3])
        await complete(two, site)
