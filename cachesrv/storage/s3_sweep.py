"""What uploads left behind that were killed: parts that nobody sees and that cost money."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from cachesrv.errors import NotFound
from cachesrv.storage.base import ObjectInfo
from cachesrv.storage.s3_errors import UploadGone
from cachesrv.storage.s3_listing import parts, uploads

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection

    from types_boto3_s3 import S3Client as Sdk

    from cachesrv.storage.s3_client import S3Client


async def abandoned(
    client: S3Client,
    prefix: str,
    *,
    before: float,
    remove: bool,
    spare: Collection[str] = (),
    but: str | None = None,
) -> AsyncIterator[ObjectInfo]:
    """The multipart uploads of keys that begin with `prefix` and do not go on with `but`, in which nothing has happened
    since `before`, in seconds since the epoch; they may be aborted on the way. Those whose ids are in `spare` are left
    alone. Raises StoreError.
    """
    async for upload in uploads(client, prefix):
        if but is not None and upload["Key"].startswith(prefix + but):
            continue
        if upload["UploadId"] in spare or upload["Initiated"].timestamp() >= before:
            continue
        with suppress(UploadGone, NotFound):
            size, last = 0, 0.0
            async for part in parts(client, upload["Key"], upload["UploadId"]):
                size, last = size + part["Size"], max(last, part["LastModified"].timestamp())
            if last < before:
                if remove:
                    await abort(client, upload["Key"], upload["UploadId"])
                yield ObjectInfo(upload["Key"].removeprefix(prefix), size, last or upload["Initiated"].timestamp())


async def abort(client: S3Client, key: str, upload: str) -> None:
    """Forget an upload. Raises UploadGone, StoreError."""

    def ask(sdk: Sdk) -> None:
        sdk.abort_multipart_upload(Bucket=client.bucket, Key=key, UploadId=upload)

    await client.call("AbortMultipartUpload", key, ask, changes=True)
