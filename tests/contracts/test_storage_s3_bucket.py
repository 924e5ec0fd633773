"""What is special to objects in a bucket, on a real server: names, parts, what others put there, who may do what."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import os
import time
from contextlib import closing
from datetime import timedelta
from secrets import token_hex
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
import botocore.auth
import brotli  # type: ignore[import-untyped]  # it has no types
import pytest
from botocore.compat import get_current_datetime
from yarl import URL

from cachesrv.errors import BadInput, NotFound, StoreError, StoreUnavailable, TooLarge
from cachesrv.storage.base import ByteRange, PresignedUrl, Stream
from cachesrv.storage.decorators import Direct, Measured, Retrying
from cachesrv.storage.s3 import S3Store
from cachesrv.storage.s3_parts import MIN_PART_SIZE
from tests.contracts.storage_contract import whole
from tests.radosgw import STRANGER, VIRTUAL_DOMAIN

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from botocore.session import Session
    from types_boto3_s3 import S3Client as Sdk

    from tests.radosgw import Gateway

LIMIT = 2**24
PARTS = os.urandom(2 * MIN_PART_SIZE + 2**20 + 3)


@pytest.fixture(scope="module")
def session(gateway: Gateway) -> Session:
    return gateway.session()


@pytest.fixture(scope="module")
def sdk(gateway: Gateway) -> Iterator[Sdk]:
    with closing(gateway.client()) as sdk:
        yield sdk


@pytest.fixture
async def open_store(gateway: Gateway, bucket: str, session: Session) -> AsyncIterator[Callable[..., S3Store]]:
    stores: list[S3Store] = []

    def open_one(name: str = bucket, **arguments: Any) -> S3Store:
        given: dict[str, Any] = {"requests": Retrying(Direct(), first=0.01, attempts=2), "endpoint": gateway.endpoint}
        given |= {"session": session, "part_size": MIN_PART_SIZE, "prefix": token_hex(8)}
        stores.append(S3Store(name, **(given | arguments)))
        return stores[-1]

    yield open_one
    for store in stores:
        await store.close()


@pytest.fixture
def store(open_store: Callable[..., S3Store]) -> S3Store:
    return open_store()


async def upload(store: S3Store, key: str, data: bytes, *, size: int | None = None, replace: bool = False) -> bool:
    async with store.writer(key, size=size) as writer:
        for position in range(0, len(data), 700_001):
            await writer.write(data[position : position + 700_001])
        return await writer.commit(replace=replace)


async def keys(store: S3Store, prefix: str = "") -> list[str]:
    return sorted([info.key async for info in store.list(prefix)])


@pytest.mark.parametrize("size", [None, len(PARTS)])
async def test_a_large_object_goes_in_parts(store: S3Store, sdk: Sdk, bucket: str, size: int | None) -> None:
    assert await upload(store, "main/nar/a.nar", PARTS, size=size)
    assert await whole(store.read("main/nar/a.nar")) == PARTS
    head = sdk.head_object(Bucket=bucket, Key=f"{store._prefix}main/nar/a.nar")
    assert head["ETag"].endswith('-3"')
    assert head["ContentType"] == "application/x-nix-nar"
    assert not await upload(store, "main/nar/a.nar", PARTS[::-1])
    assert await whole(store.read("main/nar/a.nar")) == PARTS
    assert await upload(store, "main/nar/a.nar", PARTS[::-1], replace=True)
    assert await whole(store.read("main/nar/a.nar")) == PARTS[::-1]
    assert "Uploads" not in sdk.list_multipart_uploads(Bucket=bucket, Prefix=store._prefix)


async def test_what_fits_into_a_part_goes_in_one_request(open_store: Callable[..., S3Store]) -> None:
    seen: list[str] = []
    store = open_store(requests=Measured(Direct(), lambda operation, _seconds, _error: seen.append(operation)))
    await store.put("main/first", b"")
    seen.clear()
    assert await upload(store, "main/a", PARTS[:MIN_PART_SIZE])
    assert seen == ["PutObject"]
    for key in ("main/b", "main/c"):
        seen.clear()
        assert await upload(store, key, PARTS[: MIN_PART_SIZE + 1])
        assert await whole(store.read(key)) == PARTS[: MIN_PART_SIZE + 1]
    # One of them is for the claim, and goes with it; before the second nothing had to be found out any more.
    assert sorted(seen) == [
        *("CompleteMultipartUpload", "CreateMultipartUpload", "DeleteObject", "GetObject", "GetObject", "HeadObject"),
        *("ListObjectsV2", "PutObject", "UploadPart", "UploadPart"),
    ]


async def test_of_several_in_parts_exactly_one_creates(store: S3Store) -> None:
    contents = [bytes([n]) * (MIN_PART_SIZE + 1) for n in range(4)]
    created = await asyncio.gather(*(upload(store, "main/a", content) for content in contents))
    assert created.count(True) == 1
    assert await store.get("main/a", limit=LIMIT) == contents[created.index(True)]


async def test_left_parts_are_removed_at_once(store: S3Store, sdk: Sdk, bucket: str) -> None:
    async with store.writer("main/a") as writer:
        await writer.write(PARTS)
        assert len(sdk.list_multipart_uploads(Bucket=bucket, Prefix=store._prefix)["Uploads"]) == 1
    assert "Uploads" not in sdk.list_multipart_uploads(Bucket=bucket, Prefix=store._prefix)


async def test_closing_removes_parts(store: S3Store, sdk: Sdk, bucket: str) -> None:
    async with store.writer("main/a") as writer:
        await writer.write(PARTS)
        await store.close()
        assert "Uploads" not in sdk.list_multipart_uploads(Bucket=bucket, Prefix=store._prefix)
        with pytest.raises(StoreError, match="after a commit or an error"):
            await writer.commit()
    with pytest.raises(StoreError, match="closed"):
        async with store.writer("main/b"):
            pass


async def test_sweep_aborts_what_is_stale(store: S3Store, sdk: Sdk, bucket: str) -> None:
    def begin(key: str) -> str:
        return sdk.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]

    mine = [f"{store._prefix}main/{n}" for n in range(3)]
    ids = [begin(key) for key in mine]
    other = begin(f"other{store._prefix}main/a")
    sdk.upload_part(Bucket=bucket, Key=mine[1], UploadId=ids[1], PartNumber=1, Body=b"old")
    await asyncio.sleep(1.1)
    middle = time.time()
    await asyncio.sleep(0.1)
    sdk.upload_part(Bucket=bucket, Key=mine[2], UploadId=ids[2], PartNumber=1, Body=b"new")
    assert await store.sweep(older_than=3600) == 0
    found = {info.key: info.size async for info in store.leftovers(older_than=time.time() - middle)}
    assert found == {"main/0": 0, "main/1": 3}
    assert await store.sweep(older_than=time.time() - middle) == 2
    left = sdk.list_multipart_uploads(Bucket=bucket, Prefix=store._prefix)["Uploads"]
    assert [upload["UploadId"] for upload in left] == [ids[2]]
    assert await store.sweep(older_than=-5) == 1
    everywhere = sdk.list_multipart_uploads(Bucket=bucket)["Uploads"]
    assert other in [upload["UploadId"] for upload in everywhere]


async def test_sweep_leaves_what_is_being_written(store: S3Store) -> None:
    async with store.writer("main/a") as writer:
        await writer.write(PARTS)
        assert await store.sweep(older_than=-5) == 0
        assert await writer.commit()
    assert await store.get("main/a", limit=LIMIT) == PARTS


async def test_clients_are_not_told_where_the_bucket_is(store: S3Store, bucket: str) -> None:
    """NotFound and BadInput are for them; the place is for the operator."""
    await store.put("main/a", b"12345")
    for key, part in [("main/b", None), ("main/a", ByteRange(5, 6)), ("main/a", ByteRange(0, 6))]:
        with pytest.raises((NotFound, BadInput)) as caught:
            await whole(store.read(key, part))
        assert bucket not in str(caught.value)
        assert "http" not in str(caught.value)


async def test_a_prefix_is_all_that_is_seen(open_store: Callable[..., S3Store]) -> None:
    top = token_hex(8)
    inner, beside, all_of_it = open_store(prefix=f"{top}/a"), open_store(prefix=f"{top}/ab"), open_store(prefix=top)
    await inner.put("main/x", b"inner")
    await beside.put("main/x", b"beside")
    assert await keys(inner) == ["main/x"]
    assert await keys(all_of_it) == ["a/main/x", "ab/main/x"]
    assert await all_of_it.get("ab/main/x", limit=LIMIT) == b"beside"
    await inner.delete(["main/x"])
    assert await keys(all_of_it) == ["ab/main/x"]
    for bad in ("/a", "a/", "a//b", ".a", "../a"):
        with pytest.raises(BadInput):
            open_store(prefix=bad)


async def test_without_a_prefix_the_bucket_is_the_cache(gateway: Gateway, open_store: Callable[..., S3Store]) -> None:
    store = open_store(gateway.make_bucket(), prefix="")
    await store.put("nix-cache-info", b"StoreDir: /nix/store\n")
    assert await keys(store) == ["nix-cache-info"]


async def test_names_that_are_no_keys_are_not_seen(store: S3Store, sdk: Sdk, bucket: str) -> None:
    for name in ("main/", "main//x", "main/.hidden", ".cachesrv/y", "main/a b", "main/é", "main/fine"):
        sdk.put_object(Bucket=bucket, Key=store._prefix + name, Body=b"x")
    assert await keys(store) == ["main/fine"]


@pytest.mark.parametrize("coding", ["gzip", "br", "aws-chunked", "identity"])
async def test_metadata_that_nix_compressed(store: S3Store, sdk: Sdk, bucket: str, coding: str) -> None:
    """`nix copy --to s3://…?narinfo-compression=br` says so in Content-Encoding."""
    text = b"StorePath: /nix/store/x\n" * 100
    packed = {"gzip": gzip.compress, "br": brotli.compress}.get(coding, bytes)(text)
    sdk.put_object(Bucket=bucket, Key=f"{store._prefix}main/a", Body=packed, ContentEncoding=coding)
    assert await store.get("main/a", limit=len(text)) == text
    with pytest.raises(TooLarge):
        await store.get("main/a", limit=len(text) - 1)
    info = await store.head("main/a")
    assert info is not None
    assert (info.size, info.coded) == (len(packed), packed != text)
    if packed == text:
        assert await whole(store.read("main/a")) == text
    else:
        with pytest.raises(StoreError, match=f"Content-Encoding {coding}"):
            await whole(store.read("main/a"))


async def test_metadata_that_is_not_compressed_as_it_says(store: S3Store, sdk: Sdk, bucket: str) -> None:
    for coding in ("gzip", "compress"):
        sdk.put_object(Bucket=bucket, Key=f"{store._prefix}main/a", Body=b"plain", ContentEncoding=coding)
        with pytest.raises(StoreError, match="cannot be decoded"):
            await store.get("main/a", limit=LIMIT)


async def test_many_are_deleted(store: S3Store) -> None:
    await store.put_many({"main/0": b"", "main/2499": b"", "main/x": b""})
    await store.delete([f"main/{n}" for n in range(2500)])
    assert await keys(store) == ["main/x"]


async def test_delivery_needs_no_request_and_no_credentials(open_store: Callable[..., S3Store]) -> None:
    seen: list[str] = []
    store = open_store(requests=Measured(Direct(), lambda operation, _seconds, _error: seen.append(operation)))
    await store.put("main/nar/a+b=c?.nar", PARTS)
    seen.clear()
    delivery = await store.delivery("main/nar/a+b=c?.nar")
    assert isinstance(delivery, PresignedUrl)
    assert not seen
    async with aiohttp.ClientSession() as http:
        async with http.get(URL(delivery.url, encoded=True)) as whole_object:
            assert await whole_object.read() == PARTS
        async with http.get(URL(delivery.url, encoded=True), headers={"Range": "bytes=5-9"}) as part:
            assert (part.status, await part.read()) == (206, PARTS[5:10])
        store._presign_seconds = 1
        delivery = await store.delivery("main/nar/a+b=c?.nar")
        assert isinstance(delivery, PresignedUrl)
        await asyncio.sleep(2)
        async with http.get(URL(delivery.url, encoded=True)) as late:
            assert late.status == 403


async def test_delivery_as_a_stream(open_store: Callable[..., S3Store]) -> None:
    store = open_store(redirect=False)
    await store.put("main/a", b"12345")
    assert await store.delivery("main/a") == Stream(5)
    assert await store.delivery("main/b") is None


async def test_the_bucket_in_the_name_of_the_host(
    gateway: Gateway, bucket: str, open_store: Callable[..., S3Store]
) -> None:
    """Names of buckets are in no DNS: what is signed for them is sent to where the gateway is."""
    plain = open_store()
    await plain.put("main/a", b"a")
    endpoint = f"http://{VIRTUAL_DOMAIN}:{gateway.port}"
    prefix = plain._prefix.removesuffix("/")
    hosts = {"virtual": f"{bucket}.{VIRTUAL_DOMAIN}", "path": VIRTUAL_DOMAIN, "auto": VIRTUAL_DOMAIN}
    for style, host in hosts.items():
        delivery = await open_store(endpoint=endpoint, addressing_style=style, prefix=prefix).delivery("main/a")
        assert isinstance(delivery, PresignedUrl)
        url = urlsplit(delivery.url)
        assert url.netloc == f"{host}:{gateway.port}"
        with closing(http.client.HTTPConnection("127.0.0.1", gateway.port)) as connection:
            connection.request("GET", f"{url.path}?{url.query}", headers={"Host": url.netloc})
            response = connection.getresponse()
            assert (response.status, response.read()) == (200, b"a")


async def test_at_aws(open_store: Callable[..., S3Store]) -> None:
    for name, style, start in (
        ("bkt", "auto", "https://bkt.s3.eu-west-1.amazonaws.com/"),
        ("bkt", "virtual", "https://bkt.s3.eu-west-1.amazonaws.com/"),
        ("bkt", "path", "https://s3.eu-west-1.amazonaws.com/bkt/"),
        ("b.kt", "auto", "https://s3.eu-west-1.amazonaws.com/b.kt/"),
    ):
        store = open_store(name, endpoint=None, region="eu-west-1", addressing_style=style)
        delivery = await store.delivery("main/a")
        assert isinstance(delivery, PresignedUrl)
        assert delivery.url.startswith(start)


async def everything(store: S3Store) -> list[str]:
    """What each kind of call says."""
    said = []
    for attempt in (
        store.put("main/a", b"a"),
        store.get("main/a", limit=LIMIT),
        store.head("main/a"),
        store.delete(["main/a"]),
        store.sweep(older_than=1),
        upload(store, "main/b", PARTS),
        anext(store.list("")),
    ):
        with pytest.raises(StoreError) as caught:
            await attempt
        said.append(str(caught.value))
    return said


async def test_a_wrong_bucket_is_named(open_store: Callable[..., S3Store]) -> None:
    store = open_store("nobody-has-this-bucket")
    for said in [*await everything(store), *await store.probe()]:
        assert "there is no such bucket: check bucket, region and endpoint" in said


@pytest.mark.parametrize(
    ("access_key", "secret_key", "words"),
    [
        ("testkey", "wrong", "the secret key is not that of the access key: check the credentials"),
        ("nobody", "wrong", "the access key is not known there: check the credentials"),
    ],
)
async def test_wrong_credentials_are_named(
    gateway: Gateway, open_store: Callable[..., S3Store], access_key: str, secret_key: str, words: str
) -> None:
    store = open_store(session=gateway.session(access_key, secret_key))
    found = [*await everything(store), *await store.probe()]
    assert len(found) == 8
    for said in found:
        assert words in said
        assert "wrong" not in said


async def test_missing_credentials_are_named(
    open_store: Callable[..., S3Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    store = open_store(session=None)
    for said in [*await everything(store), *await store.probe()]:
        assert "no credentials were found: set AWS_PROFILE" in said
    with pytest.raises(StoreError, match="no credentials"):
        await store.delivery("main/a")


async def test_a_profile_that_is_not_there_is_named(
    open_store: Callable[..., S3Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreError, match="nobody"):
        open_store(session=None)


async def test_a_wrong_clock_is_named(open_store: Callable[..., S3Store], monkeypatch: pytest.MonkeyPatch) -> None:
    day = 24 * 3600
    real = time.time

    def yesterday(**arguments: Any) -> Any:
        return get_current_datetime(**arguments) - timedelta(seconds=day)

    monkeypatch.setattr(botocore.auth, "get_current_datetime", yesterday)
    monkeypatch.setattr("cachesrv.storage.s3_errors.time.time", lambda: real() - day)
    store = open_store()
    for said in [*await everything(store), *await store.probe()]:
        assert "the clock of this machine is wrong by 86" in said


async def test_an_endpoint_that_is_not_there_is_named(open_store: Callable[..., S3Store]) -> None:
    store = open_store(endpoint="http://127.0.0.1:1")
    for said in await everything(store):
        assert "no answer, or not all of it" in said
    assert len(await store.probe()) == 1
    with pytest.raises(StoreUnavailable):
        await store.get("main/a", limit=LIMIT)


async def test_every_missing_permission_is_named(
    gateway: Gateway, open_store: Callable[..., S3Store], sdk: Sdk
) -> None:
    name = gateway.make_bucket()
    store = open_store(name, session=gateway.session(STRANGER, STRANGER))
    missing = " ".join(await store.probe())
    for permission in (
        "s3:ListBucket on",
        "s3:PutObject",
        "s3:GetObject",
        "s3:ListBucketMultipartUploads",
        "s3:ListMultipartUploadParts",
        "s3:DeleteObject",
    ):
        assert permission in missing
    allow(sdk, name, "s3:*")
    assert not await store.probe()
    assert await store.put("main/a", b"a")
    assert await store.get("main/a", limit=LIMIT) == b"a"


async def test_who_may_not_list_is_not_told_what_is_absent(
    gateway: Gateway, open_store: Callable[..., S3Store], sdk: Sdk
) -> None:
    """What is not there looks as if it were forbidden, and is not taken for absent."""
    name = gateway.make_bucket()
    store = open_store(name, session=gateway.session(STRANGER, STRANGER))
    allow(sdk, name, "s3:GetObject")
    sdk.put_object(Bucket=name, Key=f"{store._prefix}main/a", Body=b"a")
    assert await store.get("main/a", limit=LIMIT) == b"a"
    assert await store.head("main/a") is not None
    for attempt in (store.get("main/b", limit=LIMIT), store.head("main/b"), whole(store.read("main/b"))):
        with pytest.raises(StoreError, match="without s3:ListBucket"):
            await attempt


def allow(sdk: Sdk, bucket: str, action: str) -> None:
    statement = {
        "Effect": "Allow",
        "Principal": {"AWS": [f"arn:aws:iam:::user/{STRANGER}"]},
        "Action": [action],
        "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
    }
    sdk.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [statement]}))
