"""Whatever is sent, the front answers as aiohttp alone does, but for the date and the order of fields."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cachesrv.web.fast import FastAnswers
from tests.exchange import Connection, Outcome
from tests.front_site import (
    ABSENT,
    ENDED,
    IN_CATALOG,
    NARS,
    PRESENT,
    READER,
    STRANGER,
    UNKNOWN,
    counting_apart,
    front_server,
    open_site,
    plain_server,
)

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator
    from typing import Any, TypeVar

    from cachesrv.web.site import Site

    T = TypeVar("T")

pytestmark = pytest.mark.long

QUIET = (0.05, 1, 10)
"""Seconds without a byte after which a server is taken to wait for more: at first, and where that shows a difference,
which may have come from that.
"""


def examples(number: int) -> settings:
    return settings(max_examples=number, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Servers:
    """One event loop with both servers, that turns only while something is asked."""

    def __init__(
        self, runner: asyncio.Runner, behind_front: Site, plain: Site, front_port: int, plain_port: int
    ) -> None:
        self._runner = runner
        self.behind_front = behind_front
        self.plain = plain
        self._ports = (front_port, plain_port)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def compare(self, *steps: Step) -> Outcome:
        """Take the same steps with both; what they do has to be the same."""
        return self.run(self._compare(steps))

    def compare_all(self, exchanges: list[tuple[Step, ...]]) -> None:
        """Each of them on connections of its own, all at the same time."""

        async def together() -> None:
            await asyncio.gather(*map(self._compare, exchanges))

        self.run(together())

    async def _compare(self, steps: tuple[Step, ...]) -> Outcome:
        for quiet in QUIET:
            front, plain = await self._both(steps, quiet)
            if front == plain:
                break
            # On a busy machine a server may have had too little time: what is sent to one that is about to close the
            # connection takes its last answer from the client.
        assert front == plain
        return front

    async def _both(self, steps: tuple[Step, ...], quiet: float) -> tuple[Outcome, Outcome]:
        front, plain = await asyncio.gather(*(take(port, steps, quiet) for port in self._ports))
        return front, plain


@dataclass(frozen=True)
class Step:
    """What is sent, in segments; when the requests in it are known (by their methods), their answers are waited for."""

    segments: tuple[bytes, ...]
    methods: tuple[str, ...] | None = None


async def take(port: int, steps: tuple[Step, ...], quiet: float) -> Outcome:
    """Take the steps, then ask for the end of the connection."""
    connection = await Connection.open(port)
    try:
        known = True
        for step in steps:
            await connection.send(*step.segments)
            known = known and step.methods is not None
            if known:
                await connection.receive_answers(step.methods or ())
            else:
                await connection.receive(quiet / 5)
        if known:
            await connection.send(LAST)
            return await connection.receive_all(30)
        return await connection.receive_all(quiet)
    finally:
        connection.close()


LAST = b"GET /health/live HTTP/1.1\r\nHost: cache.test\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module", params=["front", "reactor"])
def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()

        async def start() -> Servers:
            site = await stack.enter_async_context(open_site(tmp_path_factory.mktemp("site"), complete=True))
            behind_front, plain = counting_apart(site), counting_apart(site)
            by_reactor = request.param == "reactor"
            served = await stack.enter_async_context(front_server(behind_front, by_reactor=by_reactor))
            plain_port = await stack.enter_async_context(plain_server(plain))
            return Servers(runner, behind_front, plain, served.port, plain_port)

        yield runner.run(start())
        runner.run(stack.aclose())


def request(
    target: str, method: str = "GET", *fields: str, version: str = "HTTP/1.1", host: bool = True, body: bytes = b""
) -> bytes:
    lines = [f"{method} {target} {version}", *(["Host: cache.test"] if host else []), *fields, "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def basic(password: str) -> str:
    from base64 import b64encode  # noqa: PLC0415

    return f"Basic {b64encode(f'any:{password}'.encode()).decode()}"


TARGETS = [
    *(f"/{part}.narinfo" for part in (*PRESENT, *ABSENT, ENDED, UNKNOWN)),
    *(f"/{cache}/{part}.narinfo" for cache in ("main", "open", "team") for part in (PRESENT[0], ABSENT[0], UNKNOWN)),
    *(f"/nar/{name}" for name in NARS),
    *(f"/{cache}/nar/{name}" for cache in ("open", "team") for name in list(NARS)[:3]),
    "/main/nar/missing.nar.xz",
    "/main/nar/",
    "/main/nar/.hidden",
    "/nar/nar/x.nar",
    "/main/open/nar/x.nar",
    "/nix-cache-info",
    "/team/nix-cache-info",
    "/",
    "/nowhere/x.narinfo",
    "/main/short.narinfo",
    f"/main//{PRESENT[0]}.narinfo",
    f"//main/{PRESENT[0]}.narinfo",
    f"/main/{PRESENT[0].upper()}.narinfo",
    f"/main/{PRESENT[0]}.narinfo/",
    f"/main/{PRESENT[0]}.narinfo?x=y",
    f"/main/{PRESENT[0]}?x=.narinfo",
    f"/main/{PRESENT[0]}.narinfo#fragment",
    f"/main/#/{PRESENT[0]}.narinfo",
    f"/main/{PRESENT[0]}.narinf%6f",
    f"/m%61in/{PRESENT[0]}.narinfo",
    f"/main%2f{PRESENT[0]}.narinfo",
    f"/main/nar/{next(iter(NARS))}?x",
    f"/main/nar/%30{next(iter(NARS))[1:]}",
    f"/open/../main/{PRESENT[0]}.narinfo",
    f"/main/nar/../{PRESENT[0]}.narinfo",
    f"http://cache.test/main/{PRESENT[0]}.narinfo",
    f"HTTP://other.test:80/main/{PRESENT[0]}.narinfo",
    f"main/{PRESENT[0]}.narinfo",
    f"Xmain/{PRESENT[0]}.narinfo",
    f"*main/{PRESENT[0]}.narinfo",
    "*",
    f"/{'a' * 600}/{PRESENT[0]}.narinfo",
    f"/main/{'a' * 9000}.narinfo",
    f"/main/\xe9{PRESENT[0]}.narinfo",
    f"/main/{PRESENT[0]}.narinfo\x00",
]

FIELDS = [
    "Accept: */*",
    "accept-encoding: br, zstd, gzip",
    "User-Agent: curl/8.1 Nix/2.26.3",
    "uSER-aGENT:x",
    "Connection: keep-alive",
    "Connection: Keep-Alive",
    "connection: close",
    "Connection: Keep-Alive, close",
    "Connection: upgrade",
    "Upgrade: websocket",
    "Upgrade: h2c",
    "X-Forwarded-For: 10.0.0.1",
    "X-Unheard-Of: 1",
    "X-Padded:   \t 1 \t ",
    "X-Empty:",
    "X-High: caf\xe9",
    "X-Bell: \x07",
    "Cookie: a=b",
    "Host: other.test",
    "Host:",
    "Content-Length: 0",
    "Content-Length: 4",
    "Content-Length: +0",
    "Content-Length: -1",
    "Content-Length: 0, 0",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: identity",
    "Transfer-Encoding: xchunked",
    "Transfer-Encoding : chunked",
    "Transfer-Encoding: \x0bchunked",
    "Expect: 100-continue",
    "Expect: something",
    "Content-Encoding: gzip",
    "TE: trailers",
    "Range: bytes=0-9",
    "Range: bytes=990-",
    "Range: bytes=-1",
    "Range: bytes=5000000-",
    "Range: items=0-1",
    'If-Range: "x"',
    "If-None-Match: *",
    'If-None-Match: W/"a", "b"',
    f'If-None-Match: "{list(NARS)[2]}"',
    "If-Modified-Since: Sat, 01 Jan 2000 00:00:00 GMT",
    "If-Match: *",
    f"Authorization: Bearer {READER}",
    f"Authorization: {basic(READER)}",
    f"Authorization: bearer {IN_CATALOG}",
    f"Authorization: Bearer {STRANGER}",
    "Authorization: Bearer nobody",
    "Authorization: Bearer",
    "Authorization: Basic !!!",
    "Authorization: Digest x=y",
    " folded: line",
    "\tfolded",
    "no colon",
    ": no name",
    "Sp ace: 1",
    "Late : 1",
    "X-Nul: a\x00b",
    f"X-Long: {'a' * 5000}",
    f"X-Longer: {'a' * 8200}",
    *(f"X-{number}: {number}" for number in range(3)),
]

FIRST = request(f"/main/{PRESENT[0]}.narinfo")
SECOND = request(f"/{ABSENT[0]}.narinfo", "HEAD")

targets = st.sampled_from(TARGETS[:14]) | st.sampled_from(TARGETS)
methods = st.sampled_from([*["GET"] * 4, *["HEAD"] * 3, "PUT", "POST", "DELETE", "OPTIONS", "get", "G\x00T", ""])
versions = st.sampled_from(
    [*["HTTP/1.1"] * 8, "HTTP/1.0", "HTTP/1.2", "HTTP/2.0", "HTTP/1.10", "http/1.1", "", "HTTP/1.1 "]
)


def twice(field: str) -> list[str]:
    return [field, f"{field.partition(':')[0].swapcase()}: other"]


header_fields = st.one_of(
    st.lists(st.sampled_from(FIELDS), max_size=3),
    st.sampled_from(FIELDS).map(twice),
    st.sampled_from(FIELDS[:9]).map(twice),
)


def framed(body: bytes) -> list[tuple[list[str], bytes]]:
    """Ways to say how long a body is, true and false."""
    size, chunked = len(body), b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    return [
        ([], b""),
        ([], body),
        ([f"Content-Length: {size}"], body),
        ([f"Content-Length: {size - 1}"], body),
        ([f"Content-Length: {size + 1}"], body),
        ([f"Content-Length: {size}"] * 2, body),
        ([f"Content-Length: {size}", f"Content-Length: {size - 1}"], body),
        (["Content-Length: 0"], body),
        (["Transfer-Encoding: chunked"], chunked),
        (["Transfer-Encoding: chunked", "Content-Length: 0"], chunked),
        (["Transfer-Encoding: chunked", f"Content-Length: {len(chunked)}"], chunked),
        (["Transfer-Encoding: chunked", "Transfer-Encoding: identity"], chunked),
        (["Transfer-Encoding: chunked", "X-Unheard-Of: 1"], chunked[:-2]),
        (["Expect: 100-continue", f"Content-Length: {size}"], body),
    ]


bodies = st.sampled_from([b"abcd", b"\r\n", FIRST, SECOND, FIRST + SECOND, b"x" * 3000])
frames: st.SearchStrategy[tuple[list[str], bytes]] = st.just(([], b"")) | bodies.flatmap(
    lambda body: st.sampled_from(framed(body))
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A head and what follows it."""
    framing, body = draw(frames)
    fields = [*draw(header_fields), *framing]
    head = request(draw(targets), draw(methods), *fields, version=draw(versions), host=draw(st.integers(0, 9)) > 0)
    return head, body


plain_fields = st.lists(
    st.sampled_from(FIELDS[:5]), max_size=2, unique_by=lambda field: field[:2].lower()
) | st.sampled_from(
    [[f"Authorization: Bearer {token}"] for token in (READER, STRANGER, IN_CATALOG, "nobody")]
    + [["Range: bytes=1-5"], ["If-None-Match: *"], ["Content-Length: 0"], ["X-Unheard-Of: 1"]]
)
good_requests = st.tuples(st.sampled_from(TARGETS[:36]), st.sampled_from(["GET", "HEAD"]), plain_fields)


def cut(data: bytes, places: list[int]) -> tuple[bytes, ...]:
    borders = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return tuple(data[start:end] for start, end in pairwise(borders))


cuts = st.lists(st.integers(0, 100_000), max_size=3)
"""Places where what is sent is cut; where a test has None for them, it is cut wherever a head or a body ends."""


@examples(120)
@given(st.lists(st.tuples(good_requests, cuts | st.just([])), min_size=1, max_size=5))
def test_requests_one_after_the_other(
    servers: Servers, asked: list[tuple[tuple[str, str, list[str]], list[int]]]
) -> None:
    steps = [
        Step(cut(request(target, method, *fields), places), (method,)) for (target, method, fields), places in asked
    ]
    outcome = servers.compare(*steps)
    assert len(outcome.answers) == len(steps) + 1


@examples(120)
@given(st.lists(good_requests, min_size=2, max_size=6), st.none() | cuts)
@example([("/nix-cache-info", "GET", []), (TARGETS[0], "GET", [])], None)
@example([("/", "GET", []), (TARGETS[0], "GET", []), (TARGETS[1], "HEAD", [])], [len(request("/"))])
def test_requests_that_do_not_wait_for_answers(
    servers: Servers, asked: list[tuple[str, str, list[str]]], places: list[int] | None
) -> None:
    parts = [request(target, method, *fields) for target, method, fields in asked]
    segments = tuple(parts) if places is None else cut(b"".join(parts), places)
    outcome = servers.compare(Step(segments, tuple(method for _, method, _ in asked)))
    assert len(outcome.answers) == len(asked) + 1


@examples(250)
@given(st.lists(requests(), min_size=1, max_size=3), st.none() | cuts)
@example([(FIRST, b"\r\n"), (FIRST, b"")], [])
@example([(FIRST.replace(b"\r\n", b"\n"), b"")] * 2, None)
@example([(FIRST.replace(b"\r\n", b"\r"), b"")] * 2, None)
@example([(FIRST[:-2] + b"\n", b"")] * 2, None)
@example([(FIRST[:-1], FIRST)], None)
@example([(FIRST.replace(b" ", b"\t"), b"")] * 2, None)
@example([(FIRST.replace(b" ", b"  "), b"")] * 2, None)
@example([(b"GET /a\nX: HTTP/1.1\r\nHost: x\r\n\r\n", FIRST)], None)
@example([(b"GET /a HTTP/1.1\nContent-Length: 40\nX: HTTP/1.1\r\nHost: x\r\n\r\n", FIRST)], None)
@example([(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"")], None)
@example([(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"")], None)
@example([(b"\x00" * 10_000, b"")], None)
def test_anything(servers: Servers, asked: list[tuple[bytes, bytes]], places: list[int] | None) -> None:
    servers.compare(Step(segments_of(asked, places)))


@examples(150)
@given(good_requests, requests(), requests(), st.none() | cuts)
def test_anything_after_an_answer(
    servers: Servers,
    first: tuple[str, str, list[str]],
    second: tuple[bytes, bytes],
    third: tuple[bytes, bytes],
    places: list[int] | None,
) -> None:
    target, method, fields = first
    step = Step((request(target, method, *fields),), (method,))
    servers.compare(step, Step(segments_of([second], places)), Step(segments_of([third], places)))


@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD"])
@pytest.mark.parametrize("target", ["/nix-cache-info", TARGETS[0], "/main/x/y"])
@pytest.mark.parametrize("body", [FIRST, SECOND + FIRST], ids=["one", "two"])
def test_a_request_in_a_body_is_none(servers: Servers, method: str, target: str, body: bytes) -> None:
    frames = [(request(target, method, *fields), content) for fields, content in framed(body)]
    servers.compare_all([(Step((head, content, FIRST)),) for head, content in frames])
    servers.compare_all([(Step((head,)), Step((content,)), Step((FIRST,))) for head, content in frames])


def test_fields_that_are_there_twice(servers: Servers) -> None:
    heads = [request(TARGETS[0], "GET", *fields) for field in FIELDS for fields in (twice(field), [field, field])]
    servers.compare_all([(Step((head, FIRST)),) for head in heads])


def segments_of(asked: list[tuple[bytes, bytes]], places: list[int] | None) -> tuple[bytes, ...]:
    if places is None:
        return tuple(part for head, body in asked for part in (head, body) if part)
    return cut(b"".join(head + body for head, body in asked), places)


SPECIAL = b'\x00\t\n\r "#%/:;?,.aA0\x7f\x80\xff'
PLAIN = [
    request(f"/main/{PRESENT[0]}.narinfo", "GET", "User-Agent: Nix", "Connection: keep-alive"),
    request(f"/{ABSENT[0]}.narinfo", "HEAD", "Accept: */*"),
    request(f"/open/nar/{list(NARS)[1]}", "GET", "Accept-Encoding: br"),
    request(f"/team/{PRESENT[0]}.narinfo", "GET", f"Authorization: Bearer {READER}"),
]


@pytest.mark.parametrize("number", range(len(PLAIN)))
def test_no_byte_makes_a_difference(servers: Servers, number: int) -> None:
    """Of all requests that are one byte away from a plain one, those that the front answers are answered alike."""
    plain = PLAIN[number]
    neighbours = {plain[:place] + plain[place + 1 :] for place in range(len(plain))}
    for place in range(len(plain)):
        for byte in SPECIAL:
            neighbours |= {plain[:place] + bytes([byte]) + plain[place + skip :] for skip in (0, 1)}
    answers = FastAnswers(servers.behind_front)
    answered = [data for data in sorted(neighbours) if answers.answer(data) is not None]
    assert len(answered) > 100
    # Sent one after the other: one that aiohttp takes for less or for more than a request spoils those behind it.
    for start in range(0, len(answered), 50):
        together = answered[start : start + 50]
        steps = [Step((data,), (data.split(b" ", 1)[0].decode(),)) for data in together]
        assert len(servers.compare(*steps).answers) == len(together) + 1


def test_the_same_is_counted(servers: Servers) -> None:
    before = counted(servers.behind_front), counted(servers.plain)
    asked = [(target, method) for target in TARGETS[:30] for method in ("GET", "HEAD")]
    servers.compare(*(Step((request(target, method),), (method,)) for target, method in asked))
    front, plain = (
        {key: value - earlier.get(key, 0) for key, value in counted(site).items() if value != earlier.get(key, 0)}
        for site, earlier in zip((servers.behind_front, servers.plain), before, strict=True)
    )
    assert front == plain
    assert sum(front.values()) > len(asked)


def counted(site: Site) -> dict[str, float]:
    lines = site.services.metrics.render().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}
