"""What uploads left behind that were killed: parts that nobody sees and that cost money."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

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


async def sweep(client: S3Client, prefix: str, *, before: float, spare: Collection[str]) -> int:
    """Abort the multipart uploads of keys that begin with `prefix` in which nothing has happened since `before`, in
    seconds since the epoch; how many there were. Those whose ids are in `spare` are left alone. Raises StoreError.
    """
    swept = 0
    async for upload in _uploads(client, prefix):
        if upload["UploadId"] in spare or upload["Initiated"].timestamp() >= before:
            continue
        with suppress(UploadGone):
            if await _last_part(client, upload) < before:
                await _abort(client, upload)
                swept += 1
    return swept


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


async def _last_part(client: S3Client, upload: MultipartUploadTypeDef) -> float:
    """When the last part of an upload arrived; 0 when none did."""
    last = 0.0
    position: dict[str, Any] = {}
    while True:

        def ask(sdk: Sdk, position: dict[str, Any] = position) -> ListPartsOutputTypeDef:
            return sdk.list_parts(Bucket=client.bucket, Key=upload["Key"], UploadId=upload["UploadId"], **position)

        page = await client.call("ListParts", upload["Key"], ask)
        last = max([last, *(part["LastModified"].timestamp() for part in page.get("Parts", []))])
        if not page["IsTruncated"]:
            return last
        position = {"PartNumberMarker": page["NextPartNumberMarker"]}


async def _abort(client: S3Client, upload: MultipartUploadTypeDef) -> None:
    def ask(sdk: Sdk) -> None:
        sdk.abort_multipart_upload(Bucket=client.bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    await client.call("AbortMultipartUpload", upload["Key"], ask, changes=True)
