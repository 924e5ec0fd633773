"""Realisations and build logs that are no good are found, named, and taken out of sight."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cachesrv.errors import BeingRemoved, StoreUnavailable
from cachesrv.nix.realisation import OutputId, Realisation, TracedOutput, fingerprints, object_name, render
from cachesrv.nix.signing import SecretKey
from cachesrv.services.caches import ReferencePolicy
from cachesrv.services.realisations import Realisations
from cachesrv.services.removing import Removing
from tests.planted import CHAIN, HOLDER, OTHER, TOOL, repair, verify
from tests.samples import path_of
from tests.service_site import KEY, Site, by_narinfo, open_site, served_cache

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from cachesrv.nix.realisation import RealisedOutput
    from cachesrv.nix.store_path import StorePath
    from cachesrv.services.flaws import Flaw

OUTPUT = OutputId(f"sha256:{'0' * 64}", "out")
TRACED = TracedOutput(path_of("tool.drv"), "out")
FORGER = SecretKey.generate(KEY.name)
NAME, TRACED_NAME = f"main/{object_name(OUTPUT)}", f"main/{object_name(TRACED)}"

both_layouts = pytest.mark.parametrize("output", [OUTPUT, TRACED], ids=["old", "new"])


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as site:
        await site.send(*CHAIN)
        assert await site.add(*CHAIN, as_=by_narinfo) == [None] * len(CHAIN)
        await push(site, OUTPUT, TOOL.path)
        await push(site, TRACED, TOOL.path)
        await site.storage.put(f"main/log/{path_of('tool.drv')}", b"built\n")
        yield site


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "verification"


async def push(site: Site, output: RealisedOutput, path: StorePath) -> None:
    given = render(output, Realisation(path, ()))
    await Realisations(site.storage, site.catalog).put(site.cache, output, given)


async def lay(site: Site, output: RealisedOutput, path: StorePath, key: SecretKey | None = None) -> None:
    """Put a realisation into storage as another program would."""
    given = Realisation(path, ())
    if key:
        given = replace(given, signatures=(key.sign(fingerprints(output, given)[0]),))
    await site.storage.put(f"main/{object_name(output)}", render(output, given), replace=True)


async def found(site: Site, journal: Path) -> dict[str, Flaw]:
    return {flaw.object: flaw for flaw in (await verify(site, journal)).flaws}


async def test_nothing_is_wrong_with_what_was_pushed(site: Site, journal: Path) -> None:
    assert await found(site, journal) == {}


@both_layouts
async def test_each_fault_is_found_and_goes(site: Site, journal: Path, output: RealisedOutput) -> None:
    key = f"main/{object_name(output)}"

    async def repaired(kind: str, said: str) -> None:
        flaws = await found(site, journal)
        assert flaws.keys() == {key}
        assert flaws[key].kind == kind
        assert said in flaws[key].what
        there = await site.storage.get(key, limit=2**21)
        (outcome,) = (await repair(site, [*flaws.values()])).outcomes
        assert (outcome.result, outcome.path, said in outcome.what) == ("removed", key, True)
        assert await site.storage.head(key) is None
        kept = site.folder / "removed" / "main" / object_name(output).replace("/", "_")
        assert kept.read_bytes() == there
        assert str(kept) in outcome.get_back
        assert await found(site, journal) == {}
        assert not await site.catalog.doomed()
        await push(site, output, TOOL.path)
        assert await found(site, journal) == {}

    await site.storage.put(key, b"garbage", replace=True)
    await repaired("bad-realisation", "the realisation is none: ")
    await lay(site, output, TOOL.path, FORGER)
    await repaired("bad-realisation", "the signature of the realisation by main-1 does not hold")
    await lay(site, output, path_of("nowhere"), KEY)
    await repaired("dangling-realisation", f"the realisation leads to {path_of('nowhere')}, which is not there")


async def test_one_in_the_place_of_another_is_found(site: Site, journal: Path) -> None:
    other = OutputId(f"sha256:{'1' * 64}", "out")
    there = await site.storage.get(NAME, limit=10_000)
    assert there
    await site.storage.put(f"main/{object_name(other)}", there)
    flaws = await found(site, journal)
    assert {flaw.kind for flaw in flaws.values()} == {"bad-realisation"}
    assert flaws.keys() == {f"main/{object_name(other)}"}


async def test_one_that_is_too_large_is_found_beside_good_ones(site: Site, journal: Path) -> None:
    await site.storage.put(NAME, bytes(2**20 + 1), replace=True)
    flaws = await found(site, journal)
    assert {key: flaw.kind for key, flaw in flaws.items()} == {NAME: "bad-realisation"}
    assert (await repair(site, [*flaws.values()])).results == {NAME: "removed"}


async def test_what_has_no_name_that_is_asked_for_is_told_and_stays(site: Site, journal: Path) -> None:
    strange = {"main/realisations/notes", "main/build-trace-v2/x/out.doi", "main/log/notes"}
    for key in strange:
        await site.storage.put(key, b"whatever")
    flaws = await found(site, journal)
    assert {(key, flaw.kind) for key, flaw in flaws.items()} == {(key, "foreign-object") for key in strange}
    assert (await repair(site, [*flaws.values()])).results == dict.fromkeys(strange, "left")
    assert set(await found(site, journal)) == strange


async def test_a_path_that_was_taken_away_leaves_nothing_wrong(site: Site, journal: Path) -> None:
    """Clients build what is not there; and nothing is known of what a catalog has lost, which lies in storage."""
    await lay(site, OUTPUT, OTHER.path, KEY)
    await site.storage.delete([f"main/nar/{OTHER.nar_name}"])
    flaws = await found(site, journal)
    assert {flaw.kind for flaw in flaws.values()} == {"missing-nar"}
    assert (await repair(site, [*flaws.values()])).results == {"other": "removed"}
    assert await found(site, journal) == {}
    await site.catalog.remove("main", [TOOL.path.hash_part])
    flaws = await found(site, journal)
    assert NAME not in flaws
    assert TRACED_NAME not in flaws


async def test_not_where_anything_may_be_referred_to(site: Site, journal: Path) -> None:
    await lay(site, OUTPUT, path_of("nowhere"), KEY)
    cache = served_cache(references=ReferencePolicy.ANY)
    assert (await verify(site, journal, caches={"main": cache})).flaws == []


async def test_what_others_write_is_left_to_them(site: Site, journal: Path) -> None:
    await site.storage.put(NAME, b"garbage", replace=True)
    caches = {"main": served_cache(bucket_is_authority=True)}
    flaws = (await verify(site, journal, caches=caches)).flaws
    assert {flaw.object for flaw in flaws} == {NAME}
    (outcome,) = (await repair(site, flaws, caches=caches)).outcomes
    assert (outcome.result, "it is for them to mend it" in outcome.what) == ("left", True)
    assert await site.storage.head(NAME)


async def test_when_too_many_are_wrong_it_is_the_key(site: Site, journal: Path) -> None:
    outputs = [OutputId(f"sha256:{number:064x}", "out") for number in range(11)]
    for output in outputs:
        await lay(site, output, TOOL.path, FORGER)
    flaws = [*(await found(site, journal)).values()]
    assert len(flaws) == 11
    assert {*(await repair(site, flaws)).results.values()} == {"left"}
    assert {*(await repair(site, flaws, forced=True)).results.values()} == {"removed"}
    assert await found(site, journal) == {}


async def test_what_became_well_meanwhile_stays(site: Site, journal: Path) -> None:
    """A push that was told that all is well is not undone by a repair that began before it."""
    await site.storage.put(NAME, b"garbage", replace=True)
    flaws = [*(await found(site, journal)).values()]
    await push(site, OUTPUT, TOOL.path)
    assert (await repair(site, flaws)).results == {NAME: "mended"}
    assert await site.storage.head(NAME)


async def test_a_push_between_the_last_look_and_the_deletion_is_told_to_come_again(site: Site) -> None:
    await site.storage.put(NAME, b"garbage", replace=True)
    await site.catalog.lock("maintenance", HOLDER, now=0, until=2**40)
    removing = Removing(site.storage, site.catalog, site.index)

    async def is_wrong() -> bool:
        with pytest.raises(BeingRemoved):
            await push(site, OUTPUT, TOOL.path)
        return True

    assert await removing.metadata(NAME, is_wrong, holder=HOLDER)
    assert await site.storage.head(NAME) is None
    await push(site, OUTPUT, TOOL.path)
    assert await site.storage.head(NAME)


async def test_a_push_that_began_before_the_deletion_looks_again(site: Site) -> None:
    """Its realisation was there, and went, before it could say so."""
    await site.storage.delete([NAME])
    await site.catalog.lock("maintenance", HOLDER, now=0, until=2**40)
    removing = Removing(site.storage, site.catalog, site.index)
    deleted: list[bool] = []

    class Deleted:
        """Storage in which what is written goes at once, the first time."""

        def __getattr__(self, name: str) -> Any:
            return getattr(site.storage, name)

        async def put(self, key: str, data: bytes, *, replace: bool = False) -> bool:
            written = await site.storage.put(key, data, replace=replace)

            async def is_wrong() -> bool:
                return True

            if not deleted:
                deleted.append(await removing.metadata(key, is_wrong, holder=HOLDER))
            return written

    given = render(OUTPUT, Realisation(TOOL.path, ()))
    storage: Any = Deleted()
    await Realisations(storage, site.catalog).put(site.cache, OUTPUT, given)
    assert deleted == [True]
    assert await site.storage.head(NAME)


async def test_a_repair_that_is_killed_takes_nothing_with_it_that_became_well(site: Site) -> None:
    """Not even later, when somebody ends what it had begun; and what is wrong still is found again."""
    await site.storage.put(TRACED_NAME, b"garbage", replace=True)
    await site.catalog.lock("maintenance", HOLDER, now=0, until=2**40)

    class Killed:
        """A catalog that is out of reach from the moment on that it knows what is about to go."""

        def __getattr__(self, name: str) -> Any:
            return getattr(site.catalog, name)

        async def settle(self, _: object) -> None:
            raise StoreUnavailable

    async def is_wrong() -> bool:
        raise StoreUnavailable

    catalog: Any = Killed()
    for key in (NAME, TRACED_NAME):
        with pytest.raises(StoreUnavailable):
            await Removing(site.storage, catalog, site.index).metadata(key, is_wrong, holder=HOLDER)
    with pytest.raises(BeingRemoved):
        await push(site, OUTPUT, TOOL.path)
    await Removing(site.storage, site.catalog, site.index).finish({"main": site.cache})
    assert await site.storage.head(NAME)
    await push(site, OUTPUT, TOOL.path)
    await site.catalog.unlock("maintenance", HOLDER)
    flaws = await verify(site, site.folder / "journal")
    assert (await repair(site, flaws.flaws)).results == {TRACED_NAME: "removed"}
