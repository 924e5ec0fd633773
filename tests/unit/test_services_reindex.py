"""Catalog and index, made anew from what lies in storage."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from cachesrv.errors import StoreUnavailable
from cachesrv.index.base import IndexEntry, Present
from cachesrv.index.memory import MemoryIndex
from cachesrv.index.scratch import Scratch
from cachesrv.nix import narinfo
from cachesrv.nix.signing import SecretKey
from cachesrv.services import reindex, survey
from cachesrv.services.answer import present
from cachesrv.services.caches import ReferencePolicy
from cachesrv.services.findings import TABLES
from cachesrv.services.flaws import Flaw, Kind
from cachesrv.services.reindex import Reindex, Report
from cachesrv.services.resigning import Resigning
from cachesrv.services.survey import as_found
from cachesrv.storage.memory import MemoryStore
from tests.samples import Sample, path_of
from tests.service_site import KEY, Site, open_site, served_cache

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from cachesrv.services.survey import Improve

LIBRARY = Sample("library", b"library")
TOOL = Sample("tool", b"tool", (LIBRARY.path, path_of("tool")))
PROGRAM = Sample("program", b"program", (LIBRARY.path, TOOL.path))
CHAIN = (LIBRARY, TOOL, PROGRAM)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as site:
        yield site


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Scratch]:
    scratch = Scratch(tmp_path / "reindex", TABLES)
    yield scratch
    scratch.close()


class Told:
    """A Listener that remembers."""

    def __init__(self) -> None:
        self.taken: list[int] = []
        self.flaws: list[Flaw] = []

    def progress(self, report: Report) -> None:
        self.taken.append(report.taken)

    def flaw(self, flaw: Flaw) -> None:
        self.flaws.append(flaw)


Run = Callable[..., Awaitable[Report]]


@pytest.fixture
def run(scratch: Scratch) -> Run:
    async def run(site: Site, told: Told | None = None, improve: Improve = as_found) -> Report:
        reindex = Reindex(site.storage, site.catalog, site.index)
        return await reindex.run(site.cache, scratch, told or Told(), improve)

    return run


async def lay(site: Site, *samples: Sample, **changes: Any) -> None:
    """Put paths into storage as another program would."""
    for sample in samples:
        await site.storage.put(f"main/nar/{sample.nar_name}", sample.file)
        await site.storage.put(key_of(sample), sample.narinfo(**changes), replace=True)


def key_of(sample: Sample) -> str:
    return f"main/{sample.path.hash_part}.narinfo"


def parts(*samples: Sample) -> set[str]:
    return {sample.path.hash_part for sample in samples}


def whys(report: Report) -> dict[str, str]:
    return {flaw.object: flaw.what for flaw in report.first}


def kinds(report: Report) -> dict[str, Kind]:
    return {flaw.object: Kind.of(flaw.kind) for flaw in report.first}


def answer(site: Site, sample: Sample) -> bytes:
    found = site.index.get("main", sample.path.hash_part)
    assert isinstance(found, Present)
    return found.body


async def test_everything_is_taken_as_it_lies_there(site: Site, run: Run) -> None:
    stranger = SecretKey.generate("stranger-1")
    signed = LIBRARY.narinfo(signatures=(stranger.sign(LIBRARY.info.fingerprint),))
    await lay(site, *CHAIN)
    await site.storage.put(key_of(LIBRARY), signed, replace=True)
    await site.storage.put("main/nix-cache-info", b"StoreDir: /nix/store\n")
    await site.storage.put("main/log/x.narinfo", b"not a narinfo of this cache")
    await site.storage.put("main/nar/deep/" + "/".join(["x" * 200] * 4), b"no NAR of this cache")
    await site.storage.put("other/x.narinfo", b"nor this")
    report = await run(site)
    assert (report.taken, whys(report)) == (3, {})
    assert await site.published() == site.visible() == parts(*CHAIN)
    assert answer(site, LIBRARY) == signed
    record = await site.catalog.path("main", TOOL.path.hash_part)
    assert record is not None
    assert record.nar_key == f"main/nar/{TOOL.nar_name}"
    assert set(record.references) == {str(LIBRARY.path), str(TOOL.path)}


async def test_a_narinfo_that_nix_would_write_otherwise_is_taken_too(site: Site, run: Run) -> None:
    lines = LIBRARY.narinfo().splitlines(keepends=True)
    await lay(site, LIBRARY)
    await site.storage.put(key_of(LIBRARY), b"Unheard-of: x\n" + b"".join(reversed(lines)), replace=True)
    assert (await run(site)).taken == 1
    assert answer(site, LIBRARY) == LIBRARY.narinfo()


async def test_the_size_of_a_nar_may_be_left_unsaid(site: Site, run: Run) -> None:
    await lay(site, LIBRARY, file_size=None)
    assert (await run(site)).taken == 1
    record = await site.catalog.path("main", LIBRARY.path.hash_part)
    assert record is not None
    assert record.file_size == len(LIBRARY.file)


async def test_times_are_those_of_the_objects_and_all_was_used_now(
    site: Site, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it was used last is lost; what is old is not to be collected for that."""
    await lay(site, LIBRARY)
    laid = await site.storage.head(key_of(LIBRARY))
    assert laid is not None
    monkeypatch.setattr("cachesrv.services.reindex.time.time", lambda: laid.modified + 1_000_000)
    await run(site)
    record = await site.catalog.path("main", LIBRARY.path.hash_part)
    (use,) = await site.catalog.uses("main", 0)
    assert record is not None
    assert record.registered_at == int(laid.modified)
    assert use.used_at == int(laid.modified + 1_000_000)


async def test_twice_is_as_once(site: Site, run: Run) -> None:
    await lay(site, *CHAIN)
    await run(site)
    answers = dict(site.index.scan("main"))
    report = await run(site)
    assert (report.taken, whys(report)) == (3, {})
    assert dict(site.index.scan("main")) == answers


async def test_in_batches(site: Site, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reindex, "_BATCH", 4)
    monkeypatch.setattr(survey, "_READ_TOGETHER", 3)
    monkeypatch.setattr(survey, "_LISTED_TOGETHER", 3)
    samples = [Sample(str(number), str(number).encode()) for number in range(10)]
    samples += [Sample(f"needs-{number}", b"", (path_of(str(number)),)) for number in range(10)]
    await lay(site, *samples)
    told = Told()
    report = await run(site, told)
    assert report.taken == 20
    assert told.taken == sorted(told.taken)
    assert len(set(told.taken)) >= 5
    assert site.visible() == parts(*samples)


@pytest.mark.parametrize(
    ("text", "kind", "said"),
    [
        (b"garbage", Kind.UNREADABLE_NARINFO, "narinfo"),
        (LIBRARY.narinfo(), Kind.FOREIGN_NARINFO, "it is the narinfo of"),
        (TOOL.narinfo(store_dir="/gnu/store"), Kind.FOREIGN_NARINFO, "/gnu/store"),
        (TOOL.narinfo(url="nar/absent.nar"), Kind.MISSING_NAR, "its NAR nar/absent.nar is not there"),
        (TOOL.narinfo(url=f"nar/{'x' * 600}"), Kind.MISSING_NAR, "is not there"),
        (TOOL.narinfo(url="../other/nar/x"), Kind.FOREIGN_NARINFO, "below nar/"),
        (TOOL.narinfo(url="https://example.org/nar/x"), Kind.FOREIGN_NARINFO, "below nar/"),
        (TOOL.narinfo(file_size=1), Kind.WRONG_SIZE, "it says 1"),
        (b"x" * 2_000_000, Kind.UNREADABLE_NARINFO, "at most"),
    ],
)
async def test_what_cannot_be_served_is_named(site: Site, run: Run, text: bytes, kind: Kind, said: str) -> None:
    """With all that needs it; the rest is served."""
    await lay(site, *CHAIN)
    await site.storage.put(key_of(TOOL), text, replace=True)
    told = Told()
    report = await run(site, told)
    assert kinds(report) == {key_of(TOOL): kind, key_of(PROGRAM): Kind.MISSING_REFERENCE}
    assert said in whys(report)[key_of(TOOL)]
    assert str(TOOL.path) in whys(report)[key_of(PROGRAM)]
    assert report.first == told.flaws
    assert all(flaw.advice for flaw in report.first)
    assert report.taken == 1
    assert await site.published() == site.visible() == parts(LIBRARY)


async def test_a_chain_that_hangs_in_the_air_goes_as_a_whole(site: Site, run: Run) -> None:
    samples = [Sample(str(number), b"", (path_of(str(number - 1)),)) for number in range(20)]
    await lay(site, LIBRARY, *samples)
    report = await run(site)
    assert report.taken == 1
    assert report.flaws == 20
    assert site.visible() == parts(LIBRARY)


async def test_what_refers_to_itself_over_others_is_not_served(site: Site, run: Run) -> None:
    hen, egg = Sample("hen", b"", (path_of("egg"),)), Sample("egg", b"", (path_of("hen"),))
    await lay(site, hen, egg, Sample("farm", b"", (hen.path,)), LIBRARY)
    report = await run(site)
    assert report.flaws == 3
    assert site.visible() == parts(LIBRARY)


async def test_a_cache_that_holds_a_part_only(tmp_path: Path, run: Run) -> None:
    async with open_site(tmp_path, cache=served_cache(references=ReferencePolicy.ANY)) as site:
        await lay(site, PROGRAM)
        report = await run(site)
        assert (report.taken, whys(report)) == (1, {})


async def test_nothing_is_served_before_what_it_refers_to(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it need not be there at all."""
    samples = [Sample(str(number), b"", (path_of(str(number - 1)),)) for number in range(30)]
    async with open_site(tmp_path, cache=served_cache(references=ReferencePolicy.ANY)) as site:
        await lay(site, *samples)
        put, order = site.index.put, list[str]()

        def noted(entries: Any, **how: Any) -> bool:
            order.extend(entry.hash_part for entry in entries)
            return put(entries, **how)

        monkeypatch.setattr(site.index, "put", noted)
        await run(site)
    assert order == [sample.path.hash_part for sample in samples]


async def test_what_is_published_otherwise_is_named_and_stays(site: Site, run: Run) -> None:
    await site.send(*CHAIN)
    await site.add(*CHAIN)
    before = site.index.get("main", LIBRARY.path.hash_part)
    other = Sample("library", b"another library")
    await lay(site, other)
    report = await run(site)
    assert kinds(report) == {key_of(LIBRARY): Kind.DISAGREEMENT}
    assert report.taken == 2
    assert site.index.get("main", LIBRARY.path.hash_part) == before
    assert await site.published() == parts(*CHAIN)


@pytest.mark.parametrize("sign", [False, True])
async def test_what_was_cut_off_does_not_take_the_place_of_what_is_published(
    site: Site, run: Run, *, sign: bool
) -> None:
    await site.send(*CHAIN)
    await site.add(*CHAIN)
    before = await site.catalog.path("main", PROGRAM.path.hash_part)
    text = await site.storage.get(key_of(PROGRAM), limit=10_000)
    assert text
    cut = text[: text.index(b"References:")]
    await site.storage.put(key_of(PROGRAM), cut, replace=True)
    report = await run(site, improve=Resigning(site.storage, site.cache, _refuse) if sign else as_found)
    assert kinds(report) == {key_of(PROGRAM): Kind.DISAGREEMENT}
    assert "was cut off" in whys(report)[key_of(PROGRAM)]
    assert (report.taken, report.withdrawn) == (2, 0)
    assert await site.catalog.path("main", PROGRAM.path.hash_part) == before
    assert answer(site, PROGRAM) == text
    assert await site.storage.get(key_of(PROGRAM), limit=10_000) == cut


async def test_what_is_published_otherwise_without_a_nar_gives_way(site: Site, run: Run) -> None:
    await site.send(*CHAIN)
    await site.add(*CHAIN)
    other = Sample("library", b"another library")
    await lay(site, other)
    await site.storage.delete([f"main/nar/{LIBRARY.nar_name}"])
    report = await run(site)
    assert (report.taken, whys(report)) == (3, {})
    assert answer(site, LIBRARY) == other.narinfo()


async def test_a_lost_index_is_filled_again(site: Site, run: Run) -> None:
    await site.send(*CHAIN)
    await site.add(*CHAIN)
    empty = MemoryIndex()
    filled = replace(site, index=empty)
    await run(filled)
    assert dict(empty.scan("main")) == dict(site.index.scan("main"))


async def test_what_was_believed_absent_is_there(site: Site, run: Run) -> None:
    site.index.put_absent([("main", LIBRARY.path.hash_part)], 2**40)
    await lay(site, LIBRARY)
    await run(site)
    assert isinstance(site.index.get("main", LIBRARY.path.hash_part), Present)


async def test_an_older_answer_of_the_index_is_replaced(site: Site, run: Run) -> None:
    older = present(LIBRARY.narinfo(signatures=(KEY.sign(b"older"),)))
    site.index.put([IndexEntry("main", LIBRARY.path.hash_part, older)])
    await lay(site, LIBRARY)
    await run(site)
    assert answer(site, LIBRARY) == LIBRARY.narinfo()


async def test_a_push_goes_on_from_there(site: Site, run: Run) -> None:
    """What was taken in counts as a reference, and gains our signature when it is pushed as well."""
    await lay(site, *CHAIN)
    await run(site)
    needs = Sample("needs", b"needs", (PROGRAM.path,))
    await site.send(needs)
    assert await site.add(needs) == [None]
    await site.send(LIBRARY)
    assert await site.add(LIBRARY) == [None]
    assert b"\nSig: main-1:" in answer(site, LIBRARY)


async def test_an_interrupted_one_reads_nothing_again_that_has_not_changed(
    site: Site, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "_READ_TOGETHER", 1)
    await lay(site, *CHAIN)
    with monkeypatch.context() as failing:
        failing.setattr(site.catalog, "restore", _unavailable)
        with pytest.raises(StoreUnavailable):
            await run(site)
    await lay(site, TOOL, signatures=(KEY.sign(b"x"),))
    read: list[str] = []
    get_many = site.storage.get_many

    async def noted(keys: Any, *, limit: int) -> dict[str, bytes]:
        read.extend(keys)
        return await get_many(keys, limit=limit)

    monkeypatch.setattr(site.storage, "get_many", noted)
    report = await run(site)
    assert read == [key_of(TOOL)]
    assert (report.taken, report.known, report.flaws) == (3, 2, 0)
    assert site.visible() == parts(*CHAIN)


async def test_what_was_broken_is_looked_at_again(site: Site, run: Run) -> None:
    await lay(site, *CHAIN)
    await site.storage.delete([f"main/nar/{LIBRARY.nar_name}"])
    assert (await run(site)).flaws == 3
    await lay(site, LIBRARY)
    assert (await run(site)).flaws == 0
    assert site.visible() == parts(*CHAIN)


async def _unavailable(*_: Any, **__: Any) -> Any:
    raise StoreUnavailable("as told")


class TestWithdrawal:
    """Published, and not in storage any more."""

    @pytest.fixture
    async def pushed(self, site: Site) -> Site:
        await site.send(*CHAIN)
        await site.add(*CHAIN)
        return site

    async def test_without_its_nar_it_is_served_no_more_with_what_needs_it(self, pushed: Site, run: Run) -> None:
        await pushed.storage.delete([f"main/nar/{TOOL.nar_name}"])
        report = await run(pushed)
        assert kinds(report) == {key_of(TOOL): Kind.MISSING_NAR, key_of(PROGRAM): Kind.MISSING_REFERENCE}
        assert (report.taken, report.withdrawn, report.flaws) == (1, 2, 2)
        assert await pushed.published() == pushed.visible() == parts(LIBRARY)

    async def test_without_its_narinfo_it_stays(self, pushed: Site, run: Run) -> None:
        """The catalog knows all that stood there."""
        await pushed.storage.delete([key_of(TOOL)])
        report = await run(pushed)
        assert kinds(report) == {key_of(TOOL): Kind.MISSING_NARINFO}
        assert (report.withdrawn, report.flaws) == (0, 1)
        assert await pushed.published() == pushed.visible() == parts(*CHAIN)

    async def test_without_its_narinfo_it_goes_where_others_write_to_storage(self, pushed: Site, run: Run) -> None:
        await pushed.storage.delete([key_of(TOOL)])
        report = await run(replace(pushed, cache=served_cache(bucket_is_authority=True)))
        assert kinds(report) == {key_of(TOOL): Kind.MISSING_NARINFO, key_of(PROGRAM): Kind.MISSING_REFERENCE}
        assert (report.taken, report.withdrawn, report.flaws) == (1, 2, 2)
        assert await pushed.published() == pushed.visible() == parts(LIBRARY)

    async def test_one_whose_narinfo_is_no_good_stays(self, pushed: Site, run: Run) -> None:
        """The catalog knows what it was, and the next push mends it."""
        await pushed.storage.put(key_of(TOOL), b"garbage", replace=True)
        report = await run(pushed)
        assert kinds(report) == {key_of(TOOL): Kind.UNREADABLE_NARINFO}
        assert report.withdrawn == 0
        assert await pushed.published() == pushed.visible() == parts(*CHAIN)

    async def test_nothing_goes_when_the_storage_is_empty(self, pushed: Site, run: Run) -> None:
        """It may not be mounted."""
        await pushed.storage.delete([info.key async for info in pushed.storage.list("")])
        report = await run(pushed)
        assert list(kinds(report).values()) == [Kind.EMPTY_STORAGE]
        assert await pushed.published() == pushed.visible() == parts(*CHAIN)

    async def test_an_answer_that_nothing_stands_behind_is_forgotten(self, pushed: Site, run: Run) -> None:
        entry = IndexEntry("main", path_of("gone").hash_part, present(Sample("gone").narinfo()))
        pushed.index.put([entry])
        await run(pushed)
        assert pushed.visible() == parts(*CHAIN)


class Moments:
    """The ends of all calls of the stores that it wraps; at one of these moments something happens."""

    def __init__(self, at: int, then: Callable[[], Awaitable[None]]) -> None:
        self.passed: list[str] = []
        self._at = at
        self._then = then
        self._loop = asyncio.get_running_loop()

    def wrap(self, store: Any) -> Any:
        return _Watched(store, self)

    async def pass_(self, name: str) -> None:
        self.passed.append(name)
        if len(self.passed) - 1 == self._at:
            await self._then()

    def pass_in_thread(self, name: str) -> None:
        asyncio.run_coroutine_threadsafe(self.pass_(name), self._loop).result()


class _Watched:
    def __init__(self, store: Any, moments: Moments) -> None:
        self._store = store
        self._moments = moments

    def __getattr__(self, name: str) -> Any:
        work, moments = getattr(self._store, name), self._moments

        async def awaited(*args: Any, **kwargs: Any) -> Any:
            result = await work(*args, **kwargs)
            await moments.pass_(name)
            return result

        async def walked(*args: Any, **kwargs: Any) -> Any:
            items = [item async for item in work(*args, **kwargs)]
            await moments.pass_(name)
            for item in items:
                yield item

        def in_thread(*args: Any, **kwargs: Any) -> Any:
            result = work(*args, **kwargs)
            moments.pass_in_thread(name)
            return result

        if inspect.iscoroutinefunction(work):
            return awaited
        if name == "list" or inspect.isasyncgenfunction(work):
            return walked
        return in_thread if name in {"put", "delete"} else work


class TestMeanwhile:
    """Pushes while it runs: what they acknowledged is served as they left it, whenever that was."""

    @staticmethod
    async def lost_catalog(site: Site) -> None:
        await lay(site, LIBRARY, TOOL)

    @staticmethod
    async def without_our_signature(site: Site) -> None:
        await _push(site, LIBRARY, TOOL)
        await lay(site, LIBRARY, TOOL)

    @staticmethod
    async def lost_index(site: Site) -> None:
        await _push(site, LIBRARY, TOOL)
        site.index.clear("main")

    @staticmethod
    async def lost_nar(site: Site) -> None:
        await _push(site, *CHAIN)
        await site.storage.delete([f"main/nar/{TOOL.nar_name}"])

    @staticmethod
    async def lost_narinfo(site: Site) -> None:
        await _push(site, *CHAIN)
        await site.storage.delete([key_of(LIBRARY)])

    @staticmethod
    async def older_answers(site: Site) -> None:
        await lay(site, LIBRARY, TOOL)
        older = present(LIBRARY.narinfo(signatures=(KEY.sign(b"older"),)))
        site.index.put([IndexEntry("main", LIBRARY.path.hash_part, older)])

    @pytest.mark.parametrize(
        "before", ["lost_catalog", "without_our_signature", "lost_index", "lost_nar", "lost_narinfo", "older_answers"]
    )
    async def test_at_any_moment(self, tmp_path: Path, before: str) -> None:
        at, last = -1, 0
        while at < last:
            (tmp_path / f"site {at}").mkdir()
            async with open_site(tmp_path / f"site {at}", storage=MemoryStore()) as site:
                await getattr(self, before)(site)
                moments = Moments(at, partial(_push, site, *CHAIN))
                scratch = Scratch(tmp_path / f"scratch {at}", TABLES)
                reindex = Reindex(*map(moments.wrap, (site.storage, site.catalog, site.index)))
                await reindex.run(site.cache, scratch, Told())
                scratch.close()
                if at < 0:
                    last = len(moments.passed) - 1
                    await _push(site, *CHAIN)
                await self.check(site, moments.passed[at])
            at += 1
        assert last > 3

    @staticmethod
    async def check(site: Site, moment: str) -> None:
        assert await site.published() == parts(*CHAIN), moment
        assert site.visible() <= parts(*CHAIN), moment
        for sample in CHAIN:
            record = await site.catalog.path("main", sample.path.hash_part)
            assert record is not None
            assert b"\nSig: main-1:" in record.narinfo, moment
            assert await site.storage.get(key_of(sample), limit=10**6) == record.narinfo, moment
            assert await site.storage.head(record.nar_key), moment
            # what the index does not know is looked up in the catalog
            known = site.index.get("main", sample.path.hash_part)
            assert known is None or (isinstance(known, Present) and known.body == record.narinfo), moment


async def _push(site: Site, *samples: Sample) -> None:
    await site.send(*samples)
    assert await site.add(*samples) == [None] * len(samples)


async def test_a_narinfo_that_goes_while_it_is_read(
    site: Site, run: Run, scratch: Scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    await lay(site, LIBRARY, TOOL)

    async def delete() -> None:
        await site.storage.delete([key_of(TOOL)])

    moments = Moments(0, delete)
    reindex = Reindex(*map(moments.wrap, (site.storage, site.catalog, site.index)))
    report = await reindex.run(site.cache, scratch, Told())
    assert moments.passed[0] == "list"
    assert kinds(report) == {key_of(TOOL): Kind.MISSING_NARINFO}
    assert site.visible() == parts(LIBRARY)


class TestSigning:
    """`--sign`."""

    async def test_what_lacks_a_signature_gets_it_in_storage_and_in_the_index(self, site: Site, run: Run) -> None:
        stranger = SecretKey.generate("stranger-1")
        await lay(site, LIBRARY, signatures=(stranger.sign(LIBRARY.info.fingerprint),))
        await lay(site, TOOL, signatures=(KEY.sign(TOOL.info.fingerprint),))
        await lay(site, PROGRAM)
        resigning = Resigning(site.storage, site.cache, _refuse)
        report = await run(site, improve=resigning)
        assert (report.taken, resigning.signed) == (3, 2)
        for sample in CHAIN:
            info = narinfo.parse(answer(site, sample))
            assert KEY.sign(sample.info.fingerprint) in info.signatures
            assert await site.storage.get(key_of(sample), limit=10**6) == answer(site, sample)
        assert stranger.sign(LIBRARY.info.fingerprint) in narinfo.parse(answer(site, LIBRARY)).signatures
        again = Resigning(site.storage, site.cache, _refuse)
        assert (await run(site, improve=again)).taken == 3
        assert again.signed == 0

    async def test_a_signature_by_another_key_of_the_same_name_is_replaced(self, site: Site, run: Run) -> None:
        older = SecretKey.generate(KEY.name)
        await lay(site, LIBRARY, signatures=(older.sign(LIBRARY.info.fingerprint),))
        await run(site, improve=Resigning(site.storage, site.cache, _refuse))
        assert narinfo.parse(answer(site, LIBRARY)).signatures == (KEY.sign(LIBRARY.info.fingerprint),)

    async def test_only_what_a_trusted_key_signed(self, tmp_path: Path, run: Run) -> None:
        trusted, other = SecretKey.generate("builder-1"), SecretKey.generate("builder-1")
        cache = served_cache(trusted_keys={"builder-1": trusted.public})
        async with open_site(tmp_path, cache=cache) as site:
            await lay(site, LIBRARY, signatures=(trusted.sign(LIBRARY.info.fingerprint),))
            await lay(site, TOOL, signatures=(other.sign(TOOL.info.fingerprint),))
            told = Told()
            await run(site, told, Resigning(site.storage, cache, told.flaw))
            assert [(flaw.object, Kind.of(flaw.kind)) for flaw in told.flaws] == [
                (key_of(TOOL), Kind.UNTRUSTED_NARINFO)
            ]
            assert b"Sig: main-1:" in answer(site, LIBRARY)
            assert b"Sig: main-1:" not in answer(site, TOOL)

    async def test_what_changed_since_it_was_read_is_left_alone(
        self, site: Site, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await lay(site, LIBRARY)
        other = Sample("library", b"another library")
        resigning = Resigning(site.storage, site.cache, _refuse)

        async def improve(found: Any) -> Any:
            await lay(site, other)
            return await resigning(found)

        await run(site, improve=improve)
        assert resigning.signed == 0
        assert await site.storage.get(key_of(LIBRARY), limit=10**6) == other.narinfo()


def _refuse(flaw: Flaw) -> None:
    raise AssertionError(flaw)
