"""How requests are signed and sent, without a server of S3."""

from __future__ import annotations

import asyncio
import re
import ssl
import subprocess
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

import botocore.session
import pytest
from botocore.credentials import RefreshableCredentials

from cachesrv.errors import StoreError, StoreUnavailable
from cachesrv.storage.base import ObjectInfo, PresignedUrl
from cachesrv.storage.decorators import Direct
from cachesrv.storage.s3 import S3Store
from cachesrv.storage.s3_client import S3Client
from tests.waiting import PLENTY, until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path


def session() -> botocore.session.Session:
    session = botocore.session.Session()
    session.set_credentials("key", "secret")
    return session


async def test_what_makes_a_write_what_it_is_is_signed() -> None:
    """A header that is not covered by the signature could be taken away."""
    client = S3Client("bkt", Direct(), endpoint="http://s3.test", session=session())
    url = await client.signed(
        "put_object", 60, Key="a b/c?", ContentMD5="x", ContentType="y", IfNoneMatch="*", Metadata={"m": "z"}
    )
    query = parse_qs(urlsplit(url).query)
    assert query["X-Amz-SignedHeaders"] == ["content-md5;content-type;host;if-none-match;x-amz-meta-m"]
    assert query["X-Amz-Expires"] == ["60"]
    assert url.startswith("http://s3.test/bkt/a%20b/c%3F?")
    assert "secret" not in url
    await client.close()


async def test_credentials_are_renewed_without_blocking() -> None:
    """The SDK renews them by a call that blocks, in the middle of signing."""
    core = botocore.session.Session()
    renewed, ticked = 0, threading.Event()

    def renew() -> dict[str, str]:
        nonlocal renewed
        renewed += 1
        assert ticked.wait(PLENTY)
        later = datetime.now(UTC) + timedelta(hours=1)
        return {"access_key": "new", "secret_key": "s", "token": "t", "expiry_time": later.isoformat()}

    core._credentials = RefreshableCredentials(  # type: ignore[attr-defined]  # as a provider of the chain would
        "old", "s", "t", datetime.now(UTC) + timedelta(seconds=30), renew, "test"
    )
    store = S3Store("bkt", requests=Direct(), endpoint="http://s3.test", session=core)

    async def tick() -> None:
        await until(lambda: renewed > 0)
        ticked.set()

    ticking = asyncio.create_task(tick())
    for _ in range(3):
        delivery = await store.delivery("main/a")
        assert isinstance(delivery, PresignedUrl)
        assert "X-Amz-Credential=new" in delivery.url
    assert renewed == 1
    await ticking
    await store.close()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of 127.0.0.1, by nobody else than itself; the key is in the same file."""
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    subject = ("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1")
    command = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject)
    subprocess.run((*command, "-keyout", str(file), "-out", f"{file}.crt"), check=True, capture_output=True)
    file.write_text(file.read_text() + file.with_name("both.pem.crt").read_text())
    return file


@pytest.fixture
async def endpoint(certificate: Path) -> AsyncIterator[str]:
    """An HTTPS server that has too much to do."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    async with await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context, ssl_shutdown_timeout=0.1) as server:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_certificate_is_verified(endpoint: str, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = S3Store("bkt", requests=Direct(), endpoint=endpoint, session=session())
    for attempt in (store.get("main/a", limit=1), store.head("main/a")):
        with pytest.raises(StoreError, match="cannot be verified: check the endpoint, or name its CA in AWS_CA_BUNDLE"):
            await attempt
    await store.close()
    monkeypatch.setenv("AWS_CA_BUNDLE", f"{certificate}.crt")
    store = S3Store("bkt", requests=Direct(), endpoint=endpoint, session=session())
    for attempt in (store.get("main/a", limit=1), store.head("main/a")):
        with pytest.raises(StoreUnavailable, match="too many requests"):
            await attempt
    await store.close()


FRAMES = {
    "by its length": (b"Content-Length: 5\r\n\r\n12345", b"12345"),
    "in chunks": (b"Transfer-Encoding: chunked\r\n\r\n3\r\n123\r\n2\r\n45\r\n0\r\n\r\n", b"12345"),
    "short of its length": (b"Content-Length: 6\r\n\r\n12345", None),
    "without the last chunk": (b"Transfer-Encoding: chunked\r\n\r\n3\r\n123\r\n2\r\n45\r\n", None),
    "when the connection does": (b"\r\n12345", None),
}


@pytest.mark.parametrize(("answer", "expected"), FRAMES.values(), ids=FRAMES)
async def test_a_body_ends_when_it_is_said_to_end(answer: bytes, expected: bytes | None) -> None:
    """Where nothing says how long it is, a body that was cut would look whole."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nETag: x\r\n" + answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        store = S3Store("bkt", requests=Direct(), endpoint=endpoint, session=session())
        if expected is not None:
            assert await store.get("main/a", limit=10) == expected
        else:
            with pytest.raises(StoreError):
                await store.get("main/a", limit=10)
        await store.close()


async def answering(page: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Whatever is asked, with the same page."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    await reader.readexactly(int(length[1]) if length else 0)
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(page))
    writer.write(b"" if head.startswith(b"HEAD ") else page)
    await writer.drain()
    writer.close()


async def upload(store: S3Store) -> None:
    async with store.writer("main/a") as writer:
        await writer.write(bytes(9 * 2**20))
        await writer.commit()


async def listed(store: S3Store) -> list[ObjectInfo]:
    return [info async for info in store.list("main/")]


QUESTIONS: dict[str, Callable[[S3Store], Awaitable[object]]] = {
    "put": lambda store: store.put("main/a", b"a"),
    "replace": lambda store: store.put("main/a", b"a", replace=True),
    "upload": upload,
    "get": lambda store: store.get("main/a", limit=100),
    "head": lambda store: store.head("main/a"),
    "existing": lambda store: store.existing(["main/a"]),
    "list": listed,
    "sweep": lambda store: store.sweep(older_than=0),
    "delete": lambda store: store.delete(["main/a"]),
}


@pytest.mark.parametrize("page", [b"<html><body>Log in</body></html>", b"Log in", b""], ids=["XML", "text", "nothing"])
@pytest.mark.parametrize("question", QUESTIONS)
async def test_a_page_that_somebody_in_between_shows_is_no_success(question: str, page: bytes) -> None:
    """Nothing was stored, nothing is there, and nothing is gone."""
    async with await asyncio.start_server(partial(answering, page), "127.0.0.1", 0) as server:
        endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        store = S3Store("bkt", requests=Direct(), endpoint=endpoint, session=session())
        with pytest.raises(StoreError):
            await QUESTIONS[question](store)
        await store.close()


async def test_to_delete_what_is_not_there_is_no_error() -> None:
    """Not all servers of S3 say so."""
    error = b"<Error><Key>main/a</Key><Code>NoSuchKey</Code></Error>"
    page = b"<DeleteResult>" + error + b"</DeleteResult>"
    async with await asyncio.start_server(partial(answering, page), "127.0.0.1", 0) as server:
        endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        store = S3Store("bkt", requests=Direct(), endpoint=endpoint, session=session())
        await store.delete(["main/a"])
        await store.close()
