"""Repair: what is broken is mended from another copy, or goes with all that needs it; then nothing is wrong."""

from __future__ import annotations

import errno
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import pytest

from cachesrv.errors import StoreError, StoreRefused
from cachesrv.nix import narinfo
from cachesrv.nix.signing import SecretKey
from cachesrv.services.copies import Copy, OtherCaches, SameNar, Wanted
from cachesrv.storage.threads import in_words
from tests.planted import (
    CHAIN,
    FAULTS,
    LIBRARY,
    LOST,
    OTHER,
    PROGRAM,
    TOOL,
    Fault,
    flip_a_bit,
    forge_signature,
    lose_the_catalog,
    nar_key,
    narinfo_key,
    remove_nar,
    repair,
    truncate,
    verify,
)
from tests.samples import Sample, path_of
from tests.service_site import KEY, Site, Steps, by_narinfo, chunks, open_site, served_cache

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

Plant = Callable[[Site], Awaitable[None]]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as site:
        await site.send(*CHAIN)
        assert await site.add(*CHAIN, as_=by_narinfo) == [None] * len(CHAIN)
        yield site


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "verification"


async def names(site: Site) -> set[str]:
    return {record.name async for record in site.catalog.scan("main")}


@pytest.mark.parametrize("fault", FAULTS, ids=str)
async def test_after_a_repair_nothing_is_wrong(site: Site, journal: Path, fault: Fault) -> None:
    await fault.plant(site)
    found = await verify(site, journal, contents=True)
    repaired = await repair(site, found.flaws)
    lost = LOST.get(fault.name, set())
    assert {name for name, result in repaired.results.items() if result == "removed"} == lost
    assert {name for name, result in repaired.results.items() if result == "left"} == set()
    assert await names(site) == {sample.name for sample in CHAIN} - lost
    assert (await verify(site, journal, contents=True)).flaws == []


class Elsewhere:
    """Another place, that has some paths as they were."""

    def __init__(self, *samples: Sample, key: SecretKey | None = KEY, compression: str | None = None) -> None:
        self.asked: list[str] = []
        self._samples = {sample.path.hash_part: sample for sample in samples}
        self._key = key
        self._compression = compression

    async def find(self, wanted: Wanted) -> Copy | None:
        self.asked.append(wanted.hash_part)
        sample = self._samples.get(wanted.hash_part)
        if sample is None:
            return None
        info = sample.info
        if self._key:
            info = info.add_signatures([self._key.sign(info.fingerprint)])
        if self._compression:
            sample = replace(sample, compression=self._compression)
        read = partial(chunks, sample.file)
        return Copy("elsewhere", sample.nar_hash.nix32, sample.compression, read, info)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
async def test_with_another_copy_nothing_is_lost(site: Site, journal: Path, fault: Fault) -> None:
    await fault.plant(site)
    found = await verify(site, journal, contents=True)
    repaired = await repair(site, found.flaws, Elsewhere(*CHAIN))
    assert set(repaired.results.values()) == {"mended"}
    assert await names(site) == {sample.name for sample in CHAIN}
    assert (await verify(site, journal, contents=True)).flaws == []
    for sample in CHAIN:
        assert await site.storage.get(nar_key(sample), limit=2**20) == sample.file
    assert await site.storage.sweep(older_than=-60) == 0


async def test_a_copy_that_is_packed_otherwise_gets_a_name_of_its_own(site: Site, journal: Path) -> None:
    await remove_nar(site)
    found = await verify(site, journal)
    repaired = await repair(site, found.flaws, Elsewhere(LIBRARY, compression="zstd"))
    assert [outcome.what for outcome in repaired.outcomes] == ["its NAR was taken from elsewhere"]
    assert (await verify(site, journal, contents=True)).flaws == []
    record = await site.catalog.path("main", LIBRARY.path.hash_part)
    packed = replace(LIBRARY, compression="zstd")
    assert record
    assert record.nar_key == nar_key(packed)
    assert narinfo.parse(record.narinfo).file_size == len(packed.file)
    assert set(await site.catalog.nars_by_hash("main", [LIBRARY.nar_hash.nix32])) == {LIBRARY.nar_hash.nix32}
    # the signatures hold as they did, and a push of it finds it here
    assert await site.add(LIBRARY) == [None]


async def test_a_damaged_nar_that_was_replaced_is_gone(site: Site, journal: Path) -> None:
    await truncate(site)
    found = await verify(site, journal)
    await repair(site, found.flaws, Elsewhere(LIBRARY, compression="zstd"))
    assert await site.storage.head(nar_key(LIBRARY)) is None
    assert (await verify(site, journal)).flaws == []


@pytest.mark.parametrize(
    ("elsewhere", "said"),
    [
        (Elsewhere(replace(LIBRARY, content=b"another library")), "elsewhere has another NAR of this path"),
        (Elsewhere(), "and no other copy was found"),
    ],
)
async def test_what_is_no_copy_is_not_taken(site: Site, journal: Path, elsewhere: Elsewhere, said: str) -> None:
    await remove_nar(site)
    found = await verify(site, journal)
    repaired = await repair(site, found.flaws, elsewhere)
    assert await names(site) == {"other"}
    (library,) = [outcome for outcome in repaired.outcomes if outcome.path == str(LIBRARY.path)]
    assert said in library.what
    assert library.get_back == f"cachesrv push /nix/store/{LIBRARY.path}"


async def test_a_copy_that_turns_out_wrong_is_not_taken(site: Site, journal: Path) -> None:
    class Lying(Elsewhere):
        async def find(self, wanted: Wanted) -> Copy | None:
            copy = await super().find(wanted)
            return copy and replace(copy, read=partial(chunks, b"x" + LIBRARY.file[1:]))

    await remove_nar(site)
    found = await verify(site, journal)
    repaired = await repair(site, found.flaws, Lying(LIBRARY), Elsewhere(LIBRARY))
    assert [outcome.what for outcome in repaired.outcomes] == ["its NAR was taken from elsewhere"]
    assert (await verify(site, journal, contents=True)).flaws == []


async def test_what_went_is_remembered_and_can_be_pushed_again(site: Site, journal: Path) -> None:
    await flip_a_bit(site)
    await site.catalog.pin("main", "p", str(PROGRAM.path), keep=1, expires_at=None, at=1, by="me")
    found = await verify(site, journal, contents=True)
    await repair(site, found.flaws)
    tool = await site.catalog.removal("main", TOOL.path.hash_part)
    program = await site.catalog.removal("main", PROGRAM.path.hash_part)
    assert tool
    assert program
    assert tool.by == program.by == "cachesrv verify --repair"
    assert tool.reason.startswith(f"its NAR nar/{TOOL.nar_name}")
    assert tool.reason.endswith("and no other copy was found")
    assert program.reason == f"it needs {TOOL.path}: {tool.reason}"
    assert await site.storage.head(nar_key(PROGRAM)), "it stays for a while"
    await site.send(TOOL)
    assert await site.add(TOOL, PROGRAM) == [None, None]
    assert await site.storage.get(nar_key(TOOL), limit=2**20) == TOOL.file
    assert (await verify(site, journal, contents=True)).flaws == []


async def test_a_narinfo_that_is_wrong_everywhere_is_made_anew_after_a_copy(site: Site, journal: Path) -> None:
    """As after a reindex of what somebody had changed."""
    await forge_signature(site)
    text = await site.storage.get(narinfo_key(TOOL), limit=10_000)
    record = await site.catalog.path("main", TOOL.path.hash_part)
    assert text
    assert record
    await site.catalog.publish([replace(record, narinfo=text)])
    found = await verify(site, journal)
    assert found.found == {("wrong-signature", "tool"), ("wrong-index-entry", "tool")}
    forger = SecretKey.generate("main-1")
    places = [Elsewhere(*CHAIN, key=key) for key in (None, forger, KEY)]
    repaired = await repair(site, found.flaws, *places)
    assert set(repaired.results.values()) == {"mended"}
    assert (await verify(site, journal, contents=True)).flaws == []
    assert len(await names(site)) == 4


async def test_a_narinfo_that_is_wrong_everywhere_goes(site: Site, journal: Path) -> None:
    await forge_signature(site)
    text = await site.storage.get(narinfo_key(TOOL), limit=10_000)
    record = await site.catalog.path("main", TOOL.path.hash_part)
    assert text
    assert record
    await site.catalog.publish([replace(record, narinfo=text)])
    repaired = await repair(site, (await verify(site, journal)).flaws, Elsewhere(*CHAIN, key=None))
    assert {name for name, result in repaired.results.items() if result == "removed"} == {"tool", "program"}
    assert (await verify(site, journal, contents=True)).flaws == []


@pytest.mark.parametrize("line", [b"References:", b"Sig:"])
async def test_a_narinfo_that_was_cut_off_does_not_take_the_place_of_the_whole_one(
    site: Site, journal: Path, line: bytes
) -> None:
    text = await site.storage.get(narinfo_key(PROGRAM), limit=10_000)
    assert text
    await site.storage.put(narinfo_key(PROGRAM), text[: text.index(line)], replace=True)
    repaired = await repair(site, (await verify(site, journal)).flaws)
    assert [outcome.what for outcome in repaired.outcomes] == ["its narinfo was written again, as the catalog has it"]
    assert await site.storage.get(narinfo_key(PROGRAM), limit=10_000) == text
    record = await site.catalog.path("main", PROGRAM.path.hash_part)
    assert record
    assert len(record.references) == 2
    assert (await verify(site, journal)).flaws == []


async def test_what_is_missing_is_brought_back_with_what_it_needs(site: Site, journal: Path) -> None:
    for sample in (LIBRARY, TOOL):
        await site.catalog.remove("main", [sample.path.hash_part])
        await site.storage.delete([narinfo_key(sample), nar_key(sample)])
        await site.catalog.remove_nars([nar_key(sample)])
    found = await verify(site, journal)
    assert ("missing-reference", "program") in found.found
    repaired = await repair(site, found.flaws, Elsewhere(*CHAIN))
    assert repaired.results["program"] == "mended"
    assert len(await names(site)) == 4
    assert (await verify(site, journal, contents=True)).flaws == []


async def test_a_narinfo_that_nobody_can_serve_is_moved_out_of_the_way(site: Site, journal: Path) -> None:
    stray = Sample("stray", b"stray", (LIBRARY.path, path_of("nothing")))
    await site.storage.put(nar_key(stray), stray.file)
    await site.storage.put(narinfo_key(stray), stray.narinfo())
    await site.storage.put("main/strange.narinfo", b"whatever")
    found = await verify(site, journal)
    assert found.found == {("missing-reference", "stray"), ("unreadable-narinfo", "strange")}
    repaired = await repair(site, found.flaws)
    assert repaired.results == {"stray": "removed", "strange": "removed"}
    assert kept(site) == {"strange.narinfo": b"whatever", f"{stray.path.hash_part}.narinfo": stray.narinfo()}
    assert (await verify(site, journal, contents=True)).flaws == []
    assert nar_key(stray) in {nar.key for nar in await site.catalog.unused_nars("main", 2**40, 0)}


def kept(site: Site) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (site.folder / "removed" / "main").iterdir()}


@pytest.mark.parametrize("door", ["read", "head", "get"])
async def test_what_storage_does_not_let_us_read_is_not_taken_for_damaged(
    site: Site, journal: Path, monkeypatch: pytest.MonkeyPatch, door: str
) -> None:
    """Such as objects in an archive class, or after a change of permissions."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise StoreRefused("restore it first")

    await flip_a_bit(site)
    flaws = (await verify(site, journal, contents=True)).flaws
    monkeypatch.setattr(site.storage, door, refuse)
    if door == "get":
        monkeypatch.setattr(site.storage, "get_many", refuse)
    with pytest.raises(StoreRefused):
        await verify(site, journal.with_name("other"), contents=True)
    with pytest.raises(StoreRefused):
        await repair(site, flaws)
    assert await names(site) == {sample.name for sample in CHAIN}


@pytest.mark.parametrize(("number", "kind"), [(errno.EACCES, StoreRefused), (errno.EMFILE, StoreRefused)])
def test_permissions_and_open_files_say_nothing_of_an_object(number: int, kind: type[StoreError]) -> None:
    with pytest.raises(kind, match="cannot read it"), in_words("read it"):
        raise OSError(number, "not now")


async def test_storage_that_is_not_mounted_does_not_empty_the_cache(site: Site, journal: Path) -> None:
    samples = [Sample(f"path-{number}", str(number).encode()) for number in range(60)]
    await site.send(*samples)
    assert await site.add(*samples) == [None] * 60
    keys = [info.key async for info in site.storage.list("main/")]
    await site.storage.delete(keys)
    found = await verify(site, journal)
    repaired = await repair(site, found.flaws)
    assert len(await names(site)) == 14
    assert "more than a tenth of the cache" in next(o.what for o in repaired.outcomes if o.result == "left")
    await repair(site, (await verify(site, journal)).flaws, forced=True)
    assert await names(site) == set()
    assert (await verify(site, journal)).flaws == []


async def test_keys_that_are_trusted_since_then_take_nothing_away(site: Site, journal: Path) -> None:
    friend = SecretKey.generate("friend-1")
    caches = {"main": replace(site.cache, signing_keys=(), trusted_keys={"friend-1": friend.public})}
    found = await verify(site, journal, caches=caches)
    assert found.found == {("untrusted-narinfo", sample.name) for sample in CHAIN}
    repaired = await repair(site, found.flaws, caches=caches)
    assert set(repaired.results.values()) == {"left"}
    assert len(await names(site)) == 4


async def test_a_key_that_was_changed_takes_nothing_away(site: Site, journal: Path) -> None:
    """As when the folder of the keys was lost, and one of the same name was made."""
    samples = [Sample(f"path-{number}", str(number).encode()) for number in range(8)]
    await site.send(*samples)
    assert await site.add(*samples) == [None] * 8
    caches = {"main": replace(site.cache, signing_keys=(SecretKey.generate("main-1"),))}
    found = await verify(site, journal, caches=caches)
    assert {kind for kind, _ in found.found} == {"wrong-signature"}
    repaired = await repair(site, found.flaws, caches=caches)
    assert set(repaired.results.values()) == {"left"}
    assert "reindex --sign" in repaired.outcomes[0].what
    assert len(await names(site)) == 12


async def test_storage_that_others_write_to_is_left_to_them(tmp_path: Path, journal: Path) -> None:
    async with open_site(tmp_path, cache=served_cache(bucket_is_authority=True)) as site:
        await site.storage.put(narinfo_key(OTHER), OTHER.narinfo())
        repaired = await repair(site, (await verify(site, journal)).flaws)
        assert repaired.results == {"other": "left"}
        assert await site.storage.head(narinfo_key(OTHER))


@pytest.mark.parametrize("when", [-2, 2], ids=["before", "after"])
async def test_other_places_of_this_server_have_copies(
    site: Site, journal: Path, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    """Whether the other NAR was verified before the one that is missing, or after it."""
    team = served_cache(name="team", prefix="team")
    caches = {"main": site.cache, "team": team}
    await site.ingest.receive(team, LIBRARY.nar_name, chunks(LIBRARY.file), None)
    assert await site.publish.many(team, [by_narinfo(LIBRARY)], "somebody") == [None]
    twin = replace(OTHER, name="twin")
    packed = replace(OTHER, name="packed", compression="zstd")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + when)
    await site.send(packed)
    monkeypatch.undo()
    assert await site.add(twin, packed, as_=by_narinfo) == [None, None]
    await site.storage.delete([nar_key(LIBRARY), nar_key(OTHER)])
    found = await verify(site, journal, caches=caches)
    places = (
        SameNar(site.storage, site.catalog, caches),
        OtherCaches(site.storage, site.catalog, caches),
    )
    repaired = await repair(site, found.flaws, *places, caches=caches)
    assert set(repaired.results.values()) == {"mended"}
    assert (await verify(site, journal, caches=caches, contents=True)).flaws == []


@pytest.mark.parametrize(
    ("plant", "copies", "late"),
    [
        (truncate, (), False),
        (truncate, CHAIN, True),
        (forge_signature, CHAIN, False),
        (lose_the_catalog, (), True),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_a_repair_that_is_killed_breaks_nothing_more(
    tmp_path: Path, plant: Plant, copies: tuple[Sample, ...], late: bool
) -> None:
    """At each write to a store; what is visible then is as it was or whole, and the next repair comes to the end."""
    template = tmp_path / "template"
    async with open_site(template) as site:
        await site.send(*CHAIN)
        assert await site.add(*CHAIN, as_=by_narinfo) == [None] * len(CHAIN)
        await plant(site)
        before = await verify(site, tmp_path / "journal", contents=True)
    elsewhere = Elsewhere(*copies, compression="zstd")
    number, done = 0, False
    while not done:
        steps = Steps(number, late=late)
        async with open_site(tmp_path / str(number), copy_of=template, wrap=steps.wrap) as site:
            stores = {"storage": site.storage, "catalog": site.catalog, "index": site.index}
            dying = replace(site, **{name: steps.wrap(store) for name, store in stores.items()})
            with suppress(StoreError):
                await repair(dying, before.flaws, elsewhere)
                done = len(steps.taken) <= number
            found = await verify(site, tmp_path / "journal", contents=True)
            worse = {(kind, path) for kind, path in found.found - before.found if kind in VISIBLE}
            assert not worse
            repaired = await repair(site, found.flaws, elsewhere)
            assert "left" not in repaired.results.values()
            assert (await verify(site, tmp_path / "journal", contents=True)).flaws == []
            if copies:
                assert len(await names(site)) == len(CHAIN)
        number += 1
    assert number > 2


VISIBLE = {"missing-nar", "wrong-size", "damaged-nar", "missing-reference", "wrong-index-entry"}
"""Flaws that clients see; that a narinfo in storage is ahead of the catalog is none."""
