"""Proxies that take small bodies only: what is too large is sent in smaller pieces, and what cannot be is named."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachesrv.api import PackLimits, PathToPublish, WantedPath
from cachesrv.errors import TooLarge
from cachesrv.nix.hashes import Hash
from cachesrv.nix.realisation import OutputId, Realisation
from cachesrv.push import events
from cachesrv.push.address import Address
from cachesrv.push.body_limit import SMALLEST, BodyLimit, BodyTooLarge
from cachesrv.push.retry import Backoff
from cachesrv.push.run import Options, push
from cachesrv.push.server import connect
from cachesrv.push.settings import Settings
from cachesrv.push.token import TokenVariable
from tests.push_doubles import FakeCache, TemporaryStore, answer, store_path

KIB, MIB = 2**10, 2**20
QUICK = Options(backoff=Backoff(attempts=2, first=0.01))
TOKEN = TokenVariable.of("CACHESRV_TOKEN", "secret")
PACKS = PackLimits(nars=500, size=8 * MIB, nar_size=MIB, head_size=MIB)

pytestmark = pytest.mark.usefixtures("no_pauses")


async def pushed(
    store: TemporaryStore, cache: FakeCache, names: list[str], told: list[events.Event], options: Options = QUICK
) -> events.Summary:
    settings = Settings(Address.parse(cache.url), TOKEN)
    paths = [store_path(name).full("/nix/store") for name in names]
    return await push(paths, store, settings, options, told.append)


def noted(told: list[events.Event]) -> list[str]:
    return [event.text for event in told if isinstance(event, events.Noted)]


@given(st.integers(0, 2**40), st.lists(st.integers(1, 2**40), max_size=20))
def test_the_limit_comes_down_and_never_below_what_has_been_taken(said: int, refused: list[int]) -> None:
    limit = BodyLimit()
    limit.said(said)
    for size in refused:
        before = limit.within(2**50)
        worth_trying = limit.refused(size)
        after = limit.within(2**50)
        assert worth_trying == (size > SMALLEST)
        assert after <= before
        if worth_trying:
            assert after < size
            assert after == before or after * 2 >= size


def test_a_limit_that_is_found_out_is_the_same_from_wherever_one_starts() -> None:
    found = set()
    for start in (8 * MIB, 8 * MIB - 17, 5 * MIB + 1):
        limit, size = BodyLimit(), start
        while size > MIB + 100:
            limit.refused(size)
            size = limit.within(start)
        found.add(size)
    assert found == {MIB}


def test_breaks_in_a_row_are_a_sign() -> None:
    limit = BodyLimit()
    assert [limit.broke(size, limit.begun()) for size in (3 * MIB, 8 * MIB, MIB)] == [0, 0, 8 * MIB]
    limit.refused(8 * MIB)
    assert limit.within(2**50) == 4 * MIB
    assert limit.broke(4 * MIB, limit.begun()) == 0


def test_breaks_at_once_count_once() -> None:
    limit = BodyLimit()
    begun = limit.begun()
    assert [limit.broke(8 * MIB, begun) for _ in range(10)] == [0] * 10


def test_a_break_is_no_sign_where_as_much_has_got_through() -> None:
    limit = BodyLimit()
    for _ in range(2):
        limit.broke(8 * MIB, limit.begun())
    limit.taken(MIB)
    assert limit.broke(MIB, limit.begun()) == 0
    assert limit.broke(8 * MIB, limit.begun()) == 8 * MIB
    limit.taken(8 * MIB)
    assert [limit.broke(8 * MIB, limit.begun()) for _ in range(10)] == [0] * 10
    assert [limit.broke(8 * MIB + 1, limit.begun()) for _ in range(3)] == [0, 0, 8 * MIB + 1]


async def test_nars_go_in_smaller_parts(store: TemporaryStore) -> None:
    contents = {f"file-{number}": random.Random(number).randbytes(5 * MIB) for number in range(3)}
    for name, content in contents.items():
        store.add(name, content)
    told: list[events.Event] = []
    async with FakeCache(part_size=32 * MIB, takes=MIB) as cache:
        summary = await pushed(store, cache, list(contents), told)
        later = sum(size > MIB for size in cache.sizes)
        again = await pushed(store, cache, list(contents), told)

    assert (summary.uploaded, again.present) == (3, 3)
    assert later < 20
    assert noted(told)[-1].endswith(f": bodies of at most {MIB} bytes are sent")


async def test_an_interrupted_push_is_taken_up_whatever_was_found_out(store: TemporaryStore) -> None:
    """The next one finds out the same and cuts the same parts."""
    store.add("large", random.Random(1).randbytes(6 * MIB))
    told: list[events.Event] = []
    async with FakeCache(part_size=32 * MIB, takes=MIB) as cache:
        cache.fail("complete", answer(500), answer(500))
        first = await pushed(store, cache, ["large"], told)
        second = await pushed(store, cache, ["large"], told)

    assert (first.failed, second.uploaded) == (1, 1)
    assert second.resumed_bytes > 6 * MIB


async def test_packs_are_split(store: TemporaryStore) -> None:
    names = [f"file-{number}" for number in range(60)]
    for number, name in enumerate(names):
        store.add(name, random.Random(number).randbytes(50 * KIB), names[max(0, number - 1) : number])
    async with FakeCache(part_size=32 * MIB, packs=PACKS, takes=256 * KIB) as cache:
        summary = await pushed(store, cache, names, [])

    assert (summary.uploaded, summary.failed) == (60, 0)
    assert cache.count("nar") == 0
    assert cache.count("pack") < 60 * 50 / 256 * 4


async def test_what_is_too_large_for_a_pack_goes_alone_and_in_parts(store: TemporaryStore) -> None:
    names = [f"file-{number}" for number in range(6)]
    for number, name in enumerate(names):
        store.add(name, random.Random(number).randbytes(200 * KIB))
    async with FakeCache(part_size=32 * MIB, packs=PACKS, takes=100 * KIB) as cache:
        summary = await pushed(store, cache, names, [])

    assert (summary.uploaded, summary.failed) == (6, 0)
    assert cache.count("complete") == 6


async def test_questions_and_requests_to_publish_are_split() -> None:
    names = [f"{Hash.of('sha256', b'%d' % number).bare_nix32[:32]}-name" for number in range(5000)]
    hashes = [Hash.of("sha256", name.encode()).nix32 for name in names]
    wanted = [WantedPath(name, nar_hash, 1) for name, nar_hash in zip(names, hashes, strict=True)]
    paths = [
        PathToPublish(name, nar_hash, 1, names[number - 1 : number])
        for number, (name, nar_hash) in enumerate(zip(names, hashes, strict=True))
    ]
    async with FakeCache(takes=100 * KIB) as cache:
        cache.nars = dict.fromkeys(hashes, b"")
        async with connect(Address.parse(cache.url), TOKEN, backoff=QUICK.backoff) as server:
            missing = [name for answered in await server.missing(wanted) for name in answered.missing]
            outcomes = await server.publish(paths)
            realisations = await server.missing_realisations([f"realisations/{name}.doi" for name in names])

    assert missing == names
    assert [outcome.path for outcome in outcomes] == names
    assert not any(outcome.error for outcome in outcomes)
    assert [path for batch in cache.batches for path in batch] == names
    assert len(realisations) == 5000
    assert cache.requests.count("missing") + cache.requests.count("paths") < 40


async def test_a_path_that_cannot_be_published_in_one_request_is_named() -> None:
    references = [f"{Hash.of('sha256', b'%d' % number).bare_nix32[:32]}-reference" for number in range(5000)]
    paths = [
        PathToPublish(f"{'0' * 32}-small", "sha256:small", 1, []),
        PathToPublish(f"{'1' * 32}-large", "sha256:large", 1, references),
        PathToPublish(f"{'2' * 32}-small", "sha256:small", 1, []),
    ]
    async with FakeCache(takes=SMALLEST) as cache:
        cache.nars = {"sha256:small": b"", "sha256:large": b""}
        async with connect(Address.parse(cache.url), TOKEN, backoff=QUICK.backoff) as server:
            outcomes = await server.publish(paths)

    assert [outcome.kind for outcome in outcomes] == [None, "too-large", None]
    assert "with its 5000 references: " in (outcomes[1].error or "")
    assert "too large for" in (outcomes[1].error or "") or "too many for" in (outcomes[1].error or "")


async def test_who_takes_no_parts_names_the_nar(store: TemporaryStore) -> None:
    store.add("large", random.Random(1).randbytes(3 * MIB))
    store.add("small", b"small")
    told: list[events.Event] = []
    async with FakeCache(takes=MIB) as cache:
        summary = await pushed(store, cache, ["large", "small"], told)

    assert (summary.uploaded, summary.failed) == (1, 1)
    (failed,) = (event for event in told if isinstance(event, events.Failed))
    assert failed.kind == "too-large"
    assert "too large for http" in failed.error


@pytest.mark.parametrize("part_size", [0, 32 * MIB])
async def test_who_takes_next_to_nothing_is_no_endless_story(store: TemporaryStore, part_size: int) -> None:
    store.add("large", random.Random(1).randbytes(3 * MIB))
    told: list[events.Event] = []
    async with FakeCache(takes=1000, part_size=part_size) as cache:
        summary = await pushed(store, cache, ["large"], told)

    assert summary.failed == 1
    assert len(cache.requests) < 60
    (failed,) = (event for event in told if isinstance(event, events.Failed))
    assert "too large for http" in failed.error


async def test_questions_that_are_never_taken_end_the_push(store: TemporaryStore) -> None:
    store.add("path", b"contents")
    async with FakeCache(takes=20) as cache:
        with pytest.raises(TooLarge, match="or a proxy before it") as caught:
            await pushed(store, cache, ["path"], [])
    assert not isinstance(caught.value, BodyTooLarge)


async def test_realisations_are_small(store: TemporaryStore) -> None:
    """One that is refused is named; it is the server's affair."""
    info = store.add("path", b"contents")
    output = OutputId(Hash.of("sha256", b"drv").base16, "out")
    store.infos[info.store_path] = replace(info, ca="fixed:r:sha256:" + Hash.of("sha256", b"x").bare_nix32)
    store.realised[output] = Realisation(info.store_path, ())
    told: list[events.Event] = []
    async with FakeCache() as cache:
        cache.fail("realisation", answer(413))
        summary = await pushed(store, cache, ["path"], told)

    assert summary.uploaded == 1
    (failed,) = (event for event in told if isinstance(event, events.Failed))
    assert failed.kind == "too-large"
