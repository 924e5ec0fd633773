"""NARs that clients write to a bucket in one piece, on a real server: their URLs stay good, and change nothing."""

from __future__ import annotations

import asyncio
from hashlib import md5
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import zstandard

from cachesrv.catalog.base import NarRecord
from cachesrv.errors import BadInput, Mismatch, TooLarge
from cachesrv.services import upload_room
from cachesrv.services.ingest import Ingest
from cachesrv.services.uploads import Known, Missing, Sent, Uploads, Verifying
from cachesrv.storage import s3_upload
from cachesrv.storage.base import SignedPut
from cachesrv.storage.disk_cache import DiskCache
from cachesrv.storage.s3_client import S3Client
from tests.direct_site import alter, bucket_site, keys, leftovers, process, put
from tests.samples import Sample
from tests.service_site import Site, chunks

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.radosgw import Gateway

UPLOAD = "0123456789abcdef"
NAR = Sample("whole", Random(5).randbytes(1_500_000), compression="zstd")
OTHER = Sample("other", Random(6).randbytes(len(NAR.content)), compression="zstd")
NAME = f"{NAR.nar_hash.bare_nix32}.nar.zst"
KEY = f"main/nar/{NAME}"


@pytest.fixture
async def site(tmp_path: Path, gateway: Gateway, bucket: str) -> AsyncIterator[Site]:
    async with bucket_site(tmp_path, gateway, bucket) as site:
        yield site


async def sign(uploads: Uploads, site: Site, file: bytes = NAR.file) -> SignedPut:
    signed = await uploads.sign_whole(site.cache, UPLOAD, NAR.nar_hash, len(file), md5(file).digest())
    assert isinstance(signed, SignedPut)
    return signed


def sent(file: bytes = NAR.file) -> Sent:
    digest = md5(file).hexdigest()
    return Sent([digest], [digest], len(file))


async def complete(uploads: Uploads, site: Site, what: Sent | None = None) -> NarRecord | Missing | Verifying:
    return await uploads.complete(site.cache, UPLOAD, NAR.nar_hash, what or sent(), patience=60)


async def stored(site: Site) -> bytes | None:
    return await site.storage.get(KEY, limit=10**8)


async def test_what_a_client_writes_becomes_a_nar(site: Site) -> None:
    """Another process than the one that signed can make it."""
    async with process(site) as one, process(site) as two:
        assert await put(await sign(one, site), NAR.file) == 200
        assert await keys(site) == {"staged"}
        record = await complete(two, site)

        assert record == await site.ingest.known(site.cache, NAME)
        assert await complete(one, site) == record
        known = await one.sign_whole(site.cache, UPLOAD, NAR.nar_hash, len(NAR.file), md5(NAR.file).digest())
        assert known == Known()
    assert await stored(site) == NAR.file
    assert await keys(site) == {KEY}
    assert site.metrics.total("nars_stored") == 1
    assert await leftovers(site) == 0


async def test_a_url_is_for_one_file(site: Site) -> None:
    async with process(site) as uploads:
        signed = await sign(uploads, site)
        longer = await sign(uploads, site, NAR.file + b"0")
        assert await put(signed, OTHER.file) >= 400
        assert await put(signed, NAR.file[:-1]) >= 400
        assert await put(type(signed)(signed.url, longer.headers), NAR.file + b"0") == 403
        assert await put(type(signed)(longer.url, signed.headers), NAR.file) == 403
        assert await complete(uploads, site) == Missing([1])
    assert await keys(site) == set()


async def test_a_url_that_is_used_again_changes_nothing(site: Site) -> None:
    """What it leaves behind goes with the next sweep."""
    async with process(site) as uploads:
        signed = await sign(uploads, site)
        await put(signed, NAR.file)
        await put(signed, NAR.file)
        await complete(uploads, site)
        await put(signed, NAR.file)
        assert await keys(site) == {KEY, "staged"}
        assert await uploads.sweep() == 0
    async with process(site, seconds=-60) as later:
        assert await later.sweep() == 1
    assert await keys(site) == {KEY}


async def replace_at(site: Site, uploads: Uploads, patched: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Send the NAR, and let another file lie in its place when that function is called: as a storage would allow that
    does not compare the MD5.
    """
    await put(await sign(uploads, site), NAR.file)
    (staged,) = [info.key async for info in site.storage.list("~uploads/")]
    function = getattr(owner, name)

    async def replaced(*arguments: Any, **named: Any) -> Any:
        await site.storage.put(staged, OTHER.file, replace=True)
        return await function(*arguments, **named)

    patched.setattr(owner, name, replaced)


@pytest.mark.parametrize("when", ["checked", "copied"])
async def test_what_is_replaced_after_it_was_checked_is_not_published(
    site: Site, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    async with process(site) as uploads:
        with monkeypatch.context() as patched:
            if when == "checked":
                await replace_at(site, uploads, patched, site.catalog, "fence")
            else:
                await replace_at(site, uploads, patched, s3_upload.Upload, "copy")
            assert await complete(uploads, site) == Missing([1])
        assert await stored(site) is None
        assert await site.ingest.known(site.cache, NAME) is None

        await put(await sign(uploads, site), NAR.file)
        assert not isinstance(await complete(uploads, site), Missing | Verifying)
    assert await stored(site) == NAR.file
    assert await leftovers(site) == 0


async def test_where_copies_are_called_otherwise_they_come_through_the_server(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else nothing could be told from what was replaced, and would be sent again for ever."""
    call = S3Client.call

    async def called_otherwise(client: S3Client, operation: str, *arguments: Any, **named: Any) -> Any:
        answer = await call(client, operation, *arguments, **named)
        return '"of-its-own"' if operation == "UploadPartCopy" else answer

    monkeypatch.setattr(S3Client, "call", called_otherwise)
    async with process(site) as uploads:
        await put(await sign(uploads, site), NAR.file)
        assert await complete(uploads, site) == Missing([1])
        digest = md5(NAR.file).digest()
        assert await uploads.sign_whole(site.cache, UPLOAD, NAR.nar_hash, len(NAR.file), digest) is None
    assert await stored(site) is None
    assert await leftovers(site) == 0


async def test_what_is_replaced_before_it_is_read_is_named(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async with process(site) as uploads:
        with monkeypatch.context() as patched:
            await replace_at(site, uploads, patched, site.ingest, "take_over")
            with pytest.raises(BadInput):
                await complete(uploads, site)
    assert await keys(site) == set()


@pytest.mark.parametrize("file", [OTHER.file, NAR.file[:-1], b"no zstd at all"], ids=["other", "short", "nonsense"])
async def test_what_is_not_the_nar_is_not_published(site: Site, file: bytes) -> None:
    """Nor does it stand in the way of what is sent next."""
    async with process(site) as uploads:
        assert await put(await sign(uploads, site, file), file) == 200
        for _ in range(2):
            with pytest.raises(BadInput):
                await complete(uploads, site, sent(file))
        assert await keys(site) == set()
        assert await site.ingest.known(site.cache, NAME) is None

        await put(await sign(uploads, site), NAR.file)
        assert not isinstance(await complete(uploads, site), Missing | Verifying)


async def test_what_is_altered_on_its_way_back_is_read_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async with process(site) as uploads:
        await put(await sign(uploads, site), NAR.file)
        coming = alter(site, monkeypatch, 1000)
        assert not isinstance(await complete(uploads, site), Missing | Verifying)
        assert coming == []
    assert await stored(site) == NAR.file


async def test_what_is_altered_in_the_bucket_is_named(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    async with process(site) as uploads:
        await put(await sign(uploads, site), NAR.file)
        alter(site, monkeypatch, 1000, 1000)
        with pytest.raises(Mismatch, match="was altered in the bucket"):
            await complete(uploads, site)
    assert await keys(site) == set()


async def test_what_was_altered_can_be_sent_again_by_another_process(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one of them remembers of the first file says nothing about the second."""
    async with process(site) as one, process(site) as two:
        await put(await sign(one, site), NAR.file)
        with monkeypatch.context() as patched:
            alter(site, patched, 1000, 1000)
            with pytest.raises(Mismatch):
                await complete(one, site)
        await put(await sign(two, site), NAR.file)
        assert not isinstance(await complete(one, site), Missing | Verifying)
    assert await stored(site) == NAR.file


async def test_nobody_hears_what_came_of_another_nar(site: Site) -> None:
    """Whoever can push can call an upload as others call theirs."""
    async with process(site) as uploads:
        await put(await sign(uploads, site), NAR.file)
        await put(await sign(uploads, site, OTHER.file), OTHER.file)
        one, other = await asyncio.gather(
            complete(uploads, site),
            uploads.complete(site.cache, UPLOAD, OTHER.nar_hash, sent(OTHER.file), patience=60),
        )
        assert isinstance(one, NarRecord)
        assert isinstance(other, NarRecord)
        assert (one.nar_hash, other.nar_hash) == (NAR.nar_hash.nix32, OTHER.nar_hash.nix32)


async def test_what_others_sent_wrongly_is_not_held_against_a_nar(site: Site) -> None:
    async with process(site) as uploads:
        signed = await sign(uploads, site)
        await put(await sign(uploads, site, OTHER.file), OTHER.file)
        with pytest.raises(BadInput):
            await complete(uploads, site, sent(OTHER.file))
        await put(signed, NAR.file)
        assert isinstance(await complete(uploads, site), NarRecord)


async def test_two_processes_complete_at_once(site: Site) -> None:
    async with process(site) as one, process(site) as two:
        await put(await sign(one, site), NAR.file)
        outcomes = await asyncio.gather(complete(one, site), complete(two, site))

        assert not any(isinstance(outcome, Verifying) for outcome in outcomes)
        assert not isinstance(await complete(two, site), Missing)
    assert await keys(site) == {KEY}
    assert await leftovers(site) == 0


async def test_a_nar_that_came_otherwise_meanwhile_stays(site: Site) -> None:
    in_other_bytes = zstandard.ZstdCompressor(write_checksum=True).compress(NAR.nar)
    async with process(site) as uploads:
        await put(await sign(uploads, site), NAR.file)
        first = await site.ingest.receive(site.cache, NAME, chunks(in_other_bytes), None)

        assert await complete(uploads, site) == first
    assert await stored(site) == in_other_bytes != NAR.file
    assert await keys(site) == {KEY}


async def test_what_is_published_is_in_the_disk_cache(site: Site, tmp_path: Path) -> None:
    disk_cache = DiskCache(tmp_path / "nar-cache", limit=2**28)
    await disk_cache.open()
    async with process(site, disk_cache=disk_cache) as uploads:
        await put(await sign(uploads, site), NAR.file)
        await complete(uploads, site)
    kept = await disk_cache.get(KEY)
    assert kept is not None
    assert await asyncio.to_thread(Path(kept.path).read_bytes) == NAR.file
    await disk_cache.close()


async def test_it_is_not_offered_where_there_is_no_room(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_room, "_COUNTED_FOR_IF_FULL", 0.0)
    digest = md5(NAR.file).digest()
    async with process(site, offered=False) as uploads:
        assert await uploads.sign_whole(site.cache, UPLOAD, NAR.nar_hash, len(NAR.file), digest) is None
    async with process(site, size=2 * len(NAR.file) - 1) as uploads:
        await put(await sign(uploads, site), NAR.file)
        assert await uploads.sign_whole(site.cache, UPLOAD, NAR.nar_hash, len(NAR.file), digest) is None
        await complete(uploads, site)
        assert await uploads.sign_whole(site.cache, UPLOAD, NAR.nar_hash, len(NAR.file), digest) == Known()


async def test_it_is_not_offered_where_too_many_are_unfinished(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that nobody completes are uploads like others; those that were completed are in nobody's way."""
    monkeypatch.setattr(upload_room, "_COUNTED_FOR_IF_FULL", 0.0)
    async with process(site, uploads=1) as uploads:
        await put(await sign(uploads, site), NAR.file)
        digest = md5(OTHER.file).digest()
        other = (site.cache, UPLOAD[::-1], OTHER.nar_hash, len(OTHER.file), digest)
        assert await uploads.sign_whole(*other) is None
        await complete(uploads, site)
        assert isinstance(await uploads.sign_whole(*other), SignedPut)


async def test_pieces_have_a_largest_size(site: Site) -> None:
    """Beyond that a copy could be of something else."""
    async with process(site) as uploads:
        assert await uploads.sign_whole(site.cache, UPLOAD, NAR.nar_hash, 2**28 + 1, bytes(16)) is None
        assert await uploads.sign_whole(site.cache, UPLOAD, NAR.nar_hash, 2**28, bytes(16)) is not None


async def test_nars_have_limits(site: Site) -> None:
    ingest = Ingest(site.storage, site.catalog, site.metrics, max_nar_size=len(NAR.file) - 1)
    async with process(site, ingest=ingest) as uploads:
        with pytest.raises(TooLarge):
            await sign(uploads, site)
    await ingest.close()


@pytest.mark.parametrize("parts", [[], ["a"] * 2], ids=["none", "two"])
async def test_it_is_one_part_with_its_md5(site: Site, parts: list[str]) -> None:
    async with process(site) as uploads:
        for what in (Sent(parts, parts, 5), Sent(["a"], [], 5)):
            with pytest.raises(BadInput):
                await complete(uploads, site, what)
