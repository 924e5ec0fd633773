"""Talking to the server: what each answer, or none, means to a push."""

from __future__ import annotations

import asyncio
import ssl
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from email.utils import formatdate
from typing import TYPE_CHECKING

import pytest
from aiohttp import web

from cachesrv import api
from cachesrv.errors import (
    CachesrvError,
    ConfigError,
    Conflict,
    DaemonError,
    Mismatch,
    NotAllowed,
    NotAuthenticated,
    Refused,
    ServerError,
    TooLarge,
)
from cachesrv.nix.hashes import Hash
from cachesrv.push.address import Address
from cachesrv.push.events import Event, Retrying
from cachesrv.push.foremost import foremost
from cachesrv.push.refusal import refusal, said_in, seconds_until
from cachesrv.push.retry import Backoff, TryAgain, Unreachable, retry
from cachesrv.push.server import Server, connect
from cachesrv.push.token import FirstToken, TokenFile, TokenVariable
from cachesrv.push.upload import concerns_all
from tests.push_doubles import HURRY, PLENTY, FakeCache, answer, drop, hang

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator
    from pathlib import Path

    from cachesrv.push.connection import Timeouts
    from tests.push_doubles import Handler

ADDRESS = Address.parse("http://cache.example.org/main")
NO_TOKEN = FirstToken(list)
TOKEN = TokenVariable.of("CACHESRV_TOKEN", "secret")
NAR = Hash.of("sha256", b"nar")


@asynccontextmanager
async def talking(
    cache: FakeCache, *, attempts: int = 2, timeouts: Timeouts | None = None, told: list[Event] | None = None
) -> AsyncIterator[Server]:
    backoff = Backoff(attempts=attempts, first=0.01)
    emit = (told if told is not None else []).append
    async with connect(Address.parse(cache.url), TOKEN, backoff=backoff, timeouts=timeouts, emit=emit) as server:
        yield server


async def stream(server: Server, chunks: AsyncIterable[bytes]) -> None:
    async with server.streaming() as send:
        await send(NAR, chunks)


def wanted(*names: str) -> list[api.WantedPath]:
    return [api.WantedPath(name, NAR.nix32, 1) for name in names]


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        (302, ServerError, "redirects to https://elsewhere: use that URL"),
        (400, Refused, "said"),
        (401, NotAuthenticated, r"does not accept the token from \$CACHESRV_TOKEN: said"),
        (403, NotAllowed, r"takes one that permits push: said"),
        (404, ServerError, "no cache main at http://cache.example.org, or what is there is no cachesrv: said"),
        (408, TryAgain, "status 408: said"),
        (409, Conflict, "^said$"),
        (413, TooLarge, "too large for http://cache.example.org/main or a proxy before it: said"),
        (422, Refused, "^said$"),
        (425, TryAgain, "said"),
        (429, TryAgain, "said"),
        (500, TryAgain, "status 500: said"),
        (501, ServerError, "status 501"),
        (502, TryAgain, "said"),
        (503, TryAgain, "said"),
        (505, ServerError, "said"),
        (507, ServerError, r"takes no more \(507 Insufficient Storage\): said"),
    ],
)
def test_what_a_status_means(status: int, kind: type[CachesrvError], text: str) -> None:
    error = refusal(status, "said", ADDRESS, TOKEN, location="https://elsewhere")

    with pytest.raises(kind, match=text):
        raise error
    assert isinstance(error, TryAgain) == (kind is TryAgain)


def test_who_has_no_token_is_told_where_to_put_one() -> None:
    assert "with no token" in str(refusal(403, "", ADDRESS, NO_TOKEN))
    assert "--token-file, $CACHESRV_TOKEN" in str(refusal(401, "", ADDRESS, NO_TOKEN))


@pytest.mark.parametrize(
    ("body", "content_type", "line"),
    [
        (b'{"error":"one\\nline"}', "application/json", "one line"),
        (b"a line\n", "text/plain", "a line"),
        (b"<html>long page</html>", "text/html", ""),
        (b"\xff\x1b[31m\r\nbeep\x07", "text/plain", "\ufffd [31m beep"),
        (b"x" * 5000, "text/plain", "x" * 299 + "…"),
        (b'{"error":5}', "application/json", '{"error":5}'),
        (b'{"error":"\xff"}', "application/json", '{"error":"\ufffd"}'),
        (b'{"x":' + b"[" * 60_000, "application/json", '{"x":' + "[" * 294 + "…"),
        (b"", "", ""),
    ],
)
def test_what_the_server_said_fits_a_terminal(body: bytes, content_type: str, line: str) -> None:
    assert said_in(body, content_type) == line


def test_retry_after_is_seconds_or_a_date() -> None:
    assert after("120") == 120
    assert 50 < after(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert after(formatdate(time.time() - 60, usegmt=True)) == 0
    assert after("9" * 5000) < 1e9
    assert [after(text) for text in ("", "soon", "-5", "1.5", "٣")] == [0] * 5


@pytest.mark.parametrize("skew", [-86400, 86400])
def test_retry_after_counts_by_the_servers_clock(skew: int) -> None:
    there = time.time() + skew
    date = formatdate(there, usegmt=True)
    assert seconds_until({"retry-after": formatdate(there + 60, usegmt=True), "date": date}) == 60
    assert seconds_until({"retry-after": "60", "date": date}) == 60


def after(text: str) -> float:
    return seconds_until({"retry-after": text})


def test_delays_grow_up_to_a_limit_and_are_never_less_than_asked_for() -> None:
    backoff = Backoff(first=1, longest=10)

    assert [backoff.delay(attempt, 0, 1.0) for attempt in (1, 2, 3, 4, 5, 5000)] == [1, 2, 4, 8, 10, 10]
    assert [backoff.delay(attempt, 0, 0.0) for attempt in (1, 5)] == [0.5, 5]
    assert backoff.delay(1, 7, 1.0) == 7


async def test_a_failure_that_may_pass_is_tried_again_so_often_and_told() -> None:
    told: list[Event] = []
    calls = 0

    async def fail() -> None:
        nonlocal calls
        calls += 1
        raise TryAgain(f"failure {calls}")

    with pytest.raises(TryAgain, match="failure 3"):
        await retry(fail, "asking", Backoff(attempts=3, first=0.001), told.append)

    assert [(one.attempt, one.error) for one in told if isinstance(one, Retrying)] == [
        (1, "failure 1"),
        (2, "failure 2"),
    ]


@pytest.mark.parametrize(("outage", "tries"), [(0.0, 3), (60.0, 10), (0.000001, 2)])
async def test_no_connection_is_waited_out(outage: float, tries: int) -> None:
    """Other failures count as ever, before and after."""
    said = iter([*[Unreachable("")] * 6, TryAgain(""), Unreachable(""), TryAgain(""), TryAgain("")])
    made = 0

    async def fail() -> None:
        nonlocal made
        made += 1
        raise next(said)

    with pytest.raises(TryAgain) as caught:
        await retry(fail, "asking", Backoff(3, first=0.001, longest=0.001, outage=outage), lambda _: None)
    assert (made, caught.value.tried) == (tries, True)


async def test_a_server_that_asks_for_too_much_patience_is_left() -> None:
    async def fail() -> None:
        raise TryAgain("come back tomorrow", retry_after=86400)

    with pytest.raises(TryAgain, match="tomorrow") as caught:
        await retry(fail, "asking", Backoff(), lambda _: None)
    assert concerns_all(caught.value)


async def test_other_failures_are_not_tried_again(cache: FakeCache) -> None:
    cache.fail("missing", answer(403, "no"))
    async with talking(cache) as server:
        with pytest.raises(NotAllowed):
            await server.missing(wanted("a"))

    assert cache.count("missing") == 1


@pytest.mark.parametrize("fault", [drop, answer(503), hang], ids=["drop", "503", "hang"])
async def test_questions_survive_what_passes(cache: FakeCache, fault: Handler) -> None:
    told: list[Event] = []
    cache.fail("missing", fault)
    async with talking(cache, timeouts=HURRY if fault is hang else PLENTY, told=told) as server:
        assert [answer.missing for answer in await server.missing(wanted("a"))] == [["a"]]

    assert len(told) == 1


async def test_a_token_that_was_renewed_is_read_again(cache: FakeCache, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("old")
    cache.token = "old"
    async with connect(Address.parse(cache.url), TokenFile(file), backoff=Backoff(first=0.01)) as server:
        await server.describe()
        cache.token = "new"
        file.write_text("new")
        assert [answer.missing for answer in await server.missing(wanted("a"))] == [["a"]]

        cache.token = "newer"
        with pytest.raises(NotAuthenticated, match=str(file)):
            await server.missing([])


async def test_requests_under_way_when_a_token_is_renewed(cache: FakeCache, tmp_path: Path) -> None:
    """All of them had the old one."""
    file, new = tmp_path / "token", tmp_path / "new"
    file.write_text("old")
    cache.token = "new"
    together = asyncio.Barrier(4)

    async def expired(request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer old"
        if await together.wait() == 0:
            new.write_text("new")
            new.replace(file)
        await together.wait()
        return web.Response(status=401)

    cache.fail("missing", *[expired] * 4)
    async with connect(Address.parse(cache.url), TokenFile(file), backoff=Backoff(first=0.01)) as server:
        await asyncio.gather(*[server.missing(wanted("a")) for _ in range(4)])
    assert cache.count("missing") == 8


async def test_a_token_that_comes_into_being_is_found(cache: FakeCache, tmp_path: Path) -> None:
    file = tmp_path / "token"
    tokens = FirstToken(lambda: [TokenFile(file)] if file.exists() else [])
    assert str(tokens) == "nowhere"
    async with connect(Address.parse(cache.url), tokens, backoff=Backoff(first=0.01)) as server:
        with pytest.raises(NotAuthenticated, match="wants a token"):
            await server.describe()

        file.write_text("secret")
        assert (await server.describe()).name == "main"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b'{"missing":5}',
        b'{"missing":[],"stored":[]}',
        b"\0" * 100,
        b'{"missing":["\xff"],"stored":[],"conflicts":[]}',
        b'{"unknown":' + b"[" * 100_000,
    ],
    ids=lambda body: body[:20].decode(errors="replace"),
)
async def test_an_answer_that_is_none_is_the_servers_fault(cache: FakeCache, body: bytes) -> None:
    async def nonsense(request: web.Request) -> web.Response:
        return web.Response(body=body)

    cache.fail("missing", nonsense)
    async with talking(cache) as server:
        with pytest.raises(ServerError, match="is it a cachesrv") as caught:
            await server.missing([])

    assert not isinstance(caught.value, TryAgain)


async def test_outcomes_for_other_paths_are_the_servers_fault(cache: FakeCache) -> None:
    cache.fail("paths", answer(200, '{"outcomes":[{"path":"other"}]}'))
    async with talking(cache) as server:
        with pytest.raises(ServerError, match="other paths"):
            await server.publish([api.PathToPublish("one", NAR.nix32, 1, [])])


async def test_something_that_does_not_speak_http_is_the_servers_fault() -> None:
    async def babble(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.org ESMTP\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(babble, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with connect(Address.parse(f"http://127.0.0.1:{port}/main"), NO_TOKEN) as client:
            with pytest.raises(ServerError, match="does not speak HTTP"):
                await client.describe()


async def test_a_plain_server_behind_https_is_told(cache: FakeCache) -> None:
    address = Address.parse(cache.url.replace("http:", "https:"))
    async with connect(address, NO_TOKEN) as server:
        with pytest.raises(ServerError, match="no TLS connection"):
            await server.describe()


async def test_a_host_that_does_not_exist_is_told() -> None:
    async with connect(
        Address.parse("http://no-such-host.invalid/main"), NO_TOKEN, backoff=Backoff(attempts=1)
    ) as server:
        with pytest.raises(Unreachable, match=r"http://no-such-host.invalid/main cannot be reached: \w+"):
            await server.describe()


async def test_authorities_that_cannot_be_read_are_a_mistake_in_the_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NIX_SSL_CERT_FILE", str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="gone cannot be read"):
        async with connect(Address.parse("https://host/main"), NO_TOKEN):
            pass


async def test_a_certificate_nobody_vouches_for_is_refused_until_its_authority_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    certificate, key = await _certificate(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    for name in ("NIX_SSL_CERT_FILE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)

    async with FakeCache(tls=context) as cache:
        address = Address.parse(cache.url.replace("127.0.0.1", "localhost"))
        async with connect(address, TOKEN) as server:
            with pytest.raises(ServerError, match=r"self-signed certificate.*set SSL_CERT_FILE"):
                await server.describe()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        async with connect(address, TOKEN) as server:
            assert (await server.describe()).name == "main"


async def _certificate(directory: Path) -> tuple[Path, Path]:
    certificate, key = directory / "certificate", directory / "key"
    process = await asyncio.create_subprocess_exec(
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
        *("-keyout", str(key), "-out", str(certificate)),
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert await process.wait() == 0
    return certificate, key


async def test_a_nar_that_the_server_does_not_take_is_given_up(cache: FakeCache) -> None:
    cache.fail("nar", hang)
    async with talking(cache, timeouts=HURRY) as server, asyncio.timeout(60):
        with pytest.raises(TryAgain, match="gone silent"):
            await stream(server, _endless())


async def test_a_server_that_never_answers_for_a_nar_is_given_up(cache: FakeCache) -> None:
    async def swallow(request: web.Request) -> web.StreamResponse:
        await request.read()
        return await hang(request)

    cache.fail("nar", swallow)
    async with talking(cache, timeouts=HURRY) as server:
        with pytest.raises(TryAgain, match="gone silent"):
            await stream(server, _chunks(b"x"))


async def test_our_own_slowness_is_not_held_against_the_server(cache: FakeCache) -> None:
    async def slow() -> AsyncIterator[bytes]:
        for chunk in (b"x", b"y"):
            await asyncio.sleep(0.5)
            yield chunk

    cache.fail("nar", answer(201))
    async with talking(cache, timeouts=replace(PLENTY, stall=0.3)) as server:
        await stream(server, slow())


async def test_a_refusal_in_the_middle_of_a_nar_is_understood(cache: FakeCache) -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        await request.content.read(100_000)
        return web.Response(status=409, text="not this one")

    cache.fail("nar", refuse)
    async with talking(cache) as server:
        with pytest.raises(Conflict, match="not this one"):
            await stream(server, _endless())


async def test_chunks_that_fail_end_the_request(cache: FakeCache) -> None:
    broken = asyncio.Event()

    async def watch(request: web.Request) -> web.StreamResponse:
        try:
            return await cache._put(request)
        except (ConnectionError, asyncio.CancelledError, web.RequestPayloadError):
            broken.set()
            raise

    async def fail() -> AsyncIterator[bytes]:
        yield b"x" * 1000
        raise Mismatch("not the NAR that it should be")

    cache.fail("nar", watch)
    async with talking(cache) as server:
        with pytest.raises(TryAgain):
            await stream(server, fail())
        await asyncio.wait_for(broken.wait(), 60)

    assert cache.nars == {}


async def test_an_environment_may_name_a_proxy(cache: FakeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", cache.url.removesuffix("/main"))
    monkeypatch.setenv("no_proxy", "localhost")
    async with connect(Address.parse("http://cache.invalid/main"), TOKEN) as server:
        assert (await server.describe()).name == "main"


@pytest.mark.parametrize(
    ("error", "concerned"),
    [
        (Unreachable(""), True),
        (NotAuthenticated(), True),
        (NotAllowed(), True),
        (ServerError(), True),
        (ConfigError(), True),
        (TryAgain(""), False),
        (Conflict(), False),
        (Mismatch(), False),
        (Refused(), False),
        (DaemonError(), False),
    ],
)
def test_which_errors_concern_all_paths(error: CachesrvError, *, concerned: bool) -> None:
    assert concerns_all(error) is concerned


def test_of_several_errors_ours_is_told() -> None:
    ours = Refused("ours")
    group = BaseExceptionGroup("", [ValueError(), BaseExceptionGroup("", [asyncio.CancelledError(), ours])])

    assert foremost(group) is ours


async def _chunks(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def _endless() -> AsyncIterator[bytes]:
    while True:
        yield bytes(100_000)
