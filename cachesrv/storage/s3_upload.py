"""Objects on their way into a bucket: what fits into one part by a single PUT, the rest by multipart upload.

At most one object is created under a key, and none is overwritten, as far as the endpoint helps:

- Where `If-None-Match: *` is honoured, it decides, for a PUT and for the completion of a multipart upload.
- Where it is not, the key is asked for first, and of the writers of one process one goes at a time. What remains is
  that writers of two processes can complete the same key within the time between question and completion. Each of
  them then answers True, and the later object stays, whole. (Ceph 16 honours the condition on PUT and ignores it on
  completion.) NARs are named by their hash: equal names are equal contents.

Each object carries a mark of the write that made it, as metadata. A write whose answer was lost, and which then finds
an object, knows by the mark whether it is its own.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from contextlib import asynccontextmanager, suppress
from functools import partial
from secrets import token_hex
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from cachesrv.errors import Mismatch, StoreError, StoreFull
from cachesrv.storage.s3_errors import Exists, NotImplementedThere, UploadGone

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping

    from types_boto3_s3 import S3Client as Sdk

    from cachesrv.storage.s3_client import S3Client

MAX_PARTS = 10_000
MIN_PART_SIZE = 5 * 2**20
MAX_PART_SIZE = 5 * 2**30
MAX_OBJECT_SIZE = 5 * 2**40
"""Limits of S3, in bytes but for the first ("Amazon S3 multipart upload limits")."""

_COPIED_TOGETHER = 256 * 2**20
"""Bytes that the store copies in one request: in less time than an answer is waited for."""

_GROW_AFTER = 5_000
_GROW_EVERY = 450
_HASHED_AT_ONCE = 2**16
_MARK = "cachesrv-write"


def part_size(number: int, size: int | None, least: int) -> int:
    """Bytes of part `number` (from 1) of an object of `size` bytes, so that 10,000 parts are enough. All but the last
    are equally large, as some endpoints demand. Of an object of unknown size that holds for the first 5,000; then they
    double every 450, which comes to more than an object may have.
    """
    if size is not None:
        return max(least, -(-size // MAX_PARTS))
    doublings = max(0, -(-(number - _GROW_AFTER) // _GROW_EVERY))
    return min(MAX_PART_SIZE, least << doublings)


async def content_md5(data: bytes | bytearray) -> str:
    """The value of Content-MD5, by which the server verifies what has arrived."""
    if len(data) <= _HASHED_AT_ONCE:
        return _md5(data)
    return await asyncio.to_thread(_md5, data)


def _md5(data: bytes | bytearray) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


def content_type(key: str) -> str:
    """What Nix itself says when it writes to a bucket."""
    folder, _, name = f"/{key}".rpartition("/")
    if name.endswith(".narinfo"):
        return "text/x-nix-narinfo"
    if name == "nix-cache-info":
        return "text/x-nix-cache-info"
    if folder.endswith("/nar"):
        return "application/x-nix-nar"
    if folder.endswith("/log"):
        return "text/plain; charset=utf-8"
    return "application/json"


class Uploads:
    """What all uploads into one bucket share. `metadata` gives those of an object, or None when it is not there;
    `conditional_put` says whether the endpoint honours `If-None-Match: *` on a PUT. At most `parts` parts are in
    memory on their way; each writer holds another one that fills.
    """

    def __init__(
        self,
        client: S3Client,
        metadata: Callable[[str], Awaitable[Mapping[str, str] | None]],
        conditional_put: Callable[[], Awaitable[bool]],
        *,
        least: int,
        parts: int,
    ) -> None:
        self.client = client
        self.metadata = metadata
        self.least = least
        self.slots = asyncio.Semaphore(parts)
        self._conditional_put = conditional_put
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._open: set[Upload] = set()

    @asynccontextmanager
    async def begin(self, key: str, size: int | None) -> AsyncIterator[Upload]:
        """A writer; leaving without `commit` leaves nothing behind."""
        self.client.demand_open()
        if size is not None and size > MAX_OBJECT_SIZE:
            raise StoreFull(f"no room for {key}: S3 takes objects of at most {MAX_OBJECT_SIZE} bytes, not {size}")
        upload = Upload(self, key, size)
        self._open.add(upload)
        try:
            yield upload
        finally:
            self._open.discard(upload)
            await upload.abort()

    async def put(self, key: str, data: bytes | bytearray, *, replace: bool) -> bool:
        """A whole object in one request; answers as `commit` does."""
        mark = token_hex(8)
        parameters = {
            "ContentMD5": await content_md5(data),
            "ContentType": content_type(key),
            "Metadata": {_MARK: mark},
        }

        async def put(**condition: str) -> None:
            await self.client.put("PutObject", key, data, **parameters, **condition)

        if replace:
            await put()
            return True
        if await self._conditional_put():
            try:
                await put(IfNoneMatch="*")
            except Exists:
                return await self.is_marked(key, mark)
            return True
        async with self.lock(key):
            if await self.metadata(key) is not None:
                return False
            await put()
            return True

    async def is_marked(self, key: str, mark: str) -> bool:
        """Whether the object was made by the write with this mark."""
        metadata = await self.metadata(key)
        return metadata is not None and metadata.get(_MARK) == mark

    def lock(self, key: str) -> asyncio.Lock:
        """For those who have to go one at a time."""
        return self._locks.setdefault(key, asyncio.Lock())

    @property
    def ids(self) -> frozenset[str]:
        """The multipart uploads that are open."""
        return frozenset(upload.id for upload in self._open)

    async def close(self) -> None:
        """Abort what is open."""
        await asyncio.gather(*(upload.abort() for upload in self._open))


class Upload:
    """One object on its way in: an ObjectWriter. `id` is that of its multipart upload, if there is one."""

    def __init__(self, uploads: Uploads, key: str, size: int | None) -> None:
        self._uploads = uploads
        self._client = uploads.client
        self._key = key
        self._size = size
        self._written = 0
        self._pending = bytearray()
        self.id = ""
        self._mark = token_hex(8)
        self._sending: list[asyncio.Task[str]] = []
        self._failure: BaseException | None = None
        # False while something is at work, and so for ever when that fails: a part of the object may be missing.
        self._usable = True

    async def write(self, data: bytes | memoryview) -> None:
        self._take_up()
        view = memoryview(data).cast("B")
        self._written += len(view)
        while view:
            if len(self._pending) == self._part_size():
                await self._send_part()
            room = self._part_size() - len(self._pending)
            self._pending += view[:room]
            view = view[room:]
        self._usable = True

    async def copy(self, source: str, tag: str, size: int) -> None:
        """Have the store append another object of the bucket, of so many bytes and with this ETag."""
        self._take_up()
        self.id = self.id or await self._create()
        together = max(_COPIED_TOGETHER, -(-size // MAX_PARTS))
        for start in range(0, size, together):
            span = f"bytes={start}-{min(start + together, size) - 1}"
            await self._begin(partial(self._copy, len(self._sending) + 1, source, tag, span))
        self._written += size
        self._usable = True

    async def commit(self, *, replace: bool = False) -> bool:
        self._take_up()
        if self._size not in (None, self._written):
            raise Mismatch(f"{self._key} was to have {self._size} bytes, {self._written} were written")
        if not self.id:
            return await self._uploads.put(self._key, self._pending, replace=replace)
        if self._pending:
            await self._send_part()
        tags = await asyncio.gather(*self._sending)
        if replace:
            return await self._complete(tags)
        async with self._uploads.lock(self._key):
            if await self._uploads.metadata(self._key) is not None:
                return False
            try:
                return await self._complete(tags, IfNoneMatch="*")
            except NotImplementedThere:
                return await self._complete(tags)

    async def abort(self) -> None:
        """Stop, and remove what has been sent of an object that was not completed."""
        self._usable = False
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)
        self._sending = []
        self._pending = bytearray()
        upload, self.id = self.id, ""
        if upload and not self._client.closed:

            def ask(sdk: Sdk) -> None:
                sdk.abort_multipart_upload(Bucket=self._client.bucket, Key=self._key, UploadId=upload)

            # What stays because this fails is found by the next sweep.
            with suppress(StoreError):
                await self._client.call("AbortMultipartUpload", self._key, ask, changes=True)

    def _part_size(self) -> int:
        return part_size(len(self._sending) + 1, self._size, self._uploads.least)

    def _take_up(self) -> None:
        if not self._usable:
            raise StoreError(f"{self._key}: nothing can be written after a commit or an error")
        self._usable = False

    async def _send_part(self) -> None:
        if not self.id:
            self.id = await self._create()
        part, self._pending = self._pending, bytearray()
        await self._begin(partial(self._send, len(self._sending) + 1, part))

    async def _begin(self, sending: Callable[[], Coroutine[None, None, str]]) -> None:
        await self._uploads.slots.acquire()
        task = asyncio.create_task(sending())
        task.add_done_callback(self._sent)
        self._sending.append(task)
        if self._failure:
            raise self._failure

    def _sent(self, task: asyncio.Task[str]) -> None:
        self._uploads.slots.release()
        if not task.cancelled():
            self._failure = self._failure or task.exception()

    async def _create(self) -> str:
        def ask(sdk: Sdk) -> str:
            return sdk.create_multipart_upload(
                Bucket=self._client.bucket,
                Key=self._key,
                ContentType=content_type(self._key),
                Metadata={_MARK: self._mark},
            )["UploadId"]

        return await self._client.call("CreateMultipartUpload", self._key, ask, changes=True)

    async def _send(self, number: int, part: bytearray) -> str:
        return await self._client.put(
            "UploadPart",
            self._key,
            part,
            UploadId=self.id,
            PartNumber=number,
            ContentMD5=await content_md5(part),
        )

    async def _copy(self, number: int, source: str, tag: str, span: str) -> str:
        def ask(sdk: Sdk) -> str:
            bucket = self._client.bucket
            answer = sdk.upload_part_copy(
                Bucket=bucket,
                Key=self._key,
                UploadId=self.id,
                PartNumber=number,
                CopySource={"Bucket": bucket, "Key": source},
                CopySourceIfMatch=tag,
                CopySourceRange=span,
            )
            return answer["CopyPartResult"]["ETag"]

        return await self._client.call("UploadPartCopy", self._key, ask, changes=True)

    async def _complete(self, tags: list[str], **condition: Any) -> bool:
        parts: Any = {"Parts": [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]}

        def ask(sdk: Sdk) -> None:
            sdk.complete_multipart_upload(
                Bucket=self._client.bucket,
                Key=self._key,
                UploadId=self.id,
                MultipartUpload=parts,
                **condition,
            )

        try:
            await self._client.call("CompleteMultipartUpload", self._key, ask, changes=True)
        except Exists:
            return await self._uploads.is_marked(self._key, self._mark)
        except UploadGone:
            if await self._uploads.is_marked(self._key, self._mark):
                self.id = ""
                return True
            raise
        self.id = ""
        return True
