"""Catalog and index, made anew from what lies in storage."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cachesrv.index.base import Present
from cachesrv.index.memory import MemoryIndex
from cachesrv.nix.signing import SecretKey
from cachesrv.services import reindex
from cachesrv.services.caches import ReferencePolicy
from cachesrv.services.reindex import Reindex, Report
from tests.samples import Sample, path_of
from tests.service_site import Site, open_site, served_cache

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

LIBRARY = Sample("library", b"library")
TOOL = Sample("tool", b"tool", (LIBRARY.path, path_of("tool")))
PROGRAM = Sample("program", b"program", (LIBRARY.path, TOOL.path))
CHAIN = (LIBRARY, TOOL, PROGRAM)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as site:
        yield site


async def lay(site: Site, *samples: Sample) -> None:
    """Put paths into storage as another program would."""
    for sample in samples:
        await site.storage.put(f"main/nar/{sample.nar_name}", sample.file)
        await site.storage.put(f"main/{sample.path.hash_part}.narinfo", sample.narinfo())


async def run(site: Site) -> Report:
    return await Reindex(site.storage, site.catalog, site.index).run(site.cache, lambda _: None)


def parts(*samples: Sample) -> set[str]:
    return {sample.path.hash_part for sample in samples}


async def test_everything_is_taken_as_it_lies_there(site: Site) -> None:
    stranger = SecretKey.generate("stranger-1")
    signed = LIBRARY.narinfo(signatures=(stranger.sign(LIBRARY.info.fingerprint),))
    await lay(site, *CHAIN)
    await site.storage.put(f"main/{LIBRARY.path.hash_part}.narinfo", signed, replace=True)
    await site.storage.put("main/nix-cache-info", b"StoreDir: /nix/store\n")
    await site.storage.put("main/log/x.narinfo", b"not a narinfo of this cache")
    await site.storage.put("other/x.narinfo", b"nor this")
    report = await run(site)
    assert (report.taken, report.broken) == (3, {})
    assert await site.published() == site.visible() == parts(*CHAIN)
    answer = site.index.get("main", LIBRARY.path.hash_part)
    assert isinstance(answer, Present)
    assert answer.body == signed
    record = await site.catalog.path("main", TOOL.path.hash_part)
    assert record is not None
    assert record.nar_key == f"main/nar/{TOOL.nar_name}"
    assert set(record.references) == {str(LIBRARY.path), str(TOOL.path)}


async def test_twice_is_as_once(site: Site) -> None:
    await lay(site, *CHAIN)
    await run(site)
    answers = dict(site.index.scan("main"))
    report = await run(site)
    assert (report.taken, report.broken) == (3, {})
    assert dict(site.index.scan("main")) == answers


async def test_in_batches(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reindex, "_BATCH", 4)
    samples = [Sample(str(number), str(number).encode()) for number in range(10)]
    samples += [Sample(f"needs-{number}", b"", (path_of(str(number)),)) for number in range(10)]
    await lay(site, *samples)
    told: list[int] = []
    report = await Reindex(site.storage, site.catalog, site.index).run(
        site.cache, lambda report: told.append(report.taken)
    )
    assert report.taken == 20
    assert told == sorted(told)
    assert len(told) >= 5
    assert site.visible() == parts(*samples)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"garbage", "narinfo"),
        (LIBRARY.narinfo(), "it is the narinfo of"),
        (TOOL.narinfo(store_dir="/gnu/store"), "/gnu/store"),
        (TOOL.narinfo(url="nar/absent.nar"), "its NAR nar/absent.nar is not there"),
        (TOOL.narinfo(url="../other/nar/x"), "key"),
        (TOOL.narinfo(url="https://example.org/nar/x"), "key"),
        (TOOL.narinfo(file_size=1), "it says 1"),
        (b"x" * 2_000_000, "at most"),
    ],
)
async def test_what_cannot_be_served_is_named(site: Site, text: bytes, said: str) -> None:
    """With all that needs it; the rest is served."""
    await lay(site, *CHAIN)
    name = f"main/{TOOL.path.hash_part}.narinfo"
    await site.storage.put(name, text, replace=True)
    report = await run(site)
    assert set(report.broken) == {name, f"main/{PROGRAM.path.hash_part}.narinfo"}
    assert said in report.broken[name]
    assert str(TOOL.path) in report.broken[f"main/{PROGRAM.path.hash_part}.narinfo"]
    assert report.taken == 1
    assert await site.published() == site.visible() == parts(LIBRARY)


async def test_a_chain_that_hangs_in_the_air_goes_as_a_whole(site: Site) -> None:
    samples = [Sample(str(number), b"", (path_of(str(number - 1)),)) for number in range(20)]
    await lay(site, LIBRARY, *samples)
    report = await run(site)
    assert report.taken == 1
    assert len(report.broken) == 20
    assert site.visible() == parts(LIBRARY)


async def test_a_cache_that_holds_a_part_only(tmp_path: Path) -> None:
    async with open_site(tmp_path, cache=served_cache(references=ReferencePolicy.ANY)) as site:
        await lay(site, PROGRAM)
        report = await run(site)
        assert (report.taken, report.broken) == (1, {})


async def test_what_is_published_otherwise_is_named_and_stays(site: Site) -> None:
    await site.send(*CHAIN)
    await site.add(*CHAIN)
    before = site.index.get("main", LIBRARY.path.hash_part)
    other = Sample("library", b"another library")
    await site.storage.put(f"main/nar/{other.nar_name}", other.file)
    await site.storage.put(f"main/{LIBRARY.path.hash_part}.narinfo", other.narinfo(), replace=True)
    report = await run(site)
    assert set(report.broken) == {f"main/{LIBRARY.path.hash_part}.narinfo"}
    assert report.taken == 2
    assert site.index.get("main", LIBRARY.path.hash_part) == before
    assert await site.published() == parts(*CHAIN)


async def test_a_lost_index_is_filled_again(site: Site) -> None:
    await site.send(*CHAIN)
    await site.add(*CHAIN)
    empty = MemoryIndex()
    filled = replace(site, index=empty)
    await run(filled)
    assert dict(empty.scan("main")) == dict(site.index.scan("main"))


async def test_what_was_believed_absent_is_there(site: Site) -> None:
    site.index.put_absent([("main", LIBRARY.path.hash_part)], 2**40)
    await lay(site, LIBRARY)
    await run(site)
    assert isinstance(site.index.get("main", LIBRARY.path.hash_part), Present)


async def test_a_push_goes_on_from_there(site: Site) -> None:
    """What was taken in counts as a reference, and gains our signature when it is pushed as well."""
    await lay(site, *CHAIN)
    await run(site)
    needs = Sample("needs", b"needs", (PROGRAM.path,))
    await site.send(needs)
    assert await site.add(needs) == [None]
    await site.send(LIBRARY)
    assert await site.add(LIBRARY) == [None]
    answer = site.index.get("main", LIBRARY.path.hash_part)
    assert isinstance(answer, Present)
    assert b"\nSig: main-1:" in answer.body
