"""What uploads left behind that were killed: parts that nobody sees and that cost money."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cachesrv.storage.base import ObjectInfo
from cachesrv.storage.s3_errors import UploadGone

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection

    from types_boto3_s3 import S3Client as Sdk
    from types_boto3_s3.type_defs import (
        ListMultipartUploadsOutputTypeDef,
        ListPartsOutputTypeDef,
        MultipartUploadTypeDef,
    )

    from cachesrv.storage.s3_client import S3Client


async def abandoned(
    client: S3Client, prefix: str, *, before: float, spare: Collection[str], remove: bool
) -> AsyncIterator[ObjectInfo]:
    """The multipart uploads of keys that begin with `prefix` in which nothing has happened since `before`, in seconds
    since the epoch; they may be aborted on the way. Those whose ids are in `spare` are left alone. Raises StoreError.
    """
    async for upload in _uploads(client, prefix):
        if upload["UploadId"] in spare or upload["Initiated"].timestamp() >= before:
            continue
        with suppress(UploadGone):
            size, last = await _parts(client, upload)
            if last < before:
                if remove:
                    await _abort(client, upload)
                yield ObjectInfo(upload["Key"].removeprefix(prefix), size, last or upload["Initiated"].timestamp())


async def _uploads(client: S3Client, prefix: str) -> AsyncIterator[MultipartUploadTypeDef]:
    position: dict[str, Any] = {}
    while True:

        def ask(sdk: Sdk, position: dict[str, Any] = position) -> ListMultipartUploadsOutputTypeDef:
            return sdk.list_multipart_uploads(Bucket=client.bucket, Prefix=prefix, **position)

        page = await client.call("ListMultipartUploads", prefix, ask)
        for upload in page.get("Uploads", []):
            yield upload
        if not page["IsTruncated"]:
            return
        position = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


async def _parts(client: S3Client, upload: MultipartUploadTypeDef) -> tuple[int, float]:
    """The bytes of all parts of an upload, and when the last one arrived; 0 when none did."""
    size, last = 0, 0.0
    position: dict[str, Any] = {}
    while True:

        def ask(sdk: Sdk, position: dict[str, Any] = position) -> ListPartsOutputTypeDef:
            return sdk.list_parts(Bucket=client.bucket, Key=upload["Key"], UploadId=upload["UploadId"], **position)

        page = await client.call("ListParts", upload["Key"], ask)
        parts = page.get("Parts", [])
        size += sum(part["Size"] for part in parts)
        last = max([last, *(part["LastModified"].timestamp() for part in parts)])
        if not page["IsTruncated"]:
            return size, last
        position = {"PartNumberMarker": page["NextPartNumberMarker"]}


async def _abort(client: S3Client, upload: MultipartUploadTypeDef) -> None:
    def ask(sdk: Sdk) -> None:
        sdk.abort_multipart_upload(Bucket=client.bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    await client.call("AbortMultipartUpload", upload["Key"], ask, changes=True)
