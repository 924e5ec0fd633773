"""What lies between a push and its server: names and addresses, proxies that are asked to lead there, redirects."""

from __future__ import annotations

import asyncio
import random
import socket
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cachesrv.errors import ConfigError, ServerError
from cachesrv.nix.hashes import Hash
from cachesrv.push.address import Address
from cachesrv.push.events import Retrying
from cachesrv.push.retry import Backoff, TryAgain, Unreachable
from cachesrv.push.run import Options, push
from cachesrv.push.server import connect
from cachesrv.push.settings import Settings
from cachesrv.push.token import TokenVariable
from tests.certificate import contexts
from tests.push_doubles import PLENTY, FakeCache, TemporaryStore, answer, store_path
from tests.tcp_proxy import TcpProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from aiohttp import web

    from cachesrv.push.events import Event
    from cachesrv.push.server import Server

MIB = 2**20
TOKEN = TokenVariable.of("CACHESRV_TOKEN", "secret")
QUICK = Backoff(attempts=2, first=0.01)
NAR = Hash.of("sha256", b"nar")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "NIX_SSL_CERT_FILE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


@asynccontextmanager
async def talking(url: str, **options: Any) -> AsyncIterator[Server]:
    async with connect(Address.parse(url), TOKEN, backoff=QUICK, **options) as server:
        yield server


def port(cache: FakeCache) -> int:
    return int(cache.url.removesuffix("/main").rpartition(":")[2])


async def send(server: Server, data: bytes) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield data

    async with server.streaming() as stream:
        await stream(NAR, chunks())


@pytest.mark.parametrize("library", [False, True])
async def test_an_address_that_does_not_answer_beside_one_that_does(
    environment: pytest.MonkeyPatch, *, library: bool
) -> None:
    """As where IPv6 leads nowhere. Nobody takes connections from the queue of that one, which is full."""
    if library:
        environment.setenv("no_proxy", "nothing")
    async with FakeCache() as cache:
        there = port(cache)
        with socket.socket() as deaf, socket.socket() as first, socket.socket() as second:
            deaf.bind(("127.0.0.2", there))
            deaf.listen(0)
            for waiting in (first, second):
                waiting.setblocking(False)
                with suppress(BlockingIOError):
                    waiting.connect(("127.0.0.2", there))

            async def both(*_: object, **__: object) -> list[Any]:
                kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
                return [(*kind, ("127.0.0.2", there)), (*kind, ("127.0.0.1", there))]

            environment.setattr(asyncio.get_running_loop(), "getaddrinfo", both)
            url = cache.url.replace("127.0.0.1", "cache.example")
            async with talking(url, timeouts=PLENTY) as server:
                assert (await server.describe()).name == "main"


@pytest.mark.parametrize("library", [False, True])
async def test_names_that_cannot_be_resolved_for_a_while(environment: pytest.MonkeyPatch, *, library: bool) -> None:
    if library:
        environment.setenv("no_proxy", "nothing")
    loop, asked = asyncio.get_running_loop(), 0

    async def resolve(_host: str, port: int, **__: object) -> list[Any]:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", port))]

    environment.setattr(loop, "getaddrinfo", resolve)
    async with FakeCache() as cache, talking(cache.url.replace("127.0.0.1", "cache.example")) as server:
        assert (await server.describe()).name == "main"
    assert asked > 1


@asynccontextmanager
async def proxy(status: int = 200) -> AsyncIterator[tuple[str, list[str]]]:
    """One that connects to wherever it is asked to, or answers otherwise; what it was asked."""
    asked: list[str] = []
    serving: set[asyncio.Task[None]] = set()

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.create_task(serve(reader, writer)))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            asked.append(head)
            writer.write(f"HTTP/1.1 {status} So\r\nContent-Length: 0\r\n\r\n".encode())
            if status == 200:
                host, port = head.split()[1].split(":")
                there, out = await asyncio.open_connection(host, int(port))
                with closing(out):
                    await asyncio.gather(passing(reader, out), passing(there, writer))

    async def passing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while piece := await reader.read(MIB):
                writer.write(piece)
                await writer.drain()
        writer.close()

    async with await asyncio.start_server(begin, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", asked
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        await asyncio.sleep(0)  # connections close in the next round of the loop


@pytest.fixture
async def secured(tmp_path: Path, environment: pytest.MonkeyPatch) -> AsyncIterator[FakeCache]:
    """A cache behind https, whose authority is the one that Nix is told of."""
    context, _ = contexts(tmp_path)
    environment.setenv("NIX_SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
    environment.setenv("SSL_CERT_FILE", str(tmp_path / "gone"))
    async with FakeCache(tls=context, part_size=MIB) as cache:
        yield cache


def by_name(cache: FakeCache) -> str:
    return cache.url.replace("127.0.0.1", "localhost")


@pytest.mark.parametrize("variable", ["https_proxy", "HTTPS_PROXY", "all_proxy"])
@pytest.mark.parametrize("scheme", ["", "http://user:word@"])
async def test_a_proxy_leads_to_the_server(
    tmp_path: Path, secured: FakeCache, environment: pytest.MonkeyPatch, variable: str, scheme: str
) -> None:
    """It sees neither token nor NARs."""
    store = TemporaryStore(tmp_path)
    store.add("large", random.Random(1).randbytes(3 * MIB))
    store.add("small", b"small")
    paths = [store_path(name).full("/nix/store") for name in ("large", "small")]
    async with proxy() as (host, asked):
        environment.setenv(variable, scheme + host)
        settings = Settings(Address.parse(by_name(secured)), TOKEN)
        summary = await push(paths, store, settings, Options(backoff=QUICK))

    assert summary.uploaded == 2
    where = by_name(secured).removeprefix("https://").removesuffix("/main")
    assert {head.splitlines()[0] for head in asked} == {f"CONNECT {where} HTTP/1.1"}
    assert not any("secret" in head for head in asked)
    assert all(("Proxy-Authorization: Basic dXNlcjp3b3Jk" in head) == bool(scheme) for head in asked)


async def test_some_hosts_need_no_proxy(secured: FakeCache, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("https_proxy", "http://127.0.0.1:1")
    environment.setenv("no_proxy", "example.org,localhost")
    async with talking(by_name(secured)) as server:
        assert (await server.describe()).name == "main"


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (407, ServerError, "wants a user and a password"),
        (503, TryAgain, "status 503"),
        (403, ServerError, "status 403"),
    ],
)
async def test_a_proxy_that_does_not_lead_there(
    secured: FakeCache, environment: pytest.MonkeyPatch, status: int, kind: type[Exception], words: str
) -> None:
    async with proxy(status) as (host, _):
        environment.setenv("https_proxy", f"http://user:hunter2@{host}")
        async with talking(by_name(secured)) as server:
            with pytest.raises(kind, match=rf"the proxy before https://.*{words}") as caught:
                await server.describe()
    assert isinstance(caught.value, TryAgain) == (kind is TryAgain)
    assert "hunter2" not in str(caught.value)


async def test_a_proxy_that_is_not_there(secured: FakeCache, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("https_proxy", "http://127.0.0.1:1")
    async with talking(by_name(secured)) as server:
        with pytest.raises(Unreachable, match=r"the proxy before https://.* cannot be reached: Connection refused"):
            await server.describe()


async def test_a_proxy_of_another_kind(secured: FakeCache, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("all_proxy", "socks5://user:hunter2@127.0.0.1:1")
    async with talking(by_name(secured)) as server:
        with pytest.raises(ConfigError, match="of the kind socks5: only http:// will do"):
            await server.describe()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("route", ["cache", "missing", "nar"])
@pytest.mark.parametrize("library", [False, True])
async def test_redirects_are_told_of_and_not_followed(
    environment: pytest.MonkeyPatch, status: int, route: str, *, library: bool
) -> None:
    """The token is for nobody else, not even for who has the same host."""
    if library:
        environment.setenv("no_proxy", "nothing")
    async with FakeCache() as other, FakeCache() as cache:
        path = {"cache": "/api/v1/caches/main", "missing": "/api/v1/caches/main/missing", "nar": "/main/nar/x.nar"}
        cache.fail(route, answer(status, Location=other.url.removesuffix("/main") + path[route]))
        async with talking(cache.url) as server:
            asking = {"cache": server.describe(), "missing": server.missing([]), "nar": send(server, bytes(3 * MIB))}
            with pytest.raises(ServerError, match=other.url if route != "nar" else "redirects to") as caught:
                await asking.pop(route)
            for other_question in asking.values():
                other_question.close()

    assert "use that URL" in str(caught.value)
    assert not isinstance(caught.value, TryAgain)
    assert other.requests == []


async def test_a_network_that_is_lost_for_a_while(tmp_path: Path) -> None:
    """In the middle of a large NAR: what has arrived is not sent again, however often there is no connection."""
    store = TemporaryStore(tmp_path)
    store.add("large", random.Random(1).randbytes(8 * MIB))
    async with FakeCache(part_size=MIB) as cache, TcpProxy(port(cache)).running() as between:

        async def lose(request: web.Request) -> web.StreamResponse:
            await between.down()
            return await answer(500)(request)

        def emit(event: Event) -> None:
            if isinstance(event, Retrying) and event.attempt == 5 and not found:
                found.append(asyncio.create_task(between.up()))

        found: list[asyncio.Task[None]] = []
        cache.fail("part", cache._part, cache._part, lose)
        settings = Settings(Address.parse(f"http://127.0.0.1:{between.port}/main"), TOKEN)
        patient = Options(backoff=replace(QUICK, attempts=4, longest=0.1, outage=60))
        summary = await push([store_path("large").full("/nix/store")], store, settings, patient, emit)
        await found[0]

    assert summary.uploaded == 1
    assert cache.count("part") < 9 + 9
    assert cache.count("begin") == 1
