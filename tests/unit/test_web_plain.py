"""Which requests are plain."""

from __future__ import annotations

from base64 import b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachesrv.web.plain import MAX_BLOCK, Block, Blocks, judge

PLAIN = Block(None, conditional=False)


def fields(*lines: str, host: str = "Host: cache:5000") -> bytes:
    return "".join(f"{line}\r\n" for line in (host, *lines, "")).encode("latin-1")


@pytest.mark.parametrize(
    "lines",
    [
        (),
        ("User-Agent: curl/7.88.1 Nix/2.8.0", "Accept: */*"),
        ("Accept-Encoding: zstd, br, gzip, deflate, bzip2, xz",),
        ("Connection: keep-alive",),
        ("Connection: Keep-Alive",),
        ("X-Forwarded-For: 10.0.0.1", "X-Forwarded-Proto: https", "Via: 1.1 proxy"),
        ("X-Forwarded-Server: traefik", "X-Forwarded-Port: 443", "X-Real-Ip: 10.0.0.1"),
        ("X-Original-Forwarded-For: 10.0.0.1", "X-Forwarded-Scheme: https", "X-Scheme: https"),
        ("CF-Ray: 7d1-FRA", "CF-Connecting-IP: 2001:db8::1", 'CF-Visitor: {"scheme":"https"}', "CDN-Loop: cloudflare"),
        ("x-envoy-attempt-count: 1", "traceparent: 00-4bf9-00f0-01"),
        ("accept:*/*",),
        ("ACCEPT: \t */* \t",),
        ("Accept:",),
    ],
)
def test_what_clients_and_proxies_send(lines: tuple[str, ...]) -> None:
    assert judge(fields(*lines)) == PLAIN


@pytest.mark.parametrize(
    "line", ["Range: bytes=0-1", "If-Range: x", "If-None-Match: x", "If-Modified-Since: x", "range: bytes=0-1"]
)
def test_conditions_are_told(line: str) -> None:
    assert judge(fields(line)) == Block(None, conditional=True)


def test_tokens_are_told() -> None:
    assert judge(fields("Authorization: Bearer t")) == Block("t", conditional=False)
    password = b64encode(b"user:t").decode()
    assert judge(fields(f"Authorization: Basic {password}", "Range: bytes=0-1")) == Block("t", conditional=True)


@pytest.mark.parametrize(
    "lines",
    [
        ("Content-Length: 0",),
        ("Content-Length: 5",),
        ("Transfer-Encoding: chunked",),
        ("Expect: 100-continue",),
        ("Upgrade: websocket",),
        ("Connection: close",),
        ("Connection: keep-alive, upgrade",),
        ("X-Unheard-Of: 1",),
        ("Accept: a", "Accept: b"),
        ("Accept: a", "accept: b"),
        ("Host: twice",),
        ("Authorization: Bearer",),
        ("Authorization: Bearer a", "Authorization: Bearer b"),
        ("Accept : space before the colon",),
        (" Accept: folded",),
        ("Accept: a", "\tfolded"),
        ("no colon",),
        (": no name",),
        ("Acc\xe9pt: x",),
        ("Accept: \xe9",),
        ("Accept: a\0b",),
        ("Accept: a\nContent-Length: 5",),
        ("Accept: a\rContent-Length: 5",),
        ("Accept: a\r\n\r\nGET /x HTTP/1.1",),
    ],
)
def test_what_is_out_of_the_ordinary(lines: tuple[str, ...]) -> None:
    assert judge(fields(*lines)) is None


@pytest.mark.parametrize("host", ["", "Host:", "Host: a b", "Host: a/b", "Host: user@host", "Hos: a"])
def test_a_host_has_to_be_named(host: str) -> None:
    assert judge(fields("Accept: */*", host=host)) is None


@pytest.mark.parametrize("block", [b"", b"\r\n", b"Host: a\r\n", b"Host: a\n\n", b"Host: a\r\n\r\nmore", b"Host: a"])
def test_what_is_not_whole(block: bytes) -> None:
    assert judge(block) is None


def test_long_blocks_are_not_judged() -> None:
    longest = MAX_BLOCK - len(fields("Accept: "))
    assert judge(fields(f"Accept: {'a' * longest}")) == PLAIN
    assert judge(fields(f"Accept: {'a' * (longest + 1)}")) is None


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_anything_gets_a_verdict(before: bytes, after: bytes) -> None:
    block = before + b"Host: a\r\n" + after + b"\r\n\r\n"
    verdict = judge(block)
    if verdict is not None:
        # nothing that could end the request elsewhere
        assert block.count(b"\r\n\r\n") == 1
        assert block.count(b"\n") == block.count(b"\r\n")
        assert b"length" not in block.lower()


def test_verdicts_are_remembered_and_bounded() -> None:
    blocks = Blocks()
    for number in range(5000):
        assert blocks.get(fields(f"Accept: {number}")) == PLAIN
    assert len(blocks._verdicts) <= 1024
    assert blocks.get(fields("Content-Length: 5")) is None
    assert blocks.get(fields("Content-Length: 5")) is None
    long = fields(f"Accept: {'a' * MAX_BLOCK}")
    assert blocks.get(long) is None
    assert long not in blocks._verdicts
