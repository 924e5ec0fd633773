"""What the catalog has is answered for, whatever the index believed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from cachesrv.index.base import IndexEntry, Present
from cachesrv.index.lmdb import LmdbIndex
from cachesrv.index.memory import MemoryIndex
from cachesrv.services.answer import present
from cachesrv.services.visible import nar_hashes
from tests.samples import Sample
from tests.service_site import open_site

if TYPE_CHECKING:
    from pathlib import Path

    from cachesrv.catalog.base import PathRecord
    from cachesrv.index.base import Index

THERE, HIDDEN, UNKNOWN, ABSENT = (Sample(name, name.encode()) for name in ("there", "hidden", "unknown", "absent"))
PARTS = [sample.path.hash_part for sample in (THERE, HIDDEN, UNKNOWN, ABSENT)]
FOR_LONG = 2**40


@pytest.mark.parametrize("kind", ["memory", "lmdb"])
async def test_an_absence_from_before_does_not_hide_it(tmp_path: Path, kind: str) -> None:
    index: Index = MemoryIndex() if kind == "memory" else LmdbIndex(str(tmp_path / "index"))
    async with open_site(tmp_path, index=index) as site:
        await site.send(THERE, HIDDEN, UNKNOWN)
        await site.add(THERE, HIDDEN, UNKNOWN)
        index.delete([("main", PARTS[1]), ("main", PARTS[2])])
        index.put_absent([("main", PARTS[1]), ("main", PARTS[3])], FOR_LONG)
        before = index.get("main", PARTS[0])
        found = await nar_hashes(site.catalog, index, site.cache, PARTS)
        records = await site.catalog.paths("main", PARTS)
        assert found == {hash_part: records[hash_part].nar_hash for hash_part in PARTS[:3]}
        for hash_part in PARTS[:3]:
            assert index.get("main", hash_part) == present(records[hash_part].narinfo)
        assert index.get("main", PARTS[0]) == before
        assert not isinstance(index.get("main", PARTS[3]), Present)
    index.close()


class Deleting(MemoryIndex):
    """From which a path is deleted each time that somebody is about to write."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def put(self, entries: object, *, replace: bool = True, epoch: int | None = None) -> bool:
        if epoch is not None and self.times:
            self.times -= 1
            self.delete([("main", "0" * 32)])
        return super().put(entries, replace=replace, epoch=epoch)  # type: ignore[arg-type]  # passed on as it came


@pytest.mark.parametrize("times", [1, 3, 1000])
async def test_deletions_meanwhile(tmp_path: Path, times: int) -> None:
    """What is deleted does not come back; the catalog is asked anew, but not for ever."""
    index = Deleting(0)
    async with open_site(tmp_path, index=index) as site:
        await site.send(HIDDEN)
        await site.add(HIDDEN)
        index.delete([("main", PARTS[1])])
        index.times = times
        assert set(await nar_hashes(site.catalog, index, site.cache, PARTS)) == {PARTS[1]}
        assert isinstance(index.get("main", PARTS[1]), Present) == (times < 1000)


async def test_a_newer_answer_stays(tmp_path: Path) -> None:
    async with open_site(tmp_path) as site:
        await site.send(THERE)
        await site.add(THERE)
        newer = present(THERE.narinfo())
        site.index.put([IndexEntry("main", PARTS[0], newer)])
        await nar_hashes(site.catalog, site.index, site.cache, PARTS)
        assert site.index.get("main", PARTS[0]) == newer


async def test_what_is_deleted_before_it_is_shown_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_site(tmp_path) as site:
        await site.send(HIDDEN)
        await site.add(HIDDEN)
        site.index.delete([("main", PARTS[1])])
        paths = site.catalog.paths

        async def deleted(*asked: Any) -> dict[str, PathRecord]:
            await site.catalog.remove("main", [PARTS[1]])
            return await paths(*asked)

        monkeypatch.setattr(site.catalog, "paths", deleted)
        assert await nar_hashes(site.catalog, site.index, site.cache, PARTS) == {}
        assert not isinstance(site.index.get("main", PARTS[1]), Present)
