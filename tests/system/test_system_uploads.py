"""A NAR in parts over HTTP: who may send it, what it takes, and that a server that was killed goes on with it."""

from __future__ import annotations

import json
from base64 import b64encode
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import pytest

from cachesrv.services.access import token_hash
from tests.samples import Sample

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.system.client import Answer, Client
    from tests.system.conftest import StartServer
    from tests.system.server import Server

PART = 2**20
READER, NEIGHBOUR = "csrv_reads-main", "csrv_pushes-elsewhere"
CONFIG = f"""
[uploads]
part_size = {PART}
[[cache]]
name = "main"
[[cache]]
name = "team"
[[token]]
name = "reader"
sha256 = "{token_hash(READER)}"
[[token]]
name = "neighbour"
sha256 = "{token_hash(NEIGHBOUR)}"
caches = ["team"]
permissions = ["push"]
"""
LARGE = Sample("large", b"".join(sha256(b"%d" % number).digest() for number in range(100_000)), compression="zstd")
PARTS = [LARGE.file[start : start + PART] for start in range(0, len(LARGE.file), PART)]
NAR = {"nar_hash": LARGE.nar_hash.nix32, "nar_size": len(LARGE.nar)}
STORED = f"/main/nar/{LARGE.nar_hash.bare_nix32}.nar.zst"
UPLOAD = "/api/v1/caches/main/uploads/0123456789abcdef"


@pytest.fixture
def server(make_server: StartServer) -> Server:
    return make_server(config=CONFIG).start()


@pytest.fixture
def client(server: Server) -> Client:
    return server.pusher


def digest(data: bytes) -> str:
    return f"sha-256=:{b64encode(sha256(data).digest()).decode()}:"


def begin(client: Client, upload: str = UPLOAD) -> Any:
    return answer_of(client.put(upload, json.dumps(NAR).encode()))


def put(client: Client, number: int, data: bytes, upload: str = UPLOAD) -> Answer:
    return client.put(f"{upload}/parts/{number}", data, Content_Digest=digest(data))


def begun(client: Client, *names: str) -> Answer:
    return client.ask("POST", UPLOAD.rpartition("/")[0], json.dumps({"uploads": names}).encode())


def complete(client: Client, parts: Sequence[bytes] = PARTS) -> Answer:
    asked = {"nar_hash": LARGE.nar_hash.nix32, "parts": [sha256(part).hexdigest() for part in parts]}
    return client.ask("POST", f"{UPLOAD}/complete", json.dumps(asked).encode())


def answer_of(answer: Answer) -> Any:
    assert answer.status == 200, answer.text
    return json.loads(answer.body)


def test_killed_between_two_parts(server: Server, client: Client) -> None:
    assert json.loads(client.get("/api/v1/caches/main").body)["part_size"] == PART
    assert begin(client) == {"stored": False, "parts": [], "direct": None}
    assert put(client, 2, PARTS[1]).status == 204
    assert put(client, 1, PARTS[0]).status == 204
    server.kill()
    server.start()

    assert begin(client)["parts"] == [[n, PART, sha256(PARTS[n - 1]).hexdigest()] for n in (1, 2)]
    rest = [*range(3, len(PARTS) + 1)]
    assert answer_of(complete(client)) == {"state": "incomplete", "missing": rest, "verified": 0}
    for number in rest:
        assert put(client, number, PARTS[number - 1]).status == 204
    assert answer_of(complete(client))["state"] == "stored"

    assert client.get(STORED).body == LARGE.file
    assert begin(client) == {"stored": True, "parts": [], "direct": None}
    assert answer_of(complete(client))["state"] == "stored"
    assert [name for name in server.snapshot() if name.startswith("~uploads/")] == []


def test_which_were_begun(client: Client) -> None:
    name = UPLOAD.rpartition("/")[2]
    assert answer_of(begun(client, name)) == {"begun": []}
    begin(client)
    assert answer_of(begun(client, "f" * 20, name)) == {"begun": [name]}
    assert begun(client, *[name] * 65).status == 400
    assert begun(client, "no name").status == 400


def test_who_may_not_push(server: Server, client: Client) -> None:
    begin(client)
    put(client, 1, PARTS[0])

    for token, status in ((None, 401), ("csrv_nobody", 401), (READER, 403), (NEIGHBOUR, 403)):
        stranger = server.client(token)
        assert stranger.put(UPLOAD, json.dumps(NAR).encode()).status == status
        assert begun(stranger, UPLOAD.rpartition("/")[2]).status == status
        assert put(stranger, 2, PARTS[1]).status == status
        assert complete(stranger, PARTS[:1]).status == status
        assert stranger.ask("DELETE", UPLOAD).status == status
    assert len(begin(client)["parts"]) == 1


def test_parts_stay_in_their_cache(server: Server, client: Client) -> None:
    """Who may push to another cache neither gets at them nor completes them there."""
    begin(client)
    for number, part in enumerate(PARTS, 1):
        put(client, number, part)
    neighbour = server.client(NEIGHBOUR)
    elsewhere = UPLOAD.replace("main", "team")

    asked = {"nar_hash": LARGE.nar_hash.nix32, "parts": [sha256(part).hexdigest() for part in PARTS]}
    answer = neighbour.ask("POST", f"{elsewhere}/complete", json.dumps(asked).encode())
    assert answer_of(answer)["state"] == "incomplete"
    assert begin(neighbour, elsewhere)["parts"] == []
    assert neighbour.ask("DELETE", elsewhere).status == 204
    assert neighbour.head(STORED.replace("main", "team")).status == 404
    # The keys of parts are no objects of a cache.
    for key in (name for name in server.snapshot() if name.startswith("~uploads/")):
        assert client.get(f"/{key}").status == 404
        assert client.get(f"/main/{key}").status == 404

    assert answer_of(complete(client))["state"] == "stored"


def test_what_a_part_must_be(client: Client) -> None:
    begin(client)
    part, url = PARTS[0], f"{UPLOAD}/parts/1"

    def refusal(number: str = "1", data: Any = part, **headers: str) -> tuple[int, str]:
        answer = client.put(f"{UPLOAD}/parts/{number}", data, **{"Content_Digest": digest(part)} | headers)
        return answer.status, json.loads(answer.body)["error"]

    for header in ("", "sha-512=:AAAA:", "sha-256=:AAAA:", f"sha-256=:{'=' * 44}:"):
        assert refusal(Content_Digest=header) == (400, "a part has to come with its sha256, as " + _FORM)
    assert refusal(data=PARTS[1])[0] == 422
    assert refusal(data=b"x" * (PART + 1))[0] == 413
    assert refusal(data=b"")[0] == 413
    assert refusal(data=iter([part])) == (
        400,
        "how large is the part? send Content-Length",
    )
    assert refusal(Content_Encoding="gzip")[0] == 415
    assert refusal("0")[0] == 400
    assert refusal("x") == (400, "'x' is not the number of a part")
    assert refusal("9" * 5000)[0] == 400
    assert client.put(f"{UPLOAD}0/parts/1", part, Content_Digest=digest(part)).status == 404
    assert begin(client)["parts"] == []
    assert client.put(url, part, Content_Digest=digest(part)).status == 204


_FORM = "Content-Digest: sha-256=:<base64>:"


def test_what_is_not_the_nar(client: Client) -> None:
    begin(client)
    put(client, 1, PARTS[1])
    answer = complete(client, PARTS[1:2])

    assert answer.status in {400, 422}
    assert begin(client)["parts"] == []
    assert client.head(STORED).status == 404


def test_what_is_no_upload(client: Client) -> None:
    for name in ("short", "UPPER-CASE-IS-NOT", "..%2f..%2f..%2fkeys%2fmain", "a" * 65):
        assert client.put(f"/api/v1/caches/main/uploads/{name}", json.dumps(NAR).encode()).status in {400, 404}
    for body in (b"", b"{}", b'{"nar_hash": "sha256:x", "nar_size": 1}', b'{"nar_hash": 1, "nar_size": 1}'):
        assert client.put(UPLOAD, body).status == 400
    assert client.put(UPLOAD, json.dumps(NAR | {"nar_size": -1, "direct": True}).encode()).status == 400
    begin(client)
    other = {"nar_hash": f"sha256:{'0' * 52}", "nar_size": 5}
    assert client.put(UPLOAD, json.dumps(other).encode()).status == 409
    assert client.ask("DELETE", UPLOAD).status == 204
    assert put(client, 1, PARTS[0]).status == 404
