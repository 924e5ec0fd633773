"""What a push keeps of what it sends: a record for build systems, and NARs for Nix."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import random
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cachesrv.nix import listing
from cachesrv.nix.nar_writer import dump
from cachesrv.push import events
from cachesrv.push.address import Address
from cachesrv.push.kept_nars import KeptNars
from cachesrv.push.pushed import Pushed
from cachesrv.push.record import Record
from cachesrv.push.retry import Backoff
from cachesrv.push.run import Options, push
from cachesrv.push.settings import Settings
from cachesrv.push.token import TokenVariable
from tests.push_doubles import FakeCache, TemporaryStore, answer, hang, store_path

if TYPE_CHECKING:
    from aiohttp import web


@pytest.fixture
def options(tmp_path: Path) -> Options:
    return Options(record=tmp_path / "pushed.sqlite", backoff=Backoff(attempts=2, first=0.01))


def settings(cache: FakeCache) -> Settings:
    return Settings(Address.parse(cache.url), TokenVariable.of("CACHESRV_TOKEN", "secret"))


def full(*names: str) -> list[str]:
    return [store_path(name).full("/nix/store") for name in names]


def add_release(store: TemporaryStore, name: str = "release") -> str:
    store.add(name, {"file": b"contents"})
    support = store.file(name) / "nix-support"
    support.mkdir()
    (support / "hydra-build-products").write_bytes(b"file x $out/file\n")
    nar = b"".join(dump(store.file(name)))
    info = store.infos[store_path(name)]
    store.infos[info.store_path] = replace(info, nar_hash=type(info.nar_hash).of("sha256", nar), nar_size=len(nar))
    return full(name)[0]


async def test_a_push_is_on_record(store: TemporaryStore, cache: FakeCache, options: Options) -> None:
    path = add_release(store)
    await push([path], store, settings(cache), options)

    assert options.record is not None
    with closing(Record.open(options.record)) as record:
        found = Pushed(record).find(path)
    assert found is not None
    assert found.nar_hash == store.infos[store_path("release")].nar_hash.nix32
    assert [one.cache for one in found.pushes] == [cache.url]
    products = found.file("nix-support/hydra-build-products")
    assert products is not None
    assert products.content == b"file x $out/file\n"
    assert found.file("nix-support/hydra-metrics") is None
    assert found.listing is not None
    assert isinstance(listing.find(found.listing, "file"), listing.Regular)


async def test_paths_with_one_nar_are_all_on_record(store: TemporaryStore, cache: FakeCache, options: Options) -> None:
    paths = [add_release(store, name) for name in ("one", "two")]
    await push(paths, store, settings(cache), options)

    assert cache.count("nar") == 1
    assert options.record is not None
    with closing(Record.open(options.record)) as record:
        assert all((found := Pushed(record).find(path)) and found.files for path in paths)


async def test_of_what_did_not_go_by_nothing_is_claimed(
    store: TemporaryStore, cache: FakeCache, options: Options
) -> None:
    """Somebody else has pushed a path with the same NAR."""
    other, path = add_release(store, "one"), add_release(store, "two")
    await push([other], store, settings(cache), replace(options, record=None))
    await push([path], store, settings(cache), options)

    assert cache.count("nar") == 1
    assert options.record is not None
    with closing(Record.open(options.record)) as record:
        pushed = Pushed(record)
        assert pushed.find(path) is None
        assert [one.cache for one in pushed.pushes(path)] == [cache.url]


async def test_what_failed_is_not_on_record(store: TemporaryStore, cache: FakeCache, options: Options) -> None:
    good, bad = add_release(store, "good"), add_release(store, "bad")
    (store.file("bad") / "file").write_bytes(b"damaged")
    await push([good, bad], store, settings(cache), options)

    assert options.record is not None
    with closing(Record.open(options.record)) as record:
        assert [found.path for found in record.paths()] == [good]


async def test_a_nar_from_the_daemon_and_one_that_is_sent_again(
    store: TemporaryStore, cache: FakeCache, options: Options
) -> None:
    path = add_release(store)
    store.unreadable.add(store_path("release"))
    cache.fail("nar", answer(503))
    await push([path], store, settings(cache), options)

    assert options.record is not None
    with closing(Record.open(options.record)) as record:
        found = Pushed(record).find(path)
    assert found is not None
    assert found.files.keys() == {"nix-support/hydra-build-products"}


async def test_where_nothing_can_be_recorded_the_push_goes_on(
    store: TemporaryStore, cache: FakeCache, options: Options, tmp_path: Path
) -> None:
    path = add_release(store)
    (tmp_path / "file").touch()
    told: list[events.Event] = []
    beyond = replace(options, record=tmp_path / "file" / "pushed.sqlite", keep_nars=tmp_path / "file" / "nars")

    summary = await push([path], store, settings(cache), beyond, told.append)

    assert (summary.uploaded, summary.failed) == (1, 0)
    notes = [event.text for event in told if isinstance(event, events.Noted)]
    assert len(notes) == 2
    assert f"{tmp_path}/file/pushed.sqlite" in notes[0]
    assert f"NARs are not kept in {tmp_path}/file/nars: Not a directory" in notes[1]


def test_a_directory_for_nars_may_go_while_one_is_kept(store: TemporaryStore, tmp_path: Path) -> None:
    """Letting go of what was kept so far is no reason to fail."""
    info = store.add("path", b"contents")
    directory = tmp_path / "nars"
    tap = KeptNars(directory).tap(info)
    tap.feed(memoryview(b"".join(dump(store.file("path")))))
    directory.rename(tmp_path / "elsewhere")
    directory.touch()

    tap.drop()


async def test_what_was_published_before_a_cancellation_is_on_record(
    store: TemporaryStore, cache: FakeCache, options: Options
) -> None:
    first = add_release(store, "first")
    store.add("second", random.Random(3).randbytes(5_000_000), ["first"])
    sending = asyncio.Event()

    async def begin(request: web.Request) -> web.StreamResponse:
        sending.set()
        return await hang(request)

    async def take_first(request: web.Request) -> web.StreamResponse:
        cache.fail("nar", begin)
        return await cache._put(request)

    published = asyncio.Event()

    def emit(event: events.Event) -> None:
        if isinstance(event, events.Published):
            published.set()

    cache.fail("nar", take_first)
    pushing = asyncio.create_task(push(full("second"), store, settings(cache), replace(options, jobs=1), emit))
    await sending.wait()
    await published.wait()
    pushing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pushing

    assert options.record is not None
    with closing(Record.open(options.record)) as record:
        assert [found.path for found in record.paths()] == [first]


async def test_nars_are_kept_as_nix_looks_for_them(
    store: TemporaryStore, cache: FakeCache, options: Options, tmp_path: Path
) -> None:
    paths = [add_release(store, name) for name in ("one", "two")]
    nars = tmp_path / "nars"
    await push(paths, store, settings(cache), replace(options, keep_nars=nars))

    info = store.infos[store_path("one")]
    names = [info.nar_hash.bare_nix32, *(store_path(name).hash_part for name in ("one", "two"))]
    assert {file.name for file in nars.iterdir()} == {f"{name}.{suffix}" for name in names for suffix in ("nar", "ls")}
    for name in names:
        assert (nars / f"{name}.nar").read_bytes() == b"".join(dump(store.file("one")))
        root = json.loads((nars / f"{name}.ls").read_bytes())
        assert root["entries"]["file"]["size"] == len(b"contents")
        assert (nars / f"{name}.nar").stat().st_mode & 0o777 == 0o644
    await push(paths, store, settings(cache), replace(options, keep_nars=nars))
    assert len(list(nars.iterdir())) == 6


async def test_nars_that_are_damaged_are_not_kept(
    store: TemporaryStore, cache: FakeCache, options: Options, tmp_path: Path
) -> None:
    path = add_release(store)
    (store.file("release") / "file").write_bytes(b"damaged")
    await push([path], store, settings(cache), replace(options, keep_nars=tmp_path / "nars"))

    assert list((tmp_path / "nars").iterdir()) == []


def leave(directory: Path, *, age: int) -> Path:
    """A NAR that somebody began, so many seconds ago."""
    directory.mkdir(exist_ok=True)
    file = directory / f".nar-{len(list(directory.iterdir()))}"
    file.touch()
    os.utime(file, (time.time() - age, time.time() - age))
    return file


def test_what_killed_pushes_left_goes_and_what_is_written_stays(tmp_path: Path) -> None:
    killed, begun = leave(tmp_path, age=100), leave(tmp_path, age=10)
    with closing(KeptNars(tmp_path).create()) as written:
        assert not killed.exists()
        assert begun.exists()
        os.utime(written.name, (time.time() - 1000, time.time() - 1000))
        with closing(KeptNars(tmp_path).create()):
            assert Path(written.name).exists()
    with closing(KeptNars(tmp_path).create()):
        assert not Path(written.name).exists()


def test_without_locks_what_was_left_goes_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    young, old = leave(tmp_path, age=1000), leave(tmp_path, age=90_000)
    with closing(KeptNars(tmp_path).create()):
        assert young.exists()
        assert not old.exists()
