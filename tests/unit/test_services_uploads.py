"""NARs in parts: in any order, from several at once, taken up by another process, and never more than what they are."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from hashlib import sha256
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import pytest

from cachesrv.catalog.base import NarRecord
from cachesrv.errors import BadInput, Conflict, Mismatch, NotFound, StoreError, StoreFull, TooLarge
from cachesrv.nix.hashes import Hash
from cachesrv.services import assembly, through
from cachesrv.services.ingest import Ingest
from cachesrv.services.part_store import Begun, Part, PartStore, Place
from cachesrv.services.through import Through
from cachesrv.services.uploads import DirectParts, Limits, Missing, Sent, Uploads, Verifying
from cachesrv.storage.decorators import Direct, Limited, Retrying
from cachesrv.storage.filesystem import FilesystemStore
from cachesrv.storage.memory import MemoryStore
from cachesrv.storage.s3 import S3Store
from tests.samples import Sample
from tests.service_site import Site, Steps, chunks, open_site, served_cache

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from cachesrv.storage.base import ObjectStore

UPLOAD = "0123456789abcdef"
PART = 40_000
LARGE = Sample("large", b"".join(b"%d" % number for number in range(200_000)), compression="zstd")
OTHER = Sample("other", b"".join(b"%d" % number for number in range(190_000)), compression="zstd")
OTHER_CACHE = served_cache(name="other", prefix="other", root=False)


@pytest.fixture(params=["files", "memory", "bucket"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """Closed by the site."""
    if request.param == "memory":
        return MemoryStore()
    if request.param == "files":
        return FilesystemStore(tmp_path / "objects")
    gateway, bucket = request.getfixturevalue("gateway"), request.getfixturevalue("bucket")
    requests = Retrying(Limited(Direct()))
    return S3Store(bucket, requests=requests, endpoint=gateway.endpoint, prefix=token_hex(8), session=gateway.session())


@pytest.fixture
async def site(tmp_path: Path, storage: ObjectStore) -> AsyncIterator[Site]:
    async with open_site(tmp_path, storage=storage) as site:
        yield site


@pytest.fixture
async def files(tmp_path: Path) -> AsyncIterator[Site]:
    """For what does not depend on the storage."""
    async with open_site(tmp_path) as site:
        yield site


@asynccontextmanager
async def process(site: Site, **limits: int) -> AsyncIterator[Uploads]:
    """Uploads as one process of a server has them."""
    opened = Uploads(PartStore(site.storage), site.ingest, replace(Limits(part_size=PART), **limits))
    try:
        yield opened
    finally:
        await opened.close()


def cut(data: bytes, size: int = PART) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def digests(parts: Sequence[bytes]) -> list[str]:
    return [sha256(part).hexdigest() for part in parts]


PARTS = cut(LARGE.file)


async def begin(uploads: Uploads, site: Site, sample: Sample = LARGE, **changes: Any) -> list[Part] | None:
    given: dict[str, Any] = {"cache": site.cache, "upload": UPLOAD, "nar_hash": sample.nar_hash} | changes
    parts = await uploads.begin(**given, begun=Begun(given["nar_hash"].nix32, len(sample.nar), "somebody"))
    assert not isinstance(parts, DirectParts)
    return parts


async def send(uploads: Uploads, site: Site, number: int, data: bytes, **changes: Any) -> None:
    stated = replace(Part(number, len(data), sha256(data).hexdigest()), **changes)
    await uploads.receive(site.cache, UPLOAD, stated, chunks(data, 10_000))


async def complete(
    uploads: Uploads, site: Site, parts: Sequence[bytes] = PARTS, sample: Sample = LARGE
) -> NarRecord | Missing | Verifying:
    return await uploads.complete(site.cache, UPLOAD, sample.nar_hash, Sent(digests(parts)), patience=60)


async def keys(site: Site) -> set[str]:
    """Of all objects of all caches, and of all parts."""
    found = {info.key async for info in site.storage.list("")}
    return {"part" if key.startswith("~uploads/") else key for key in found}


NAR_KEY = f"main/nar/{LARGE.nar_hash.bare_nix32}.nar.zst"


async def test_parts_make_up_a_nar(site: Site) -> None:
    async with process(site) as uploads:
        assert await begin(uploads, site) == []
        # As they come when several are on their way.
        await asyncio.gather(*(send(uploads, site, number, PARTS[number - 1]) for number in range(len(PARTS), 0, -1)))
        assert await keys(site) == {"part"}
        record = await complete(uploads, site)

    assert record == await site.ingest.known(site.cache, NAR_KEY.removeprefix("main/nar/"))
    assert await site.storage.get(NAR_KEY, limit=10_000_000) == LARGE.file
    assert await keys(site) == {NAR_KEY}
    assert site.metrics.total("nars_stored") == 1


async def test_another_process_goes_on(site: Site) -> None:
    """As after a restart, or on another host."""
    async with process(site) as first:
        await begin(first, site)
        for number in (1, 2, 4):
            await send(first, site, number, PARTS[number - 1])

    async with process(site) as second:
        there = await begin(second, site)
        assert there == [Part(number, PART, digests(PARTS)[number - 1]) for number in (1, 2, 4)]
        assert await complete(second, site) == Missing([3, *range(5, len(PARTS) + 1)])
        for number in (3, *range(5, len(PARTS) + 1)):
            await send(second, site, number, PARTS[number - 1])
        await complete(second, site)

    assert await keys(site) == {NAR_KEY}


async def test_what_is_begun_is_known(site: Site) -> None:
    """To another process, and as long as it is neither complete nor given up."""
    names = ["f" * 16, UPLOAD, "e" * 16, "d" * 16]
    async with process(site) as first:
        await begin(first, site)
        await begin(first, site, OTHER, nar_hash=OTHER.nar_hash, upload=names[2])
    async with process(site) as second:
        assert await second.begun(site.cache, names) == names[1:3]
        assert await second.begun(OTHER_CACHE, names) == []
        await second.abort(site.cache, names[2])
        assert await second.begun(site.cache, names) == [UPLOAD]
        with pytest.raises(BadInput, match="name of an upload"):
            await second.begun(site.cache, ["../" * 6])


async def test_two_processes_take_parts_of_one_nar(site: Site) -> None:
    async with process(site) as one, process(site) as two:
        await begin(one, site)
        await begin(two, site)
        for number, part in enumerate(PARTS, 1):
            await send(one if number % 2 else two, site, number, part)
        outcomes = await asyncio.gather(complete(one, site), complete(two, site))

        assert [outcome for outcome in outcomes if isinstance(outcome, Missing | Verifying)] == []
        # Each may have read it for itself, in another second.
        assert len({replace(outcome, verified_at=0) for outcome in outcomes if isinstance(outcome, NarRecord)}) == 1
    assert await keys(site) == {NAR_KEY}


async def test_a_nar_that_is_there_needs_no_parts(files: Site) -> None:
    async with process(files) as uploads:
        await begin(uploads, files)
        await send(uploads, files, 1, PARTS[0])
        name = NAR_KEY.removeprefix("main/nar/")
        await files.ingest.receive(files.cache, name, chunks(LARGE.file), None)

        assert await begin(uploads, files) is None
        # Who did not ask, or whose answer was lost, hears it as well.
        assert await complete(uploads, files) == await files.ingest.known(files.cache, name)
    assert await keys(files) == {NAR_KEY}


async def test_a_nar_is_read_while_its_parts_arrive(files: Site) -> None:
    """So that the last part is not followed by a long silence."""
    async with process(files) as uploads:
        await begin(uploads, files)
        for number, part in enumerate(PARTS[:-1], 1):
            await send(uploads, files, number, part)
        (assembly,) = uploads._through._assemblies.values()
        async with asyncio.timeout(30):
            while assembly.read < PART * (len(PARTS) - 1):  # noqa: ASYNC110  nothing tells of it
                await asyncio.sleep(0.001)
        assert await keys(files) == {"part"}
        await send(uploads, files, len(PARTS), PARTS[-1])
        await complete(uploads, files)

    assert await keys(files) == {NAR_KEY}


async def test_other_parts_than_came_first_may_make_up_the_nar(files: Site) -> None:
    """Somebody else has another version of zstd."""
    async with process(files) as uploads:
        await begin(uploads, files)
        await send(uploads, files, 1, PARTS[0][::-1])
        for number, part in enumerate(PARTS, 1):
            await send(uploads, files, number, part)
        await complete(uploads, files)

    assert await files.storage.get(NAR_KEY, limit=10_000_000) == LARGE.file
    assert await keys(files) == {NAR_KEY}


async def test_an_assembly_that_was_given_up_is_begun_anew(files: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(through, "_PATIENCE", 0.01)
    async with process(files) as opened:
        await begin(opened, files)
        await send(opened, files, 1, PARTS[0])
        (waiting,) = opened._through._assemblies.values()
        with pytest.raises(assembly.GivenUp):
            await waiting.result
        for number, part in enumerate(PARTS[1:], 2):
            await send(opened, files, number, part)
        await complete(opened, files)

    assert await keys(files) == {NAR_KEY}


async def test_no_more_than_some_are_read_early(files: Site) -> None:
    async with process(files) as opened:
        for number in range(through._ASSEMBLIES + 1):
            name = f"{number:016}"
            nar_hash = Hash.of("sha256", name.encode())
            await begin(opened, files, upload=name, nar_hash=nar_hash)
            await opened.receive(files.cache, name, Part(1, PART, digests(PARTS)[0]), chunks(PARTS[0]))
        assert len(opened._through._assemblies) == through._ASSEMBLIES

        assert not isinstance(await _whole(opened, files), Missing)


async def _whole(opened: Uploads, site: Site) -> NarRecord | Missing | Verifying:
    await begin(opened, site)
    for number, part in enumerate(PARTS, 1):
        await send(opened, site, number, part)
    return await complete(opened, site)


@pytest.mark.parametrize(
    "parts",
    [
        [*PARTS[:2], *PARTS[3:]],
        [PARTS[1], PARTS[0], *PARTS[2:]],
        PARTS[:-1],
        [*PARTS, PARTS[-1]],
        cut(OTHER.file),
        [b"no zstd at all"],
    ],
    ids=["gap", "order", "short", "long", "other", "nonsense"],
)
async def test_what_is_not_the_nar_is_not_kept(files: Site, parts: list[bytes]) -> None:
    async with process(files) as opened:
        for _ in range(2):
            await begin(opened, files)
            for number, part in enumerate(parts, 1):
                await send(opened, files, number, part)
            with pytest.raises(BadInput) as first:
                await complete(opened, files, parts)
            # Who has not heard it asks again.
            with pytest.raises(BadInput) as second:
                await complete(opened, files, parts)
            assert str(first.value) == str(second.value)
            assert await keys(files) == set()
        assert await files.ingest.known(files.cache, NAR_KEY.removeprefix("main/nar/")) is None

        assert not isinstance(await _whole(opened, files), Missing)


async def test_a_part_that_is_not_what_is_said_is_not_kept(site: Site) -> None:
    async with process(site) as opened:
        await begin(opened, site)
        with pytest.raises(Mismatch, match="altered on the way"):
            await send(opened, site, 1, PARTS[0], sha256=digests(PARTS)[1])
        with pytest.raises(BadInput, match="more than the 39999 bytes"):
            await send(opened, site, 1, PARTS[0], size=PART - 1)
        with pytest.raises(BadInput, match="39999 bytes, 40000 were stated"):
            await send(opened, site, 1, PARTS[0][:-1], size=PART)

        assert await begin(opened, site) == []


@pytest.mark.parametrize("number", [-1, 0, 100_001])
async def test_numbers_have_limits(files: Site, number: int) -> None:
    async with process(files) as opened:
        await begin(opened, files)
        with pytest.raises(BadInput, match="counted from 1 to 100000"):
            await send(opened, files, number, b"x")


async def test_parts_have_limits(files: Site) -> None:
    async with process(files) as opened:
        await begin(opened, files)
        for data in (b"", b"x" * (PART + 1)):
            with pytest.raises(TooLarge):
                await send(opened, files, 1, data)
        for count in (0, 100_001):
            with pytest.raises(BadInput):
                await complete(opened, files, [b""] * count)


async def test_nars_have_limits(files: Site) -> None:
    ingest = Ingest(files.storage, files.catalog, files.metrics, max_nar_size=1000)
    opened = Uploads(PartStore(files.storage), ingest, Limits())
    with pytest.raises(TooLarge):
        await begin(opened, files)
    await ingest.close()


@pytest.mark.parametrize(
    "name", ["", "short", "UPPERCASE0123456789", "../../../../etc/passwd", "a" * 65, "a" * 20 + "/"]
)
async def test_uploads_have_names(files: Site, name: str) -> None:
    async with process(files) as opened:
        with pytest.raises(BadInput, match="name of an upload"):
            await begin(opened, files, upload=name)
        with pytest.raises(BadInput, match="name of an upload"):
            await opened.receive(files.cache, name, Part(1, 1, "0" * 64), chunks(b"x"))
        with pytest.raises(BadInput, match="name of an upload"):
            await opened.complete(files.cache, name, LARGE.nar_hash, Sent(["0" * 64]), patience=1)
        with pytest.raises(BadInput, match="name of an upload"):
            await opened.abort(files.cache, name)


async def test_what_was_no_nar_may_become_one_by_way_of_another_process(files: Site) -> None:
    """A part was damaged in storage: it is found out by one process, and sent again to another one."""
    async with process(files) as one, process(files) as two:
        await begin(two, files)
        for number, part in enumerate(PARTS, 1):
            await send(two, files, number, part)
        key = Place.of("main", UPLOAD).part_key(2, digests(PARTS)[1])
        await files.storage.put(key, bytes(PART), replace=True)
        with pytest.raises(BadInput):
            await complete(one, files)
        with pytest.raises(BadInput):
            await complete(one, files)

        assert await begin(two, files) == []
        for number, part in enumerate(PARTS, 1):
            await send(two, files, number, part)
        await complete(one, files)
    assert await keys(files) == {NAR_KEY}


async def test_an_upload_is_for_one_nar(files: Site) -> None:
    async with process(files) as opened:
        await begin(opened, files)
        with pytest.raises(Conflict, match="another NAR"):
            await begin(opened, files, OTHER)
        for number, part in enumerate(PARTS, 1):
            await send(opened, files, number, part)
        with pytest.raises(Conflict, match="another NAR"):
            await complete(opened, files, sample=OTHER)
        assert await complete(opened, files) == await files.ingest.known(files.cache, NAR_KEY.removeprefix("main/nar/"))


async def test_what_was_wrong_with_one_nar_says_nothing_of_another(files: Site) -> None:
    """Also when nothing is noted any more of whose upload it was."""
    async with process(files) as opened:
        await begin(opened, files)
        await send(opened, files, 1, PARTS[1])
        with pytest.raises(BadInput):
            await complete(opened, files, PARTS[1:2])
        assert await complete(opened, files, PARTS[1:2], OTHER) == Missing([1])


async def test_parts_may_be_forgotten_while_a_nar_is_made_of_them(files: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another client has found that what it sends is damaged: this one is told to send all of it again."""
    making, goes_on = asyncio.Event(), asyncio.Event()
    receive, make = files.ingest.receive, Through.make

    async def held(*given: Any) -> NarRecord:
        await goes_on.wait()
        return await receive(*given)

    async def made(*given: Any) -> NarRecord:
        making.set()
        return await make(*given)

    monkeypatch.setattr(files.ingest, "receive", held)
    monkeypatch.setattr(Through, "make", made)
    async with process(files) as opened:
        await begin(opened, files)
        for number, part in enumerate(PARTS, 1):
            await send(opened, files, number, part)
        completing = asyncio.create_task(complete(opened, files))
        await making.wait()
        await opened.abort(files.cache, UPLOAD)
        goes_on.set()

        assert await completing == Missing([*range(1, len(PARTS) + 1)])
    assert await keys(files) == set()


async def test_an_upload_is_for_one_cache(files: Site) -> None:
    """Who may write to another cache finds nothing of it there, and changes nothing."""
    async with process(files) as opened:
        await begin(opened, files)
        await send(opened, files, 1, PARTS[0])

        assert await begin(opened, files, cache=OTHER_CACHE) == []
        await opened.abort(OTHER_CACHE, UPLOAD)
        with pytest.raises(NotFound):
            await opened.receive(OTHER_CACHE, UPLOAD, Part(1, 1, sha256(b"x").hexdigest()), chunks(b"x"))
        outcome = await opened.complete(OTHER_CACHE, UPLOAD, LARGE.nar_hash, Sent(digests(PARTS)), patience=60)
        assert outcome == Missing([*range(1, len(PARTS) + 1)])

        there = await begin(opened, files)
        assert there is not None
        assert len(there) == 1


async def test_uploads_with_names_that_begin_alike_are_apart(files: Site) -> None:
    async with process(files) as opened:
        await begin(opened, files)
        await send(opened, files, 1, PARTS[0])

        assert await begin(opened, files, upload=UPLOAD + "0") == []
        await opened.abort(files.cache, UPLOAD + "0")
        assert await begin(opened, files) == [Part(1, PART, digests(PARTS)[0])]


async def test_what_was_not_begun_takes_no_parts(site: Site) -> None:
    async with process(site) as opened:
        with pytest.raises(NotFound, match="no such upload"):
            await send(opened, site, 1, PARTS[0])
        await begin(opened, site)
        await send(opened, site, 1, PARTS[0])
        await opened.abort(site.cache, UPLOAD)
        with pytest.raises(NotFound, match="no such upload"):
            await send(opened, site, 2, PARTS[1])

        assert await keys(site) == set()


async def test_what_nobody_goes_on_with_is_swept_away(site: Site) -> None:
    async with process(site) as opened:
        await begin(opened, site)
        await send(opened, site, 1, PARTS[0])
        assert await opened.sweep() == 0
        assert await keys(site) == {"part"}

    async with process(site, seconds=-60) as later:
        assert await later.sweep() == 1
        assert await keys(site) == set()
        assert await later.sweep() == 0


@pytest.mark.parametrize("noted", [b"", b'{"nar_hash": 1}', b'{"nar_hash":"\xff","nar_size":1,"pusher":""}'])
async def test_what_is_noted_in_another_way_is_begun_anew_or_swept_away(files: Site, noted: bytes) -> None:
    """By a later version, say."""
    async with process(files) as opened:
        place = Place.of("main", UPLOAD)
        await files.storage.put(place.begun_key, noted)
        assert await begin(opened, files) == []
        await send(opened, files, 1, PARTS[0])
        await files.storage.put(place.begun_key, noted, replace=True)
        await begin(opened, files, OTHER, upload="f" * 16)

    async with process(files, seconds=-60) as later:
        assert await later.sweep() == 2
    assert await keys(files) == set()


async def test_the_room_for_parts_has_limits(files: Site) -> None:
    async with process(files, size=3 * PART - 1, uploads=2) as opened:
        await begin(opened, files)
        await begin(opened, files, upload="a" * 16)
        with pytest.raises(StoreFull, match="2 uploads are unfinished"):
            await begin(opened, files, upload="b" * 16)
        await begin(opened, files)  # is there already
        await send(opened, files, 1, PARTS[0])
        await send(opened, files, 2, PARTS[1])
        with pytest.raises(StoreFull, match="bytes of unfinished NARs"):
            await send(opened, files, 3, PARTS[2])

    async with process(files, size=3 * PART - 1, uploads=2) as restarted:
        with pytest.raises(StoreFull):
            await begin(restarted, files, upload="b" * 16)
        with pytest.raises(StoreFull):
            await send(restarted, files, 3, PARTS[2])


async def test_who_asks_for_long_is_told_how_far_it_is(files: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = asyncio.Event()
    noted = files.catalog.put_nar

    async def slow(*arguments: Any, **named: Any) -> int:
        await let_go.wait()
        return await noted(*arguments, **named)

    monkeypatch.setattr(files.catalog, "put_nar", slow)
    async with process(files) as opened:
        await begin(opened, files)
        for number, part in enumerate(PARTS, 1):
            await send(opened, files, number, part)
        async with asyncio.timeout(30):
            while (outcome := await _impatient(opened, files)) != Verifying(len(LARGE.file)):
                assert isinstance(outcome, Verifying)
        let_go.set()
        assert not isinstance(await complete(opened, files), Verifying | Missing)


async def _impatient(opened: Uploads, site: Site) -> NarRecord | Missing | Verifying:
    return await opened.complete(site.cache, UPLOAD, LARGE.nar_hash, Sent(digests(PARTS)), patience=0.01)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
async def test_whatever_fails_it_can_be_gone_on_with(tmp_path: Path, late: bool) -> None:
    counting = Steps()
    await _sent_with(tmp_path / "counted", counting)
    for fail_at in range(len(counting.taken)):
        folder = tmp_path / f"{fail_at}"
        with suppress(StoreError):
            await _sent_with(folder, Steps(fail_at, late=late))
        async with open_site(folder) as site:
            assert (await keys(site)) <= {"part", NAR_KEY}
            async with process(site) as opened:
                if await begin(opened, site) is not None:
                    assert not isinstance(await _whole(opened, site), Missing)
            assert await site.storage.get(NAR_KEY, limit=10_000_000) == LARGE.file


async def _sent_with(folder: Path, steps: Steps) -> None:
    async with open_site(folder, wrap=steps.wrap) as site:
        opened = Uploads(PartStore(steps.wrap(site.storage)), site.ingest, Limits(part_size=100_000))
        try:
            await begin(opened, site)
            parts = cut(LARGE.file, 100_000)
            for number, part in enumerate(parts, 1):
                await send(opened, site, number, part)
            await complete(opened, site, parts)
        finally:
            await opened.close()
