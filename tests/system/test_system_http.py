"""HTTP as clients and proxies speak it: headers, ranges, conditions, framing."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from secrets import token_hex
from typing import TYPE_CHECKING

import pytest

from tests.samples import Sample
from tests.system.client import receive
from tests.system.server import PATIENCE, Server
from tests.system.stored import Bucket

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.system.client import Client

SMALL = Sample("small", b"some bytes")
LARGE = Sample("large", bytes(range(256)) * 4096 * 4)
NIX = "Host: cache\r\nUser-Agent: curl/7.88.1 Nix/2.8.0\r\nAccept: */*\r\n"


@pytest.fixture(scope="module", params=["files", "bucket"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """What lies in a bucket is told in the same words, when it comes through the server."""
    folder = tmp_path_factory.mktemp("server")
    stored = None
    if request.param == "bucket":
        gateway, bucket = request.getfixturevalue("gateway"), request.getfixturevalue("bucket")
        stored = Bucket(gateway, bucket, token_hex(8), folder, mode="proxy")
    server = Server(folder, stored=stored).start()
    for sample in (SMALL, LARGE):
        assert server.pusher.put(sample.nar_url, sample.file).status == 204
        assert server.pusher.put(sample.narinfo_url, sample.narinfo()).status == 204
    yield server
    server.dispose()


@pytest.fixture
def client(server: Server) -> Client:
    return server.client()


def test_the_fields_of_each_kind_of_object(client: Client) -> None:
    for path, kind, caching in (
        ("/main/nix-cache-info", "text/x-nix-cache-info", r"max-age=\d+"),
        (SMALL.narinfo_url, "text/x-nix-narinfo", r"max-age=\d+"),
        (SMALL.nar_url, "application/x-nix-nar", r"max-age=31536000, immutable"),
        (LARGE.nar_url, "application/x-nix-nar", r"max-age=31536000, immutable"),
        (SMALL.narinfo_url.replace(".narinfo", ".ls"), "application/json", r"no-cache"),
    ):
        answer, head = client.get(path), client.head(path)
        assert answer.status == 200
        assert answer.headers["content-type"] == kind
        assert re.fullmatch(caching, answer.headers["cache-control"]), path
        assert answer.headers["content-length"] == str(len(answer.body))
        assert "content-encoding" not in answer.headers
        assert "transfer-encoding" not in answer.headers
        assert "date" in answer.headers
        assert head.body == b""
        assert _without_date(head.headers) == _without_date(answer.headers)


def test_an_object_without_contents(server: Server, client: Client) -> None:
    log = f"/main/log/{Sample('silent').path.base_name}.drv"
    assert server.pusher.put(log, b"").status == 204
    whole, head = client.get(log), client.head(log)
    assert (whole.status, whole.body, whole.headers["content-length"]) == (200, b"", "0")
    assert (head.status, head.headers["content-length"]) == (200, "0")
    assert client.get(log, Range="bytes=0-").status == 416


def test_the_cache_is_at_the_root_too(client: Client) -> None:
    for path in ("/main/nix-cache-info", SMALL.narinfo_url, SMALL.nar_url, LARGE.nar_url):
        assert client.get(path.removeprefix("/main")).body == client.get(path).body


def test_a_miss_is_not_kept_by_anybody(client: Client) -> None:
    absent = Sample("absent", b"nowhere")
    for path in (absent.narinfo_url, absent.nar_url, f"/main/log/{absent.path}.drv"):
        for answer in (client.get(path), client.get(path), client.head(path)):
            assert answer.status == 404
            assert answer.headers["cache-control"] == "no-store"


def test_nothing_is_compressed_on_the_way(client: Client) -> None:
    """Some versions of Nix offer codings that they cannot read, and none resumes a transfer that has one."""
    offered = "zstd, br, gzip, deflate, bzip2, xz"
    for path in ("/main/nix-cache-info", SMALL.narinfo_url, SMALL.nar_url, LARGE.nar_url, "/"):
        answer = client.get(path, Accept_Encoding=offered)
        assert "content-encoding" not in answer.headers
        assert answer.body == client.get(path).body


@pytest.mark.parametrize("sample", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-", 0, None),
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=100-", 100, None),
        ("bytes=5-999999999999", 5, None),
        ("bytes=-7", -7, None),
        ("bytes=-999999999999", 0, None),
    ],
)
def test_ranges(client: Client, sample: Sample, asked: str, start: int, end: int | None) -> None:
    answer = client.get(sample.nar_url, Range=asked)
    expected = sample.file[start:end]
    assert (answer.status, answer.body) == (206, expected)
    first = start if start >= 0 else len(sample.file) + start
    assert answer.headers["content-range"] == f"bytes {first}-{first + len(expected) - 1}/{len(sample.file)}"
    assert answer.headers["content-length"] == str(len(expected))
    assert answer.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize("asked", ["bytes={size}-", "bytes=999999999999-", "bytes=-0"])
def test_ranges_beyond_the_end(client: Client, asked: str) -> None:
    answer = client.get(LARGE.nar_url, Range=asked.format(size=len(LARGE.file)))
    assert answer.status == 416
    assert answer.headers["content-range"] == f"bytes */{len(LARGE.file)}"


@pytest.mark.parametrize(
    "asked", ["bytes=0-1,5-6", "bytes=5-2", "bytes=-", "bytes=x-y", "lines=1-2", "bytes", "bytes=1_0-20", "bytes=٣-٤"]
)
def test_ranges_that_are_passed_over(client: Client, asked: str) -> None:
    """Several at once, and what is none."""
    answer = client.ask("GET", LARGE.nar_url, headers={"Range": asked.encode().decode("latin-1")})
    assert (answer.status, answer.body) == (200, LARGE.file)


@pytest.mark.parametrize("asked", ["bytes=0-1", "bytes=999999999999-"])
def test_a_head_has_no_ranges(client: Client, asked: str) -> None:
    answer = client.ask("HEAD", LARGE.nar_url, headers={"Range": asked})
    assert (answer.status, answer.headers["content-length"]) == (200, str(len(LARGE.file)))
    assert "content-range" not in answer.headers


@pytest.mark.parametrize("sample", [SMALL, LARGE], ids=["small", "large"])
def test_conditions(client: Client, sample: Sample) -> None:
    for path in (sample.nar_url, sample.narinfo_url):
        whole = client.get(path)
        tag = whole.headers["etag"]
        for header in (tag, f"W/{tag}", f'"other", {tag}', "*"):
            answer = client.get(path, If_None_Match=header)
            assert (answer.status, answer.body) == (304, b"")
            assert answer.headers["etag"] == tag
            assert answer.headers["cache-control"] == whole.headers["cache-control"]
        assert client.get(path, If_None_Match='"other"').body == whole.body
    tag = client.head(sample.nar_url).headers["etag"]
    assert client.get(sample.nar_url, Range="bytes=1-2", If_Range=tag).status == 206
    for other in ('"other"', f"W/{tag}", "Sat, 21 Nov 2026 06:00:00 GMT"):
        answer = client.get(sample.nar_url, Range="bytes=1-2", If_Range=other)
        assert (answer.status, answer.body) == (200, sample.file)


def test_a_narinfo_that_changes_has_another_tag(server: Server, client: Client) -> None:
    sample = Sample("signed-later")
    server.pusher.put(sample.nar_url, sample.file)
    server.pusher.put(sample.narinfo_url, sample.narinfo())
    before = client.get(sample.narinfo_url)
    signed = before.body + b"Sig: late-1:" + b"A" * 86 + b"==\n"
    assert server.pusher.put(sample.narinfo_url, signed).status == 204
    after = client.get(sample.narinfo_url, If_None_Match=before.headers["etag"])
    assert after.status == 200
    assert after.headers["etag"] != before.headers["etag"]
    assert after.body.count(b"Sig: ") == 2


@pytest.mark.parametrize(
    "path", [SMALL.narinfo_url, SMALL.nar_url, "/main/nix-cache-info", Sample("absent").narinfo_url]
)
@pytest.mark.parametrize("fields", [NIX, NIX + "X-Odd: 1\r\n"], ids=["fast", "slow"])
def test_head_and_body_come_in_one_segment(server: Server, client: Client, path: str, fields: str) -> None:
    """Two of them cost 40 ms each time: the kernel waits with the second for an acknowledgement of the first."""
    whole = client.get(path)
    with client.connect() as connection:
        for _ in range(3):
            connection.sendall(f"GET {path} HTTP/1.1\r\n{fields}\r\n".encode())
            received = connection.recv(1 << 20)
            assert received.endswith(b"\r\n\r\n" + whole.body)


def test_requests_are_answered_without_delay(client: Client) -> None:
    """By none of 40 ms, that is: it would come with each of them, while a busy machine is quick from time to time."""
    requests = [f"GET {path} HTTP/1.1\r\n{NIX}\r\n".encode() for path in (SMALL.narinfo_url, SMALL.nar_url)]
    quickest = [PATIENCE, PATIENCE]
    with client.connect() as connection:
        for number in range(100):
            begun = time.monotonic()
            connection.sendall(requests[number % 2])
            assert receive(connection).status == 200
            quickest[number % 2] = min(quickest[number % 2], time.monotonic() - begun)
    assert max(quickest) < 0.03


@pytest.mark.parametrize("path", [SMALL.narinfo_url, SMALL.nar_url, f"/main/log/{'0' * 32}-x.drv"])
def test_expect_continue_is_answered_at_once(server: Server, path: str) -> None:
    """A client that waits for it in vain loses a second with each object."""
    body = {SMALL.narinfo_url: SMALL.narinfo(), SMALL.nar_url: SMALL.file}.get(path, b"log")
    with server.client().connect() as connection:
        for _ in range(2):
            head = f"PUT {path} HTTP/1.1\r\n{NIX}Authorization: Bearer {server.token}\r\n"
            head += f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
            connection.sendall(head.encode())
            assert connection.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
            connection.sendall(body)
            assert receive(connection, "PUT").status == 204


def test_curl_does_not_wait(server: Server, tmp_path: object) -> None:
    """The library that Nix uses, told to expect what Nix 2.8 expects."""
    options = ["--silent", "--show-error", "--fail", "--write-out", "%{http_code} %{time_total}", "-X", "PUT"]
    options += ["-H", "Expect: 100-continue", "-H", f"Authorization: Bearer {server.token}", "--data-binary", "@-"]
    done = subprocess.run(
        ["curl", *options, f"{server.url}{LARGE.nar_url}"],
        input=LARGE.file,
        capture_output=True,
        check=True,
        timeout=60,
    )
    status, seconds = done.stdout.split()
    assert status == b"204"
    assert float(seconds) < 1


def test_a_body_without_a_length(server: Server) -> None:
    sample = Sample("chunked", b"chunked" * 1_000_000)
    size = 100_000
    chunks = [sample.file[start : start + size] for start in range(0, len(sample.file), size)]
    assert server.pusher.put(sample.nar_url, chunks).status == 204
    assert server.client().get(sample.nar_url).body == sample.file


def test_many_requests_on_one_connection_keep_their_order(server: Server, client: Client) -> None:
    """Pipelined, of all kinds: what the fast way answers does not overtake what it leaves to the slow one."""
    paths = [SMALL.narinfo_url, LARGE.nar_url, Sample("absent").narinfo_url, SMALL.nar_url, "/main/nix-cache-info"] * 3
    expected = [client.get(path) for path in paths]
    with client.connect() as connection:
        connection.sendall("".join(f"GET {path} HTTP/1.1\r\n{NIX}\r\n" for path in paths).encode())
        stream = connection.makefile("rb")
        for path, answer in zip(paths, expected, strict=True):
            status = int(stream.readline().split()[1])
            length = 0
            while (line := stream.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            assert (path, status, stream.read(length)) == (path, answer.status, answer.body)


def test_a_request_in_pieces(client: Client) -> None:
    whole = client.get(SMALL.narinfo_url)
    request = f"GET {SMALL.narinfo_url} HTTP/1.1\r\n{NIX}\r\n".encode()
    with client.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in request:
            connection.sendall(bytes([byte]))
        assert receive(connection).body == whole.body
        connection.sendall(request)
        assert receive(connection).body == whole.body


def test_old_http(client: Client) -> None:
    """HTTP/1.0 ends the connection; a client that asks for it is obeyed."""
    for request in (
        f"GET {SMALL.narinfo_url} HTTP/1.0\r\n\r\n",
        f"GET {SMALL.narinfo_url} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ):
        with client.connect() as connection:
            connection.sendall(request.encode())
            received = b""
            while data := connection.recv(65536):
                received += data
        assert received.partition(b" ")[2].startswith(b"200 ")
        assert received.endswith(client.get(SMALL.narinfo_url).body)


def test_a_client_that_does_not_read_holds_nothing_up(server: Server, client: Client) -> None:
    with client.connect() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.sendall(f"GET {LARGE.nar_url} HTTP/1.1\r\n{NIX}\r\n".encode())
        for _ in range(20):
            assert client.get(SMALL.narinfo_url).status == 200
        assert client.get(LARGE.nar_url).body == LARGE.file
        assert lazy.recv(1024).startswith(b"HTTP/1.1 200 OK\r\n")


def test_the_page_tells_what_to_do(server: Server, client: Client) -> None:
    text = client.get("/").text
    assert f"extra-substituters = {server.main}" in text
    assert f"extra-trusted-public-keys = {server.public_key}" in text
    assert server.token not in text
    for url in ("/main", "/main/"):  # what `serve` prints is opened in a browser
        assert client.get(url).text == text
    assert client.put("/main", b"").status == 404


def _without_date(headers: object) -> dict[str, str]:
    assert isinstance(headers, dict)
    return {name: value for name, value in headers.items() if name != "date"}
