"""Storage that others write to: what lies there is published, and nothing else is."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from cachesrv.errors import PeerError, PeerUnavailable, StoreError, StoreUnavailable
from cachesrv.nix import narinfo
from cachesrv.services.breaker import FAILURES, SLOW_SECONDS, Breaker
from cachesrv.services.bucket import BucketSource
from cachesrv.storage.memory import MemoryStore
from tests.samples import Sample
from tests.service_site import served_cache

CACHE = served_cache(bucket_is_authority=True)
SAMPLE = Sample("sample")
HASH_PART = SAMPLE.path.hash_part
ABSENT = "0" * 32


class Counting(MemoryStore):
    """Counts what it is asked, and fails with `error`."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.error: Exception | None = None
        self.hangs = False
        self.now = 0.0

    async def _ask(self, what: str) -> None:
        self.asked.append(what)
        if self.hangs:
            self.now += SLOW_SECONDS
            await asyncio.Event().wait()
        if self.error:
            raise self.error

    async def get(self, key: str, *, limit: int) -> bytes | None:
        await self._ask("get")
        return await super().get(key, limit=limit)

    async def head(self, key: str) -> Any:
        await self._ask("head")
        return await super().head(key)


@pytest.fixture
async def store() -> Counting:
    store = Counting()
    await store.put_many({f"main/{HASH_PART}.narinfo": SAMPLE.narinfo(), f"main/nar/{SAMPLE.nar_name}": SAMPLE.file})
    return store


@pytest.fixture
def source(store: Counting) -> BucketSource:
    return BucketSource(store, Breaker(lambda: store.now))


async def test_what_lies_there_is_found(source: BucketSource, store: Counting) -> None:
    assert await source.narinfo(CACHE, HASH_PART) == SAMPLE.narinfo()
    assert store.asked == ["get", "head"]


async def test_what_does_not_costs_one_question(source: BucketSource, store: Counting) -> None:
    assert await source.narinfo(CACHE, ABSENT) is None
    assert store.asked == ["get"]


async def test_other_caches_are_not_asked_about(source: BucketSource, store: Counting) -> None:
    assert await source.narinfo(served_cache(), HASH_PART) is None
    assert store.asked == []


async def test_it_is_said_as_we_say_it(source: BucketSource, store: Counting) -> None:
    """Whoever wrote it, however odd: an answer is made of it, and its lines are ours."""
    odd = SAMPLE.narinfo().replace(b"References: ", b"X-Odd: \xff\nReferences: ")
    await store.put(f"main/{HASH_PART}.narinfo", odd, replace=True)
    assert await source.narinfo(CACHE, HASH_PART) == SAMPLE.narinfo()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "cannot be served"),
        (b"nonsense\n", "cannot be served"),
        (Sample("other").narinfo(), "it is that of /nix/store/.*-other"),
        (narinfo.render(replace(SAMPLE.info, store_dir="/gnu/store")), "it is that of /gnu/store"),
        (narinfo.render(replace(SAMPLE.info, url="nar/gone.nar")), "its NAR nar/gone.nar does not"),
        (narinfo.render(replace(SAMPLE.info, url="https://elsewhere.test/nar/x")), "below nar/"),
        (narinfo.render(replace(SAMPLE.info, url="nar/x?y")), "below nar/"),
        (narinfo.render(replace(SAMPLE.info, url="../other/nar/x")), "below nar/"),
        (narinfo.render(replace(SAMPLE.info, url="/etc/passwd")), "below nar/"),
        (bytes(2**20 + 1), "cannot be served"),
    ],
)
async def test_what_cannot_be_served_is_neither_there_nor_absent(
    source: BucketSource, store: Counting, text: bytes, said: str
) -> None:
    await store.put(f"main/{HASH_PART}.narinfo", text, replace=True)
    for _ in range(2 * FAILURES):
        with pytest.raises(PeerError, match=said) as failure:
            await source.narinfo(CACHE, HASH_PART)
        assert not isinstance(failure.value, PeerUnavailable)


async def test_a_bucket_that_does_not_answer_is_left_alone_for_a_while(source: BucketSource, store: Counting) -> None:
    store.error = StoreUnavailable("no route to the bucket")
    for _ in range(FAILURES):
        with pytest.raises(StoreUnavailable, match="no route"):
            await source.narinfo(CACHE, ABSENT)
    store.error = None
    with pytest.raises(StoreUnavailable, match="did not answer a moment ago"):
        await source.narinfo(CACHE, ABSENT)
    assert len(store.asked) == FAILURES


async def test_one_that_refuses_is_asked_again(source: BucketSource, store: Counting) -> None:
    """Another object it may give."""
    store.error = StoreError("denied")
    for _ in range(2 * FAILURES):
        with pytest.raises(StoreError, match="denied"):
            await source.narinfo(CACHE, ABSENT)
    store.error = None
    assert await source.narinfo(CACHE, HASH_PART)


async def test_one_that_hangs_is_soon_not_waited_for(source: BucketSource, store: Counting) -> None:
    store.hangs = True
    for _ in range(FAILURES):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(source.narinfo(CACHE, ABSENT), 0.01)
    with pytest.raises(StoreUnavailable, match="a moment ago"):
        await source.narinfo(CACHE, ABSENT)
