"""What can be known of a bucket before it is needed."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cachesrv.errors import BadInput, NotFound, StoreError
from cachesrv.storage import s3_sweep
from cachesrv.storage.decorators import TryAgain
from cachesrv.storage.s3_errors import Denied, Exists, UploadGone
from cachesrv.storage.s3_parts import content_md5

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from types_boto3_s3 import S3Client as Sdk

    from cachesrv.storage.s3_client import S3Client

_TEXT = b"By writing this object once more, cachesrv finds out whether this server honours If-None-Match.\n"


def probe_key(prefix: str) -> str:
    """The key of an object for trying things out. Its name makes it none of the store's."""
    return f"{prefix}.cachesrv/probe"


async def honours_conditions(client: S3Client, prefix: str) -> bool:
    """Whether a PUT with `If-None-Match: *` leaves an object that is there alone. Takes one request where it does and
    the probe object is there. Raises StoreError when nothing can be written.
    """
    key = probe_key(prefix)
    md5 = await content_md5(_TEXT)
    try:
        await client.put("PutObject", key, _TEXT, ContentMD5=md5, IfNoneMatch="*")
        await client.put("PutObject", key, _TEXT, ContentMD5=md5, IfNoneMatch="*")
    except Exists:
        return True
    except TryAgain:
        raise
    except StoreError:
        # Some refuse a condition that they do not know. If it is something else that they refuse, this says it.
        await client.put("PutObject", key, _TEXT, ContentMD5=md5)
    return False


async def honours_conditions_on_completion(client: S3Client, prefix: str) -> bool:
    """The same of the completion of a multipart upload; the probe object is there. Raises StoreError."""
    bucket, key = client.bucket, probe_key(prefix)

    def begin(sdk: Sdk) -> str:
        return sdk.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]

    upload = await client.call("CreateMultipartUpload", key, begin, changes=True)
    md5 = await content_md5(_TEXT)
    try:
        tag = await client.put("UploadPart", key, _TEXT, UploadId=upload, PartNumber=1, ContentMD5=md5)
        parts: Any = {"Parts": [{"PartNumber": 1, "ETag": tag}]}

        def complete(sdk: Sdk) -> None:
            sdk.complete_multipart_upload(
                Bucket=bucket, Key=key, UploadId=upload, MultipartUpload=parts, IfNoneMatch="*"
            )

        await client.call("CompleteMultipartUpload", key, complete, changes=True)
    except Exists:
        return True
    except TryAgain:
        raise
    except StoreError:
        # Some refuse a condition that they do not know.
        return False
    else:
        return False
    finally:
        with suppress(StoreError, NotFound):
            await s3_sweep.abort(client, key, upload)


class Abilities:
    """What the endpoint can do; found out when it is first needed."""

    def __init__(self, client: S3Client, prefix: str) -> None:
        self._client = client
        self._prefix = prefix
        self._put: bool | None = None
        self._completion: bool | None = None
        self._finding_out = asyncio.Lock()

    async def conditional_put(self) -> bool:
        """Whether it honours `If-None-Match: *` on a PUT. Raises StoreError."""
        async with self._finding_out:
            if self._put is None:
                self._put = await honours_conditions(self._client, self._prefix)
        return self._put

    async def conditional_completion(self) -> bool:
        """Whether it does so on the completion of a multipart upload. Raises StoreError."""
        if not await self.conditional_put():
            return False
        async with self._finding_out:
            if self._completion is None:
                self._completion = await honours_conditions_on_completion(self._client, self._prefix)
        return self._completion


async def problems(client: S3Client, prefix: str) -> list[str]:
    """What is wrong, one line each: nothing, if all that a store does can be done. Leaves the probe object behind.

    A missing permission is named for each kind of request; all else that is wrong concerns all of them and is named
    once.
    """
    found = []
    for try_out in _requests(client, prefix):
        try:
            await try_out()
        except (BadInput, NotFound):
            found.append(f"{client.bucket} does not give back what was put into it")
        except Denied as error:
            found.append(str(error))
        except StoreError as error:
            return [*found, str(error)]
    return found


def _requests(client: S3Client, prefix: str) -> Iterator[Callable[[], Awaitable[object]]]:
    bucket, key = client.bucket, probe_key(prefix)

    def list_objects(sdk: Sdk) -> None:
        sdk.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)

    def list_uploads(sdk: Sdk) -> None:
        sdk.list_multipart_uploads(Bucket=bucket, Prefix=prefix, MaxUploads=1)

    def upload(sdk: Sdk) -> None:
        begun = sdk.create_multipart_upload(Bucket=bucket, Key=key)
        sdk.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=begun["UploadId"])

    async def list_parts() -> None:
        def ask(sdk: Sdk) -> None:
            sdk.list_parts(Bucket=bucket, Key=key, UploadId="none")

        with suppress(UploadGone, NotFound):
            await client.call("ListParts", key, ask)

    def delete(sdk: Sdk) -> None:
        sdk.delete_object(Bucket=bucket, Key=f"{key}-not-there")

    async def read() -> None:
        async with await client.get(key):
            pass

    yield lambda: client.call("ListObjectsV2", prefix, list_objects)
    yield lambda: honours_conditions(client, prefix)
    yield read
    yield lambda: client.call("AbortMultipartUpload", key, upload, changes=True)
    yield lambda: client.call("ListMultipartUploads", prefix, list_uploads)
    yield list_parts
    yield lambda: client.call("DeleteObjects", key, delete, changes=True)
