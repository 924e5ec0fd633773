"""Objects on their way into a bucket: what fits into one part by a single PUT, the rest by multipart upload.

At most one object is created under a key, and none is overwritten, as far as the endpoint helps
(`cachesrv.storage.s3_probe` finds out whether it does):

- Where `If-None-Match: *` is honoured, it decides, for a PUT and for the completion of a multipart upload.
- Where it is honoured for a PUT alone, as by Ceph 16, uploads are completed by one writer at a time, of all processes
  (`cachesrv.storage.s3_claims`), who asks for the key first.
- Where it is not honoured at all, the key is asked for first, and of the writers of one process one goes at a time.
  What remains is that writers of two processes can create the same key within the time between question and creation.
  Each of them then answers True, and the later object stays, whole.

Each object carries a mark of the write that made it, as metadata. A write whose answer was lost, and which then finds
an object, knows by the mark whether it is its own.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from functools import partial
from secrets import token_hex
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from cachesrv.errors import Mismatch, NotFound, StoreError, StoreFull, StoreUnavailable
from cachesrv.storage import s3_sweep
from cachesrv.storage.decorators import TryAgain
from cachesrv.storage.s3_client import having
from cachesrv.storage.s3_errors import Exists, UploadGone
from cachesrv.storage.s3_parts import MAX_OBJECT_SIZE, MAX_PARTS, content_md5, content_type, part_size

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping

    from types_boto3_s3 import S3Client as Sdk

    from cachesrv.storage.s3_claims import Claims
    from cachesrv.storage.s3_client import S3Client
    from cachesrv.storage.s3_probe import Abilities

COPIED_TOGETHER = 256 * 2**20
"""Bytes that the store copies in one request: in less time than an answer is waited for."""

_MARK = "cachesrv-write"


class OtherContent(NotFound):
    """What was copied is not called by the MD5 that it was to have."""


class Uploads:
    """What all uploads into one bucket share. `metadata` gives those of an object, or None when it is not there.
    At most `parts` parts are in memory on their way; each writer holds another one that fills.
    """

    def __init__(
        self,
        client: S3Client,
        metadata: Callable[[str], Awaitable[Mapping[str, str] | None]],
        abilities: Abilities,
        claims: Claims,
        *,
        least: int,
        parts: int,
    ) -> None:
        self.client = client
        self.metadata = metadata
        self.least = least
        self.slots = asyncio.Semaphore(parts)
        self._abilities = abilities
        self._claims = claims
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
        if await self._abilities.conditional_put():
            try:
                await put(IfNoneMatch="*")
            except Exists:
                return await self.is_marked(key, mark)
            return True
        async with self._lock(key):
            if await self.is_there(key):
                return False
            await put()
            return True

    async def complete(self, key: str, upload: str, complete: Callable[..., Awaitable[bool]]) -> bool:
        """Create an object by what completes an upload and takes a condition, unless it is there; False when it is."""
        try:
            return await self._complete(key, upload, complete)
        except (UploadGone, TryAgain) as error:
            if await self.is_there(key):
                return False
            raise StoreUnavailable(f"{key}: another writer may have taken over: {error}") from error

    async def _complete(self, key: str, upload: str, complete: Callable[..., Awaitable[bool]]) -> bool:
        if await self._abilities.conditional_completion():
            return await complete(IfNoneMatch="*")
        is_there = partial(self.is_there, key)
        async with self._lock(key):
            if not await self._abilities.conditional_put():
                return not await is_there() and await complete()
            async with self._claims.held(key, upload, is_there) as held:
                return held and await complete()

    async def is_there(self, key: str) -> bool:
        return await self.metadata(key) is not None

    async def is_marked(self, key: str, mark: str) -> bool:
        """Whether the object was made by the write with this mark."""
        metadata = await self.metadata(key)
        return metadata is not None and metadata.get(_MARK) == mark

    def _lock(self, key: str) -> asyncio.Lock:
        """For those of this process who have to go one at a time."""
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

    async def copy(self, source: str, tag: str, size: int, *, md5: str = "") -> None:
        """Have the store append another object of the bucket, of so many bytes and with this ETag. Where the store
        calls it by its `md5`, which is given of at most COPIED_TOGETHER bytes, the copy is to be called so, too: Ceph
        16 copies parts whatever the ETag. Else NotFound is raised, here or later: OtherContent where the copy shows it.
        """
        self._take_up()
        self.id = self.id or await self._create()
        together = max(COPIED_TOGETHER, -(-size // MAX_PARTS))
        for start in range(0, size, together):
            # S3 has ranges copied only of objects of more than 5 MB.
            span = {"CopySourceRange": f"bytes={start}-{min(start + together, size) - 1}"} if size > together else {}
            await self._begin(partial(self._copy, len(self._sending) + 1, source, tag, md5, **span))
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
        complete = partial(self._complete, await asyncio.gather(*self._sending))
        return await complete() if replace else await self._uploads.complete(self._key, self.id, complete)

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
            # What stays because this fails is found by the next sweep.
            with suppress(StoreError, NotFound):
                await s3_sweep.abort(self._client, self._key, upload)

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

    async def _copy(self, number: int, source: str, tag: str, md5: str, **span: Any) -> str:
        def ask(sdk: Sdk) -> str:
            bucket = self._client.bucket
            answer = sdk.upload_part_copy(
                Bucket=bucket,
                Key=self._key,
                UploadId=self.id,
                PartNumber=number,
                CopySource={"Bucket": bucket, "Key": source},
                CopySourceIfMatch=tag,
                **span,
            )
            return answer["CopyPartResult"]["ETag"]

        replaced = f"{source} was replaced before it was copied"
        try:
            copied = await self._client.call("UploadPartCopy", self._key, ask, changes=True)
        except Exists as error:
            raise NotFound(replaced) from error
        if md5 and copied.strip('"') != md5:
            raise OtherContent(replaced)
        return copied

    async def _complete(self, tags: list[str], **condition: Any) -> bool:
        parts: Any = {"Parts": [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]}

        def ask(sdk: Sdk) -> None:
            answer = sdk.complete_multipart_upload(
                Bucket=self._client.bucket,
                Key=self._key,
                UploadId=self.id,
                MultipartUpload=parts,
                **condition,
            )
            having(answer, "ETag")

        try:
            await self._client.call("CompleteMultipartUpload", self._key, ask, changes=True)
        except Exists:
            return await self._uploads.is_marked(self._key, self._mark)
        except (UploadGone, TryAgain):
            # It may have been completed by an attempt whose answer was lost; Ceph says for minutes that it is at it.
            if not await self._uploads.is_marked(self._key, self._mark):
                raise
        self.id = ""
        return True
