"""Objects that clients write to a bucket themselves, by presigned URLs: in one piece, or by multipart upload.

A URL is signed for the MD5 of what it is for, which S3 compares. Those of parts are worth nothing once the upload is
completed. That of a piece can be used again, also after the object was checked; so it is a copy that counts, and only
one of the object with the ETag that was checked. Where ETags are MD5, that of the copy tells; a store that calls copies
otherwise is found out by the first one, and gets no more pieces.
"""

from __future__ import annotations

import base64
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import structlog

from cachesrv.errors import NotFound
from cachesrv.storage import s3_listing, s3_sweep
from cachesrv.storage.base import STAGING, ArrivedPart, SignedPut, validate_key
from cachesrv.storage.decorators import TryAgain
from cachesrv.storage.s3_errors import UploadGone
from cachesrv.storage.s3_parts import MAX_PARTS, MIN_PART_SIZE
from cachesrv.storage.s3_upload import COPIED_TOGETHER, OtherContent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from types_boto3_s3 import S3Client as Sdk
    from types_boto3_s3.type_defs import HeadObjectOutputTypeDef

    from cachesrv.storage.base import Piece
    from cachesrv.storage.s3_client import S3Client
    from cachesrv.storage.s3_upload import Uploads

_log = structlog.get_logger()


class S3Direct:
    """A `cachesrv.storage.base.DirectStore`. `head` gives what is known of an object by its name, `uploads` are those
    of the store, `prefix` is what names begin with before the key. URLs can be used for `presign_seconds`.
    """

    least = MIN_PART_SIZE
    most = MAX_PARTS

    def __init__(
        self,
        client: S3Client,
        uploads: Uploads,
        head: Callable[[str], Awaitable[HeadObjectOutputTypeDef | None]],
        *,
        prefix: str,
        presign_seconds: int,
    ) -> None:
        self._client = client
        self._uploads = uploads
        self._head = head
        self._prefix = prefix
        self._presign_seconds = presign_seconds
        self.largest_piece = COPIED_TOGETHER

    async def begin(self, key: str) -> str:
        name = self._name(key)

        def ask(sdk: Sdk) -> str:
            return sdk.create_multipart_upload(Bucket=self._client.bucket, Key=name)["UploadId"]

        return await self._client.call("CreateMultipartUpload", name, ask, changes=True)

    async def sign(self, key: str, upload: str, number: int, md5: bytes) -> SignedPut:
        return await self._signed("upload_part", key, md5, UploadId=upload, PartNumber=number)

    async def parts(self, key: str, upload: str) -> list[ArrivedPart] | None:
        try:
            return [
                ArrivedPart(part["PartNumber"], part["Size"], part["ETag"].strip('"'), part["LastModified"].timestamp())
                async for part in s3_listing.parts(self._client, self._name(key), upload)
            ]
        except (UploadGone, NotFound):
            return None

    async def complete(self, key: str, upload: str, tags: Sequence[str]) -> None:
        name = self._name(key)
        parts: Any = {"Parts": [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]}

        def ask(sdk: Sdk) -> None:
            sdk.complete_multipart_upload(Bucket=self._client.bucket, Key=name, UploadId=upload, MultipartUpload=parts)

        try:
            await self._client.call("CompleteMultipartUpload", name, ask, changes=True)
        except (UploadGone, NotFound, TryAgain):
            # The answer to the attempt before may be all that was lost; and of two at once, one fails at Ceph for long.
            if await self._head(name) is None:
                raise

    async def abort(self, key: str, upload: str) -> None:
        with suppress(UploadGone, NotFound):
            await s3_sweep.abort(self._client, self._name(key), upload)

    async def sign_whole(self, key: str, size: int, md5: bytes) -> SignedPut:
        return await self._signed("put_object", key, md5, ContentLength=size)

    async def whole(self, key: str) -> ArrivedPart | None:
        found = await self._head(self._name(key))
        if found is None:
            return None
        return ArrivedPart(1, found["ContentLength"], found["ETag"].strip('"'), found["LastModified"].timestamp())

    async def publish(self, key: str, to: str, piece: Piece | None = None) -> bool:
        name = self._name(key)
        found = await self._head(name)
        if found is None:
            raise NotFound(f"there is no object {key}")
        size, tag, md5 = found["ContentLength"], found["ETag"], ""
        if piece:
            if tag.strip('"') != piece.tag:
                raise NotFound(f"there is another object {key} by now")
            md5 = piece.md5 if piece.md5 == piece.tag else ""
        try:
            async with self._uploads.begin(self._name(to), size) as writer:
                await writer.copy(name, tag, size, md5=md5)
                return await writer.commit()
        except OtherContent:
            found = await self._head(name)
            if found and found["ETag"] == tag:
                _log.warning("the bucket calls copies otherwise, NARs are sent there in parts only", etag=tag)
                self.largest_piece = 0
            raise

    async def unfinished(self) -> AsyncIterator[str]:
        async for upload in s3_listing.uploads(self._client, self._prefix + STAGING):
            yield upload["Key"].removeprefix(self._prefix)

    async def sweep(self, *, older_than: float) -> int:
        before = time.time() - older_than
        uploads = s3_sweep.abandoned(self._client, self._prefix + STAGING, before=before, remove=True)
        return len([info async for info in uploads])

    async def _signed(self, operation: str, key: str, md5: bytes, **parameters: Any) -> SignedPut:
        digest = base64.b64encode(md5).decode()
        parameters |= {"Key": self._name(key), "ContentMD5": digest}
        return SignedPut(
            await self._client.signed(operation, self._presign_seconds, **parameters), {"Content-MD5": digest}
        )

    def _name(self, key: str) -> str:
        return self._prefix + validate_key(key)
