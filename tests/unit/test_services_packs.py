"""Packs at the server: each NAR judged by itself, all stored together, paths published with them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import zstandard

from cachesrv.errors import BadInput, Mismatch, MissingNar, MissingReferences, StoreError, TooLarge
from cachesrv.nix.compression import decompress
from cachesrv.nix.seekable import compress_zstd
from cachesrv.services.packs import Packs, SentNar
from tests.samples import Sample, file_nar
from tests.service_site import Site, Steps, by_api, check_what_is_visible, open_site

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from cachesrv.services.publish import Outcome

LIBRARY = Sample("library", b"library", compression="zstd")
TOOL = Sample("tool", b"tool", (LIBRARY.path,), compression="zstd")
PROGRAM = Sample("program", b"program", (LIBRARY.path, TOOL.path), compression="zstd")
CHAIN = (LIBRARY, TOOL, PROGRAM)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as site:
        yield site


def packed(sample: Sample, file: bytes | None = None) -> SentNar:
    """As the uploader sends it, or as another file."""
    whole = b"".join(compress_zstd([sample.nar])) if file is None else file
    return SentNar(sample.nar_hash.nix32, len(sample.nar), whole)


async def send(
    site: Site, nars: Sequence[SentNar], *paths: Sample, packs: Packs | None = None
) -> tuple[list[Outcome], list[Outcome]]:
    return await (packs or site.packs).receive(site.cache, nars, [by_api(path) for path in paths], "somebody")


def name(sample: Sample) -> str:
    return f"nar/{sample.nar_hash.bare_nix32}.nar.zst"


async def test_nars_and_their_paths_in_one_go(site: Site) -> None:
    assert await send(site, [packed(sample) for sample in CHAIN], *CHAIN) == ([None] * 3, [None] * 3)

    await check_what_is_visible(site)
    assert site.visible() == {sample.path.hash_part for sample in CHAIN}
    assert await site.names() == {
        "nix-cache-info",
        *map(name, CHAIN),
        *(f"{sample.path.hash_part}.narinfo" for sample in CHAIN),
        *(f"{sample.path.hash_part}.ls" for sample in CHAIN),
    }
    stored = await site.storage.get(f"main/{name(TOOL)}", limit=10_000)
    assert stored is not None
    assert decompress("zstd", stored, 10_000) == TOOL.nar
    assert site.metrics.total("nars_stored") == 3


async def test_it_is_as_if_they_had_come_one_by_one(site: Site, tmp_path: Path) -> None:
    await send(site, [packed(sample) for sample in CHAIN], *CHAIN)
    async with open_site(tmp_path / "other", cache=site.cache) as other:
        for sample in CHAIN:
            sent = packed(sample)
            await other.ingest.receive(other.cache, name(sample).removeprefix("nar/"), _chunks(sent.file), None)
        await other.add(*CHAIN)

        assert await other.names() == await site.names()
        for key in await site.names():
            assert await other.storage.get(f"main/{key}", limit=10_000) == await site.storage.get(
                f"main/{key}", limit=10_000
            )
        for sample in CHAIN:
            key = f"main/{name(sample)}"
            nars = [await one.catalog.nar(key) for one in (site, other)]
            assert None not in nars
            assert [replace(nar, verified_at=0) for nar in nars if nar] == [
                replace(nar, verified_at=0) for nar in reversed(nars) if nar
            ]


async def _chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


@pytest.mark.parametrize(
    ("sent", "error", "text"),
    [
        (packed(TOOL, b"garbage"), BadInput, "not zstd"),
        (packed(TOOL, b""), BadInput, "zstd"),
        (packed(TOOL, packed(TOOL).file[:-1]), BadInput, "early|zstd"),
        (packed(TOOL, packed(TOOL).file[:20] + b"\x55" + packed(TOOL).file[21:]), BadInput, "zstd"),
        (packed(TOOL, packed(LIBRARY).file), Mismatch, "bytes|hash"),
        (replace(packed(TOOL), nar_hash=LIBRARY.nar_hash.nix32), Mismatch, "has the hash"),
        (replace(packed(TOOL), nar_hash="x" * 100_000), Mismatch, "has the hash .{,400}$"),
        (replace(packed(TOOL), nar_size=len(TOOL.nar) - 1), BadInput, "bytes"),
        (replace(packed(TOOL), nar_size=len(TOOL.nar) + 1), Mismatch, "bytes"),
        (replace(packed(TOOL), nar_size=0), BadInput, "bytes"),
        (replace(packed(TOOL), nar_size=2**60), TooLarge, "NAR in a pack"),
        (packed(TOOL, b"".join(compress_zstd([bytes(2**24)]))), TooLarge, "more than"),
        (SentNar("sha256:x", 5, b"".join(compress_zstd([b"five!"]))), BadInput, "NAR"),
    ],
    ids=[
        "garbage",
        "empty",
        "cut",
        "damaged",
        "another",
        "another hash",
        "no hash",
        "too small",
        "too large",
        "no size",
        "beyond the limit",
        "a bomb",
        "no NAR",
    ],
)
async def test_a_bad_one_is_named_and_hurts_no_other(
    site: Site, sent: SentNar, error: type[BadInput], text: str
) -> None:
    nars = [packed(LIBRARY), sent, packed(PROGRAM)]
    (library, bad, program), paths = await send(site, nars, *CHAIN)

    assert (library, program) == (None, None)
    with pytest.raises(error, match=text):
        raise bad or AssertionError
    assert [type(outcome) for outcome in paths] == [type(None), MissingNar, MissingReferences]
    assert site.visible() == {LIBRARY.path.hash_part}
    await check_what_is_visible(site)


@pytest.mark.parametrize("size", [1, 100, 1_000_000])
async def test_any_form_of_zstd_is_taken(site: Site, size: int) -> None:
    """Several frames, no size in the frame, no seek table."""
    nar = file_nar(bytes(size))
    half = len(nar) // 2
    stream = zstandard.ZstdCompressor().compressobj()
    files = [
        b"".join(compress_zstd([nar], frame_size=max(1, half))),
        stream.compress(nar) + stream.flush(),
        zstandard.ZstdCompressor().compress(nar),
    ]
    sample = Sample("file", bytes(size))
    for file in files:
        assert await send(site, [packed(sample, file)]) == ([None], [])


async def test_equal_nars_and_those_that_are_there(site: Site) -> None:
    twin = Sample("twin", LIBRARY.content)
    assert await send(site, [packed(LIBRARY), packed(LIBRARY)], LIBRARY, twin) == ([None, None], [None, None])
    for _ in range(2):
        assert await send(site, [packed(TOOL), packed(LIBRARY)], TOOL, LIBRARY) == ([None, None], [None, None])
    assert len(site.visible()) == 3


async def test_a_nar_whose_path_comes_later(site: Site) -> None:
    assert await send(site, [packed(LIBRARY)]) == ([None], [])
    record = await site.catalog.nar(f"main/{name(LIBRARY)}")
    assert record is not None
    assert record.listing is not None
    assert await send(site, [], LIBRARY) == ([], [None])
    await check_what_is_visible(site)
    assert f"{LIBRARY.path.hash_part}.ls" in await site.names()


async def test_a_path_that_is_refused_can_come_again(site: Site) -> None:
    """The listing of its NAR was not kept, and is made anew."""
    assert [type(one) for one in (await send(site, [packed(TOOL)], TOOL))[1]] == [MissingReferences]
    assert await send(site, [packed(LIBRARY)], LIBRARY, TOOL) == ([None], [None, None])
    assert f"{TOOL.path.hash_part}.ls" in await site.names()


async def test_an_object_that_the_catalog_does_not_know(site: Site) -> None:
    await site.storage.put(f"main/{name(LIBRARY)}", packed(LIBRARY).file)
    await site.storage.put(f"main/{name(TOOL)}", packed(LIBRARY).file)

    (library, tool), paths = await send(site, [packed(LIBRARY), packed(TOOL)], LIBRARY, TOOL)

    assert (library, paths[0]) == (None, None)
    assert isinstance(tool, Mismatch)
    assert isinstance(paths[1], MissingNar)


async def test_the_limit_of_a_nar_holds_in_packs(site: Site) -> None:
    packs = Packs(site.storage, site.catalog, site.ingest, site.publish, site.metrics, max_nar_size=len(TOOL.nar) - 1)

    assert packs.limits.nar_size == len(TOOL.nar) - 1
    ((outcome,), _) = await send(site, [packed(TOOL)], packs=packs)
    assert isinstance(outcome, TooLarge)


async def test_an_empty_pack(site: Site) -> None:
    assert await send(site, []) == ([], [])


@pytest.mark.parametrize("late", [False, True])
async def test_cut_short_at_every_step(tmp_path: Path, late: bool) -> None:
    """Whichever write was the last one: nothing is visible too early, and the same pack again completes it."""
    nars = [packed(sample) for sample in CHAIN]
    number, failed = 0, True
    async with open_site(tmp_path / "empty"):
        pass
    while failed:
        folder, steps = tmp_path / str(number), Steps(number, late=late)
        async with open_site(folder, wrap=steps.wrap, copy_of=tmp_path / "empty") as site:
            try:
                outcomes = await send(site, nars, *CHAIN)
            except StoreError:
                outcomes = [], [StoreError()]
            failed = any(outcomes[1])
            await check_what_is_visible(site)
            index = site.index
        async with open_site(folder, index=index) as site:
            await check_what_is_visible(site)
            assert await send(site, nars, *CHAIN) == ([None] * 3, [None] * 3)
            await check_what_is_visible(site)
            assert site.visible() == {sample.path.hash_part for sample in CHAIN}
            assert len([name for name in await site.names() if name.endswith(".ls")]) == 3
        number += 1
    assert number > 6
