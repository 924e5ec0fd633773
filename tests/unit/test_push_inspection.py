"""What is kept of a NAR that goes by: the listing, and the files that build systems read."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest

from cachesrv.errors import Mismatch
from cachesrv.nix import listing
from cachesrv.nix.nar_writer import NarDump, dump
from cachesrv.push import inspection
from cachesrv.push.inspection import MAX_CONTENT, Inspection, Seen
from cachesrv.push.nar_source import LocalNar, StreamedNar
from cachesrv.push.pipeline import Pipeline
from tests.push_doubles import TemporaryStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from cachesrv.push.compressed_nar import CompressedNar

PRODUCTS = b"file iso $out/iso\n"


def seen_in(tree: Path, chunk_size: int = 1000) -> Seen | None:
    found: list[Seen] = []
    looking = Inspection(found.append)
    for chunk in dump(tree, chunk_size=chunk_size):
        looking.feed(memoryview(chunk))
    looking.accept()
    return found[0] if found else None


def make(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        file = folder / "path" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return folder / "path"


@pytest.mark.parametrize("chunk_size", [7, 1 << 20])
def test_build_facing_files_and_the_listing(tmp_path: Path, chunk_size: int) -> None:
    files = {"bin/x": b"x" * 5000, "nix-support/hydra-build-products": PRODUCTS, "nix-support/empty": b""}
    tree = make(tmp_path, files)
    (tree / "nix-support" / "failed").touch(mode=0o755)
    (tree / "nix-support" / "link").symlink_to("../bin/x")
    (tree / "nix-support" / "folder").mkdir()
    (tree / "nix-support" / "folder" / "below").write_bytes(b"is none of them")

    seen = seen_in(tree, chunk_size)

    assert seen is not None
    found = {file.name.removeprefix("nix-support/"): file for file in seen.files}
    assert found.keys() == {"hydra-build-products", "empty", "failed", "link", "folder"}
    products = found["hydra-build-products"]
    assert (products.kind, products.size, products.executable) == ("regular", len(PRODUCTS), False)
    assert (products.content, products.sha256) == (PRODUCTS, sha256(PRODUCTS).hexdigest())
    assert (found["empty"].content, found["empty"].sha256) == (b"", sha256().hexdigest())
    assert found["failed"].executable
    assert (found["link"].kind, found["link"].target) == ("symlink", "../bin/x")
    assert (found["folder"].kind, found["folder"].content) == ("directory", None)
    assert seen.listing is not None
    assert isinstance(listing.find(seen.listing, "bin/x"), listing.Regular)


def test_large_contents_are_hashed_and_not_kept(tmp_path: Path) -> None:
    large = bytes(MAX_CONTENT)
    seen = seen_in(make(tmp_path, {"nix-support/a": b"a", "nix-support/b": large, "nix-support/c": b"c"}))

    assert seen is not None
    assert [file.content for file in seen.files] == [b"a", None, b"c"]
    assert (seen.files[1].size, seen.files[1].sha256) == (MAX_CONTENT, sha256(large).hexdigest())


def test_a_nar_of_many_files_keeps_what_build_systems_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "LISTING_ENTRIES", 5)
    files = {f"many/{number}": b"" for number in range(9)}
    seen = seen_in(make(tmp_path, {**files, "nix-support/hydra-build-products": PRODUCTS}))

    assert seen is not None
    assert seen.listing is None
    assert [file.content for file in seen.files] == [PRODUCTS]


def test_names_that_are_no_text(tmp_path: Path) -> None:
    tree = make(tmp_path, {"nix-support/good": b"good"})
    (tree / "nix-support").joinpath(b"\xff".decode(errors="surrogateescape")).write_bytes(b"")

    seen = seen_in(tree)

    assert seen is not None
    assert seen.listing is None
    assert [file.name for file in seen.files] == ["nix-support/good"]


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"file")
    seen = seen_in(tmp_path / "file")

    assert seen is not None
    assert seen.files == ()


@pytest.mark.parametrize("nar", [b"no NAR at all", b""])
def test_what_is_no_nar_is_no_news(nar: bytes) -> None:
    found: list[Seen] = []
    looking = Inspection(found.append)
    looking.feed(memoryview(nar))
    looking.feed(memoryview(nar))
    looking.accept()
    assert found == []


class Watching:
    def __init__(self) -> None:
        self.told: list[str] = []
        self.data = b""

    def feed(self, data: memoryview) -> None:
        self.data += data

    def accept(self) -> None:
        self.told.append("accept")

    def drop(self) -> None:
        self.told.append("drop")


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_nar_is_accepted_when_it_turned_out_well(tmp_path: Path, *, streamed: bool) -> None:
    tap, other = Watching(), Watching()
    store = TemporaryStore(tmp_path)
    info = store.add("path", b"contents" * 1000)

    async def chunks() -> AsyncIterator[bytes]:
        for chunk in dump(store.file("path")):
            yield chunk
            await asyncio.sleep(0)

    with Pipeline() as pipeline:
        source = (
            StreamedNar(chunks(), [tap, other]) if streamed else LocalNar(NarDump(store.file("path")), [tap, other])
        )
        async with pipeline.nar(source, info) as nar:
            async for _ in nar:
                pass

    assert tap.told == other.told == ["accept"]
    assert tap.data == b"".join(dump(store.file("path")))


async def _without_failure(nar: CompressedNar) -> AsyncIterator[bytes]:
    with suppress(Mismatch):
        async for chunk in nar:
            yield chunk


async def test_a_nar_that_is_damaged_or_cut_short_is_dropped(tmp_path: Path) -> None:
    store = TemporaryStore(tmp_path)
    info = store.add("path", b"contents")
    store.file("path").write_bytes(b"CONTENTS")
    damaged, left = Watching(), Watching()

    with Pipeline() as pipeline:
        async with pipeline.nar(LocalNar(NarDump(store.file("path")), [damaged]), info) as nar:
            async for _ in _without_failure(nar):
                pass
            assert isinstance(nar.failure, Mismatch)
        large = store.add("large", bytes(20_000_000))
        async with pipeline.nar(LocalNar(NarDump(store.file("large")), [left]), large):
            pass

    assert damaged.told == left.told == ["drop"]
