"""Objects in an S3 bucket, which is a binary cache for any Nix client (`s3://…`) as it lies there.

A key of ours is a key of the bucket, behind a prefix. Objects with other names, such as those with a segment that
begins with a dot, are not seen. The promises of `cachesrv.storage.base` hold but for one: `cachesrv.storage.s3_upload`
says what remains of "if absent" where the endpoint does not help. What of requests is tried again, limited and
measured is up to the `Requests` that they go through (`cachesrv.storage.decorators`).
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from botocore.exceptions import ClientError

from cachesrv.errors import BadInput, NotFound, StoreError, TooLarge
from cachesrv.nix.compression import content_coding, decompress
from cachesrv.storage import s3_errors, s3_listing, s3_probe
from cachesrv.storage.base import (
    MAX_KEY_LENGTH,
    STAGING,
    ByteRange,
    ObjectInfo,
    PresignedUrl,
    Stream,
    is_segment,
    validate_key,
    validate_prefix,
)
from cachesrv.storage.decorators import TryAgain
from cachesrv.storage.s3_claims import Claims
from cachesrv.storage.s3_client import S3Client, having
from cachesrv.storage.s3_direct import S3Direct
from cachesrv.storage.s3_download import Download, codings
from cachesrv.storage.s3_errors import Answer
from cachesrv.storage.s3_sweep import abandoned
from cachesrv.storage.s3_upload import Uploads

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from botocore.session import Session
    from types_boto3_s3 import S3Client as Sdk
    from types_boto3_s3.type_defs import HeadObjectOutputTypeDef

    from cachesrv.storage.base import ObjectWriter
    from cachesrv.storage.decorators import Requests
    from cachesrv.storage.s3_client import AddressingStyle

_DELETED_TOGETHER = 1000
_TOGETHER = 32


class S3Store:
    """See `cachesrv.storage.base.ObjectStore`, and `cachesrv.storage.s3_client.S3Client` for the arguments that say
    where the bucket is. `prefix` is empty or a key. Objects reach clients by URLs that hold for `presign_seconds`, or
    through us when `redirect` is not set. An object larger than `part_size` bytes (at least 5 MiB) is uploaded in
    parts, of which at most `parts` are on their way in memory. Raises StoreError, BadInput for a bad prefix.
    """

    def __init__(
        self,
        bucket: str,
        *,
        requests: Requests,
        prefix: str = "",
        region: str | None = None,
        endpoint: str | None = None,
        addressing_style: AddressingStyle = "auto",
        redirect: bool = True,
        presign_seconds: int = 3600,
        part_size: int = 8 * 2**20,
        parts: int = 5,
        threads: int = 16,
        session: Session | None = None,
    ) -> None:
        self._prefix = f"{validate_key(prefix)}/" if prefix else ""
        self._redirect = redirect
        self._presign_seconds = presign_seconds
        self._client = S3Client(
            bucket,
            requests,
            region=region,
            endpoint=endpoint,
            addressing_style=addressing_style,
            threads=threads,
            session=session,
        )
        abilities = s3_probe.Abilities(self._client, self._prefix)
        self._claims = Claims(self._client, self._prefix)
        self._uploads = Uploads(self._client, self._metadata, abilities, self._claims, least=part_size, parts=parts)
        self.direct = S3Direct(
            self._client, self._uploads, self._head, prefix=self._prefix, presign_seconds=presign_seconds
        )
        """For clients that write to the bucket themselves."""

    def writer(self, key: str, *, size: int | None = None) -> AbstractAsyncContextManager[ObjectWriter]:
        return self._uploads.begin(self._name(key), size)

    async def put(self, key: str, data: bytes, *, replace: bool = False) -> bool:
        return await self._uploads.put(self._name(key), data, replace=replace)

    async def put_many(self, objects: Mapping[str, bytes], *, replace: bool = False) -> set[str]:
        for key in objects:
            validate_key(key)
        created: set[str] = set()

        async def put(key: str) -> None:
            if await self.put(key, objects[key], replace=replace):
                created.add(key)

        await _together(objects, put)
        return created

    async def put_in_order(self, groups: Sequence[Mapping[str, bytes]]) -> set[str]:
        for key in (key for group in groups for key in group):
            validate_key(key)
        created: set[str] = set()
        for group in groups:
            created |= await self.put_many(group)
        return created

    async def get(self, key: str, *, limit: int) -> bytes | None:
        try:
            async with Download(self._client, self._name(key)) as body:
                data = bytearray()
                _check_limit(key, body.length or 0, limit)
                async for chunk in body:
                    data += chunk
                    _check_limit(key, len(data), limit)
                return _decoded(key, bytes(data), body.encoding, limit)
        except NotFound:
            return None

    async def get_many(self, keys: Collection[str], *, limit: int) -> dict[str, bytes]:
        for key in keys:
            validate_key(key)
        found: dict[str, bytes] = {}

        async def get(key: str) -> None:
            with suppress(TooLarge):
                data = await self.get(key, limit=limit)
                if data is not None:
                    found[key] = data

        await _together(keys, get)
        return found

    def at_once(self, key: str, *, limit: int) -> None:  # noqa: ARG002  nothing can be had without a request
        validate_key(key)

    def warm_file(self, key: str, *, limit: int) -> None:  # noqa: ARG002  see at_once
        validate_key(key)

    def read(self, key: str, byte_range: ByteRange | None = None) -> AsyncIterator[bytes]:
        return self._read(self._name(key), byte_range)

    async def _read(self, name: str, byte_range: ByteRange | None) -> AsyncIterator[bytes]:
        async with Download(self._client, name, byte_range) as body:
            if body.encoding:
                raise StoreError(f"{name} is stored with Content-Encoding {body.encoding}: it cannot be streamed")
            async for chunk in body:
                yield chunk

    async def head(self, key: str) -> ObjectInfo | None:
        found = await self._head(self._name(key))
        if found is None:
            return None
        coded = bool(codings(found.get("ContentEncoding", "")))
        return ObjectInfo(key, found["ContentLength"], found["LastModified"].timestamp(), coded=coded)

    async def existing(self, keys: Collection[str]) -> set[str]:
        for key in keys:
            validate_key(key)
        found: set[str] = set()

        async def head(key: str) -> None:
            if await self._head(self._name(key)) is not None:
                found.add(key)

        await _together(keys, head)
        return found

    async def delete(self, keys: Sequence[str]) -> None:
        names = [self._name(key) for key in keys]
        self._client.demand_open()
        for start in range(0, len(names), _DELETED_TOGETHER):
            await self._delete(names[start : start + _DELETED_TOGETHER])

    async def _delete(self, names: Sequence[str]) -> None:
        def ask(sdk: Sdk) -> None:
            answer = sdk.delete_objects(
                Bucket=self._client.bucket, Delete={"Objects": [{"Key": name} for name in names]}
            )
            if not answer.get("Errors"):
                having(answer, "Deleted")
            for error in answer.get("Errors", []):
                if error.get("Code") == "NoSuchKey":
                    continue
                said = Answer(200, error.get("Code", ""), error.get("Message", ""), "", {})
                raise s3_errors.named(said, self._client.request("DeleteObjects", error.get("Key", "")))

        await self._client.call("DeleteObjects", names[0], ask, changes=True)

    def list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        return self._list(self._prefix + validate_prefix(prefix))

    async def _list(self, prefix: str) -> AsyncIterator[ObjectInfo]:
        async for found in s3_listing.objects(self._client, prefix):
            key = found["Key"].removeprefix(self._prefix)
            if len(key) <= MAX_KEY_LENGTH and all(map(is_segment, key.split("/"))):
                yield ObjectInfo(key, found["Size"], found["LastModified"].timestamp())

    async def delivery(self, key: str) -> PresignedUrl | Stream | None:
        if self._redirect:
            return PresignedUrl(await self._client.signed("get_object", self._presign_seconds, Key=self._name(key)))
        info = await self.head(key)
        return None if info is None else Stream(info.size)

    def leftovers(self, *, older_than: float) -> AsyncIterator[ObjectInfo]:
        return self._abandoned(older_than, remove=False)

    async def sweep(self, *, older_than: float) -> int:
        return len([info async for info in self._abandoned(older_than, remove=True)])

    async def _abandoned(self, older_than: float, *, remove: bool) -> AsyncIterator[ObjectInfo]:
        before, spare = time.time() - older_than, self._uploads.ids
        # What clients write themselves has a sweep of its own.
        async for info in abandoned(self._client, self._prefix, before=before, remove=remove, spare=spare, but=STAGING):
            yield info
        async for info in self._claims.abandoned(before=before, remove=remove):
            yield info

    async def probe(self) -> Sequence[str]:
        """What is wrong, one line each, found out by trying all kinds of requests."""
        return await s3_probe.problems(self._client, self._prefix)

    async def close(self) -> None:
        if not self._client.closed:
            await self._uploads.close()
            await self._client.close()

    def _name(self, key: str) -> str:
        return self._prefix + validate_key(key)

    async def _metadata(self, name: str) -> Mapping[str, str] | None:
        found = await self._head(name)
        return None if found is None else found["Metadata"]

    async def _head(self, name: str) -> HeadObjectOutputTypeDef | None:
        def ask(sdk: Sdk) -> HeadObjectOutputTypeDef | None:
            try:
                found = sdk.head_object(Bucket=self._client.bucket, Key=name)
            except ClientError as error:
                if Answer.of_sdk(error).status not in {400, 403, 404}:
                    raise
                return None
            return having(found, "ContentLength", "ETag", "LastModified")

        # A refusal of HEAD does not say why: that there is no object, no bucket, no permission. One of GET does.
        for _ in range(2):
            if found := await self._client.call("HeadObject", name, ask):
                return found
            if await self._is_absent(name):
                return None
        raise TryAgain(f"{self._client.request('HeadObject', name)}: it comes and goes")

    async def _is_absent(self, name: str) -> bool:
        try:
            response = await self._client.get(name, ByteRange(0, 1))
        except NotFound:
            return True
        except BadInput:  # it is there, and empty
            return False
        response.close()
        return False


async def _together(keys: Iterable[str], work: Callable[[str], Awaitable[None]]) -> None:
    """Several at a time; all are waited for, also when one fails: nothing is at work afterwards."""
    waiting = iter(keys)

    async def work_some() -> None:
        for key in waiting:
            await work(key)

    outcomes = await asyncio.gather(*(work_some() for _ in range(_TOGETHER)), return_exceptions=True)
    for outcome in outcomes:
        if outcome is not None:
            raise outcome


def _check_limit(key: str, size: int, limit: int) -> None:
    if size > limit:
        raise TooLarge(f"{key} has {size} bytes, at most {limit} are allowed")


def _decoded(key: str, data: bytes, encoding: str, limit: int) -> bytes:
    """Nix compresses metadata for S3 when it is told to, and says so in Content-Encoding."""
    if not encoding:
        return data
    try:
        return decompress(content_coding(encoding), data, limit)
    except TooLarge:
        raise
    except BadInput as error:
        raise StoreError(f"{key} is stored with Content-Encoding {encoding}, and cannot be decoded: {error}") from error
