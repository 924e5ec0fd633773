"""Several caches on one server: their own keys, priorities and readers."""

from __future__ import annotations

import json
from base64 import b64encode
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest

from cachesrv.nix.signing import SecretKey
from tests.samples import Sample
from tests.system.conftest import every_storage
from tests.system.nix import CHAIN
from tests.system.push import push

if TYPE_CHECKING:
    from tests.system.conftest import MakeClient, StartServer
    from tests.system.nix import Nix
    from tests.system.server import Server

READER, FOREIGN = "token-of-a-reader", "token-for-another-cache"
CONFIG = f"""
[[cache]]
name = "main"
root = true
priority = 10

[[cache]]
name = "team"
public = false
priority = 90
want_mass_query = false

[[cache]]
name = "partial"
references = "any"

[[token]]
name = "reader"
sha256 = "{sha256(READER.encode()).hexdigest()}"
caches = ["team"]
permissions = ["pull"]

[[token]]
name = "foreigner"
sha256 = "{sha256(FOREIGN.encode()).hexdigest()}"
caches = ["main"]
permissions = ["pull", "push"]
"""


@pytest.fixture
def server(builder: Nix, make_server: StartServer) -> Server:
    environment = {"CACHESRV_SERVER__STORE_DIR": builder.store_dir}
    return make_server(config=CONFIG, environment=environment).start()


def public_key(server: Server, cache: str) -> str:
    return (server.data_dir / "keys" / f"{cache}.public").read_text().strip()


def test_each_says_what_it_is(server: Server) -> None:
    client = server.client(READER)
    assert b"Priority: 10\n" in client.get("/main/nix-cache-info").body
    assert b"WantMassQuery: 1\n" in client.get("/main/nix-cache-info").body
    assert b"Priority: 90\n" in client.get("/team/nix-cache-info").body
    assert b"WantMassQuery: 0\n" in client.get("/team/nix-cache-info").body
    assert client.get("/nix-cache-info").body == client.get("/main/nix-cache-info").body


def test_each_signs_with_its_own_key(builder: Nix, server: Server, make_client: MakeClient) -> None:
    (program,) = builder.build(CHAIN, "program")
    hash_part = program.removeprefix(f"{builder.store_dir}/")[:32]
    builder.log_in(server.token)
    for cache in ("main", "team"):
        builder.run("nix", "copy", "--to", f"{server.url}/{cache}", program)
        narinfo = server.pusher.get(f"/{cache}/{hash_part}.narinfo").text
        assert f"\nSig: {cache}-1:" in narinfo
        assert narinfo.count("\nSig: ") == 1
    client = make_client(server)
    client.log_in(READER)
    client.configure(trusted_public_keys=public_key(server, "main"))
    refused = client.attempt("nix", "copy", "--from", f"{server.url}/team", program)
    assert "lacks a valid signature" in refused.stderr
    client.configure(trusted_public_keys=public_key(server, "team"))
    client.run("nix", "copy", "--from", f"{server.url}/team", program)


@every_storage
def test_what_is_in_one_is_not_in_the_others(builder: Nix, server: Server) -> None:
    sample = Sample("alone", b"alone")
    assert server.pusher.put(f"/team/nar/{sample.nar_name}", sample.file).status == 204
    narinfo = sample.narinfo(store_dir=builder.store_dir)
    url = f"/{sample.path.hash_part}.narinfo"
    assert server.pusher.put(f"/team{url}", narinfo).status == 204
    assert server.pusher.get(f"/team{url}").status == 200
    for cache in ("/main", "/partial", ""):
        assert server.pusher.get(f"{cache}{url}").status == 404
        assert server.pusher.get(f"{cache}/nar/{sample.nar_name}").status == 404
        assert server.pusher.put(f"{cache}{url}", narinfo).status == 422


@every_storage
def test_a_private_cache_shows_nothing_to_strangers(builder: Nix, server: Server) -> None:
    """Not even whether a path is there; 403 would be a miss to Nix, so that without a token it is 401."""
    there, absent = Sample("there", b"there"), Sample("absent", b"absent")
    assert server.pusher.put(f"/team/nar/{there.nar_name}", there.file).status == 204
    narinfo = there.narinfo(store_dir=builder.store_dir)
    assert server.pusher.put(f"/team/{there.path.hash_part}.narinfo", narinfo).status == 204
    assert server.pusher.put(f"/team/log/{'0' * 32}-x.drv", b"log").status == 204
    secrets = [
        *(f"/team/{sample.path.hash_part}.narinfo" for sample in (there, absent)),
        *(f"/team/{sample.path.hash_part}.ls" for sample in (there, absent)),
        *(f"/team/nar/{sample.nar_name}" for sample in (there, absent)),
        f"/team/log/{'0' * 32}-x.drv",
        "/team/nix-cache-info",
        "/team",
        "/api/v1/caches/team",
    ]
    for url in secrets:
        # what one with a token has learnt must not help the next one without
        server.client(READER).get(url)
        for token, status in ((None, 401), ("wrong", 401), (FOREIGN, 403)):
            for method in ("GET",) if url.startswith("/api") else ("GET", "HEAD"):
                answer = server.client(token).ask(method, url)
                assert answer.status == status, url
                assert ("www-authenticate" in answer.headers) == (status == 401)
                assert answer.headers["cache-control"] == "no-store"
    statuses = [server.client(READER).get(url).status for url in secrets]
    assert statuses == [200, 404, 200, 404, 200, 404, 200, 200, 200, 200]


def test_tokens_come_as_bearer_and_as_password(server: Server) -> None:
    for header, status in (
        (f"Bearer {READER}", 200),
        (f"bearer {READER}", 200),
        (f"Basic {b64encode(f'anybody:{READER}'.encode()).decode()}", 200),
        (f"Basic {b64encode(f':{READER}'.encode()).decode()}", 200),
        (f"Basic {b64encode(READER.encode()).decode()}", 401),
        (f"Basic {b64encode(f'{READER}:'.encode()).decode()}", 401),
        (f"Digest {READER}", 401),
        ("Bearer", 401),
        ("Bearer  ", 401),
        (f"Bearer {READER}x", 401),
        (f"Bearer {READER} {READER}", 401),
        ("Bearer \xff", 401),
        ("Basic \xff", 401),
        (f"Bearer {'x' * 5000}", 401),
    ):
        answer = server.client().ask("GET", "/team/nix-cache-info", headers={"Authorization": header})
        assert answer.status == status, header


@every_storage
def test_nix_reads_a_private_cache_with_netrc(builder: Nix, server: Server, make_client: MakeClient) -> None:
    (program,) = builder.build(CHAIN, "program")
    team = f"{server.url}/team"
    builder.log_in(server.token)
    builder.run("nix", "copy", "--to", team, program)
    client = make_client(server)
    client.configure(trusted_public_keys=public_key(server, "team"), substituters=team)
    assert client.attempt("nix-store", "--realise", program).returncode != 0
    client.log_in(FOREIGN)
    client.forget()
    assert client.attempt("nix-store", "--realise", program).returncode != 0
    client.log_in(READER)
    client.forget()
    client.run("nix-store", "--realise", program)
    assert client.hashes(program) == builder.hashes(program)
    # and the reader may not write
    (other,) = client.evaluate('[ (builtins.toFile "other" "") ]')
    assert client.attempt("nix", "copy", "--to", team, other).returncode != 0


def test_a_cache_that_holds_a_part_only(builder: Nix, server: Server) -> None:
    (program,) = builder.build(CHAIN, "program")
    hash_part = program.removeprefix(f"{builder.store_dir}/")[:32]
    done = push(builder, server, "--to", f"{server.url}/partial", "--no-closure", program)
    assert done["uploaded"] == 1
    assert server.client().get(f"/partial/{hash_part}.narinfo").status == 200
    with pytest.raises(AssertionError, match="references"):
        push(builder, server, "--no-closure", program)
    assert server.client().get(f"/main/{hash_part}.narinfo").status == 404


def test_a_cache_that_takes_only_what_is_signed(builder: Nix, make_server: StartServer) -> None:
    trusted, stranger = SecretKey.generate("trusted-1"), SecretKey.generate("stranger-1")
    server = make_server(
        environment={
            "CACHESRV_SERVER__STORE_DIR": builder.store_dir,
            "CACHESRV_CACHE__0__TRUSTED_KEYS": trusted.public.render(),
        }
    ).start()
    (program,) = builder.build(CHAIN, "program")
    for secret in (None, stranger, trusted):
        if secret:
            (builder.folder / "secret").write_text(secret.render())
            builder.run("nix", "store", "sign", "-r", "--key-file", str(builder.folder / "secret"), program)
        if secret is trusted:
            assert push(builder, server, program)["uploaded"] == 3
        else:
            with pytest.raises(AssertionError, match="has no signature by a key that this cache trusts: trusted-1"):
                push(builder, server, program)
    # a content address that holds is as good as a signature
    assert push(builder, server, builder.add("added", "added"))["uploaded"] == 1


def test_passwords_for_upstreams_are_for_nobody_else(make_server: StartServer) -> None:
    """Not for those who ask for the upstreams, whatever they may do, and not for who reads the log."""
    upstreams = {
        "http": ("http://reader:a-secret@127.0.0.1:9/cache", "http://127.0.0.1:9/cache"),
        "plain": ("http://127.0.0.1:9/other", "http://127.0.0.1:9/other"),
    }
    key = SecretKey.generate("up-1").public.render()
    config = f"[[cache]]\nname = 'main'\nroot = true\nreferences = 'upstream'\nupstreams = {[*upstreams]}\n"
    config += "pull_through = true\n"
    for name, (url, _) in upstreams.items():
        config += f"[[upstream]]\nname = '{name}'\nurl = '{url}'\npublic_keys = ['{key}']\ntimeout = 1\n"
    server = make_server(config=config).start()
    assert server.client().get(Sample("absent").narinfo_url).status == 503
    for client in (server.client(), server.pusher):
        told = json.loads(client.get("/api/v1/caches/main").body)["upstreams"]
        assert [one["url"] for one in told] == [url for _, url in upstreams.values()]
    assert "upstream http" in server.log
    assert "a-secret" not in server.log
