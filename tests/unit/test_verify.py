"""Verification: faults are found and named, and nothing else is."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cachesrv.errors import PeerUnavailable, StoreUnavailable
from cachesrv.index.base import IndexEntry
from cachesrv.nix.signing import SecretKey
from cachesrv.services import verify as verify_module
from cachesrv.services.answer import present
from cachesrv.services.caches import ReferencePolicy
from cachesrv.services.verify_journal import Journal
from tests.planted import (
    AT_ONCE,
    CHAIN,
    FAULTS,
    LIBRARY,
    OTHER,
    PROGRAM,
    TOOL,
    Fault,
    Heard,
    lose_the_catalog,
    nar_key,
    narinfo_key,
    put_garbage,
    remove_nar,
    truncate,
    verification,
    verify,
)
from tests.samples import Sample, path_of
from tests.service_site import Site, by_narinfo, open_site, served_cache

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection
    from pathlib import Path

    from cachesrv.services.caches import ServedCache
    from cachesrv.services.verify_journal import Counts


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as site:
        await push(site, *CHAIN)
        yield site


async def push(site: Site, *samples: Sample) -> None:
    await site.send(*samples)
    assert await site.add(*samples, as_=by_narinfo) == [None] * len(samples)


async def lay(site: Site, *samples: Sample) -> None:
    """Put paths into storage as another program would."""
    for sample in samples:
        await site.storage.put(nar_key(sample), sample.file)
        await site.storage.put(narinfo_key(sample), sample.narinfo())


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "verification"


async def test_nothing_is_wrong_with_what_was_pushed(site: Site, journal: Path) -> None:
    heard = await verify(site, journal, contents=True)
    assert heard.flaws == []
    counts = heard.told[-1]
    assert (counts.paths, counts.nars, counts.bytes) == (4, 4, sum(len(sample.file) for sample in CHAIN))
    assert heard.stages[0] == ("main", "published paths", 4)


@pytest.mark.parametrize("fault", FAULTS, ids=str)
async def test_each_fault_is_found_and_named(site: Site, journal: Path, fault: Fault) -> None:
    await fault.plant(site)
    heard = await verify(site, journal, contents=True)
    assert heard.found == fault.found
    assert len(heard.flaws) == len(fault.found)
    assert all(flaw.what and flaw.advice for flaw in heard.flaws)
    assert (await verify(site, journal)).found == (set() if fault.contents else fault.found)


async def test_faults_in_words(site: Site, journal: Path) -> None:
    await truncate(site)
    await put_garbage(site)
    await site.storage.delete([nar_key(OTHER)])
    said = {flaw.path[33:]: (flaw.object, flaw.what) for flaw in (await verify(site, journal)).flaws}
    assert said["library"] == (
        nar_key(LIBRARY),
        f"its NAR nar/{LIBRARY.nar_name} has {len(LIBRARY.file) - 8} bytes, its narinfo says {len(LIBRARY.file)}",
    )
    assert said["other"] == (nar_key(OTHER), f"its NAR nar/{OTHER.nar_name} is not there")
    assert said["tool"][0] == narinfo_key(TOOL)
    assert said["tool"][1].startswith("its narinfo is none: ")


async def test_page_by_page(site: Site, journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "_TOGETHER", 3)
    samples = [Sample(f"path-{number}", str(number).encode()) for number in range(20)]
    await push(site, *samples)
    broken = samples[::4]
    await site.storage.delete([nar_key(sample) for sample in broken])
    await site.catalog.remove("main", [samples[1].path.hash_part, samples[2].path.hash_part])
    heard = await verify(site, journal)
    assert heard.found == {
        *(("missing-nar", sample.name) for sample in broken),
        *(("unpublished-path", sample.name) for sample in samples[1:3]),
        *(("dangling-index-entry", sample.path.hash_part) for sample in samples[1:3]),
    }
    assert heard.told[-1].paths == 24


class Passing:
    """A store that answers wrongly when it is asked first by `method`, as while others are at work."""

    def __init__(self, store: Any, method: str, *answers: Any) -> None:
        self._store = store
        self._method = method
        self._answers = [*answers]

    def __getattr__(self, name: str) -> Any:
        if name != self._method or not self._answers:
            return getattr(self._store, name)

        async def passing(*_: Any, **__: Any) -> Any:
            return self._answers.pop()

        return passing


async def test_what_passes_is_no_flaw(site: Site, journal: Path) -> None:
    passing = replace(site, storage=Passing(site.storage, "head", None))
    assert (await verify(passing, journal)).flaws == []
    for method, answer in (("present", set()), ("stray_nars", {nar_key(TOOL)})):
        passing = replace(site, catalog=Passing(site.catalog, method, answer))
        assert (await verify(passing, journal)).flaws == []


async def test_what_is_young_may_be_on_its_way(site: Site, journal: Path) -> None:
    await site.storage.put("main/nar/orphan.nar", b"whatever")
    await lay(site, Sample("late"))
    heard = await verify(site, journal, allowances=replace(AT_ONCE, young=60))
    assert (heard.flaws, heard.told[-1].young) == ([], 3)
    assert (await verify(site, journal)).told[-1].young == 0


async def test_with_the_catalog_lost_what_is_young_is_counted(site: Site, journal: Path) -> None:
    await lose_the_catalog(site)
    site.index.delete([("main", sample.path.hash_part) for sample in CHAIN])
    heard = await verify(site, journal, allowances=replace(AT_ONCE, young=60))
    assert (heard.flaws, heard.told[-1].young) == ([], 2 * len(CHAIN))


async def test_what_is_about_to_be_deleted_is_passed_over(site: Site, journal: Path) -> None:
    late = Sample("late")
    await lay(site, late)
    await site.catalog.lock("maintenance", "me", now=0, until=2**40)
    await site.catalog.doom([narinfo_key(late), nar_key(late)], holder="me", before=2**40, now=0)
    assert (await verify(site, journal)).flaws == []


async def test_storage_that_fails_says_nothing_of_what_it_holds(site: Site, journal: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise StoreUnavailable("out of reach")

    class Failing(Passing):
        def __getattr__(self, name: str) -> Any:
            return fail if name == self._method else getattr(self._store, name)

    for method in ("get_many", "head", "read"):
        with pytest.raises(StoreUnavailable, match="out of reach"):
            await verify(replace(site, storage=Failing(site.storage, method)), journal, contents=method == "read")


def contents_of(file: Path) -> bytes:
    return file.read_bytes()


def append(file: Path, data: bytes) -> None:
    file.write_bytes(file.read_bytes() + data)


class Interrupted(Exception):
    pass


class Interrupting(Heard):
    """Ends the run at a number of paths."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at

    def progress(self, counts: Counts) -> None:
        super().progress(counts)
        if counts.paths == self._at:
            raise Interrupted


async def test_an_interrupted_run_goes_on(site: Site, journal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "_READ_TOGETHER", 1)
    samples = [Sample(f"path-{number}", str(number).encode()) for number in range(6)]
    await push(site, *samples)
    broken = {sample.name for sample in samples if sample.path.hash_part > "8"} | {"library"}
    await remove_nar(site)
    await site.storage.delete([nar_key(sample) for sample in samples if sample.name in broken])
    await site.storage.put("main/nar/orphan.nar", b"whatever")
    expected = {("missing-nar", name) for name in broken} | {("orphan-nar", "main/nar/orphan.nar")}
    read = 0
    for at in (3, 4, 8, 10, None):
        heard = Interrupting(at) if at else Heard()
        notes = Journal(journal, {})
        with verification(site, contents=True) as run:
            try:
                counts = await run.run(["main"], notes, heard)
                notes.finish()
            except Interrupted:
                assert at is not None
            else:
                assert at is None
                assert counts.paths == 10
            assert run._contents is not None
            read += run._contents.nars
        notes.close()
        assert len(heard.flaws) == len(set(heard.flaws))
    assert heard.found == expected
    assert read == 10 - len(broken), "no NAR is read twice"
    assert contents_of(journal) == b""


async def test_a_journal_of_something_else_is_not_gone_on_with(site: Site, journal: Path) -> None:
    async def leave(terms: dict[str, str]) -> None:
        notes = Journal(journal, terms)
        with verification(site) as run, pytest.raises(Interrupted):
            await run.run(["main"], notes, Interrupting(4))
        notes.close()

    def position(terms: dict[str, str], *, fresh: bool = False) -> str | None:
        notes = Journal(journal, terms, fresh=fresh)
        try:
            return notes.position.stage if notes.position else None
        finally:
            notes.close()

    await leave({"a": "1"})
    assert position({"a": "1"}) == "published paths"
    append(journal, b'{"position":')
    assert position({"a": "1"}) == "published paths"
    assert position({"a": "2"}) is None
    await leave({"a": "1"})
    assert position({"a": "1"}, fresh=True) is None
    for garbage in (b"\0\0garbage", b'{"position":{"cache":"\xff"}}', b'{"flaw":' + b"[" * 100_000):
        await leave({"a": "1"})
        assert position({"a": "1"}) == "published paths"
        append(journal, garbage + b"\n")
        assert position({"a": "1"}) == "published paths"


def test_one_at_a_time(journal: Path) -> None:
    notes = Journal(journal, {})
    with pytest.raises(StoreUnavailable, match="another process"):
        Journal(journal, {})
    notes.close()
    Journal(journal, {}).close()


async def test_signatures_of_known_keys_only_are_judged(tmp_path: Path, journal: Path) -> None:
    stranger, friend = SecretKey.generate("stranger-1"), SecretKey.generate("friend-1")
    forged = SecretKey.generate("friend-1").sign(OTHER.info.fingerprint)
    cache = served_cache(trusted_keys={"friend-1": friend.public})
    async with open_site(tmp_path, cache=cache, storage=None) as site:
        signatures = (stranger.sign(b"something else"), friend.sign(OTHER.info.fingerprint))
        signed = replace(by_narinfo(OTHER), signatures=signatures)
        await site.send(OTHER)
        assert await site.publish.many(cache, [signed], "somebody") == [None]
        assert (await verify(site, journal)).flaws == []
        await site.catalog.remove("main", [OTHER.path.hash_part])
        await site.storage.put(narinfo_key(OTHER), OTHER.narinfo(signatures=(forged,)), replace=True)
        (flaw, _) = (await verify(site, journal)).flaws
        assert (flaw.kind, flaw.what) == ("wrong-signature", "its signature by friend-1 does not hold")
        await site.storage.put(narinfo_key(OTHER), OTHER.narinfo(signatures=signatures[:1]), replace=True)
        (flaw, _) = (await verify(site, journal)).flaws
        assert (flaw.kind, flaw.what) == ("untrusted-narinfo", "it has no signature by a key that the cache trusts")


async def test_storage_that_others_write_to(tmp_path: Path, journal: Path) -> None:
    """What lies there is published, whether the catalog knows it or not; NARs may be needed by what comes later."""
    cache = served_cache(bucket_is_authority=True)
    async with open_site(tmp_path, cache=cache) as site:
        await push(site, LIBRARY)
        await lay(site, TOOL, PROGRAM, OTHER)
        await site.storage.put("main/nar/orphan.nar", b"whatever")
        for sample in CHAIN:
            site.index.put([IndexEntry("main", sample.path.hash_part, present(sample.narinfo()))], replace=False)
        heard = await verify(site, journal, contents=True)
        assert (heard.flaws, heard.told[-1].paths, heard.told[-1].nars) == ([], 4, 4)
        await site.storage.put(nar_key(TOOL), TOOL.file[:-1], replace=True)
        await site.storage.delete([narinfo_key(OTHER)])
        assert (await verify(site, journal, contents=True)).found == {
            ("wrong-size", "tool"),
            ("dangling-index-entry", OTHER.path.hash_part),
        }


async def test_caches_that_share_a_folder(site: Site, journal: Path) -> None:
    """What one of them publishes is no stranger to the other; NARs neither."""
    twin = served_cache(name="twin")
    caches = {"main": site.cache, "twin": twin}
    assert await site.publish.many(twin, [by_narinfo(LIBRARY)], "somebody") == [None]
    heard = await verify(site, journal, caches=caches)
    assert heard.flaws == []
    assert [stage for stage in heard.stages if stage[1] == "storage"] == [("main", "storage", None)]
    await remove_nar(site)
    flaws = (await verify(site, journal, caches=caches)).flaws
    assert [(flaw.cache, flaw.kind) for flaw in flaws] == [("main", "missing-nar"), ("twin", "missing-nar")]


@pytest.mark.parametrize("policy", ReferencePolicy)
async def test_references_resolve_where_the_cache_says(tmp_path: Path, journal: Path, policy: ReferencePolicy) -> None:
    asked: list[str] = []

    async def has_library(_cache: ServedCache, hash_parts: Collection[str]) -> set[str]:
        asked.extend(hash_parts)
        return {LIBRARY.path.hash_part} & {*hash_parts}

    async def is_away(_cache: ServedCache, _hash_parts: Collection[str]) -> set[str]:
        raise PeerUnavailable("upstream u did not answer")

    async with open_site(tmp_path, cache=served_cache(references=ReferencePolicy.ANY)) as site:
        await push(site, Sample("needy", b"", (LIBRARY.path, path_of("nothing"), path_of("needy"))))
        caches = {"main": served_cache(references=policy)}
        whats = [flaw.what for flaw in (await verify(site, journal, caches=caches, resolve=has_library)).flaws]
        expected = {"strict": ["library", "nothing"], "upstream": ["nothing"], "any": []}[policy.value]
        assert sorted(whats) == sorted(f"it refers to {path_of(name)}, which is not there" for name in expected)
        assert bool(asked) is (policy is ReferencePolicy.UPSTREAM)
        if policy is ReferencePolicy.UPSTREAM:
            flaws = (await verify(site, journal, caches=caches, resolve=is_away)).flaws
            assert {flaw.kind for flaw in flaws} == {"undecided"}
            assert all("upstream u did not answer" in flaw.what for flaw in flaws)


async def test_offers_of_an_upstream_are_no_answers_of_ours(tmp_path: Path, journal: Path) -> None:
    async with open_site(tmp_path, cache=served_cache(pull_through=True)) as site:
        offer = OTHER.narinfo(url=f"nar/{OTHER.nar_name}?path={OTHER.path.hash_part}")
        site.index.put([IndexEntry("main", OTHER.path.hash_part, present(offer))])
        assert (await verify(site, journal)).flaws == []


async def test_a_nar_is_read_once_for_all_its_paths(site: Site, journal: Path) -> None:
    await push(site, *(Sample(f"twin-{number}", OTHER.content) for number in range(5)))
    heard = await verify(site, journal, contents=True)
    assert (heard.told[-1].paths, heard.told[-1].nars) == (9, 4)


async def test_a_compression_that_is_not_known_here_is_hashed_as_it_is(site: Site, journal: Path) -> None:
    packed = Sample("packed", b"packed")
    await site.storage.put(nar_key(packed), packed.file)
    text = packed.narinfo(compression="lzip")
    await site.storage.put(narinfo_key(packed), text)
    record = await site.catalog.path("main", OTHER.path.hash_part)
    assert record
    known = replace(record, hash_part=packed.path.hash_part, name="packed", narinfo=text, nar_key=nar_key(packed))
    known = replace(known, nar_hash=packed.nar_hash.nix32, nar_size=len(packed.nar), file_size=len(packed.file))
    await site.catalog.publish([known])
    assert (await verify(site, journal, contents=True)).flaws == []
    await site.storage.put(nar_key(packed), packed.file[::-1], replace=True)
    assert (await verify(site, journal, contents=True)).found == {("damaged-nar", "packed")}
