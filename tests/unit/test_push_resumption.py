"""What has arrived, by the journal and by the server's word, is not made again; nothing is believed that is not so."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import zstandard

from cachesrv.nix.nar_writer import dump
from cachesrv.push import events
from cachesrv.push.address import Address
from cachesrv.push.frame import Compressors, Frame
from cachesrv.push.journal import Journal
from cachesrv.push.record import Record
from cachesrv.push.retry import Backoff
from cachesrv.push.run import Options, push
from cachesrv.push.settings import Settings
from cachesrv.push.token import TokenVariable
from tests.push_doubles import PLENTY, FakeCache, TemporaryStore, hang, store_path

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from aiohttp import web

    from cachesrv.nix.path_info import PathInfo

MIB = 2**20
PARTS = 14
FRAMES = 7
CONTENT = random.Random(6).randbytes(13 * MIB + 5)

pytestmark = pytest.mark.usefixtures("no_pauses")


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(
        journal=tmp_path / "state" / "transfers.sqlite",
        record=tmp_path / "state" / "pushed.sqlite",
        backoff=Backoff(attempts=3, first=0.01),
        timeouts=PLENTY,
    )


@pytest.fixture
def store(store: TemporaryStore) -> TemporaryStore:
    store.add("large", {"content": CONTENT})
    return store


@pytest.fixture
async def cache() -> AsyncIterator[FakeCache]:
    async with FakeCache(part_size=MIB) as running:
        yield running


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the NAR's frames that are compressed."""
    sizes: list[int] = []
    compress = Compressors.frame

    def counted(compressors: Compressors, data: memoryview, level: int) -> Frame:
        sizes.append(len(data))
        return compress(compressors, data, level)

    monkeypatch.setattr(Compressors, "frame", counted)
    return sizes


async def pushed(
    store: TemporaryStore,
    cache: FakeCache,
    options: Options,
    told: list[events.Event] | None = None,
    names: Sequence[str] = ("large",),
) -> events.Summary:
    settings = Settings(Address.parse(cache.url), TokenVariable.of("CACHESRV_TOKEN", "secret"))
    paths = [store_path(name).full("/nix/store") for name in names]
    return await push(paths, store, settings, options, (told if told is not None else []).append)


async def interrupted(store: TemporaryStore, cache: FakeCache, options: Options, after: int) -> dict[int, bytes]:
    """What the server has when so many parts were acknowledged, and the next ones were not."""
    reached, route = asyncio.Event(), "bucket" if cache.direct else "part"

    async def stop(request: web.Request) -> web.StreamResponse:
        reached.set()
        return await hang(request)

    async def pass_on(request: web.Request) -> web.StreamResponse:
        return await (cache._bucket if cache.direct else cache._part)(request)

    cache.fail(route, *[pass_on] * after, *[stop] * 100)
    pushing = asyncio.create_task(pushed(store, cache, options))
    await asyncio.wait_for(reached.wait(), 30)
    (there,) = cache.uploads.values()
    async with asyncio.timeout(30):
        while len(there) < after:  # noqa: ASYNC110  the double has no event for it
            await asyncio.sleep(0.01)
    pushing.cancel()
    await asyncio.gather(pushing, return_exceptions=True)
    cache.faults.clear()
    cache.requests.clear()
    return there


def info_of(store: TemporaryStore) -> PathInfo:
    return store.infos[store_path("large")]


def arrived(store: TemporaryStore, cache: FakeCache) -> bool:
    """Whether the NAR is at the cache, byte for byte."""
    file = cache.nars.get(info_of(store).nar_hash.nix32, b"")
    if not file:
        return False
    nar = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True).decompress(file)
    return nar == b"".join(dump(store.file("large")))


def journal_of(options: Options) -> Path:
    assert options.journal is not None
    return options.journal


def is_empty(options: Options, cache: FakeCache, store: TemporaryStore) -> bool:
    with closing(Journal.open(journal_of(options))) as journal:
        return not journal.transfers(cache.url, info_of(store).nar_hash.nix32)


async def whole_file(store: TemporaryStore, options: Options) -> bytes:
    """What becomes of the NAR without an interruption."""
    async with FakeCache(part_size=MIB) as other:
        await pushed(store, other, replace(options, journal=None, record=None))
        return other.nars[info_of(store).nar_hash.nix32]


@pytest.mark.parametrize("level", [None, 9, "auto"])
async def test_what_has_arrived_is_not_made_again(
    store: TemporaryStore, cache: FakeCache, options: Options, made: list[int], level: int | None
) -> None:
    """And has the level with which it was begun, whatever the repeat says."""
    expected = await whole_file(store, options)
    there = await interrupted(store, cache, options, after=9)
    sizes = sum(map(len, there.values()))
    made.clear()
    told: list[events.Event] = []
    summary = await pushed(store, cache, replace(options, level=level), told)

    assert arrived(store, cache)
    assert cache.nars[info_of(store).nar_hash.nix32] == expected
    assert cache.count("part") == PARTS - 9
    assert cache.count("begun") == 0
    # the frames that lie in five parts at most, one of which may lie in the last part that has arrived
    assert len([size for size in made if size]) <= FRAMES - 2
    (resumed,) = [event for event in told if isinstance(event, events.Resumed)]
    assert resumed == events.Resumed(store_path("large").base_name, sizes, 9, PARTS)
    assert summary.resumed_bytes == sizes
    assert sum(event.nar_bytes for event in told if isinstance(event, events.Sent)) == info_of(store).nar_size
    assert [event.level for event in told if isinstance(event, events.Stored)] == [3]
    assert is_empty(options, cache, store)
    assert options.record
    with closing(Record.open(options.record)) as record:
        assert record.listing(info_of(store).nar_hash.nix32) is not None


async def test_what_arrived_unheard_has_its_level_as_well(
    store: TemporaryStore, cache: FakeCache, options: Options
) -> None:
    """The uploader was killed before the first part was acknowledged."""

    async def take_and_hang(request: web.Request) -> web.StreamResponse:
        await cache._part(request)
        return await hang(request)

    cache.fail("part", *[take_and_hang] * 100)
    pushing = asyncio.create_task(pushed(store, cache, options))
    async with asyncio.timeout(30):
        while not any(cache.uploads.values()):  # noqa: ASYNC110  the double has no event for it
            await asyncio.sleep(0.01)
    pushing.cancel()
    await asyncio.gather(pushing, return_exceptions=True)
    cache.faults.clear()
    told: list[events.Event] = []
    summary = await pushed(store, cache, replace(options, level=9), told)

    assert arrived(store, cache)
    assert summary.resumed_bytes > 0
    assert [event.level for event in told if isinstance(event, events.Stored)] == [3]


async def test_all_parts_had_arrived(
    store: TemporaryStore, cache: FakeCache, options: Options, made: list[int]
) -> None:
    reached = asyncio.Event()

    async def stop(request: web.Request) -> web.StreamResponse:
        reached.set()
        return await hang(request)

    cache.fail("complete", stop)
    pushing = asyncio.create_task(pushed(store, cache, options))
    await asyncio.wait_for(reached.wait(), 30)
    pushing.cancel()
    await asyncio.gather(pushing, return_exceptions=True)
    cache.requests.clear()
    made.clear()
    summary = await pushed(store, cache, options)

    assert arrived(store, cache)
    assert (cache.count("part"), cache.count("complete"), sum(made)) == (0, 1, 0)
    assert summary.sent_bytes == 0


async def test_what_the_server_has_lost_is_made_again(
    store: TemporaryStore, cache: FakeCache, options: Options, made: list[int]
) -> None:
    there = await interrupted(store, cache, options, after=9)
    del there[min(there)]
    there[max(there)] = b"of somebody else"
    made.clear()
    await pushed(store, cache, options)

    assert arrived(store, cache)
    assert cache.count("part") == PARTS - 7
    assert sum(made) < info_of(store).nar_size


async def test_an_upload_that_is_gone_is_begun_anew(
    store: TemporaryStore, cache: FakeCache, options: Options, made: list[int]
) -> None:
    await interrupted(store, cache, options, after=9)
    cache.uploads.clear()
    made.clear()
    await pushed(store, cache, options)

    assert arrived(store, cache)
    assert cache.count("part") == PARTS
    assert sum(made) == info_of(store).nar_size


async def test_what_turns_out_to_be_there_needs_nothing(
    store: TemporaryStore, cache: FakeCache, options: Options
) -> None:
    await interrupted(store, cache, options, after=9)
    file = await whole_file(store, options)

    async def be_slower(request: web.Request) -> web.StreamResponse:
        cache.nars[info_of(store).nar_hash.nix32] = file
        return await cache._begin(request)

    cache.fail("begin", be_slower)
    summary = await pushed(store, cache, options)
    assert (summary.uploaded, cache.count("part")) == (1, 0)
    assert is_empty(options, cache, store)


async def test_what_was_finished_without_us_is_forgotten(
    store: TemporaryStore, cache: FakeCache, options: Options
) -> None:
    """By a push that has the journal at hand."""
    await interrupted(store, cache, options, after=9)
    cache.nars[info_of(store).nar_hash.nix32] = await whole_file(store, options)
    assert not is_empty(options, cache, store)
    store.add("another", {"content": CONTENT[: 3 * MIB]})
    await pushed(store, cache, options, names=("large", "another"))
    assert is_empty(options, cache, store)


async def test_a_path_that_was_damaged_meanwhile_is_found_out(
    store: TemporaryStore, cache: FakeCache, options: Options
) -> None:
    """Where it is damaged, all has arrived."""
    there = await interrupted(store, cache, options, after=9)
    assert {1, 2, 3} <= set(there)
    (store.file("large") / "content").write_bytes(b"x" + CONTENT[1:])
    summary = await pushed(store, cache, options)

    assert (summary.uploaded, summary.failed) == (0, 1)
    assert cache.uploads == {}
    assert is_empty(options, cache, store)


@pytest.mark.parametrize("change", ["start", "size"])
@pytest.mark.usefixtures("made")
async def test_a_journal_that_is_wrong_costs_time_only(
    store: TemporaryStore, cache: FakeCache, options: Options, change: str
) -> None:
    """With rows that seem to be right: the frames of parts begin elsewhere, or have other sizes."""
    await interrupted(store, cache, options, after=9)
    nar_hash = info_of(store).nar_hash.nix32
    with closing(Journal.open(journal_of(options))) as journal:
        (transfer,) = journal.transfers(cache.url, nar_hash)
        for part in journal.parts(transfer):
            frames = [size - 1 if change == "size" else size for size in part.frames]
            start = part.start - part.first if change == "size" else max(0, part.start - 1)
            journal.add(transfer, replace(part, start=start, frames=frames))
    told: list[events.Event] = []
    summary = await pushed(store, cache, options, told)

    assert (summary.uploaded, summary.failed) == (1, 0)
    assert arrived(store, cache)
    assert [event for event in told if isinstance(event, events.Retrying)]
    assert is_empty(options, cache, store)


@pytest.mark.parametrize("how", ["directory", "rubbish", "another schema"])
async def test_a_journal_that_cannot_be_used_is_no_reason_to_fail(
    store: TemporaryStore, cache: FakeCache, options: Options, how: str
) -> None:
    await interrupted(store, cache, options, after=9)
    file = journal_of(options)
    for name in file.parent.glob(f"{file.name}*"):
        name.unlink()
    if how == "directory":
        file.mkdir()
    elif how == "rubbish":
        file.write_bytes(b"rubbish" * 1000)
    else:
        with closing(sqlite3.connect(file)) as db:
            db.execute("CREATE TABLE parts (number)")
    told: list[events.Event] = []
    summary = await pushed(store, cache, options, told)

    assert arrived(store, cache)
    assert (summary.uploaded, cache.count("part")) == (1, PARTS - 9)
    noted = [event.text for event in told if isinstance(event, events.Noted)]
    assert len(noted) == (how != "rubbish")
    assert all(text.startswith(f"the journal of what is on its way, {file}, cannot be used: ") for text in noted)


async def test_what_was_begun_otherwise_is_forgotten_at_the_server(
    store: TemporaryStore, cache: FakeCache, options: Options
) -> None:
    """Such as in smaller parts, which only this machine knows of."""
    cache.part_size = 2 * MIB
    await interrupted(store, cache, options, after=2)
    cache.part_size = MIB
    assert len(cache.uploads) == 1
    await pushed(store, cache, options)

    assert arrived(store, cache)
    assert cache.count("abort") == 1
    assert is_empty(options, cache, store)


async def test_parts_that_went_straight_to_the_bucket(
    tmp_path: Path, cache: FakeCache, options: Options, made: list[int]
) -> None:
    """Some of which it calls other than by their MD5."""
    (tmp_path / "other").mkdir()
    store = TemporaryStore(tmp_path / "other")
    store.add("large", {"content": random.Random(1).randbytes(30 * MIB)})
    cache.direct = True
    await interrupted(store, cache, options, after=2)
    made.clear()
    await pushed(store, cache, options)

    assert arrived(store, cache)
    assert cache.count("bucket") == 2
    assert sum(made) < info_of(store).nar_size
    assert is_empty(options, cache, store)


async def test_small_ones_need_no_journal(store: TemporaryStore, cache: FakeCache, options: Options) -> None:
    (store.file("large") / "content").unlink()
    store.file("large").rmdir()
    store.add("large", b"small")
    await pushed(store, cache, options)
    assert not journal_of(options).exists()
