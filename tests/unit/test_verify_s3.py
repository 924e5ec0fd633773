"""Faults in a bucket are found and repaired as those in a folder are."""

from __future__ import annotations

from contextlib import closing
from secrets import token_hex
from typing import TYPE_CHECKING

import pytest

from cachesrv.nix.realisation import OutputId, Realisation, object_name, render
from cachesrv.services.realisations import Realisations
from cachesrv.storage.decorators import Direct, Limited, Retrying
from cachesrv.storage.s3 import S3Store
from tests.planted import CHAIN, FAULTS, LOST, Fault, Repaired, leave_temporary_file, nar_key, repair, verify
from tests.service_site import Site, by_narinfo, open_site

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.radosgw import Gateway

IN_A_BUCKET = tuple(fault for fault in FAULTS if fault.plant is not leave_temporary_file and "index" not in fault.name)


@pytest.fixture
async def site(gateway: Gateway, bucket: str, tmp_path: Path) -> AsyncIterator[Site]:
    requests = Retrying(Limited(Direct()))
    prefix = token_hex(8)
    storage = S3Store(bucket, requests=requests, endpoint=gateway.endpoint, prefix=prefix, session=gateway.session())
    async with open_site(tmp_path, storage=storage) as site:
        await site.send(*CHAIN)
        assert await site.add(*CHAIN, as_=by_narinfo) == [None] * len(CHAIN)
        yield site


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "verification"


def removed(repaired: Repaired) -> set[str]:
    return {name for name, result in repaired.results.items() if result == "removed"}


@pytest.mark.parametrize("fault", IN_A_BUCKET, ids=str)
async def test_each_fault_is_found_and_repaired(site: Site, journal: Path, fault: Fault) -> None:
    assert (await verify(site, journal, contents=True)).flaws == []
    await fault.plant(site)
    found = await verify(site, journal, contents=True)
    assert found.found == fault.found
    lost = LOST.get(fault.name, set())
    assert removed(await repair(site, found.flaws)) == lost
    assert (await verify(site, journal, contents=True)).flaws == []
    assert {record.name async for record in site.catalog.scan("main")} == {sample.name for sample in CHAIN} - lost


async def test_an_upload_that_somebody_left_is_found_and_removed(
    site: Site, journal: Path, gateway: Gateway, bucket: str
) -> None:
    assert isinstance(site.storage, S3Store)
    with closing(gateway.client()) as sdk:
        key = f"{site.storage._prefix}main/nar/left.nar"
        upload = sdk.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        sdk.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"half")
        found = await verify(site, journal)
        assert found.found == {("stale-temporary-file", "main/nar/left.nar")}
        assert removed(await repair(site, found.flaws)) == set()
        assert (await verify(site, journal)).flaws == []
        assert "Uploads" not in sdk.list_multipart_uploads(Bucket=bucket, Prefix=site.storage._prefix)


async def test_realisations_are_found_and_removed(site: Site, journal: Path) -> None:
    output, other = (OutputId(f"sha256:{digit * 64}", "out") for digit in "01")
    given = render(output, Realisation(CHAIN[0].path, ()))
    await Realisations(site.storage, site.catalog).put(site.cache, output, given)
    await site.storage.put(f"main/{object_name(other)}", given)
    found = await verify(site, journal)
    assert found.found == {("bad-realisation", f"main/{object_name(other)}")}
    assert (await repair(site, found.flaws)).results == {f"main/{object_name(other)}": "removed"}
    assert (await verify(site, journal)).flaws == []
    assert await site.storage.head(f"main/{object_name(output)}")


async def test_a_nar_that_is_lost_stays_lost_for_clients_too(site: Site, journal: Path) -> None:
    """What goes out of sight goes from the bucket, which clients read without us."""
    await site.storage.delete([nar_key(CHAIN[0])])
    await repair(site, (await verify(site, journal)).flaws)
    narinfos = {info.key async for info in site.storage.list("main/") if info.key.endswith(".narinfo")}
    assert narinfos == {f"main/{CHAIN[3].path.hash_part}.narinfo"}
