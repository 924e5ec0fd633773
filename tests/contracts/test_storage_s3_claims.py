"""Objects in parts, written by several processes to an endpoint that completes every upload."""

from __future__ import annotations

import asyncio
import os
from contextlib import closing
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import pytest

from cachesrv.errors import StoreUnavailable
from cachesrv.storage.decorators import Direct, Retrying
from cachesrv.storage.s3 import S3Store
from cachesrv.storage.s3_claims import Claims
from cachesrv.storage.s3_parts import MIN_PART_SIZE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from types_boto3_s3 import S3Client as Sdk

    from tests.radosgw import Gateway

LIMIT = 2**24
CONTENTS = [os.urandom(MIN_PART_SIZE + 1) for _ in range(4)]


@pytest.fixture(scope="module")
def sdk(gateway: Gateway) -> Iterator[Sdk]:
    with closing(gateway.client()) as sdk:
        yield sdk


@pytest.fixture
async def stores(gateway: Gateway, bucket: str) -> AsyncIterator[list[S3Store]]:
    """As many as there are contents, in one place."""
    prefix = token_hex(8)
    stores = [
        S3Store(
            bucket,
            requests=Retrying(Direct(), first=0.01, attempts=2),
            endpoint=gateway.endpoint,
            session=gateway.session(),
            prefix=prefix,
            part_size=MIN_PART_SIZE,
        )
        for _ in CONTENTS
    ]
    for store in stores:
        store._uploads._claims = store._claims = Claims(store._client, store._prefix, patience=0.3)
    yield stores
    for store in stores:
        await store.close()


def claims(sdk: Sdk, bucket: str, store: S3Store) -> list[str]:
    listed = sdk.list_objects_v2(Bucket=bucket, Prefix=f"{store._prefix}.cachesrv/claims/")
    return [found["Key"] for found in listed.get("Contents", [])]


async def upload(store: S3Store, data: bytes) -> bool:
    async with store.writer("main/a") as writer:
        await writer.write(data)
        return await writer.commit()


async def test_exactly_one_creates(stores: list[S3Store], sdk: Sdk, bucket: str) -> None:
    created = await asyncio.gather(*map(upload, stores, CONTENTS))
    assert created.count(True) == 1
    for store in stores:
        assert await store.get("main/a", limit=LIMIT) == CONTENTS[created.index(True)]
    assert not claims(sdk, bucket, stores[0])
    assert not await upload(stores[0], CONTENTS[0])


async def paused(store: S3Store, data: bytes, monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Task[bool], Any]:
    """An upload that sleeps when it holds the claim and is sure that the object is not there; what wakes it up."""
    call, asleep, awake = store._client.call, asyncio.Event(), asyncio.Event()

    async def sleepy(operation: str, key: str, work: Callable[[Sdk], Any], *, changes: bool = False) -> Any:
        if operation == "CompleteMultipartUpload" and key.endswith("main/a"):
            asleep.set()
            await awake.wait()
        return await call(operation, key, work, changes=changes)

    monkeypatch.setattr(store._client, "call", sleepy)
    task = asyncio.create_task(upload(store, data))
    await asleep.wait()
    return task, awake


async def test_one_that_is_quick_is_waited_for(
    stores: list[S3Store], monkeypatch: pytest.MonkeyPatch, sdk: Sdk, bucket: str
) -> None:
    stores[1]._uploads._claims = Claims(stores[1]._client, stores[1]._prefix)
    first, awake = await paused(stores[0], CONTENTS[0], monkeypatch)
    second = asyncio.create_task(upload(stores[1], CONTENTS[1]))
    await asyncio.sleep(0.5)
    assert not second.done()
    awake.set()
    assert [await first, await second] == [True, False]
    assert await stores[2].get("main/a", limit=LIMIT) == CONTENTS[0]
    assert not claims(sdk, bucket, stores[0])


async def test_one_that_sleeps_is_passed_over_and_does_no_harm(
    stores: list[S3Store], monkeypatch: pytest.MonkeyPatch, sdk: Sdk, bucket: str
) -> None:
    first, awake = await paused(stores[0], CONTENTS[0], monkeypatch)
    created = await asyncio.gather(*map(upload, stores[1:], CONTENTS[1:]))
    assert created.count(True) == 1
    awake.set()
    assert not await first
    assert await stores[0].get("main/a", limit=LIMIT) == CONTENTS[1 + created.index(True)]
    assert not claims(sdk, bucket, stores[0])


async def test_what_nobody_has_written_can_be_written_again(
    stores: list[S3Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, awake = await paused(stores[0], CONTENTS[0], monkeypatch)
    await upload(stores[1], CONTENTS[1])
    await stores[1].delete(["main/a"])
    awake.set()
    with pytest.raises(StoreUnavailable, match="another writer"):
        await first
    monkeypatch.undo()
    assert await upload(stores[0], CONTENTS[0])


async def test_one_that_was_killed_is_passed_over(stores: list[S3Store], sdk: Sdk, bucket: str) -> None:
    key = f"{stores[0]._prefix}main/a"
    begun = sdk.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    claim = await stores[0]._claims._obtain(key, begun, _never)
    assert claims(sdk, bucket, stores[0]) == [claim]
    assert await upload(stores[1], CONTENTS[1])
    assert not claims(sdk, bucket, stores[0])
    assert "Uploads" not in sdk.list_multipart_uploads(Bucket=bucket, Prefix=stores[0]._prefix)


async def test_claims_that_stay_are_swept(stores: list[S3Store], sdk: Sdk, bucket: str) -> None:
    key = f"{stores[0]._prefix}main/a"
    claim = await stores[0]._claims._obtain(key, "no upload", _never)
    assert [info async for info in stores[0].list("")] == []
    assert await stores[0].sweep(older_than=3600) == 0
    assert [info.key async for info in stores[0].leftovers(older_than=0)] == [claim]
    assert await stores[0].sweep(older_than=0) == 1
    assert not claims(sdk, bucket, stores[0])


async def _never() -> bool:
    return False
