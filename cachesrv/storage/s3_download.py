"""Objects on their way out of a bucket."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from cachesrv.errors import BadInput, NotFound, StoreError
from cachesrv.storage.base import ByteRange
from cachesrv.storage.decorators import TryAgain

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Self

    from cachesrv.storage.s3_client import S3Client

_BREAKS = 8
"""Transfers that may break one after the other …"""
_PROGRESS = 2**20
"""… without so many bytes having come between."""


def codings(content_encoding: str) -> str:
    """What has to be undone to have the object, as a Content-Encoding names it; empty if nothing."""
    named = map(str.strip, content_encoding.lower().split(","))
    return ",".join(coding for coding in named if coding not in {"", "identity", "aws-chunked"})


class Download:
    """The body of an object, or a part of it: an asynchronous context manager to iterate over, once. Where a transfer
    breaks, the rest is asked for by range, of the same object or not at all. It ends after the last byte, or raises
    StoreError.

    On entry raises NotFound; BadInput for a part that is not within the object.
    """

    def __init__(self, client: S3Client, key: str, part: ByteRange | None = None) -> None:
        if part and not 0 <= part.start < part.end:
            raise BadInput(f"not a part of an object: {part.start} up to {part.end}")
        self._client = client
        self._key = key
        self._part = part
        self._position = part.start if part else 0
        self._end: int | None = None
        self._breaks = 0
        self._broke_at = 0
        self._etag = ""

    async def __aenter__(self) -> Self:
        try:
            self._response = await self._client.get(self._key, self._part)
        except NotFound:
            raise NotFound(f"there is no object {self._key}") from None
        except BadInput:
            raise BadInput(f"{self._key} has fewer bytes than were asked for") from None
        try:
            self._end = self._part.end if self._part else self._length()
            self._check_part()
        except BaseException:
            self._response.close()
            raise
        self._etag = self._response.headers.get("ETag", "")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._response.release()

    @property
    def length(self) -> int | None:
        """Bytes to come; None where the server does not say it before the end."""
        return None if self._end is None else self._end - self._position

    @property
    def encoding(self) -> str:
        """The Content-Encoding that the object is stored with; empty if none."""
        return codings(self._response.headers.get("Content-Encoding", ""))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            try:
                async for chunk in self._client.chunks(self._key, self._response):
                    self._position += len(chunk)
                    yield chunk
            except TryAgain as error:
                await self._go_on(error)
            else:
                break
        if self._end not in {None, self._position}:
            raise StoreError(f"{self._request()}: it should end at {self._end}, and ended at {self._position}")

    async def _go_on(self, error: TryAgain) -> None:
        self._response.close()
        if self._position - self._broke_at >= _PROGRESS:
            self._breaks = 0
        self._breaks += 1
        self._broke_at = self._position
        if self._breaks > _BREAKS or not self._etag or self._end is None:
            raise error
        self._part = ByteRange(self._position, self._end)
        try:
            self._response = await self._client.get(self._key, self._part, etag=self._etag)
        except (NotFound, BadInput) as changed:
            raise StoreError(f"{self._request()}: it changed while it was read") from changed
        self._check_part()

    def _length(self) -> int | None:
        if self._response.content_length is None and self._response.headers.get("Transfer-Encoding") != "chunked":
            raise StoreError(f"{self._request()}: an answer without Content-Length: a proxy must not take it away")
        return self._response.content_length

    def _check_part(self) -> None:
        if self._part is None:
            return
        found = re.fullmatch(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", self._response.headers.get("Content-Range", ""))
        if self._response.status != 206 or not found or int(found[1]) != self._part.start:
            raise StoreError(f"{self._request()}: a part was asked for, and something else is given")
        if self._part.end != int(found[2]) + 1:
            raise BadInput(
                f"{self._key} has {found[3]} bytes, {self._part.start} up to {self._part.end} are not among them"
            )

    def _request(self) -> str:
        return str(self._client.request("GetObject", self._key))
