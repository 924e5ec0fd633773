"""One writer at a time completes a multipart upload of a key, of all processes, where the endpoint does not see to it.

Completing an upload replaces what is there where `If-None-Match: *` is not honoured for that, as by Ceph 16. Where it
is honoured for a PUT, who is about to complete an upload first creates a claim: a small object with the id of the
upload, beside all keys. Of the claims of one key the one with the highest number counts. Who finds one that stays (its
holder was killed, or sleeps) makes the next one and aborts the upload of the one before: so that its holder, should it
wake up, cannot complete it any more.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager, suppress
from hashlib import sha256
from typing import TYPE_CHECKING

from cachesrv.errors import NotFound, StoreError
from cachesrv.storage import s3_listing, s3_sweep
from cachesrv.storage.base import ObjectInfo
from cachesrv.storage.s3_download import Download
from cachesrv.storage.s3_errors import Exists, UploadGone
from cachesrv.storage.s3_parts import content_md5

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from types_boto3_s3 import S3Client as Sdk

    from cachesrv.storage.s3_client import S3Client

_PATIENCE = 60.0
"""Seconds for which a claim is respected: longer than a request to complete an upload is tried again."""
_PAUSES = (0.1, 0.2, 0.4, 0.8)
"""Seconds between looks at a claim of somebody else's; the last again and again."""


class Claims:
    """Claims on keys of a bucket. They lie below `prefix`, which is empty or ends in a slash."""

    def __init__(self, client: S3Client, prefix: str, *, patience: float = _PATIENCE) -> None:
        self._client = client
        self._folder = f"{prefix}.cachesrv/claims/"
        self._patience = patience

    @asynccontextmanager
    async def held(self, key: str, upload: str, is_there: Callable[[], Awaitable[bool]]) -> AsyncIterator[bool]:
        """Hold the claim on a key for an upload of it; False when the object `is_there` by then. Raises StoreError."""
        claim = await self._obtain(key, upload, is_there)
        if claim is None:
            yield False
            return
        try:
            yield not await is_there()
        finally:
            # What stays because this fails is passed over after a while, and found by the next sweep.
            with suppress(StoreError):
                await self._remove(claim)

    async def abandoned(self, *, before: float, remove: bool) -> AsyncIterator[ObjectInfo]:
        """Claims made before that, in seconds since the epoch; they may be removed on the way. Raises StoreError."""
        async for name, modified in self._names(self._folder):
            if modified < before:
                if remove:
                    await self._remove(name)
                yield ObjectInfo(name, 0, modified)

    async def _obtain(self, key: str, upload: str, is_there: Callable[[], Awaitable[bool]]) -> str | None:
        folder = f"{self._folder}{sha256(key.encode()).hexdigest()[:32]}/"
        latest, since, looks = "", time.monotonic(), 0
        while True:
            if not latest or time.monotonic() - since >= self._patience:
                claim = _next(folder, latest)
                if await self._create(claim, upload) and await self._counts(folder, key, claim):
                    return claim
            if await is_there():
                return None
            there = max([name async for name, _ in self._names(folder)], default="")
            if there != latest:
                latest, since = there, time.monotonic()
            if latest:
                await asyncio.sleep(_PAUSES[min(looks, len(_PAUSES) - 1)])
                looks += 1

    async def _counts(self, folder: str, key: str, claim: str) -> bool:
        """Whether no claim has a higher number; then those with lower ones have ended."""
        names = [name async for name, _ in self._names(folder)]
        if claim != max(names, default=""):
            await self._remove(claim)
            return False
        for name in names:
            if name < claim:
                await self._end(name, key)
        return True

    async def _end(self, claim: str, key: str) -> None:
        with suppress(NotFound, UploadGone):
            upload = await self._read(claim)
            await s3_sweep.abort(self._client, key, upload)
        await self._remove(claim)

    async def _create(self, claim: str, upload: str) -> bool:
        text = upload.encode()
        try:
            await self._client.put("PutObject", claim, text, ContentMD5=await content_md5(text), IfNoneMatch="*")
        except Exists:
            # The answer to the attempt before may be all that was lost.
            with suppress(NotFound):
                return await self._read(claim) == upload
            return False
        return True

    async def _read(self, claim: str) -> str:
        async with Download(self._client, claim) as body:
            return b"".join([chunk async for chunk in body]).decode()

    async def _remove(self, claim: str) -> None:
        def ask(sdk: Sdk) -> None:
            sdk.delete_object(Bucket=self._client.bucket, Key=claim)

        await self._client.call("DeleteObject", claim, ask, changes=True)

    async def _names(self, folder: str) -> AsyncIterator[tuple[str, float]]:
        """Claims, and when they were made."""
        async for found in s3_listing.objects(self._client, folder):
            yield found["Key"], found["LastModified"].timestamp()


def _next(folder: str, latest: str) -> str:
    number = int(latest.rpartition("/")[2]) + 1 if latest else 0
    return f"{folder}{number:06}"
