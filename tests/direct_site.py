"""What clients write to a bucket themselves: helpers for tests on a real server."""

from __future__ import annotations

import io
from contextlib import asynccontextmanager
from secrets import token_hex
from typing import TYPE_CHECKING

import aiohttp
from yarl import URL

from cachesrv.services.direct import Direct
from cachesrv.services.part_store import PartStore
from cachesrv.services.uploads import Limits, Uploads
from cachesrv.storage import decorators
from cachesrv.storage.kept import KeptCopies
from cachesrv.storage.no_cache import NoCache
from cachesrv.storage.s3 import S3Store
from tests.service_site import Site, open_site

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    import pytest

    from cachesrv.services.ingest import Ingest
    from cachesrv.storage.base import ObjectCache, SignedPut
    from tests.radosgw import Gateway


@asynccontextmanager
async def bucket_site(tmp_path: Path, gateway: Gateway, bucket: str) -> AsyncIterator[Site]:
    """All that a server has of one bucket."""
    storage = S3Store(
        bucket,
        requests=decorators.Retrying(decorators.Limited(decorators.Direct())),
        endpoint=gateway.endpoint,
        prefix=token_hex(8),
        session=gateway.session(),
    )
    async with open_site(tmp_path, storage=storage) as site:
        yield site


@asynccontextmanager
async def process(
    site: Site,
    *,
    offered: bool = True,
    ingest: Ingest | None = None,
    disk_cache: ObjectCache | None = None,
    **limits: int,
) -> AsyncIterator[Uploads]:
    """Uploads as one process of a server has them."""
    assert isinstance(site.storage, S3Store)
    parts = PartStore(site.storage)
    copies = KeptCopies(disk_cache or NoCache())
    direct = Direct(parts, site.storage, site.storage.direct, ingest or site.ingest, copies, offered=offered)
    opened = Uploads(parts, ingest or site.ingest, Limits(**limits), direct)
    try:
        yield opened
    finally:
        await opened.close()


async def put(signed: SignedPut, data: bytes) -> int:
    """By somebody without credentials; the status."""
    async with (
        aiohttp.ClientSession() as session,
        session.put(URL(signed.url, encoded=True), data=io.BytesIO(data), headers=signed.headers) as response,
    ):
        return response.status


async def keys(site: Site) -> set[str]:
    """Of all objects; those that are staged go by one name."""
    found = {info.key async for info in site.storage.list("")}
    return {"staged" if key.startswith("~uploads/") else key for key in found}


async def leftovers(site: Site) -> int:
    """Uploads in the bucket that nobody completed."""
    assert isinstance(site.storage, S3Store)
    return await site.storage.direct.sweep(older_than=-60) + await site.storage.sweep(older_than=-60)


async def altering(chunks: AsyncIterator[bytes], at: int) -> AsyncIterator[bytes]:
    """The bytes, but for the one at this position."""
    position = 0
    async for chunk in chunks:
        altered = bytearray(chunk)
        if 0 <= at - position < len(chunk):
            altered[at - position] ^= 1
        position += len(chunk)
        yield bytes(altered)


def alter(site: Site, monkeypatch: pytest.MonkeyPatch, *positions: int | None) -> list[int | None]:
    """Let what is read from now on have another byte there, once for each position; those that are still to come."""
    read, coming = site.storage.read, [*positions]

    def reading(key: str) -> AsyncIterator[bytes]:
        at = coming.pop(0) if coming else None
        return read(key) if at is None else altering(read(key), at)

    monkeypatch.setattr(site.storage, "read", reading)
    return coming
