"""Requests to one bucket. Control calls are made by the SDK in a few threads; bodies travel by aiohttp over URLs that
the SDK signs, so that no thread is held by a transfer. All requests go through `Requests`, which is where they are
tried again: the SDK's own retries are off.
"""

from __future__ import annotations

import asyncio
import ssl
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from yarl import URL

from cachesrv.errors import StoreError
from cachesrv.storage import s3_errors
from cachesrv.storage.s3_errors import Answer, Request
from cachesrv.storage.threads import Threads, finished

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from types_boto3_s3 import S3Client as Sdk

    from cachesrv.storage.base import ByteRange
    from cachesrv.storage.decorators import Requests

T = TypeVar("T")

AddressingStyle = Literal["auto", "path", "virtual"]

_CONNECT_TIMEOUT = 5
_READ_TIMEOUT = 30
_SLOWEST_UPLOAD = 64 * 1024
"""Bytes per second below which an upload is taken to be stuck."""
_GRACE = 5
"""Seconds that an answer is waited for although nobody wants it any more."""
_SIGNED_FOR = 900
"""Seconds for which URLs are signed that are used at once. It bears the clocks that S3 itself bears."""
_REFRESH_AHEAD = 15 * 60
"""Seconds before their end at which the SDK renews temporary credentials, by a call that blocks."""
_SENT_TOGETHER = 2**18
_READ_TOGETHER = 2**20


class S3Client:
    """See the module's docstring. `endpoint` is a URL, by default that of AWS in the region; the style "auto" is path
    for an endpoint that is given and virtual otherwise. Credentials and what else is not given come from where the SDK
    looks for them. At most `threads` control calls are made at the same time. Raises StoreError.
    """

    def __init__(
        self,
        bucket: str,
        requests: Requests,
        *,
        region: str | None = None,
        endpoint: str | None = None,
        addressing_style: AddressingStyle = "auto",
        session: botocore.session.Session | None = None,
        threads: int = 16,
    ) -> None:
        self.bucket = bucket
        self.endpoint = endpoint or "AWS"
        self._requests = requests
        self._threads = Threads(threads, name="s3")
        self._signers = Threads(1, name="s3-sign")
        self._abandoned: set[asyncio.Task[Any]] = set()
        self._http: aiohttp.ClientSession | None = None
        core = session or botocore.session.get_session()
        with self._translated(Request("open", f"s3://{bucket}")):
            self._sdk = _open_sdk(core, region, endpoint, addressing_style, threads)
            self._credentials = core.get_credentials()
        self.endpoint = self._sdk.meta.endpoint_url
        self._ca_bundle = core.get_config_variable("ca_bundle")

    def request(self, operation: str, key: str = "") -> Request:
        """A name for a request."""
        return Request(operation, f"s3://{self.bucket}/{key} at {self.endpoint}")

    async def call(self, operation: str, key: str, work: Callable[[Sdk], T], *, changes: bool = False) -> T:
        """A control call: what `work` returns. One that `changes` nothing is left to itself when the caller is
        cancelled; one that does is waited for. Raises what `s3_errors.named` gives, and `s3_errors.foreign` for a
        KeyError: what `work` looks for in answers is what S3 always says.
        """
        request = self.request(operation, key)

        def attempt() -> T:
            with self._translated(request):
                try:
                    return work(self._sdk)
                except KeyError as error:
                    raise s3_errors.foreign(request) from error

        run = partial(self._threads.run, str(request), attempt)
        return await self._requests.run(operation, run if changes else partial(self._abandonable, run))

    async def _abandonable(self, run: Callable[[], Any]) -> Any:
        task = asyncio.ensure_future(run())
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            self._abandoned.add(task)
            task.add_done_callback(self._forget)
            raise

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._abandoned.discard(task)
        if not task.cancelled():
            task.exception()

    async def signed(self, method: str, seconds: int, **parameters: Any) -> str:
        """A URL for a method of the SDK (`get_object`), which can be used for so long. Makes no call to S3; it waits
        only when temporary credentials are to be renewed.
        """
        parameters["Bucket"] = self.bucket
        request = self.request("sign", parameters.get("Key", ""))

        def make() -> str:
            with self._translated(request):
                return self._sdk.generate_presigned_url(method, Params=parameters, ExpiresIn=seconds)

        refresh_needed = getattr(self._credentials, "refresh_needed", None)
        if refresh_needed is not None and refresh_needed(_REFRESH_AHEAD):
            return await self._signers.run(str(request), make)
        self.demand_open()
        return make()

    async def put(self, operation: str, key: str, body: bytes | bytearray, **parameters: Any) -> str:
        """Send a body by PutObject or UploadPart; its ETag. When the caller is cancelled, an object that has left
        already is waited for a few seconds: it may take effect. Raises what `s3_errors.named` gives.
        """
        request = self.request(operation, key)
        method = {"PutObject": "put_object", "UploadPart": "upload_part"}[operation]
        headers = {**_headers(parameters), "Content-Length": str(len(body))}

        async def attempt() -> str:
            url = await self.signed(method, _SIGNED_FOR, Key=key, **parameters)
            sent = _Body(body)
            sending = asyncio.ensure_future(self._send(request, url, headers, sent))
            try:
                return await asyncio.shield(sending)
            except asyncio.CancelledError:
                if sent.handed_over and operation == "PutObject":
                    asyncio.get_running_loop().call_later(_GRACE, sending.cancel)
                else:
                    sending.cancel()
                await finished(sending)
                raise

        return await self._requests.run(operation, attempt)

    async def _send(self, request: Request, url: str, headers: Mapping[str, str], body: _Body) -> str:
        seconds = _READ_TIMEOUT + int(headers["Content-Length"]) / _SLOWEST_UPLOAD
        with self._translated(request):
            async with (
                asyncio.timeout(seconds),
                self._session().put(
                    URL(url, encoded=True), data=body, headers=headers, allow_redirects=False
                ) as response,
            ):
                if response.status == 200:
                    if tag := response.headers.get("ETag"):
                        return tag
                    raise s3_errors.foreign(request)
                raise s3_errors.named(await _answer(response), request)

    async def get(self, key: str, byte_range: ByteRange | None = None, *, etag: str = "") -> aiohttp.ClientResponse:
        """An answer to GetObject, 200 or 206, whose body is to be read with `chunks`; the caller closes it. Raises what
        `s3_errors.named` gives; Exists when there is an `etag` and the object has another one.
        """
        request = self.request("GetObject", key)
        headers = {"If-Match": etag} if etag else {}
        if byte_range:
            headers["Range"] = f"bytes={byte_range.start}-{byte_range.end - 1}"

        async def attempt() -> aiohttp.ClientResponse:
            url = URL(await self.signed("get_object", _SIGNED_FOR, Key=key), encoded=True)
            with self._translated(request):
                response = await self._session().get(url, headers=headers, allow_redirects=False)
                if response.status in {200, 206} and "ETag" in response.headers:
                    return response
                async with response:
                    if response.status in {200, 206}:
                        raise s3_errors.foreign(request)
                    raise s3_errors.named(await _answer(response), request)

        return await self._requests.run("GetObject", attempt)

    async def chunks(self, key: str, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """The body of an answer; raises TryAgain when it breaks."""
        with self._translated(self.request("GetObject", key)):
            async for chunk in response.content.iter_chunked(_READ_TOGETHER):
                yield chunk

    async def close(self) -> None:
        """Let go of connections and threads, when what they do has ended."""
        await asyncio.gather(self._threads.close(), self._signers.close())
        if self._http is not None:
            await self._http.close()
        self._sdk.close()

    @property
    def closed(self) -> bool:
        return self._threads.closed

    def demand_open(self) -> None:
        """Raises StoreError after `close`."""
        if self.closed:
            raise StoreError("the store is closed")

    def _session(self) -> aiohttp.ClientSession:
        self.demand_open()
        if self._http is None:
            context = ssl.create_default_context(cafile=self._ca_bundle) if self._ca_bundle else True
            endpoint = urlsplit(self.endpoint)
            bypass = proxy_bypass(endpoint.hostname or "")
            self._http = aiohttp.ClientSession(
                auto_decompress=False,
                connector=aiohttp.TCPConnector(limit=0, ssl=context),
                cookie_jar=aiohttp.DummyCookieJar(),
                proxy=None if bypass else getproxies().get(endpoint.scheme),
                read_bufsize=2**19,
                timeout=aiohttp.ClientTimeout(sock_connect=_CONNECT_TIMEOUT, sock_read=_READ_TIMEOUT),
            )
        return self._http

    @contextmanager
    def _translated(self, request: Request) -> Iterator[None]:
        """Turns what libraries raise into our errors."""
        try:
            yield
        except (BotoCoreError, ClientError) as error:
            raise s3_errors.of_sdk(error, request) from error
        except (aiohttp.ClientConnectorCertificateError, ssl.SSLCertVerificationError) as error:
            raise s3_errors.untrusted(request) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise s3_errors.unreachable(error, request) from error


def having(answer: T, *names: str) -> T:
    """An answer of the SDK, if it has all of these. Raises KeyError, for `S3Client.call`."""
    for name in names:
        cast("Mapping[str, Any]", answer)[name]
    return answer


def _open_sdk(
    core: botocore.session.Session, region: str | None, endpoint: str | None, style: AddressingStyle, threads: int
) -> Sdk:
    client = core.create_client(
        "s3",
        region_name=region or core.get_config_variable("region") or "us-east-1",
        endpoint_url=endpoint,
        config=Config(
            connect_timeout=_CONNECT_TIMEOUT,
            read_timeout=_READ_TIMEOUT,
            max_pool_connections=threads,
            # Endpoints other than AWS do not all know the checksums that newer SDKs add by themselves.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"total_max_attempts": 1, "mode": "standard"},
            s3={"addressing_style": style},
            signature_version="s3v4",
        ),
    )
    if style == "auto" and ".amazonaws.com" in client.meta.endpoint_url:
        # With "auto", URLs are signed for the global endpoint of AWS, which sends clients of new buckets elsewhere.
        return _open_sdk(core, region, endpoint, "virtual", threads)
    return cast("Sdk", client)


class _Body:
    """Bytes to be sent, from the start each time that they are asked for; a large body in one piece would hold up the
    event loop.
    """

    def __init__(self, data: bytes | bytearray) -> None:
        self._data = memoryview(data)
        self.handed_over = not data

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        for position in range(0, len(self._data), _SENT_TOGETHER):
            self.handed_over = position + _SENT_TOGETHER >= len(self._data)
            yield self._data[position : position + _SENT_TOGETHER]


_HEADERS = {"ContentMD5": "Content-MD5", "ContentType": "Content-Type", "IfNoneMatch": "If-None-Match"}


def _headers(parameters: Mapping[str, Any]) -> dict[str, str]:
    """Those headers of a request that are covered by the signature of its URL."""
    headers = {_HEADERS[name]: value for name, value in parameters.items() if name in _HEADERS}
    return headers | {f"x-amz-meta-{name}": value for name, value in parameters.get("Metadata", {}).items()}


async def _answer(response: aiohttp.ClientResponse) -> Answer:
    body = bytearray()
    async for chunk in response.content.iter_chunked(s3_errors.MAX_ERROR_BODY):
        body += chunk
        if len(body) >= s3_errors.MAX_ERROR_BODY:
            break
    return Answer.parse(response.status, response.headers, bytes(body))
