"""What is not as it should be is refused: with a clear status, one line that says why, and no trace in the store."""

from __future__ import annotations

import gzip
import re
import socket
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest
import zstandard

from cachesrv.api import PackedNar, PackHead
from cachesrv.nix.nar import token
from cachesrv.pack import encode
from tests.samples import Sample, directory_nar, file_name, file_nar, path_of
from tests.system.client import Answer, Client, receive
from tests.system.push import attempt, events
from tests.system.server import Server, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.system.conftest import MakeNix

READER, STRANGER = "reader's token", "token for the other cache"
CONFIG = f"""
[server]
stall_timeout = 1
max_nar_size = "8 MiB"

[[cache]]
name = "main"
root = true

[[cache]]
name = "other"

[[token]]
name = "reader"
sha256 = "{sha256(READER.encode()).hexdigest()}"
permissions = ["pull"]

[[token]]
name = "stranger"
sha256 = "{sha256(STRANGER.encode()).hexdigest()}"
permissions = ["push"]
caches = ["other"]
"""

PUBLISHED = Sample("published", b"as it was built first")
REBUILT = Sample("published", b"as it was built again")
SENT = Sample("sent", b"whose NAR is there")
NEW = Sample("new", b"of which nothing is there")
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for all: no test here changes anything."""
    server = Server(tmp_path_factory.mktemp("server"), config=CONFIG).start()
    pusher = server.pusher
    for sample in (PUBLISHED, SENT, REBUILT):
        assert pusher.put(sample.nar_url, sample.file).status == 204
    assert pusher.put(PUBLISHED.narinfo_url, PUBLISHED.narinfo()).status == 204
    yield server
    server.dispose()


@pytest.fixture
def pusher(server: Server) -> Iterator[Client]:
    """Sees to it that nothing is changed, kept or told that should not be."""
    before = server.snapshot()
    yield server.pusher
    until(lambda: server.snapshot() == before, "something has changed in the store")
    assert server.client().get(PUBLISHED.narinfo_url).status == 200


def check(server: Server, answer: Answer, status: int, text: str) -> None:
    """A refusal as it has to be; `text` is a pattern."""
    assert (answer.status, answer.text) == (status, answer.text)
    assert re.search(text, answer.text), answer.text
    assert answer.text.endswith("\n")
    assert len(answer.text.splitlines()) == 1
    for secret in (str(server.folder), "objects/", "Traceback", ".py", server.token):
        assert secret not in answer.text
    assert answer.headers["cache-control"] == "no-store"


def test_another_nar_for_a_published_path(server: Server, pusher: Client) -> None:
    """Refused with both hashes, and remembered: the build is not deterministic."""
    answer = pusher.put(REBUILT.narinfo_url, REBUILT.narinfo())
    check(server, answer, 409, "not deterministic")
    assert PUBLISHED.nar_hash.nix32 in answer.text
    assert REBUILT.nar_hash.nix32 in answer.text
    for _ in range(2):
        pusher.put(REBUILT.narinfo_url, REBUILT.narinfo())
    assert server.query("select hash_part, published_nar_hash, refused_nar_hash, pusher from conflicts") == [
        (PUBLISHED.path.hash_part, PUBLISHED.nar_hash.nix32, REBUILT.nar_hash.nix32, "push-token")
    ]


@pytest.mark.parametrize(
    ("change", "status", "text"),
    [
        ({"nar_hash": NEW.nar_hash}, 422, "NarHash says"),
        ({"nar_size": 12345}, 422, "NarSize says 12345"),
        ({"file_hash": NEW.nar_hash}, 422, "FileHash says"),
        ({"file_size": 12345}, 422, "FileSize says 12345"),
        ({"compression": "xz"}, 422, "Compression says xz"),
        ({"references": (path_of("absent"),)}, 422, f"{path_of('absent')}.*push the references first"),
        ({"url": f"nar/{NEW.nar_name}"}, 422, "send the NAR before the narinfo"),
        ({"url": "../keys/main.secret"}, 400, "URL is"),
        ({"url": "nar/../../keys/main.secret"}, 400, "URL is"),
        ({"url": f"https://example.org/nar/{SENT.nar_name}"}, 400, "URL is"),
        ({"store_dir": "/gnu/store"}, 400, "/gnu/store.*/nix/store"),
        ({"store_path": path_of("other")}, 400, "its name says"),
    ],
)
def test_narinfos_that_lie(server: Server, pusher: Client, change: dict[str, object], status: int, text: str) -> None:
    check(server, pusher.put(SENT.narinfo_url, SENT.narinfo(**change)), status, text)
    assert pusher.get(SENT.narinfo_url).status == 404


@pytest.mark.parametrize(
    "text",
    [b"", b"garbage", b"StorePath: /nix/store/nonsense\n", SENT.narinfo()[:-1], SENT.narinfo() + b"\n", b"\xff\xfe\n"],
)
def test_narinfos_that_are_none(server: Server, pusher: Client, text: bytes) -> None:
    check(server, pusher.put(SENT.narinfo_url, text), 400, "narinfo|line|body|field")


def test_a_narinfo_of_a_megabyte(server: Server, pusher: Client) -> None:
    """By what it says, by what comes, and by what it becomes."""
    large = SENT.narinfo() + b"Unknown: " + b"x" * MIB + b"\n"
    check(server, pusher.put(SENT.narinfo_url, large), 413, "at most 1048576")
    check(server, pusher.put(SENT.narinfo_url, [large]), 413, "1048576")
    check(server, pusher.put(SENT.narinfo_url, gzip.compress(large), Content_Encoding="gzip"), 413, "1048576")


def test_bombs_are_not_unpacked(server: Server, pusher: Client) -> None:
    """Tens of kilobytes that become gigabytes; and a frame that asks for 2 GiB of memory."""
    zeros = bytes(64 * MIB)
    bomb = zstandard.ZstdCompressor(level=1).compress(zeros) * 64
    assert len(bomb) < MIB
    check(server, pusher.put(SENT.narinfo_url, bomb, Content_Encoding="zstd"), 413, "1048576")
    start = zstandard.ZstdCompressor().compress(file_nar(b"")[:88] + (2**32).to_bytes(8, "little"))
    name = file_name(start + bomb, "zstd")
    check(server, pusher.put(f"/main/nar/{name}", start + bomb), 413, "more than the 8388608 bytes")
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=True)
    greedy = zstandard.ZstdCompressor(compression_params=parameters).compressobj().compress(b"x")
    greedy = b"\x28\xb5\x2f\xfd\x00\xa8" + greedy[6:] + b"\x01\x00\x00"
    check(server, pusher.put(f"/main/nar/{file_name(greedy, 'zstd')}", greedy), 400, "zstd")
    assert server.peak_memory < 200 * MIB


def nars_that_are_none() -> Iterator[tuple[str, bytes]]:
    good = NEW.nar
    yield "empty", b""
    yield "no NAR", b"x" * 200
    yield "cut", good[:-8]
    yield "cut in a token", good[:-3]
    yield "bytes behind the end", good + b"\0" * 8
    yield "padding that is not zero", good.replace(b"regular\0", b"regular\1")
    yield "entries out of order", directory_nar(b"b", b"a")
    yield "an entry twice", directory_nar(b"a", b"a")
    yield "an entry that leads out", directory_nar(b"..")
    yield "an entry with a slash", directory_nar(b"a/b")
    yield (
        "fields out of order",
        b"".join(map(token, (b"nix-archive-1", b"(", b"contents", b"", b"type", b"regular", b")"))),
    )


@pytest.mark.parametrize(("what", "nar"), [pytest.param(*case, id=case[0]) for case in nars_that_are_none()])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_nars_that_are_none(server: Server, pusher: Client, what: str, nar: bytes, compression: str) -> None:
    """Under the right name: it is the content that is wrong. By its length, and without one."""
    file = nar if compression == "none" else zstandard.ZstdCompressor().compress(nar)
    url = f"/main/nar/{file_name(file, compression)}"
    check(server, pusher.put(url, file), 400, "NAR|nar")
    check(server, pusher.put(url, [file]), 400, "NAR|nar")
    assert pusher.get(url).status == 404


def test_large_nars_that_are_none(server: Server, pusher: Client) -> None:
    """Those that are written to storage while they are checked."""
    content = bytes(2 * MIB)
    nar = file_nar(content)
    for bad in (nar[:-8], nar + b"\0" * 8, nar[: MIB + 3], nar[:-16] + b"\2" + nar[-15:]):
        check(server, pusher.put(f"/main/nar/{file_name(bad)}", bad), 400, "NAR")
    check(server, pusher.put(f"/main/nar/{file_name(b'something else')}", nar), 422, "but the file's hash is")
    check(server, pusher.put(f"/main/nar/{file_name(nar)}", file_nar(bytes(9 * MIB))), 413, "8388608")
    assert pusher.get(f"/main/nar/{file_name(nar)}").status == 404


def test_a_nar_under_a_wrong_name(server: Server, pusher: Client) -> None:
    check(server, pusher.put(f"/main/nar/{SENT.nar_name}", NEW.nar), 422, SENT.nar_hash.bare_nix32)
    check(server, pusher.put(f"{NEW.nar_url}.zst", NEW.nar), 400, "zstd")
    check(server, pusher.put(f"{NEW.nar_url}.unheard-of", NEW.nar), 400, "nar/")
    check(server, pusher.put("/main/nar/name", NEW.nar), 400, "nar/<52 characters")
    check(server, pusher.put(NEW.nar_url.replace(".nar", ".nar.xz"), NEW.nar), 400, "xz")


def test_compressed_nars_that_break_off_or_go_on(server: Server, pusher: Client) -> None:
    whole = Sample("new", b"of which nothing is there" * 1000, compression="zstd").file
    for file in (whole[:-4], whole + b"\0" * 8, whole[:20] + b"\0" + whole[21:]):
        check(server, pusher.put(f"/main/nar/{file_name(file, 'zstd')}", file), 400, "zstd|NAR")


@pytest.mark.parametrize("size", [100, 3 * MIB])
def test_a_body_that_breaks_off(server: Server, pusher: Client, size: int) -> None:
    """The connection is cut in the middle of a body: nobody is there for an answer, and nothing is left."""
    nar = file_nar(bytes(size))
    head = _head("PUT", f"/main/nar/{file_name(nar)}", pusher, f"Content-Length: {len(nar)}")
    with pusher.connect() as connection:
        connection.sendall(head + nar[: len(nar) // 2])
        connection.shutdown(socket.SHUT_WR)
        assert not connection.recv(65536).startswith(b"HTTP/1.1 2")
    assert pusher.get(f"/main/nar/{file_name(nar)}").status == 404


@pytest.mark.parametrize("sent", [0, 100])
def test_a_body_that_does_not_come_forward(server: Server, pusher: Client, sent: int) -> None:
    nar = file_nar(bytes(MIB))
    for url in (f"/main/nar/{file_name(nar)}", SENT.narinfo_url, "/api/v1/caches/main/paths"):
        method = "POST" if url.startswith("/api") else "PUT"
        head = _head(method, url, pusher, "Content-Length: 100000", "X-Odd: 1")
        with pusher.connect() as connection:
            connection.sendall(head + nar[:sent])
            answer = receive(connection)
        if method == "PUT":
            check(server, answer, 408, "less than 16384 bytes of the body came in 1 seconds")
        assert answer.status == 408


def test_a_body_that_drips(server: Server, pusher: Client) -> None:
    """A byte now and then is no progress."""
    head = _head("PUT", SENT.narinfo_url, pusher, "Content-Length: 100000")
    with pusher.connect() as connection:
        connection.sendall(head)
        connection.settimeout(0.2)
        answer = b""
        for _ in range(100):
            connection.sendall(b"x")
            try:
                answer = connection.recv(65536)
                break
            except TimeoutError:
                continue
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("target", ["narinfo", "nar", "log", "listing", "api", "pack"])
def test_tokens(server: Server, pusher: Client, target: str) -> None:
    """Without one, with a wrong one, and with one that may not."""
    method, url, body = {
        "narinfo": ("PUT", SENT.narinfo_url, SENT.narinfo()),
        "nar": ("PUT", NEW.nar_url, NEW.nar),
        "log": ("PUT", f"/main/log/{path_of('x.drv')}", b"log"),
        "listing": ("PUT", f"/main/{SENT.path.hash_part}.ls", b"{}"),
        "api": ("POST", "/api/v1/caches/main/missing", b'{"paths":[]}'),
        "pack": ("POST", "/api/v1/caches/main/nars", encode(PackHead([]), [])),
    }[target]
    for held, status, text in (
        (None, 401, "needs a token"),
        ("csrv_wrong", 401, "not valid"),
        (READER, 403, "'reader' may not push"),
        (STRANGER, 403, "'stranger' may not push"),
    ):
        answer = server.client(held).ask(method, url, body)
        check(server, answer, status, text)
        assert ("www-authenticate" in answer.headers) == (status == 401)
    garbled = server.client().ask(method, url, body, {"Authorization": "Basic garbled"})
    check(server, garbled, 401, "Authorization")


def test_the_token_is_asked_for_before_the_body(server: Server, pusher: Client) -> None:
    """Who may not push is told so at once, and is not asked to go on."""
    for held in (None, "csrv_wrong", READER):
        client = server.client(held)
        head = _head("PUT", NEW.nar_url, client, f"Content-Length: {len(NEW.nar)}", "Expect: 100-continue")
        with client.connect() as connection:
            connection.sendall(head)
            assert connection.recv(65536).startswith((b"HTTP/1.1 401 ", b"HTTP/1.1 403 "))


TRAVERSALS = [
    "/main/../../keys/main.secret",
    "/main/%2e%2e/%2e%2e/keys/main.secret",
    "/main/nar/../../../keys/main.secret",
    "/main/nar/%2e%2e%2f%2e%2e%2f%2e%2e%2fkeys%2fmain.secret",
    "/main/nar/..",
    "/main/nar/%2e%2e",
    "/main/log/..%2f..%2f..%2fpush-token",
    "/main/log/../../../push-token",
    "/main/..%00.narinfo",
    "/main/..%2fother%2fx.narinfo",
    "/..%2f..%2fpush-token",
    "/main//etc/passwd",
    "//etc/passwd",
    "/main/realisations/..%2f..%2fx.doi",
    "/main/debuginfo/..%2f..%2fx.debug",
    "/main/build-trace-v2/../x.doi",
    "/main/build-trace-v2/..%2f..%2f/x.doi",
]


@pytest.mark.parametrize("path", TRAVERSALS)
def test_names_that_lead_out(server: Server, pusher: Client, path: str) -> None:
    answer = pusher.put(path, b"planted")
    check(server, answer, answer.status, "")
    assert answer.status in {400, 404}
    for method in ("GET", "HEAD"):
        answer = pusher.ask(method, path)
        assert answer.status in {400, 404}
        assert not answer.body or len(answer.text.splitlines()) == 1
    assert not list(server.folder.rglob("*planted*"))


def test_encodings_that_nobody_knows(server: Server, pusher: Client) -> None:
    for coding in ("compress", "x-unheard-of", "gzip, gzip"):
        answer = pusher.put(SENT.narinfo_url, SENT.narinfo(), Content_Encoding=coding)
        check(server, answer, 415, "Content-Encoding")
    garbage = pusher.put(SENT.narinfo_url, SENT.narinfo(), Content_Encoding="zstd")
    check(server, garbage, 400, "zstd")
    encoded = pusher.put(NEW.nar_url, gzip.compress(NEW.nar), Content_Encoding="gzip")
    check(server, encoded, 415, "without Content-Encoding")


def test_methods(server: Server, pusher: Client) -> None:
    for method in ("POST", "DELETE", "PATCH"):
        for url, allowed in (
            (PUBLISHED.narinfo_url, "GET, HEAD, PUT"),
            (PUBLISHED.nar_url, "GET, HEAD, PUT"),
            ("/main/nix-cache-info", "GET, HEAD"),
            ("/nix-cache-info", "GET, HEAD"),
        ):
            answer = pusher.ask(method, url, b"")
            check(server, answer, 405, method)
            assert answer.headers["allow"] == allowed
    check(server, pusher.put("/main/nix-cache-info", b"StoreDir: /elsewhere\n"), 405, "PUT")


def test_what_is_not_there(server: Server, pusher: Client) -> None:
    for path in ("/main/unheard-of", "/nowhere/nix-cache-info", "/main/nar/x/y", "/api/v1/caches/nowhere", "/api/x"):
        answer = pusher.get(path)
        assert answer.status == 404, path
        assert len(answer.text.splitlines()) == 1
    for path in (NEW.narinfo_url, NEW.nar_url, f"/main/log/{NEW.path}", f"/main/{NEW.path.hash_part}.ls"):
        check(server, pusher.get(path), 404, "no such")
    check(server, pusher.get("/main/nonsense.narinfo"), 400, "32 characters")


@pytest.mark.parametrize(
    "framing", ["Content-Length: 5\r\n\r\nhello", "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"]
)
def test_a_get_with_a_body(server: Server, pusher: Client, framing: str) -> None:
    """The body is passed over, and does not become the next request."""
    head = f"GET {PUBLISHED.narinfo_url} HTTP/1.1\r\nHost: x\r\n"
    with pusher.connect() as connection:
        connection.sendall((head + framing).encode())
        assert receive(connection).status == 200
        connection.sendall((head + "\r\n").encode())
        assert receive(connection).status == 200


@pytest.mark.parametrize(
    "request_",
    [
        b"garbage\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /main/nix-cache-info HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"PUT /main/x HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"PUT /main/x HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"PUT /main/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
        b"GET /main/nix-cache-info HTTP/1.1\r\nHost: x\r\n folded: 1\r\n\r\n",
    ],
)
def test_what_is_not_http(server: Server, pusher: Client, request_: bytes) -> None:
    """One line and the end, or the end alone; never anything of how things are inside."""
    with pusher.connect() as connection:
        connection.sendall(request_)
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        while data := connection.recv(65536):
            answer += data
    assert not answer.startswith(b"HTTP/1.1 5")
    assert b"Traceback" not in answer
    assert str(server.folder).encode() not in answer


def test_requests_to_the_api_that_are_none(server: Server, pusher: Client) -> None:
    for action in ("missing", "paths"):
        url = f"/api/v1/caches/main/{action}"
        for body in (b"", b"{", b"[]", b'{"paths": 1}', b'{"paths": [1]}', b"\xff", b'{"paths": [["\xff"]]}'):
            answer = pusher.ask("POST", url, body)
            check(server, answer, 400, '{"error": ')
            assert answer.headers["content-type"].startswith("application/json")
    paths = b'{"paths": [' + b",".join([b'["x","y",1]'] * 5001) + b"]}"
    check(server, pusher.ask("POST", "/api/v1/caches/main/missing", paths), 413, "at most 5000")
    nonsense = pusher.ask("POST", "/api/v1/caches/main/missing", b'{"paths": [["x","y",1]]}')
    check(server, nonsense, 400, "store path")


def test_packs_that_are_none(server: Server, pusher: Client) -> None:
    url, pack = "/api/v1/caches/main/nars", encode(PackHead([PackedNar("sha256:x", 1, 3)]), [b"one"])
    assert pusher.ask("POST", url, pack).status == 200
    for body, status in (
        (b"", 400),
        (pack[:-1], 400),
        (pack + b"x", 400),
        (b"\xff" * 100, 413),
        (encode(PackHead([PackedNar("sha256:x", 1, 0)] * 1001), []), 413),
        (pack + bytes(16 * MIB), 413),
    ):
        check(server, pusher.ask("POST", url, body), status, '{"error": ')


def test_the_uploader_shows_both_hashes(server: Server, make_nix: MakeNix) -> None:
    """`cachesrv push` of another NAR for a published path; the other paths go through."""
    path, hashes = "/nix/store/00000000000000000000000000000001-rebuilt", []
    for content in ("first", "second"):
        nix = make_nix()
        nix.plant(path, content)
        other = nix.add(content, content)
        done = attempt(nix, server, path, other)
        hashes.append(nix.run("nix-store", "-q", "--hash", path))
    assert done.returncode == 3
    (failed,) = [event for event in events(done) if event["event"] == "failed"]
    assert hashes[0] in failed["error"]
    assert hashes[1] in failed["error"]
    assert server.client().get(f"/main/{other.rpartition('/')[2][:32]}.narinfo").status == 200
    remembered = server.query("select published_nar_hash, refused_nar_hash from conflicts where name = 'rebuilt'")
    assert remembered == [tuple(hashes)]


def test_nix_copy_shows_both_hashes(server: Server, make_nix: MakeNix) -> None:
    """The client that looked before somebody else pushed believes that the path is missing, and pushes its own."""
    path = "/nix/store/00000000000000000000000000000002-rebuilt"
    first, second = make_nix(), make_nix()
    for nix, content in ((first, "first"), (second, "second")):
        nix.plant(path, content)
        nix.log_in(server.token)
    assert second.attempt("nix", "path-info", "--store", server.main, path).returncode != 0
    first.run("nix", "copy", "--to", server.main, path)
    refused = second.attempt("nix", "copy", "--to", server.main, path)
    assert refused.returncode != 0
    assert "409" in refused.stderr
    assert server.query("select published_nar_hash, refused_nar_hash from conflicts where hash_part like '%2'") == [
        (first.run("nix-store", "-q", "--hash", path), second.run("nix-store", "-q", "--hash", path))
    ]


def _head(method: str, url: str, client: Client, *fields: str) -> bytes:
    authorization = (f"Authorization: Bearer {client.token}",) if client.token else ()
    return "\r\n".join((f"{method} {url} HTTP/1.1", "Host: x", *authorization, *fields, "", "")).encode()
