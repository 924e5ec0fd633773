"""Realisations: they lead to what is there, are signed, and do not come to mean something else."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from cachesrv.errors import Conflict, MissingReferences, Unsigned
from cachesrv.nix import realisation as layouts
from cachesrv.nix.realisation import OutputId, Realisation, TracedOutput, fingerprints, object_name, render
from cachesrv.nix.signing import SecretKey, Signature, trusted_keys
from cachesrv.nix.store_path import StorePath
from cachesrv.services.caches import ReferencePolicy
from cachesrv.services.realisations import Realisations
from tests.samples import Sample
from tests.service_site import KEY, Site, open_site, served_cache

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from cachesrv.nix.realisation import RealisedOutput
    from cachesrv.services.caches import ServedCache

THERE, ALSO, ABSENT = Sample("there", b"there"), Sample("also", b"also"), Sample("absent")
OUTPUT = OutputId(f"sha256:{'0' * 64}", "out")
NEEDED = OutputId(f"sha256:{'1' * 64}", "dev")
TRACED = TracedOutput(StorePath("0" * 32, "there.drv"), "out")
BUILDER = SecretKey.generate("builder-1")

both_layouts = pytest.mark.parametrize("output", [OUTPUT, TRACED], ids=["old", "new"])


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path) as site:
        await site.send(THERE, ALSO)
        assert await site.add(THERE, ALSO) == [None, None]
        yield site


@pytest.fixture
def realisations(site: Site) -> Realisations:
    return Realisations(site.storage, site.catalog)


def leading_to(sample: Sample, *signatures: Signature) -> Realisation:
    return Realisation(sample.path, signatures)


def signed(output: RealisedOutput, given: Realisation, key: SecretKey = BUILDER) -> Realisation:
    return replace(given, signatures=(*given.signatures, key.sign(fingerprints(output, given)[0])))


async def stored(site: Site, output: RealisedOutput) -> Realisation | None:
    data = await site.storage.get(f"main/{object_name(output)}", limit=1_000_000)
    if data is None:
        return None
    if isinstance(output, OutputId):
        return layouts.parse_realisation(data, output)
    return layouts.parse_build_trace(data)


async def put(
    realisations: Realisations, output: RealisedOutput, given: Realisation, cache: ServedCache | None = None
) -> None:
    await realisations.put(cache or served_cache(), output, render(output, given))


@both_layouts
async def test_they_lead_to_what_is_there_and_stay(
    site: Site, realisations: Realisations, output: RealisedOutput
) -> None:
    with pytest.raises(MissingReferences, match="absent"):
        await put(realisations, output, leading_to(ABSENT))
    assert await stored(site, output) is None
    for _ in range(2):
        await put(realisations, output, leading_to(THERE))
        found = await stored(site, output)
        assert found is not None
        assert found.out_path == THERE.path
    with pytest.raises(Conflict) as caught:
        await put(realisations, output, leading_to(ALSO))
    assert str(THERE.path) in str(caught.value)
    assert str(ALSO.path) in str(caught.value)
    assert await stored(site, output) == found


@both_layouts
async def test_the_cache_signs_them(site: Site, realisations: Realisations, output: RealisedOutput) -> None:
    await put(realisations, output, signed(output, leading_to(THERE)))

    found = await stored(site, output)
    assert found is not None
    (text,) = fingerprints(output, found)
    names = {one.name: one for one in found.signatures}
    assert names.keys() == {"main-1", "builder-1"}
    assert KEY.public.verify(text, names["main-1"])
    assert BUILDER.public.verify(text, names["builder-1"])


async def test_with_dependencies_both_texts_are_signed(site: Site, realisations: Realisations) -> None:
    """Nix 2.34 does not know of dependencies any more, Nix 2.8 signs them too."""
    await put(realisations, NEEDED, leading_to(ALSO))
    await put(realisations, OUTPUT, Realisation(THERE.path, (), ((NEEDED, ALSO.path),)))

    found = await stored(site, OUTPUT)
    assert found is not None
    texts = fingerprints(OUTPUT, found)
    assert len(texts) == len(found.signatures) == 2
    assert all(any(KEY.public.verify(text, one) for one in found.signatures) for text in texts)


async def test_they_gain_signatures(site: Site, realisations: Realisations) -> None:
    other = SecretKey.generate("other-1")
    await put(realisations, OUTPUT, signed(OUTPUT, leading_to(THERE)))
    await put(realisations, OUTPUT, signed(OUTPUT, leading_to(THERE), other))

    found = await stored(site, OUTPUT)
    assert found is not None
    assert {one.name for one in found.signatures} == {"main-1", "builder-1", "other-1"}


async def test_signatures_in_the_name_of_known_keys_have_to_hold(site: Site, realisations: Realisations) -> None:
    cache = served_cache(trusted_keys=trusted_keys([BUILDER.public]))
    forged = [Signature("main-1", bytes(64)), Signature("builder-1", bytes(64)), Signature("unknown-1", bytes(64))]
    await put(realisations, OUTPUT, signed(OUTPUT, leading_to(THERE, *forged)), cache)

    found = await stored(site, OUTPUT)
    assert found is not None
    assert sorted(one.name for one in found.signatures) == ["builder-1", "main-1", "unknown-1"]
    assert all(any(one.data) for one in found.signatures if one.name != "unknown-1")


@both_layouts
async def test_a_cache_that_wants_signatures_wants_them_here_too(
    site: Site, realisations: Realisations, output: RealisedOutput
) -> None:
    cache = served_cache(trusted_keys=trusted_keys([BUILDER.public]))
    for given in (leading_to(THERE), signed(output, leading_to(ALSO)).signatures):
        unsigned = given if isinstance(given, Realisation) else leading_to(THERE, *given)
        with pytest.raises(Unsigned, match="builder-1"):
            await put(realisations, output, unsigned, cache)
    await put(realisations, output, signed(output, leading_to(THERE)), cache)
    assert await stored(site, output) is not None


async def test_what_they_need_is_there(site: Site, realisations: Realisations) -> None:
    needing = Realisation(THERE.path, (), ((NEEDED, ALSO.path), (OUTPUT, THERE.path)))
    with pytest.raises(MissingReferences, match=str(NEEDED)):
        await put(realisations, OUTPUT, needing)
    await put(realisations, OUTPUT, needing, served_cache(references=ReferencePolicy.UPSTREAM))
    await put(realisations, NEEDED, leading_to(ALSO))
    await put(realisations, OUTPUT, needing)


async def test_a_cache_that_holds_a_part_only(site: Site, realisations: Realisations) -> None:
    await put(realisations, OUTPUT, leading_to(ABSENT), served_cache(references=ReferencePolicy.ANY))


async def test_what_is_broken_in_storage_is_replaced(site: Site, realisations: Realisations) -> None:
    await site.storage.put(f"main/{object_name(OUTPUT)}", b"garbage")
    await put(realisations, OUTPUT, leading_to(THERE))
    assert await stored(site, OUTPUT) is not None


async def test_one_that_leads_to_what_was_deleted_is_replaced(site: Site, realisations: Realisations) -> None:
    """Its output may come out otherwise when it is built again."""
    await site.storage.put(f"main/{object_name(OUTPUT)}", render(OUTPUT, signed(OUTPUT, leading_to(ABSENT))))
    await put(realisations, OUTPUT, leading_to(THERE))
    found = await stored(site, OUTPUT)
    assert found is not None
    assert found.out_path == THERE.path
    assert [one.name for one in found.signatures] == ["main-1"]


async def test_which_are_missing(site: Site, realisations: Realisations) -> None:
    await put(realisations, OUTPUT, leading_to(THERE))
    assert await realisations.missing(served_cache(), [OUTPUT, NEEDED, TRACED]) == [NEEDED, TRACED]
