"""Objects that clients write to a bucket themselves, on a real server: what was signed and no more, and no change."""

from __future__ import annotations

import asyncio
import io
import os
from datetime import timedelta
from hashlib import md5
from secrets import token_hex
from typing import TYPE_CHECKING, Any

import aiohttp
import botocore.auth
import pytest
from botocore.compat import get_current_datetime
from yarl import URL

from cachesrv.errors import BadInput, NotFound, StoreError
from cachesrv.push.connection import Timeouts
from cachesrv.push.elsewhere import Elsewhere
from cachesrv.push.retry import TryAgain
from cachesrv.storage import s3_upload
from cachesrv.storage.base import Piece
from cachesrv.storage.decorators import Direct, Retrying
from cachesrv.storage.s3 import S3Store
from cachesrv.storage.s3_parts import MIN_PART_SIZE
from tests.contracts.storage_contract import whole

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cachesrv.storage.base import SignedPut
    from cachesrv.storage.s3_direct import S3Direct
    from tests.radosgw import Gateway

KEY = "~uploads/main/01/0123.staged"
PARTS = [os.urandom(MIN_PART_SIZE), os.urandom(MIN_PART_SIZE + 5), os.urandom(100)]


@pytest.fixture
async def store(gateway: Gateway, bucket: str) -> AsyncIterator[S3Store]:
    store = S3Store(
        bucket,
        requests=Retrying(Direct(), first=0.01, attempts=2),
        endpoint=gateway.endpoint,
        prefix=token_hex(8),
        session=gateway.session(),
    )
    yield store
    await store.close()


@pytest.fixture
def direct(store: S3Store) -> S3Direct:
    return store.direct


async def put(signed: SignedPut, data: bytes, **changes: str) -> tuple[int, str]:
    """By somebody without credentials; the status, and the tag of what was sent."""
    headers = {**signed.headers} | {name.replace("_", "-"): value for name, value in changes.items()}
    async with (
        aiohttp.ClientSession() as session,
        session.put(URL(signed.url, encoded=True), data=io.BytesIO(data), headers=headers) as response,
    ):
        return response.status, response.headers.get("ETag", "").strip('"')


async def send(direct: S3Direct, upload: str, parts: list[bytes] = PARTS, key: str = KEY) -> list[str]:
    """All parts; their tags."""
    tags = []
    for number, part in enumerate(parts, 1):
        status, tag = await put(await direct.sign(key, upload, number, md5(part).digest()), part)
        assert status == 200
        tags.append(tag)
    return tags


@pytest.mark.parametrize("parts", [PARTS, PARTS[2:]], ids=["several", "one"])
async def test_parts_become_an_object(store: S3Store, direct: S3Direct, parts: list[bytes]) -> None:
    upload = await direct.begin(KEY)
    assert await direct.parts(KEY, upload) == []
    tags = await send(direct, upload, parts)
    there = await direct.parts(KEY, upload)
    assert there is not None
    assert [(part.number, part.size, part.tag) for part in there] == [
        (number, len(part), md5(part).hexdigest()) for number, part in enumerate(parts, 1)
    ]
    assert await store.head(KEY) is None

    # Who did not hear of it does it again.
    await direct.complete(KEY, upload, tags)
    await direct.complete(KEY, upload, tags)

    assert await whole(store.read(KEY)) == b"".join(parts)
    assert await direct.parts(KEY, upload) is None
    await direct.abort(KEY, upload)
    assert await store.head(KEY) is not None


async def test_what_is_complete_does_not_change(store: S3Store, direct: S3Direct) -> None:
    upload = await direct.begin(KEY)
    signed = await direct.sign(KEY, upload, 1, md5(PARTS[2]).digest())
    await direct.complete(KEY, upload, await send(direct, upload, PARTS[2:]))

    assert (await put(signed, PARTS[2]))[0] == 404
    assert await whole(store.read(KEY)) == PARTS[2]


async def test_nothing_is_taken_but_what_was_signed(direct: S3Direct) -> None:
    upload = await direct.begin(KEY)
    signed = await direct.sign(KEY, upload, 1, md5(PARTS[0]).digest())
    other = md5(PARTS[1]).digest()
    other_md5 = (await direct.sign(KEY, upload, 1, other)).headers["Content-MD5"]

    assert (await put(signed, PARTS[1]))[0] == 400
    assert (await put(signed, PARTS[1], Content_MD5=other_md5))[0] == 403
    another = upload[:-1] + ("1" if upload.endswith("0") else "0")
    for old, new in (("partNumber=1", "partNumber=2"), (upload, another), ("0123.staged", "0124.staged")):
        assert old in signed.url
        assert (await put(type(signed)(signed.url.replace(old, new), signed.headers), PARTS[0]))[0] == 403
    assert await direct.parts(KEY, upload) == []


async def test_an_uploader_asks_for_another_url_when_one_has_expired(
    direct: S3Direct, monkeypatch: pytest.MonkeyPatch
) -> None:
    def yesterday(**arguments: Any) -> Any:
        return get_current_datetime(**arguments) - timedelta(days=1)

    async def send(signed: SignedPut) -> str:
        async with elsewhere.turn() as turn:
            return await elsewhere.put(
                turn, signed.url, {**signed.headers, "Content-Length": "100"}, lambda: once(PARTS[2])
            )

    upload = await direct.begin(KEY)
    digest = md5(PARTS[2])
    with monkeypatch.context() as patched:
        patched.setattr(botocore.auth, "get_current_datetime", yesterday)
        expired = await direct.sign(KEY, upload, 1, digest.digest())
    elsewhere = Elsewhere(1, Timeouts(), patience=1)
    try:
        with pytest.raises(TryAgain, match="AccessDenied"):
            await send(expired)
        assert await send(await direct.sign(KEY, upload, 1, digest.digest())) == digest.hexdigest()
    finally:
        await elsewhere.close()


async def once(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def test_an_upload_that_is_not_there(direct: S3Direct) -> None:
    upload = await direct.begin(KEY)
    tags = await send(direct, upload, PARTS[2:])
    await direct.abort(KEY, upload)
    await direct.abort(KEY, upload)

    assert await direct.parts(KEY, upload) is None
    assert (await put(await direct.sign(KEY, upload, 1, md5(PARTS[2]).digest()), PARTS[2]))[0] == 404
    with pytest.raises(StoreError):
        await direct.complete(KEY, upload, tags)


async def test_tags_of_other_parts_are_refused(store: S3Store, direct: S3Direct) -> None:
    upload = await direct.begin(KEY)
    tags = await send(direct, upload)
    with pytest.raises(StoreError):
        await direct.complete(KEY, upload, [tags[1], tags[0], tags[2]])
    assert await store.head(KEY) is None


@pytest.mark.parametrize("together", [s3_upload.COPIED_TOGETHER, MIN_PART_SIZE], ids=["at-once", "in-parts"])
async def test_publishing_copies(
    store: S3Store, direct: S3Direct, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_upload, "COPIED_TOGETHER", together)
    upload = await direct.begin(KEY)
    await direct.complete(KEY, upload, await send(direct, upload))

    outcomes = await asyncio.gather(*(direct.publish(KEY, "main/nar/a.nar.zst") for _ in range(3)))
    assert sorted(outcomes) == [False, False, True]
    assert await whole(store.read("main/nar/a.nar.zst")) == b"".join(PARTS)
    await store.put("main/nar/there.nar.zst", b"there")
    assert not await direct.publish(KEY, "main/nar/there.nar.zst")
    assert await whole(store.read("main/nar/there.nar.zst")) == b"there"
    await store.delete([KEY])
    assert await whole(store.read("main/nar/a.nar.zst")) == b"".join(PARTS)
    with pytest.raises(NotFound):
        await direct.publish(KEY, "main/nar/b.nar.zst")
    assert await store.sweep(older_than=-60) == 0


async def test_a_piece_is_an_object_at_once(store: S3Store, direct: S3Direct) -> None:
    """As often as its URL is used, and with nothing else in it."""
    assert await direct.whole(KEY) is None
    digest = md5(PARTS[2])
    signed = await direct.sign_whole(KEY, len(PARTS[2]), digest.digest())
    for _ in range(2):
        assert await put(signed, PARTS[2]) == (200, digest.hexdigest())
    assert (await put(signed, PARTS[2][::-1]))[0] == 400
    assert (await put(signed, PARTS[2][:-1]))[0] in {400, 403}
    found = await direct.whole(KEY)
    assert found is not None
    assert (found.number, found.size, found.tag) == (1, len(PARTS[2]), digest.hexdigest())
    assert await whole(store.read(KEY)) == PARTS[2]


async def test_another_piece_is_not_published(
    store: S3Store, direct: S3Direct, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it was replaced before it is asked for, or while it is."""
    await store.put(KEY, PARTS[2])
    digest = md5(PARTS[2]).hexdigest()
    with pytest.raises(NotFound, match="another object"):
        await direct.publish(KEY, "main/nar/a.nar.zst", Piece(md5(PARTS[1]).hexdigest(), digest))

    copy = s3_upload.Upload.copy

    async def replaced(upload: s3_upload.Upload, *source: Any, **named: Any) -> None:
        await store.put(KEY, PARTS[2][::-1], replace=True)
        await copy(upload, *source, **named)

    with monkeypatch.context() as patched:
        patched.setattr(s3_upload.Upload, "copy", replaced)
        with pytest.raises(NotFound, match="replaced"):
            await direct.publish(KEY, "main/nar/a.nar.zst", Piece(digest, digest))
    assert await store.head("main/nar/a.nar.zst") is None
    assert await store.sweep(older_than=-60) == 0

    await store.put(KEY, PARTS[2], replace=True)
    assert await direct.publish(KEY, "main/nar/a.nar.zst", Piece(digest, digest))
    assert await whole(store.read("main/nar/a.nar.zst")) == PARTS[2]


async def test_each_sweep_has_its_own(store: S3Store, direct: S3Direct) -> None:
    upload = await direct.begin(KEY)
    await send(direct, upload, PARTS[:1])

    assert await store.sweep(older_than=-60) == 0
    assert await direct.sweep(older_than=60) == 0
    assert await direct.parts(KEY, upload) != []
    assert await direct.sweep(older_than=-60) == 1
    assert await direct.parts(KEY, upload) is None


async def test_those_that_are_unfinished(store: S3Store, direct: S3Direct) -> None:
    other = KEY.replace("0123", "4567")
    upload, second = await direct.begin(KEY), await direct.begin(other)
    async with store.writer("main/nar/a.nar.zst") as writer:
        await writer.write(bytes(2 * MIN_PART_SIZE))
        assert sorted([key async for key in direct.unfinished()]) == [KEY, other]
    await direct.complete(KEY, upload, await send(direct, upload, PARTS[2:]))
    assert [key async for key in direct.unfinished()] == [other]
    await direct.abort(other, second)
    assert [key async for key in direct.unfinished()] == []


async def test_names_are_keys(direct: S3Direct) -> None:
    asked: list[Any] = [direct.begin("/x"), direct.parts("/x", "y"), direct.publish("/x", "y"), direct.whole("/x")]
    for question in asked:
        with pytest.raises(BadInput, match="not an object key"):
            await question
