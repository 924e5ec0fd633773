"""NARs on their way in: stored when they are what they say, and without a trace when they are not."""

from __future__ import annotations

import asyncio
import gzip
import lzma
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cachesrv.errors import BadInput, Mismatch, MissingNar, StoreError, TooLarge
from cachesrv.nix.hashes import Hash
from cachesrv.services.ingest import Ingest, NarName
from tests.samples import Sample, directory_nar, file_name, file_nar
from tests.service_site import Site, Steps, chunks, open_site

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

SMALL = Sample("small", b"small")
LARGE = Sample("large", bytes(range(256)) * 8192)
PACKED = Sample("packed", bytes(range(256)) * 8192, compression="zstd")


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as site:
        yield site


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("sample", [SMALL, LARGE, PACKED], ids=lambda sample: sample.name)
async def test_what_is_noted_is_what_was_stored(site: Site, sample: Sample, stated: bool) -> None:
    size = len(sample.file) if stated else None
    record = await site.ingest.receive(site.cache, sample.nar_name, chunks(sample.file), size)
    assert record.key == f"main/nar/{sample.nar_name}"
    assert (record.file_hash, record.file_size) == (Hash.of("sha256", sample.file).nix32, len(sample.file))
    assert (record.nar_hash, record.nar_size) == (sample.nar_hash.nix32, len(sample.nar))
    assert record.compression == sample.compression
    assert await site.storage.get(record.key, limit=10_000_000) == sample.file
    assert await site.catalog.nar(record.key) == record
    assert await site.ingest.known(site.cache, sample.nar_name) == record
    assert site.metrics.total("nars_stored") == 1
    assert site.metrics.total("received_bytes") == len(sample.file)


async def test_a_nar_may_be_called_by_its_own_hash(site: Site) -> None:
    """As `cachesrv push` and Hydra do, instead of by the hash of the file."""
    name = f"{PACKED.nar_hash.bare_nix32}.nar.zst"
    record = await site.ingest.receive(site.cache, name, chunks(PACKED.file), None)
    assert record.nar_hash == PACKED.nar_hash.nix32


@pytest.mark.parametrize("content", [b"small", b"large" * 500_000])
async def test_no_suffix_may_mean_gzip(site: Site, content: bytes) -> None:
    file = gzip.compress(file_nar(content), 1)
    record = await site.ingest.receive(site.cache, file_name(file, "gzip"), chunks(file), len(file))
    assert record.compression == "gzip"
    assert record.nar_hash == Hash.of("sha256", file_nar(content)).nix32


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize(
    "file",
    [
        b"",
        b"x" * 300,
        SMALL.nar[:-8],
        SMALL.nar + bytes(8),
        directory_nar(b"b", b"a"),
        LARGE.nar[:-8],
        LARGE.nar + b"x",
    ],
)
async def test_what_is_no_nar_leaves_no_trace(site: Site, file: bytes, stated: bool) -> None:
    name = file_name(file)
    with pytest.raises(BadInput):
        await site.ingest.receive(site.cache, name, chunks(file), len(file) if stated else None)
    assert await site.names() == set()
    assert await site.catalog.nar(f"main/nar/{name}") is None


@pytest.mark.parametrize("sample", [SMALL, LARGE], ids=lambda sample: sample.name)
async def test_a_wrong_name(site: Site, sample: Sample) -> None:
    other = file_name(b"something else")
    with pytest.raises(Mismatch, match=sample.nar_hash.bare_nix32):
        await site.ingest.receive(site.cache, other, chunks(sample.file), None)
    with pytest.raises(BadInput):
        await site.ingest.receive(site.cache, f"{sample.nar_name}.xz", chunks(sample.file), None)
    assert await site.names() == set()


@pytest.mark.parametrize("difference", [-1, 1])
@pytest.mark.parametrize("sample", [SMALL, LARGE], ids=lambda sample: sample.name)
async def test_a_body_of_another_length(site: Site, sample: Sample, difference: int) -> None:
    with pytest.raises(BadInput):
        await site.ingest.receive(site.cache, sample.nar_name, chunks(sample.file), len(sample.file) + difference)
    assert await site.names() == set()


async def test_the_limit_counts_both_sizes(tmp_path: Path) -> None:
    """What is said, what comes, and what it becomes."""
    async with open_site(tmp_path) as site:
        ingest = Ingest(site.storage, site.catalog, site.metrics, max_nar_size=len(LARGE.nar) - 1)
        for sample, size in ((LARGE, len(LARGE.file)), (LARGE, None), (PACKED, len(PACKED.file)), (PACKED, None)):
            with pytest.raises(TooLarge):
                await ingest.receive(site.cache, sample.nar_name, chunks(sample.file), size)
        assert await site.names() == set()
        await ingest.receive(site.cache, SMALL.nar_name, chunks(SMALL.file), None)
        await ingest.close()


async def test_what_is_said_to_be_too_large_is_not_read(tmp_path: Path) -> None:
    read = False

    async def noticed() -> AsyncIterator[bytes]:
        nonlocal read
        read = True
        yield b"x"

    async with open_site(tmp_path) as site:
        ingest = Ingest(site.storage, site.catalog, site.metrics, max_nar_size=100)
        with pytest.raises(TooLarge):
            await ingest.receive(site.cache, LARGE.nar_name, noticed(), 101)
        assert not read
        await ingest.close()


@pytest.mark.parametrize("sample", [SMALL, LARGE], ids=lambda sample: sample.name)
async def test_the_same_again_changes_nothing(site: Site, sample: Sample) -> None:
    first = await site.ingest.receive(site.cache, sample.nar_name, chunks(sample.file), None)
    before = await site.storage.head(first.key)
    again = await asyncio.gather(
        *(site.ingest.receive(site.cache, sample.nar_name, chunks(sample.file), None) for _ in range(4))
    )
    assert {record.nar_hash for record in again} == {first.nar_hash}
    assert await site.storage.head(first.key) == before
    with pytest.raises(BadInput):
        await site.ingest.receive(site.cache, sample.nar_name, chunks(sample.file[:-8]), None)
    assert await site.storage.head(first.key) == before


async def test_other_bytes_of_the_same_nar(site: Site) -> None:
    """Called by its NAR hash, a NAR can be compressed in several ways; what is stored is what is noted."""
    name = f"{LARGE.nar_hash.bare_nix32}.nar.xz"
    files = [lzma.compress(LARGE.nar, preset=preset) for preset in (0, 6)]
    assert files[0] != files[1]
    records = [await site.ingest.receive(site.cache, name, chunks(file), len(file)) for file in files]
    stored = await site.storage.get(f"main/nar/{name}", limit=10_000_000)
    assert stored == files[0]
    assert [record.file_hash for record in records] == [Hash.of("sha256", files[0]).nix32] * 2


async def test_a_body_that_breaks_off(site: Site) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield LARGE.file[:1_000_000]
        raise BadInput("the body broke off")

    for size in (len(LARGE.file), None):
        with pytest.raises(BadInput, match="broke off"):
            await site.ingest.receive(site.cache, LARGE.nar_name, broken(), size)
    assert await site.names() == set()
    assert not [*site.storage._tree.root.rglob(".incoming-*")]  # type: ignore[attr-defined]  # of FilesystemStore


async def test_a_client_that_goes_away(site: Site) -> None:
    arrived = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        yield LARGE.file[:1_000_000]
        arrived.set()
        await asyncio.Event().wait()

    task = asyncio.create_task(site.ingest.receive(site.cache, LARGE.nar_name, endless(), None))
    await arrived.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not [*site.storage._tree.root.rglob(".incoming-*")]  # type: ignore[attr-defined]  # of FilesystemStore
    await site.ingest.receive(site.cache, LARGE.nar_name, chunks(LARGE.file), None)


async def test_a_nar_that_lies_in_storage(site: Site) -> None:
    """Put there by somebody else, or by a crash before it was noted: it is read before it is believed."""
    key = f"main/nar/{PACKED.nar_name}"
    with pytest.raises(MissingNar):
        await site.ingest.adopt(site.cache, PACKED.nar_name, "zstd")
    await site.storage.put(key, PACKED.file)
    assert await site.ingest.known(site.cache, PACKED.nar_name) is None
    record = await site.ingest.adopt(site.cache, PACKED.nar_name, "zstd")
    assert record.nar_hash == PACKED.nar_hash.nix32
    assert await site.ingest.known(site.cache, PACKED.nar_name) == record
    await site.storage.put(f"main/nar/{SMALL.nar_name}", b"garbage")
    with pytest.raises(BadInput):
        await site.ingest.adopt(site.cache, SMALL.nar_name, "none")


@pytest.mark.parametrize("sample", [SMALL, LARGE], ids=lambda sample: sample.name)
async def test_many_that_lie_in_storage_come_at_once(site: Site, sample: Sample) -> None:
    """As after the catalog was lost: what is there is read, while all turns are taken by those who send it again."""
    samples = [replace(sample, content=sample.content + b"%d" % number) for number in range(3)]
    for one in samples:
        await site.storage.put(f"main/nar/{one.nar_name}", one.file)
    ingest = Ingest(site.storage, site.catalog, site.metrics, parallel=len(samples))
    try:
        async with asyncio.timeout(30):
            records = await asyncio.gather(
                *(ingest.receive(site.cache, one.nar_name, chunks(one.file), len(one.file)) for one in samples)
            )
    finally:
        await ingest.close()
    assert [record.nar_hash for record in records] == [one.nar_hash.nix32 for one in samples]
    assert [await site.catalog.nar(record.key) for record in records] == records


async def test_a_nar_that_is_gone_from_storage_is_not_known(site: Site) -> None:
    record = await site.ingest.receive(site.cache, SMALL.nar_name, chunks(SMALL.file), None)
    await site.storage.delete([record.key])
    assert await site.ingest.known(site.cache, SMALL.nar_name) is None
    await site.ingest.receive(site.cache, SMALL.nar_name, chunks(SMALL.file), None)
    assert await site.ingest.known(site.cache, SMALL.nar_name) is not None


async def test_a_store_that_fails(tmp_path: Path) -> None:
    for number in range(2):
        steps = Steps(number)
        async with open_site(tmp_path / str(number), wrap=steps.wrap) as site:
            with pytest.raises(StoreError, match="as told"):
                await site.ingest.receive(site.cache, LARGE.nar_name, chunks(LARGE.file), None)
            assert await site.catalog.nar(f"main/nar/{LARGE.nar_name}") is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        "x",
        "x.nar",
        f"{'e' * 52}.nar",
        f"{'0' * 51}.nar",
        f"{'0' * 52}.nar.unheard",
        f"{'0' * 52}.nar.zst.zst",
        f"{'0' * 52}",
        f"{'0' * 52}.nar/",
        f"../{'0' * 52}.nar",
        f"{'0' * 52}.nar\n",
        f"{'0' * 52}.nar.",
    ],
)
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(BadInput):
        NarName.parse(name)


@pytest.mark.parametrize(
    ("suffix", "compression"), [("", None), (".xz", "xz"), (".zst", "zstd"), (".br", "br"), (".bz2", "bzip2")]
)
def test_names(suffix: str, compression: str | None) -> None:
    assert NarName.parse(f"{'0' * 52}.nar{suffix}") == NarName("0" * 52, compression)
