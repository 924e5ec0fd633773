"""Publishing: what becomes visible, in what order, and what is left when it is cut short."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cachesrv.errors import (
    BadInput,
    CachesrvError,
    Conflict,
    Mismatch,
    MissingNar,
    MissingReferences,
    StoreError,
    StoreUnavailable,
    TooLarge,
    Unsigned,
)
from cachesrv.index.base import IndexEntry, Present
from cachesrv.index.memory import MemoryIndex
from cachesrv.nix import narinfo
from cachesrv.nix.signing import SecretKey
from cachesrv.services.caches import ReferencePolicy
from cachesrv.services.candidate import Candidate
from cachesrv.services.lookup import CatalogSource, Lookup
from cachesrv.storage import incoming
from tests.samples import Sample, path_of
from tests.service_site import (
    KEY,
    Site,
    Steps,
    by_api,
    by_narinfo,
    check_what_is_visible,
    open_site,
    served_cache,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from pathlib import Path

LIBRARY = Sample("library", b"library")
TOOL = Sample("tool", b"tool", (LIBRARY.path, path_of("tool")))
PROGRAM = Sample("program", b"program", (LIBRARY.path, TOOL.path))
CHAIN = (LIBRARY, TOOL, PROGRAM)

both = pytest.mark.parametrize("as_", [by_api, by_narinfo])


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as site:
        yield site


@both
async def test_a_closure(site: Site, as_: Callable[[Sample], Candidate]) -> None:
    await site.send(*CHAIN)
    assert await site.add(*CHAIN, as_=as_) == [None] * 3
    await check_what_is_visible(site)
    assert site.visible() == {sample.path.hash_part for sample in CHAIN}
    for sample in CHAIN:
        answer = site.index.get("main", sample.path.hash_part)
        assert isinstance(answer, Present)
        info = narinfo.parse(answer.body)
        assert (info.nar_hash, info.nar_size, info.references) == (
            sample.nar_hash,
            len(sample.nar),
            sample.info.references,
        )
        assert KEY.public.verify(info.fingerprint, info.signatures[0])
        listing = await site.storage.get(f"main/{sample.path.hash_part}.ls", limit=10_000)
        assert listing is not None
        assert json.loads(listing)["root"]["size"] == len(sample.content)
    assert site.metrics.total("paths_published") == 3


@both
async def test_what_is_not_as_it_says(site: Site, as_: Callable[[Sample], Candidate]) -> None:
    await site.send(*CHAIN)
    (outcome,) = await site.add(Sample("program", b"never sent"), as_=as_)
    assert isinstance(outcome, MissingNar)
    (outcome,) = await site.add(PROGRAM, as_=as_)
    assert isinstance(outcome, MissingReferences)
    assert LIBRARY.path.base_name in str(outcome)
    assert TOOL.path.base_name in str(outcome)
    assert await site.published() == set()
    assert site.metrics.total("pushes_refused") == 2
    assert {name for name in await site.names() if not name.startswith("nar/")} == set()


async def test_a_failing_member_fails_its_dependants_only(site: Site) -> None:
    other = Sample("other", b"other")
    lost = Sample("lost", b"lost")
    needs_lost = Sample("needs-lost", b"needs lost", (lost.path, LIBRARY.path))
    needs_that = Sample("needs-that", b"needs that", (needs_lost.path,))
    await site.send(*CHAIN, other, needs_lost, needs_that)
    batch = (LIBRARY, lost, needs_lost, other, needs_that, TOOL, PROGRAM)
    outcomes = dict(zip([sample.name for sample in batch], await site.add(*batch), strict=True))
    assert {name for name, outcome in outcomes.items() if outcome is None} == {"library", "other", "tool", "program"}
    assert isinstance(outcomes["lost"], MissingNar)
    assert isinstance(outcomes["needs-lost"], MissingReferences)
    assert isinstance(outcomes["needs-that"], MissingReferences)
    await check_what_is_visible(site)
    assert site.visible() == {sample.path.hash_part for sample in (*CHAIN, other)}


async def test_references_come_first(site: Site) -> None:
    """A batch in the wrong order: what comes too early fails."""
    await site.send(*CHAIN)
    outcomes = await site.add(TOOL, LIBRARY)
    assert isinstance(outcomes[0], MissingReferences)
    assert outcomes[1] is None


async def test_what_was_refused_is_remembered(site: Site) -> None:
    await site.send(TOOL)
    assert await site.add(TOOL, LIBRARY) != [None, None]
    refusal = await site.catalog.refusal("main", TOOL.path.hash_part)
    assert refusal is not None
    assert (refusal.name, refusal.pusher) == ("tool", "somebody")
    assert LIBRARY.path.base_name in refusal.reason
    missing = await site.catalog.refusal("main", LIBRARY.path.hash_part)
    assert missing is not None
    assert missing.reason.startswith("there is no NAR")
    await site.send(LIBRARY)
    await site.add(LIBRARY)
    again = replace(by_api(LIBRARY), nar_hash=TOOL.nar_hash, nar_size=len(TOOL.nar))
    assert isinstance((await site.publish.many(site.cache, [again], "ann"))[0], Conflict)
    assert await site.catalog.refusal("main", LIBRARY.path.hash_part) == missing, "that is another list"


@both
async def test_a_second_nar_for_a_path(site: Site, as_: Callable[[Sample], Candidate]) -> None:
    """Refused with both hashes, and remembered once for each who tried."""
    again = Sample("library", b"another library")
    await site.send(LIBRARY, again)
    await site.add(LIBRARY)
    for _ in range(2):
        (outcome,) = await site.add(again, as_=as_)
        assert isinstance(outcome, Conflict)
        assert LIBRARY.nar_hash.nix32 in str(outcome)
        assert again.nar_hash.nix32 in str(outcome)
    (conflict,) = await site.catalog.conflicts("main")
    assert conflict.hash_part == LIBRARY.path.hash_part
    assert conflict.published_nar_hash == LIBRARY.nar_hash.nix32
    assert conflict.refused_nar_hash == again.nar_hash.nix32
    assert conflict.pusher == "somebody"
    # those that need the path may follow: it is there
    needs = Sample("needs", b"needs", (LIBRARY.path,))
    await site.send(needs)
    outcomes = await site.add(again, needs, as_=as_)
    assert isinstance(outcomes[0], Conflict)
    assert outcomes[1] is None


async def test_two_nars_for_a_path_in_one_batch(site: Site) -> None:
    """The first one is published."""
    again = Sample("library", b"another library")
    await site.send(LIBRARY, again)

    outcomes = await site.add(LIBRARY, again)

    assert outcomes[0] is None
    assert isinstance(outcomes[1], Conflict)
    assert LIBRARY.nar_hash.nix32 in str(outcomes[1])
    record = await site.catalog.path("main", LIBRARY.path.hash_part)
    assert record is not None
    assert record.nar_hash == LIBRARY.nar_hash.nix32
    await check_what_is_visible(site)


async def test_a_path_twice_in_one_batch(site: Site) -> None:
    tool = replace(TOOL, references=())
    await site.send(*CHAIN)
    assert await site.add(LIBRARY, TOOL, tool, TOOL) == [None] * 4
    await check_what_is_visible(site)


async def test_a_narinfo_that_nobody_would_read_again_is_not_published(tmp_path: Path) -> None:
    many = Sample("many", references=tuple(path_of(f"{number}-{'n' * 200}") for number in range(5000)))
    async with open_site(tmp_path, cache=served_cache(references=ReferencePolicy.ANY)) as site:
        await site.send(many)
        (outcome,) = await site.add(many)
        assert isinstance(outcome, TooLarge)
        assert "5000 references" in str(outcome)
        assert await site.published() == set()


@pytest.mark.parametrize("gone_after", [0, 2])
async def test_a_store_that_has_gone_is_not_asked_for_each_path(tmp_path: Path, gone_after: int) -> None:
    """`gone_after`: so many paths, which are tried one by one since one of them cannot be published."""
    samples = [Sample(f"sample-{number}", b"%d" % number) for number in range(20)]
    asked = 0

    class Gone:
        def __init__(self, store: Any) -> None:
            self._store = store

        def __getattr__(self, name: str) -> Any:
            return getattr(self._store, name)

        async def put_in_order(self, levels: Sequence[Mapping[str, bytes]]) -> Any:
            nonlocal asked
            asked += 1
            if gone_after and asked == 1:
                raise StoreError("one of them")
            if asked > gone_after:
                raise StoreUnavailable("no answer")
            return await self._store.put_in_order(levels)

    def wrap(store: Any) -> Any:
        return Gone(store) if hasattr(store, "put_in_order") else store

    async with open_site(tmp_path, wrap=wrap) as site:
        await site.send(*samples)
        outcomes = await site.add(*samples)
        published = max(0, gone_after - 1)
        assert [outcome is None for outcome in outcomes] == [True] * published + [False] * (20 - published)
        assert isinstance(outcomes[-1], StoreUnavailable)
        assert asked == gone_after + 1
        await check_what_is_visible(site)


async def test_many_at_once_publish_one_of_two(site: Site) -> None:
    """Two contents of one path at the same time: one is published, the other one is refused."""
    samples = [Sample("library", str(number).encode()) for number in range(8)]
    await site.send(*samples)
    outcomes = [outcome for (outcome,) in await asyncio.gather(*(site.add(sample) for sample in samples))]
    assert outcomes.count(None) == 1
    assert sum(isinstance(outcome, Conflict) for outcome in outcomes) == 7
    winner = samples[outcomes.index(None)]
    record = await site.catalog.path("main", winner.path.hash_part)
    assert record is not None
    assert record.nar_hash == winner.nar_hash.nix32
    await check_what_is_visible(site)


async def test_signatures_gather(site: Site) -> None:
    """Those that a path had stay, those that it brings join them; in the name of our key there is only our own."""
    first, second = SecretKey.generate("first-1"), SecretKey.generate("second-1")
    impostor = SecretKey.generate(KEY.name)
    await site.send(LIBRARY)
    for key in (first, second, impostor):
        signed = LIBRARY.info.add_signatures([key.sign(LIBRARY.info.fingerprint)])
        await site.publish.one(site.cache, Candidate.from_narinfo(signed), "somebody")
    answer = site.index.get("main", LIBRARY.path.hash_part)
    assert isinstance(answer, Present)
    info = narinfo.parse(answer.body)
    assert sorted(signature.name for signature in info.signatures) == ["first-1", KEY.name, "second-1"]
    for key in (first, second, KEY):
        assert any(key.public.verify(info.fingerprint, signature) for signature in info.signatures)
    await check_what_is_visible(site)


async def test_a_cache_that_wants_signatures(tmp_path: Path) -> None:
    trusted, stranger = SecretKey.generate("trusted-1"), SecretKey.generate("stranger-1")
    cache = served_cache(trusted_keys={"trusted-1": trusted.public})
    async with open_site(tmp_path, cache=cache) as site:
        await site.send(LIBRARY)
        for key in (stranger, SecretKey.generate("trusted-1")):
            signed = LIBRARY.info.add_signatures([key.sign(LIBRARY.info.fingerprint)])
            with pytest.raises(Unsigned, match="trusted-1"):
                await site.publish.one(cache, Candidate.from_narinfo(signed), "somebody")
        signed = LIBRARY.info.add_signatures([trusted.sign(LIBRARY.info.fingerprint)])
        await site.publish.one(cache, Candidate.from_narinfo(signed), "somebody")


async def test_a_cache_that_holds_a_part_only(tmp_path: Path) -> None:
    async with open_site(tmp_path, cache=served_cache(references=ReferencePolicy.ANY)) as site:
        await site.send(PROGRAM)
        assert await site.add(PROGRAM) == [None]


async def test_a_content_address_that_does_not_hold(site: Site) -> None:
    """What a path says of its contents is checked against them, whoever signed it."""
    ca = "fixed:sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73"
    await site.send(LIBRARY)
    lying = narinfo.parse(LIBRARY.narinfo() + f"CA: {ca}\n".encode())
    with pytest.raises(BadInput, match="does not lead to"):
        await site.publish.one(site.cache, Candidate.from_narinfo(lying), "somebody")


async def test_the_file_is_what_the_narinfo_says(site: Site) -> None:
    await site.send(LIBRARY)
    lying = narinfo.parse(LIBRARY.narinfo(file_size=1))
    with pytest.raises(Mismatch, match="FileSize says 1"):
        await site.publish.one(site.cache, Candidate.from_narinfo(lying), "somebody")


async def test_equal_nars_are_stored_once(site: Site) -> None:
    """Two paths with the same content share a NAR; each has its own narinfo and listing."""
    twin = Sample("twin", LIBRARY.content)
    await site.send(LIBRARY)
    assert await site.add(LIBRARY, twin) == [None, None]
    assert await site.names() == {
        "nix-cache-info",
        f"nar/{LIBRARY.nar_name}",
        *(f"{sample.path.hash_part}.narinfo" for sample in (LIBRARY, twin)),
        *(f"{sample.path.hash_part}.ls" for sample in (LIBRARY, twin)),
    }
    third = Sample("third", LIBRARY.content)
    assert await site.add(third) == [None]
    assert f"{third.path.hash_part}.ls" in await site.names()


async def number_of_steps(folder: Path) -> list[str]:
    steps = Steps()
    async with open_site(folder, wrap=steps.wrap) as site:
        await site.send(*CHAIN)
        await site.add(*CHAIN)
    return steps.taken


async def push(site: Site, as_: Callable[[Sample], Candidate]) -> None:
    await site.send(*CHAIN)
    for outcome in await site.add(*CHAIN, as_=as_):
        if outcome:
            raise outcome


@pytest.mark.parametrize(("as_", "late"), [(by_api, False), (by_api, True), (by_narinfo, False)])
async def test_cut_short_at_every_step(tmp_path: Path, as_: Callable[[Sample], Candidate], late: bool) -> None:
    """Whichever write was the last one: nothing is visible too early, and the same push completes it."""
    taken = await number_of_steps(tmp_path / "whole")
    assert taken.index("put_in_order") > taken.index("put_nar")
    assert taken[-2:] == ["publish", "put"], "the index comes last, after the catalog"
    async with open_site(tmp_path / "empty"):
        pass
    for number in range(len(taken)):
        folder = tmp_path / str(number)
        steps = Steps(number, late=late)
        async with open_site(folder, wrap=steps.wrap, copy_of=tmp_path / "empty") as site:
            with pytest.raises(StoreError, match="as told"):
                await push(site, as_)
            await check_what_is_visible(site)
            index = site.index
        async with open_site(folder, index=index) as site:
            await check_what_is_visible(site)
            await push(site, as_)
            await check_what_is_visible(site)
            assert site.visible() == {sample.path.hash_part for sample in CHAIN}


async def check_answers(site: Site) -> None:
    """Clients are told what the catalog says, neither less nor something older."""
    lookup = Lookup(site.index, [CatalogSource(site.catalog)], negative_ttl=1000, timeout=10)
    for sample in CHAIN:
        answer = await lookup.find(site.cache, sample.path.hash_part)
        record = await site.catalog.path("main", sample.path.hash_part)
        assert (answer and answer.body) == (record and record.narinfo), sample.name
    await lookup.close()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("before", ["absent", "published"])
async def test_cut_short_after_it_was_asked_for(tmp_path: Path, before: str, late: bool) -> None:
    """The index knew of the paths: that they are not there, or their narinfos from before. Wherever the process dies,
    it does not hold on to that against the catalog.
    """
    resent = [replace(sample, compression="zstd") for sample in CHAIN]
    async with open_site(tmp_path / "before") as site:
        await site.send(*CHAIN, *resent)
        if before == "published":
            assert await site.add(*CHAIN, as_=by_narinfo) == [None] * 3
        answers = dict(site.index.scan("main"))
    number, failed = 0, True
    while failed:
        index = MemoryIndex()
        if before == "published":
            index.put(
                [IndexEntry("main", part, answer) for part, answer in answers.items() if isinstance(answer, Present)]
            )
        else:
            index.put_absent([("main", sample.path.hash_part) for sample in CHAIN], 2**40)
        steps = Steps(number, late=late)
        folder = tmp_path / str(number)
        async with open_site(folder, index=index, wrap=steps.wrap, copy_of=tmp_path / "before") as site:
            failed = any(await site.add(*resent, as_=by_narinfo))
            await check_answers(site)
        number += 1
    assert number > 5, "it was never cut short"
    assert all(isinstance(index.get("main", sample.path.hash_part), Present) for sample in CHAIN)


@pytest.mark.parametrize("shown", [1, 4, 7, 11])
async def test_killed_between_two_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shown: int) -> None:
    """The files of a batch get their names one by one: also in between, none is there without its references."""
    samples = [
        Sample(str(number), str(number).encode(), (path_of(str(number - 1)),) if number else ()) for number in range(12)
    ]
    reveal = incoming.IncomingFile.reveal
    names = 0

    def reveal_some(file: incoming.IncomingFile, *, replace: bool) -> bool:
        nonlocal names
        if file.key.endswith(".narinfo"):
            names += 1
            if names > shown:
                raise OSError("killed")
        return reveal(file, replace=replace)

    async with open_site(tmp_path) as site:
        await site.send(*samples)
        monkeypatch.setattr(incoming.IncomingFile, "reveal", reveal_some)
        assert any(isinstance(outcome, CachesrvError) for outcome in await site.add(*samples))
        await check_what_is_visible(site)
        assert sum(name.endswith(".narinfo") for name in await site.names()) >= shown
        monkeypatch.undo()
        assert await site.add(*samples) == [None] * len(samples)
        await check_what_is_visible(site)
