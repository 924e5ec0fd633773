"""What there is in a bucket, page by page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cachesrv.storage.s3_client import having

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from types_boto3_s3 import S3Client as Sdk
    from types_boto3_s3.type_defs import (
        ListMultipartUploadsOutputTypeDef,
        ListObjectsV2OutputTypeDef,
        ListPartsOutputTypeDef,
        MultipartUploadTypeDef,
        ObjectTypeDef,
        PartTypeDef,
    )

    from cachesrv.storage.s3_client import S3Client


async def objects(client: S3Client, prefix: str) -> AsyncIterator[ObjectTypeDef]:
    """The objects whose keys begin so. Raises StoreError."""
    position: dict[str, Any] = {}
    while True:

        def ask(sdk: Sdk, position: dict[str, Any] = position) -> ListObjectsV2OutputTypeDef:
            return having(sdk.list_objects_v2(Bucket=client.bucket, Prefix=prefix, **position), "IsTruncated")

        page = await client.call("ListObjectsV2", prefix, ask)
        for found in page.get("Contents", []):
            yield found
        if not page["IsTruncated"]:
            return
        position = {"ContinuationToken": page["NextContinuationToken"]}


async def uploads(client: S3Client, prefix: str) -> AsyncIterator[MultipartUploadTypeDef]:
    """The multipart uploads of keys that begin so. Raises StoreError."""
    position: dict[str, Any] = {}
    while True:

        def ask(sdk: Sdk, position: dict[str, Any] = position) -> ListMultipartUploadsOutputTypeDef:
            return having(sdk.list_multipart_uploads(Bucket=client.bucket, Prefix=prefix, **position), "IsTruncated")

        page = await client.call("ListMultipartUploads", prefix, ask)
        for upload in page.get("Uploads", []):
            yield upload
        if not page["IsTruncated"]:
            return
        position = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


async def parts(client: S3Client, key: str, upload: str) -> AsyncIterator[PartTypeDef]:
    """The parts of an upload that have arrived, by number. Raises UploadGone (Ceph: NotFound), StoreError."""
    position: dict[str, Any] = {}
    while True:

        def ask(sdk: Sdk, position: dict[str, Any] = position) -> ListPartsOutputTypeDef:
            return having(sdk.list_parts(Bucket=client.bucket, Key=key, UploadId=upload, **position), "IsTruncated")

        page = await client.call("ListParts", key, ask)
        for part in page.get("Parts", []):
            yield part
        if not page["IsTruncated"]:
            return
        position = {"PartNumberMarker": page["NextPartNumberMarker"]}
