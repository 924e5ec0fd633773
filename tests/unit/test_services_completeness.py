"""Catalogs that were lost, and storage that others write to: what the catalog does not know is there all the same."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from cachesrv.errors import StoreError, StoreUnavailable
from cachesrv.index.base import Present
from cachesrv.services.breaker import Breaker
from cachesrv.services.bucket import BucketSource
from cachesrv.services.caches import ReferencePolicy
from cachesrv.services.collect import Collect, Terms
from cachesrv.services.completeness import Completeness
from cachesrv.services.maintenance import maintenance
from cachesrv.services.publish import Publish
from cachesrv.services.removal_report import Silent
from cachesrv.services.taking import Taking
from tests.samples import Sample, path_of
from tests.service_site import Site, by_api, open_site, served_cache

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

LIBRARY = Sample("library", b"library")
TOOL = Sample("tool", b"tool", (LIBRARY.path, path_of("tool")))
PROGRAM = Sample("program", b"program", (LIBRARY.path, TOOL.path))
BUCKET = served_cache(bucket_is_authority=True)


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as site:
        yield site


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def completeness(site: Site, clock: Clock) -> Completeness:
    return Completeness(site.storage, site.catalog, clock=clock)


@pytest.fixture
def taking(site: Site, completeness: Completeness) -> Taking:
    return Taking(site.storage, site.catalog, site.index, completeness)


async def lay(site: Site, *samples: Sample) -> None:
    for sample in samples:
        await site.storage.put(f"main/nar/{sample.nar_name}", sample.file)
        await site.storage.put(key_of(sample), sample.narinfo())


def key_of(sample: Sample) -> str:
    return f"main/{sample.path.hash_part}.narinfo"


def parts(*samples: Sample) -> set[str]:
    return {sample.path.hash_part for sample in samples}


class TestCompleteness:
    async def test_a_new_cache_is_complete(self, site: Site, completeness: Completeness) -> None:
        await site.storage.put("main/nix-cache-info", b"")
        await site.storage.put("main/log/x.narinfo", b"")
        await completeness.find_out([site.cache])
        assert await completeness.holds(site.cache)
        await lay(site, LIBRARY)
        await completeness.find_out([site.cache])
        assert await completeness.holds(site.cache)

    async def test_a_catalog_that_knows_nothing_of_what_lies_there_is_not(
        self, site: Site, completeness: Completeness, clock: Clock
    ) -> None:
        await lay(site, LIBRARY)
        await completeness.find_out([site.cache])
        assert not await completeness.holds(site.cache)
        await site.send(TOOL)
        await site.catalog.restore([], used_at=1)
        await completeness.find_out([site.cache])
        clock.now += 1000
        assert not await completeness.holds(site.cache)

    async def test_an_older_catalog_is_complete(self, site: Site, completeness: Completeness) -> None:
        await site.send(LIBRARY)
        assert await site.add(LIBRARY) == [None]
        await completeness.find_out([site.cache])
        assert await completeness.holds(site.cache)

    async def test_it_becomes_so_a_while_after_a_reindex(
        self, site: Site, completeness: Completeness, clock: Clock
    ) -> None:
        """A lookup that asked the catalog before is over by then."""
        await lay(site, LIBRARY)
        await completeness.find_out([site.cache])
        await completeness.reached(site.cache)
        clock.now += 59
        assert not await completeness.holds(site.cache)
        clock.now += 2
        assert await completeness.holds(site.cache)

    async def test_where_storage_cannot_tell_it_is_asked(
        self, site: Site, completeness: Completeness, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreachable(_: str) -> Any:
            raise StoreUnavailable("as told")

        with monkeypatch.context() as failing:
            failing.setattr(site.storage, "list", unreachable)
            await completeness.find_out([site.cache])
        assert not await completeness.holds(site.cache)
        await completeness.find_out([site.cache])


async def test_caches_are_looked_at_together(
    site: Site, completeness: Completeness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start does not wait for a storage that cannot be reached once for each of them."""
    await site.send(LIBRARY)
    assert await site.add(LIBRARY) == [None]
    both, there = asyncio.Barrier(2), []

    async def head(key: str) -> Any:
        await both.wait()
        there.append(key)
        raise StoreUnavailable("as told")

    monkeypatch.setattr(site.storage, "head", head)
    await completeness.tell([site.cache, site.cache])
    assert there == [key_of(LIBRARY)] * 2


async def test_a_clock_that_is_set_back_does_not_put_it_off(
    site: Site, completeness: Completeness, clock: Clock
) -> None:
    await site.catalog.note("complete main", "no")
    assert not await completeness.holds(site.cache)
    await completeness.reached(site.cache)
    clock.now -= 365 * 86_400
    assert await completeness.holds(site.cache)


async def test_lookups_ask_storage_until_then(site: Site, completeness: Completeness, clock: Clock) -> None:
    await lay(site, LIBRARY)
    source = BucketSource(site.storage, Breaker(), completeness)
    await completeness.find_out([site.cache])
    assert await source.narinfo(site.cache, LIBRARY.path.hash_part) == LIBRARY.narinfo()
    assert await source.narinfo(site.cache, TOOL.path.hash_part) is None
    await completeness.reached(site.cache)
    clock.now += 100
    assert await source.narinfo(site.cache, LIBRARY.path.hash_part) is None


async def test_nothing_is_collected_until_then(site: Site, completeness: Completeness) -> None:
    """Of two paths with one NAR, the catalog may know the one that goes, and not the one that stays."""
    await lay(site, LIBRARY)
    await completeness.find_out([site.cache])
    terms = Terms(nar_grace=0, history=0)
    collect = Collect(site.storage, site.catalog, site.index, caches={"main": site.cache}, policies={}, terms=terms)
    async with maintenance(site.catalog) as holder:
        with pytest.raises(StoreUnavailable, match="cachesrv reindex"):
            await collect.run(holder, Silent(), by="somebody")
        await completeness.reached(site.cache)
        await collect.run(holder, Silent(), by="somebody")


class TestTaking:
    async def test_nothing_is_taken_from_storage_of_ours(
        self, site: Site, completeness: Completeness, taking: Taking
    ) -> None:
        await completeness.find_out([site.cache])
        await lay(site, LIBRARY)
        assert await taking.take(site.cache, parts(LIBRARY)) == set()
        assert await site.published() == set()

    async def test_a_path_comes_with_all_that_it_refers_to(self, site: Site, taking: Taking) -> None:
        await lay(site, LIBRARY, TOOL, PROGRAM)
        assert await taking.take(BUCKET, parts(PROGRAM, Sample("absent"))) == parts(PROGRAM)
        assert await site.published() == site.visible() == parts(LIBRARY, TOOL, PROGRAM)
        answer = site.index.get("main", TOOL.path.hash_part)
        assert isinstance(answer, Present)
        assert answer.body == TOOL.narinfo()

    @pytest.mark.parametrize("lost", [key_of(LIBRARY), f"main/nar/{LIBRARY.nar_name}"])
    async def test_but_not_without(self, site: Site, taking: Taking, lost: str) -> None:
        await lay(site, LIBRARY, TOOL, PROGRAM)
        await site.storage.delete([lost])
        assert await taking.take(BUCKET, parts(PROGRAM)) == set()
        assert await site.published() == site.visible() == set()

    async def test_unless_nobody_minds(self, site: Site, taking: Taking) -> None:
        cache = served_cache(bucket_is_authority=True, references=ReferencePolicy.ANY)
        await lay(site, PROGRAM)
        assert await taking.take(cache, parts(PROGRAM)) == parts(PROGRAM)

    @pytest.mark.parametrize("text", [b"garbage", b"x" * 2_000_000, TOOL.narinfo(), LIBRARY.narinfo(url="nar/x")])
    async def test_what_is_no_good_is_left(self, site: Site, taking: Taking, text: bytes) -> None:
        await site.storage.put(key_of(LIBRARY), text)
        assert await taking.take(BUCKET, parts(LIBRARY)) == set()

    async def test_what_is_withdrawn_meanwhile_is_not_visible(
        self, site: Site, taking: Taking, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever withdrew it had the index forget it before it came there."""
        await lay(site, LIBRARY)
        restore = site.catalog.restore

        async def restore_in_vain(*given: Any, **more: Any) -> Any:
            otherwise = await restore(*given, **more)
            await site.catalog.remove("main", parts(LIBRARY))
            site.index.delete([("main", LIBRARY.path.hash_part)])
            return otherwise

        monkeypatch.setattr(site.catalog, "restore", restore_in_vain)
        assert await taking.take(BUCKET, parts(LIBRARY)) == set()
        assert site.index.get("main", LIBRARY.path.hash_part) is None

    async def test_what_is_published_stays_as_it_is(self, site: Site, taking: Taking) -> None:
        await site.send(LIBRARY)
        await site.add(LIBRARY)
        before = await site.catalog.path("main", LIBRARY.path.hash_part)
        await site.storage.put(key_of(LIBRARY), LIBRARY.narinfo(), replace=True)
        assert await taking.take(BUCKET, parts(LIBRARY)) == parts(LIBRARY)
        assert await site.catalog.path("main", LIBRARY.path.hash_part) == before

    async def test_what_is_deleted_meanwhile_is_not_published(
        self, site: Site, taking: Taking, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await lay(site, LIBRARY, TOOL)
        restore = site.catalog.restore

        async def just_then(*args: Any, **kwargs: Any) -> Any:
            await site.storage.delete([key_of(TOOL)])
            await site.catalog.settle([key_of(TOOL)])
            return await restore(*args, **kwargs)

        monkeypatch.setattr(site.catalog, "restore", just_then)
        assert await taking.take(BUCKET, parts(TOOL)) == set()
        assert await site.published() == site.visible() == parts(LIBRARY)

    async def test_what_others_have_deleted(self, site: Site, taking: Taking) -> None:
        """The catalog knows it all the same; what the index answers for is not looked for."""
        for sample in (LIBRARY, TOOL, PROGRAM):
            await site.send(sample)
            await site.add(sample)
        await site.storage.delete([key_of(LIBRARY), key_of(TOOL)])
        site.index.delete([("main", part) for part in parts(TOOL, PROGRAM)])
        asked = parts(LIBRARY, TOOL, PROGRAM, Sample("absent"))
        assert await taking.deleted(BUCKET, asked) == parts(TOOL)
        assert await taking.deleted(site.cache, asked) == set()

    async def test_pushes_can_rely_on_it(self, site: Site, taking: Taking) -> None:
        await lay(site, LIBRARY, TOOL)
        publish = Publish(site.storage, site.catalog, site.index, site.ingest, site.metrics, taking=taking)
        await site.send(PROGRAM)
        assert await publish.many(BUCKET, [by_api(PROGRAM)], "somebody") == [None]
        await publish.close()
        assert await site.published() == site.visible() == parts(LIBRARY, TOOL, PROGRAM)

    async def test_storage_that_fails_says_so(
        self, site: Site, taking: Taking, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def fail(_: str) -> Any:
            raise StoreError("as told")

        monkeypatch.setattr(site.storage, "head", fail)
        with pytest.raises(StoreError, match="as told"):
            await taking.take(BUCKET, parts(LIBRARY))
