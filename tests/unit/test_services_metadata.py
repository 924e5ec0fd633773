"""Listings, logs, realisations and debug info: kept when they are what their names say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from cachesrv.errors import BadInput, TooLarge
from cachesrv.services import metadata
from cachesrv.services.metadata import BUILD_TRACE, DEBUGINFO, LISTING, REALISATION, Metadata, kind_of
from tests.samples import Sample
from tests.service_site import Site, chunks, open_site

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

THERE, ALSO = Sample("there", b"there"), Sample("also", b"also")
OUTPUT = f"sha256:{'0' * 64}!out"
REALISED = f"realisations/{OUTPUT}.doi"
TRACED = f"build-trace-v2/{'0' * 32}-there.drv/out.doi"
LOG = f"log/{'0' * 32}-there.drv"
DEBUG = f"debuginfo/{'0' * 40}.debug"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as site:
        await site.send(THERE, ALSO)
        assert await site.add(THERE, ALSO) == [None, None]
        yield site


@pytest.fixture
def keeper(site: Site) -> Metadata:
    return Metadata(site.storage, site.catalog, patience=5)


def realisation(sample: Sample, *signatures: str) -> bytes:
    value = {"id": OUTPUT, "outPath": str(sample.path), "signatures": signatures, "dependentRealisations": {}}
    return json.dumps(value).encode()


def trace(sample: Sample) -> bytes:
    return json.dumps({"outPath": str(sample.path), "signatures": []}).encode()


async def stored(site: Site, name: str) -> bytes | None:
    return await site.storage.get(f"main/{name}", limit=10_000_000)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (f"{'0' * 32}.ls", LISTING),
        (LOG, metadata.LOG),
        (REALISED, REALISATION),
        (TRACED, BUILD_TRACE),
        (DEBUG, DEBUGINFO),
        (f"debuginfo/{'0' * 40}", DEBUGINFO),
        ("log/", None),
        ("log/a/b", None),
        ("x/y.ls", None),
        (f"debuginfo/{'0' * 39}.debug", None),
        (f"debuginfo/{'0' * 40}.debug.debug", None),
        ("build-trace-v2/x.doi", None),
        ("nar/x", None),
        ("", None),
    ],
)
def test_kinds(name: str, kind: metadata.MetadataKind | None) -> None:
    assert kind_of(name) is kind


@pytest.mark.parametrize(
    ("kind", "name", "data"),
    [
        (REALISATION, REALISED, b"{}"),
        (REALISATION, REALISED, b"garbage"),
        (REALISATION, "realisations/garbage.doi", realisation(THERE)),
        (REALISATION, f"realisations/sha256:{'1' * 64}!out.doi", realisation(THERE)),
        (BUILD_TRACE, TRACED, b"[]"),
        (BUILD_TRACE, "build-trace-v2/garbage/out.doi", trace(THERE)),
        (LISTING, f"{'0' * 32}.ls", b"{}"),
        (LISTING, f"{'0' * 32}.ls", b'{"version":2,"root":{}}'),
        (LISTING, "garbage.ls", b'{"version":1,"root":{"type":"directory","entries":{}}}'),
        (DEBUGINFO, DEBUG, b"{}"),
        (DEBUGINFO, DEBUG, b'{"archive":1,"member":"x"}'),
    ],
)
async def test_what_is_malformed(
    site: Site, keeper: Metadata, kind: metadata.MetadataKind, name: str, data: bytes
) -> None:
    before = await site.names()
    with pytest.raises(BadInput):
        await keeper.put(site.cache, kind, name, data)
    assert await site.names() == before


async def test_a_listing_of_somebody_else_is_not_believed(site: Site, keeper: Metadata) -> None:
    """It may come before its NAR, so that it cannot be checked: our own, made from the NAR, is what is served."""
    name = f"{THERE.path.hash_part}.ls"
    ours = await stored(site, name)
    await keeper.put(site.cache, LISTING, name, b'{"version":1,"root":{"type":"directory","entries":{}}}')
    assert await stored(site, name) == ours
    await keeper.put(site.cache, LISTING, f"{'0' * 32}.ls", b'{"version":1,"root":{"type":"directory","entries":{}}}')
    assert await stored(site, f"{'0' * 32}.ls") is None


async def test_debug_info_is_not_overwritten(site: Site, keeper: Metadata) -> None:
    entries = [json.dumps({"archive": f"../nar/{name}", "member": "lib/x"}).encode() for name in ("a", "b")]
    for entry in entries:
        await keeper.put(site.cache, DEBUGINFO, DEBUG, entry)
    assert await stored(site, DEBUG) == entries[0]


async def test_logs(site: Site, keeper: Metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last one counts; one that is too long leaves the earlier one as it was."""
    for log in (b"first", b"second" * 100_000, b""):
        await keeper.put_log(site.cache, LOG, chunks(log))
        assert await stored(site, LOG) == log
    await keeper.put_log(site.cache, LOG, chunks(b"third"))
    monkeypatch.setattr(metadata, "LOG_LIMIT", 1000)
    with pytest.raises(TooLarge, match="at most 1000"):
        await keeper.put_log(site.cache, LOG, chunks(b"x" * 1001))
    assert await stored(site, LOG) == b"third"
    for name in ("log/garbage", "log/..", f"log/{'e' * 32}-x.drv"):
        with pytest.raises(BadInput):
            await keeper.put_log(site.cache, name, chunks(b"log"))
