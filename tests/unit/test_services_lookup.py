"""Lookups: what is asked, how often, and what the index learns of it."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import pytest

from cachesrv.errors import StoreError
from cachesrv.index.base import Absent, IndexEntry, Present
from cachesrv.index.lmdb import LmdbIndex
from cachesrv.index.memory import MemoryIndex
from cachesrv.services.answer import present
from cachesrv.services.lookup import CatalogSource, Lookup
from tests.samples import Sample
from tests.service_site import open_site, served_cache

if TYPE_CHECKING:
    from pathlib import Path

    from cachesrv.services.caches import ServedCache

CACHE = served_cache()
SAMPLE = Sample("sample", b"content")
HASH_PART, TEXT = SAMPLE.path.hash_part, SAMPLE.narinfo()
TTL = 1000


class Known:
    """A source that knows some narinfos, counts questions, and can be held up."""

    def __init__(self, known: dict[str, bytes] | None = None, error: Exception | None = None) -> None:
        self.known = known or {}
        self.error = error
        self.asked: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def narinfo(self, cache: ServedCache, hash_part: str) -> bytes | None:
        self.asked.append(hash_part)
        await self.gate.wait()
        if self.error:
            raise self.error
        return self.known.get(hash_part)

    def lacks(self, cache: ServedCache, hash_part: str) -> bool:
        return not self.error and hash_part not in self.known


def lookup(index: MemoryIndex, *sources: Known) -> Lookup:
    return Lookup(index, sources, negative_ttl=TTL, timeout=10)


async def test_what_a_source_has_is_learnt() -> None:
    index, source = MemoryIndex(), Known({HASH_PART: TEXT})
    asking = lookup(index, source)
    assert await asking.find(CACHE, HASH_PART) == present(TEXT)
    await asking.close()
    assert index.get("main", HASH_PART) == present(TEXT)
    assert await asking.find(CACHE, HASH_PART) == present(TEXT)
    assert source.asked == [HASH_PART]


async def test_an_absence_is_learnt_for_a_while() -> None:
    index, source = MemoryIndex(), Known()
    asking = lookup(index, source)
    before = int(time.time())
    assert await asking.find(CACHE, HASH_PART) is None
    await asking.close()
    absent = index.get("main", HASH_PART)
    assert isinstance(absent, Absent)
    assert before + TTL <= absent.until <= time.time() + TTL
    assert await asking.find(CACHE, HASH_PART) is None
    assert source.asked == [HASH_PART]
    index.put_absent([("main", HASH_PART)], 1)
    assert await asking.find(CACHE, HASH_PART) is None
    assert source.asked == [HASH_PART] * 2


async def test_an_absence_does_not_wait_for_the_time_from_which_a_clock_was_set_back() -> None:
    index, source = MemoryIndex(), Known({HASH_PART: TEXT})
    asking = lookup(index, source)
    now = int(time.time())
    index.put_absent([("main", HASH_PART)], now + TTL + 86_400)
    assert asking.believes(now + TTL, now)
    assert not asking.believes(now + TTL + 86_400, now)
    assert await asking.find(CACHE, HASH_PART) == present(TEXT)
    await asking.close()
    assert index.get("main", HASH_PART) == present(TEXT)


async def test_sources_are_asked_in_order_until_one_has_it() -> None:
    first, second, third = Known(), Known({HASH_PART: TEXT}), Known({HASH_PART: b"other"})
    asking = lookup(MemoryIndex(), first, second, third)
    assert await asking.find(CACHE, HASH_PART) == present(TEXT)
    assert (len(first.asked), len(second.asked), len(third.asked)) == (1, 1, 0)
    await asking.close()


async def test_an_error_is_not_an_absence() -> None:
    """It is raised, nothing is learnt, and the next question is asked anew."""
    index, source = MemoryIndex(), Known(error=StoreError("broken"))
    asking = lookup(index, source)
    for _ in range(2):
        with pytest.raises(StoreError, match="broken"):
            await asking.find(CACHE, HASH_PART)
        await asking.close()
        assert index.get("main", HASH_PART) is None
    source.error, source.known = None, {HASH_PART: TEXT}
    assert await asking.find(CACHE, HASH_PART) == present(TEXT)
    await asking.close()


async def test_an_index_that_cannot_be_read_costs_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, source = tmp_path / "index", Known({HASH_PART: TEXT})
    index = LmdbIndex(str(path), size_limit=2**26)
    index.put([IndexEntry("main", HASH_PART, present(b"damaged"))])
    with (path / "data.mdb").open("r+b") as file:
        file.seek(8192)
        file.write(bytes((path / "data.mdb").stat().st_size - 8192))
    asking = Lookup(index, [source], negative_ttl=TTL, timeout=10)
    for _ in range(2):
        assert await asking.find(CACHE, HASH_PART) == present(TEXT)
        assert await asking.find(CACHE, "0" * 32) is None
        await asking.close()
    index.close()
    assert len(source.asked) == 4
    assert "the index cannot be read" in capsys.readouterr().out
    index = LmdbIndex(str(path), size_limit=2**26)
    assert index.fresh
    index.close()


async def test_a_source_that_does_not_answer() -> None:
    index, source = MemoryIndex(), Known({HASH_PART: TEXT})
    source.gate.clear()
    asking = Lookup(index, [source], negative_ttl=TTL, timeout=0.01)
    with pytest.raises(StoreError, match="nobody could say"):
        await asking.find(CACHE, HASH_PART)
    await asking.close()
    assert index.get("main", HASH_PART) is None


async def test_equal_questions_are_asked_once() -> None:
    """Also when one of those who ask goes away meanwhile; other questions are not held up by it."""
    index, source = MemoryIndex(), Known({HASH_PART: TEXT})
    source.gate.clear()
    asking = lookup(index, source)
    tasks = [asyncio.create_task(asking.find(CACHE, HASH_PART)) for _ in range(5)]
    other = asyncio.create_task(asking.find(CACHE, "0" * 32))
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.wait([tasks[0]])
    source.gate.set()
    assert await asyncio.gather(*tasks[1:]) == [present(TEXT)] * 4
    assert await other is None
    assert sorted(source.asked) == sorted([HASH_PART, "0" * 32])
    await asking.close()


async def test_caches_are_apart() -> None:
    index, source = MemoryIndex(), Known({HASH_PART: TEXT})
    asking = lookup(index, source)
    await asking.find(CACHE, HASH_PART)
    await asking.find(served_cache(name="other", prefix="other"), HASH_PART)
    await asking.close()
    assert source.asked == [HASH_PART] * 2
    assert isinstance(index.get("other", HASH_PART), Present)


async def test_a_publish_meanwhile_wins() -> None:
    """The source said `absent` before the publish, and its answer comes after: the path stays visible."""
    index, source = MemoryIndex(), Known()
    source.gate.clear()
    asking = lookup(index, source)
    task = asyncio.create_task(asking.find(CACHE, HASH_PART))
    await asyncio.sleep(0)
    newer = present(TEXT + b"Sig: key:AAAA\n")
    index.put([IndexEntry("main", HASH_PART, newer)])
    source.gate.set()
    await task
    await asking.close()
    assert index.get("main", HASH_PART) == newer
    # and an older answer does not take the place of a newer one
    index.delete([("main", HASH_PART)])
    source.gate.clear()
    source.known = {HASH_PART: TEXT}
    task = asyncio.create_task(asking.find(CACHE, HASH_PART))
    await asyncio.sleep(0)
    index.put([IndexEntry("main", HASH_PART, newer)])
    source.gate.set()
    await task
    await asking.close()
    assert index.get("main", HASH_PART) == newer


async def test_the_catalog_as_a_source(tmp_path: Path) -> None:
    """What another process published is found, though this one's index does not know it."""
    async with open_site(tmp_path) as site:
        await site.send(SAMPLE)
        await site.add(SAMPLE)
        index = MemoryIndex()
        asking = Lookup(index, [CatalogSource(site.catalog)], negative_ttl=TTL, timeout=10)
        assert await asking.find(CACHE, HASH_PART) == site.index.get("main", HASH_PART)
        assert await asking.find(CACHE, "0" * 32) is None
        await asking.close()
        assert index.get("main", HASH_PART) == site.index.get("main", HASH_PART)
        assert isinstance(index.get("main", "0" * 32), Absent)
